"""Embeddings read ahead: each once, the right one, and no more than are waited for."""

from __future__ import annotations

import gc
import threading

import torch

from md3cli.model.engine.recaller import Recaller


class Disk:
    """What was kept, and what was read of it, in order."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def load(self, key: str) -> torch.Tensor | None:
        self.may_read.wait(30)
        self.read.append(key)
        return torch.tensor([float(key)]) if key.isdigit() else None


def test_what_is_expected_is_read_once_and_what_is_not_when_it_is_asked() -> None:
    disk = Disk()
    recaller = Recaller(disk.load)
    recaller.expect(["1", "none", "2", "1"])
    recaller.expect(["none", "2", "3"])
    assert recaller.take("none") is None
    assert recaller.take("2") == torch.tensor([2.0])
    assert recaller.take("3") == torch.tensor([3.0])
    assert recaller.take("4") == torch.tensor([4.0])
    assert sorted(set(disk.read) - {"1"}) == ["2", "3", "4", "none"]
    assert len(disk.read) == len(set(disk.read))


def test_expecting_waits_for_nothing_and_reads_no_more_than_it_may() -> None:
    disk = Disk()
    disk.may_read.clear()
    recaller = Recaller(disk.load, most_ahead=3)
    recaller.expect(iter("123456"))
    assert not disk.read
    disk.may_read.set()
    assert [recaller.take(key) for key in "123"] == [torch.tensor([float(key)]) for key in "123"]
    assert sorted(disk.read) == ["1", "2", "3"]


def test_a_recaller_that_is_dropped_leaves_no_thread() -> None:
    disk, threads = Disk(), list[threading.Thread]()

    def load(key: str) -> torch.Tensor | None:
        threads.append(threading.current_thread())
        return disk.load(key)

    recaller = Recaller(load)
    recaller.expect("123456789")
    recaller.take("1")
    del recaller
    gc.collect()
    for thread in {*threads}:
        thread.join(30)
    assert threads
    assert not any(thread.is_alive() for thread in threads)
