"""The append log: all of an append or nothing, synced as was asked, and one file at every time while it is replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from md3cli.errors import OutputError
from md3cli.run.log import AppendLog, SyncAfter


def fill_disk(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the disk take so many bytes of the next write, and nothing after them."""
    real_write, rest = os.write, [num_bytes]

    def write(fd: int, data: bytes) -> int:
        if not rest:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, data[: rest.pop()])

    monkeypatch.setattr(os, "write", write)


def test_a_failed_append_leaves_nothing_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AppendLog(tmp_path / "log", is_new=True)
    log.append(b"one\n")
    with monkeypatch.context() as patch:
        fill_disk(patch, 2)
        with pytest.raises(OutputError, match="No space left on device"):
            log.append(b"two\nthree\n")
    assert (log.path.read_bytes(), log.size) == (b"one\n", 4)
    log.append(b"four\n")
    log.close()
    assert log.path.read_bytes() == b"one\nfour\n"


def test_a_new_log_takes_no_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"mine\n")
    with pytest.raises(OutputError, match="File exists"):
        AppendLog(tmp_path / "log", is_new=True)
    log = AppendLog(tmp_path / "log")
    assert log.size == 5
    log.close()


@pytest.mark.parametrize(
    ("sync_after", "num_syncs"), [(None, 0), (SyncAfter(1000, 1e9), 1), (SyncAfter(4, 1e9), 3), (SyncAfter(1000, 0), 6)]
)
def test_it_is_synced_by_count_and_time_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_after: SyncAfter | None, num_syncs: int
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("md3cli.run.log.sync_data", synced.append)
    log = AppendLog(tmp_path / "log", sync_after=sync_after)
    for _ in range(5):
        log.append(b"note\n")  # needs no sync
        log.append(b"record\nrecord\n", 2)
        log.sync_in_time()
    log.append(b"record\n", 1)
    log.close()
    log.close()
    assert len(synced) == num_syncs


def test_lines_are_read_in_any_order_and_after_it_was_replaced(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log")
    lines = [b"x" * (1 + n**4) + b"\n" for n in range(20)]
    log.append(b"".join(lines))
    starts = [sum(map(len, lines[:n])) for n in range(20)]
    for n in (*range(20), 7, 3, 19, 0):
        assert log.line_at(starts[n]) == lines[n]
    with log.replaced() as new:
        new.write(b"another\n")
    log.append(b"more\n")
    assert (log.line_at(0), log.line_at(8), log.size) == (b"another\n", b"more\n", 13)
    log.cut(8)
    assert log.path.read_bytes() == b"another\n"
    log.close()


def test_a_block_that_fails_replaces_nothing(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log")
    log.append(b"one\n")
    with pytest.raises(ZeroDivisionError), log.replaced():
        raise ZeroDivisionError
    log.append(b"three\n")
    log.close()
    assert log.path.read_bytes() == b"one\nthree\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
