"""Memory shared with a worker: what is lent never overlaps, comes back by itself, and cannot be taken away."""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli import system
from md3cli.images import arena as arena_module
from md3cli.images.arena import ARENA_BYTES, LEAST_BYTES, PAGE, Arena, Ranges, arena_bytes, make_arena
from md3cli.system import shared_memory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system shares no memory without a name")
PAGES = 16


@pytest.fixture
def arena() -> Arena:
    made = make_arena(PAGES * PAGE)
    assert made is not None
    return made


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20 * PAGE)), max_size=60))
def test_what_is_taken_never_overlaps_and_no_room_is_lost(deeds: list[tuple[bool, int]]) -> None:
    book, taken = Ranges(PAGES * PAGE), {}
    for is_return, number in deeds:
        if is_return and taken:
            start = sorted(taken)[number % len(taken)]
            del taken[start]
            book.give_back(start)
        elif not is_return:
            size = -(-number // PAGE)
            used = {page for first, count in taken.items() for page in range(first // PAGE, first // PAGE + count)}
            fits = any(not used & set(range(at, at + size)) for at in range(PAGES - size + 1))
            start = book.take(number)
            assert (start is not None) == fits
            if start is not None:
                assert start % PAGE == 0
                assert start + number <= PAGES * PAGE
                assert not used & set(range(start // PAGE, start // PAGE + size))
                taken[start] = size
    for start in taken:
        book.give_back(start)
    assert book.take(PAGES * PAGE) == 0


def test_a_loan_ends_with_the_last_view_of_it(arena: Arena) -> None:
    lent = arena.lend(PAGES * PAGE, 0.0)
    assert lent is not None
    view = lent[1].reshape(PAGES, PAGE)[3:, ::2]
    del lent
    assert arena.lend(1, 0.0) is None
    del view
    assert arena.lend(1, 0.0) is not None


def test_a_loan_waits_for_room_and_no_longer_than_it_may(arena: Arena) -> None:
    held = [arena.lend(PAGES * PAGE, 0.0)]
    started = time.monotonic()
    assert arena.lend(1, 0.2) is None
    assert time.monotonic() - started >= 0.2
    threading.Timer(0.1, held.clear).start()
    assert arena.lend(1, 30.0) is not None
    assert time.monotonic() - started < 20


def test_who_waits_can_be_sent_away(arena: Arena) -> None:
    held = arena.lend(PAGES * PAGE, 0.0)
    threading.Timer(0.1, arena.give_up).start()
    started = time.monotonic()
    assert arena.lend(1, 60.0) is None
    assert arena.lend(1, 60.0) is None
    assert time.monotonic() - started < 30
    assert held is not None


def test_more_than_there_is_is_refused_at_once(arena: Arena) -> None:
    started = time.monotonic()
    assert arena.lend(PAGES * PAGE + 1, 60.0) is None
    assert time.monotonic() - started < 30


def test_what_is_lent_outlives_the_arena(arena: Arena) -> None:
    lent = arena.lend(PAGE, 0.0)
    assert lent is not None
    lent[1][:] = 7
    arena.close()
    del arena
    gc.collect()
    assert (lent[1] == 7).all()


def test_nobody_can_take_the_memory_away(arena: Arena) -> None:
    """A mapping behind the end of a file ends whoever looks at it."""
    for size in (0, 10 * PAGES * PAGE):
        with pytest.raises(OSError, match="permitted"):
            os.ftruncate(arena.fd, size)


def test_memory_is_used_when_it_is_lent_and_not_before(arena: Arena) -> None:
    assert os.fstat(arena.fd).st_blocks == 0
    first = arena.lend(2 * PAGE, 0.0)
    assert os.fstat(arena.fd).st_blocks * 512 == 2 * PAGE
    del first
    arena.lend(PAGE, 0.0)
    assert os.fstat(arena.fd).st_blocks * 512 == 2 * PAGE


def test_without_memory_for_it_nothing_is_lent(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*asked: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(arena_module.os, "posix_fallocate", refuse)
        assert arena.lend(PAGE, 0.0) is None
    lent = arena.lend(PAGES * PAGE, 0.0)
    assert lent is not None
    assert lent[0] == 0


def test_a_limit_on_files_leaves_no_arena() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        num_open = len(os.listdir("/proc/self/fd"))
        assert make_arena(PAGES * PAGE) is None
        assert len(os.listdir("/proc/self/fd")) == num_open
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_memory_has_no_name() -> None:
    before = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").exists() else set()
    fd = shared_memory(PAGE)
    assert fd is not None
    assert not os.get_inheritable(fd)
    assert (set(Path("/dev/shm").iterdir()) if before else set()) <= before
    os.close(fd)


def test_a_system_without_such_memory_has_no_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert make_arena(PAGES * PAGE) is None


@pytest.mark.parametrize(
    ("available", "num_workers", "expected"),
    [
        (64 << 30, 14, ARENA_BYTES),
        (4 << 30, 16, 32 << 20),
        (4 << 30, 1, ARENA_BYTES),
        (512 << 20, 16, 0),
        (8 * LEAST_BYTES, 1, LEAST_BYTES),
        (0, 1, 0),
        (None, 4, 0),
    ],
)
def test_arenas_take_a_share_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, available: int | None, num_workers: int, expected: int
) -> None:
    monkeypatch.setattr(arena_module, "available_memory", lambda: available)
    assert arena_bytes(num_workers) == expected


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = system.available_memory()
    assert free is not None
    assert free > 0
    for name, value in {"max": 10_000, "current": 7_000, "stat": "anon 1\ninactive_file 500\n"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    monkeypatch.setattr(system, "_CONTAINER", str(tmp_path))
    assert system.available_memory() == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert system.available_memory() > 3500


def test_bytes_written_through_the_file_are_the_lent_ones(arena: Arena) -> None:
    lent = arena.lend(PAGE, 0.0)
    assert lent is not None
    os.pwrite(arena.fd, b"\x2a" * PAGE, lent[0])
    np.testing.assert_array_equal(lent[1], 42)
