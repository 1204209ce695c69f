"""The append log: all of an append or nothing, synced as was asked, one file at every time while it is replaced.

And single bits of a journal turned over: what breaks a record is found and done again, the rest md3 verify reports.
"""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from program import Program, make_pictures

from md3cli.errors import OutputError
from md3cli.records import unique_keys
from md3cli.run.log import AppendLog, SyncAfter, damaged_path

NUM_PICTURES = 6


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


# -- damaged lines ---------------------------------------------------------------------------------------


def has_broken(good: bytes, flipped: bytes) -> bool:
    """Whether a line can no more be the record it was: judged by what it parses to, as a reader of JSON would."""
    was: Any = json.loads(good)
    try:
        now: Any = json.loads(flipped.decode(), object_pairs_hook=unique_keys)
    except ValueError:
        return True
    return _shape(was) != _shape(now) or any(
        was[key] != now[key] for key in ("schema", "id", "image", "task", "prompt")
    )


def _shape(value: Any) -> Any:
    """Keys and types; a number is a number."""
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shape(item) for item in value]
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def turn_bits(md3: Program, tmp_path: Path, count: int, seed: int) -> tuple[int, int]:
    """Turn `count` bits over, one at a time; how many broke a record, and how many changed a value."""
    pictures, out = make_pictures(tmp_path / "pictures", NUM_PICTURES), tmp_path / "o.jsonl"
    (pictures / "p4.png").write_bytes(b"no picture")
    command = ("detect", pictures, "a", "größer", "-o", out, "--fail-on", "none", "--no-progress")
    assert md3(*command).exit_code == 0
    good, run_info = out.read_bytes(), (tmp_path / "o.jsonl.run.json").read_bytes()
    lines, chooser, num_broken = good.splitlines(keepends=True), random.Random(seed), 0
    for _ in range(count):
        at, bit = chooser.randrange(len(good)), chooser.randrange(8)
        flipped = bytearray(good)
        flipped[at] ^= 1 << bit
        out.write_bytes(flipped)
        (tmp_path / "o.jsonl.run.json").write_bytes(run_info)
        damaged_path(out).unlink(missing_ok=True)
        number = good.count(b"\n", 0, at)
        found = bytes(flipped[sum(map(len, lines[:number])) :])[: len(lines[number])]
        is_broken = at + 1 == sum(map(len, lines[: number + 1])) or has_broken(lines[number], found)
        num_broken += is_broken
        assert md3("verify", out).exit_code == 1, (at, bit)
        again = md3(*command)
        assert again.exit_code == 0, (at, bit, again.output)
        assert "repaired" in again.stderr or "was changed by something else" in again.stderr, (at, bit, again.stderr)
        if is_broken:
            assert md3.num_answered <= 1, "what is not damaged is not asked again"
            assert out.read_bytes() == good, (at, bit, number, found)
            assert md3("verify", out).exit_code == 0, (at, bit)
        else:  # kept, or found after all, as a number out of range is
            after = out.read_bytes()
            assert after in (good, bytes(flipped)), (at, bit)
            assert md3("verify", out).exit_code == (after != good), (at, bit)
    return num_broken, count - num_broken


@pytest.mark.process
def test_100_bits_turned_over(md3: Program, tmp_path: Path) -> None:
    num_broken, num_changed = turn_bits(md3, tmp_path, 100, 7)
    assert num_broken > 25
    assert num_changed > 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_5000_bits_turned_over(md3: Program, tmp_path: Path) -> None:
    print(turn_bits(md3, tmp_path, 5000, 5000))
