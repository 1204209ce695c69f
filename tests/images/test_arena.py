"""Memory shared with a worker: used when it is asked for, and never taken away."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from md3cli import system
from md3cli.images import arena as arena_module
from md3cli.images.arena import ARENA_BYTES, LEAST_BYTES, PAGE, Arena, arena_bytes, make_arena
from md3cli.system import shared_memory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system shares no memory without a name")
PAGES = 16


@pytest.fixture
def arena() -> Arena:
    made = make_arena(PAGES * PAGE)
    assert made is not None
    return made


def test_what_was_given_outlives_the_arena(arena: Arena) -> None:
    given = arena.first(PAGE)
    assert given is not None
    given[:] = 7
    arena.close()
    del arena
    gc.collect()
    assert (given == 7).all()


def test_there_is_no_more_than_there_is(arena: Arena) -> None:
    assert arena.first(PAGES * PAGE + 1) is None
    found = arena.first(PAGES * PAGE)
    assert found is not None
    assert len(found) == PAGES * PAGE


def test_nobody_can_take_the_memory_away(arena: Arena) -> None:
    """A mapping behind the end of a file ends whoever looks at it."""
    for size in (0, 10 * PAGES * PAGE):
        with pytest.raises(OSError, match="permitted"):
            os.ftruncate(arena.fd, size)


def test_memory_is_used_when_it_is_asked_for_and_not_before(arena: Arena) -> None:
    assert os.fstat(arena.fd).st_blocks == 0
    arena.first(2 * PAGE)
    assert os.fstat(arena.fd).st_blocks * 512 == 2 * PAGE
    arena.first(PAGE)
    assert os.fstat(arena.fd).st_blocks * 512 == 2 * PAGE


def test_without_memory_for_it_nothing_is_given(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*asked: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(arena_module.os, "posix_fallocate", refuse)
        assert arena.first(PAGE) is None
    assert arena.first(PAGES * PAGE) is not None


def test_a_limit_on_files_leaves_no_arena() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        num_open = len(os.listdir("/proc/self/fd"))
        assert make_arena(PAGES * PAGE) is None
        assert len(os.listdir("/proc/self/fd")) <= num_open
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


def test_bytes_written_through_the_file_are_the_given_ones(arena: Arena) -> None:
    given = arena.first(PAGE)
    assert given is not None
    os.pwrite(arena.fd, b"\x2a" * PAGE, 0)
    np.testing.assert_array_equal(given, 42)
