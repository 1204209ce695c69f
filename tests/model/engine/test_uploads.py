"""Pictures on their way to the device: the same crops whichever way they come, and nothing overwritten too early."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from md3cli.images.arena import Arena, make_arena
from md3cli.images.crops import CropConfig, PreparedImage, UncutImage, cut_crops, select_tiling
from md3cli.model.engine import uploads
from md3cli.model.engine.resize import MAX_SIDE, PictureCutter
from md3cli.model.engine.uploads import Uploads, num_distinct_crops

CFG = CropConfig(crop_size=42, patch_size=6, overlap_margin=2, max_crops=12)
CPU = torch.device("cpu")
SIZES = ((300, 200), (30, 20), (64, 48), (90, 700), (1, 1))


def pixels_of(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


def whole(width: int, height: int) -> UncutImage:
    return UncutImage(pixels_of(width, height), select_tiling(width, height, CFG), width, height, f"{width}")


def cut(width: int, height: int) -> PreparedImage:
    crops, tiling = cut_crops(Image.fromarray(pixels_of(width, height)), CFG)
    return PreparedImage(crops, tiling, width, height, f"{width}")


def expected(*sizes: tuple[int, int]) -> np.ndarray:
    return np.concatenate([(image := cut(*size)).crops[: num_distinct_crops(image.tiling)] for size in sizes])


@pytest.mark.parametrize("first", [0, 1])
def test_whole_and_cut_pictures_give_the_same_crops(first: int) -> None:
    images = [(whole if number % 2 == first else cut)(*size) for number, size in enumerate(SIZES)]
    block = Uploads(CPU, PictureCutter(CPU, CFG)).crops_of(images)
    np.testing.assert_array_equal(block.numpy(), expected(*SIZES))


def test_without_a_cutter_pictures_are_cut_before() -> None:
    found = Uploads(CPU)
    assert found.longest_whole == 0
    np.testing.assert_array_equal(found.crops_of([cut(*size) for size in SIZES]).numpy(), expected(*SIZES))
    assert Uploads(CPU, PictureCutter(CPU, CFG)).longest_whole == MAX_SIDE


# -- a CUDA device that is not there ---------------------------------------------------------------


class LateEvent:
    """Is reached when the test runs the stream up to it."""

    def __init__(self) -> None:
        self.is_reached = False

    def query(self) -> bool:
        return self.is_reached


class LateStream:
    """Does what it is told when the test says so, and waits for events as a CUDA stream does."""

    def __init__(self) -> None:
        self.line: list[object] = []

    def record_event(self) -> LateEvent:
        self.line.append(event := LateEvent())
        return event

    def wait_event(self, event: LateEvent) -> None:
        self.line.append((event,))

    def wait_stream(self, other: LateStream) -> None:
        self.wait_event(other.record_event())

    def run(self) -> bool:
        """Do all that can be done now; return whether anything was."""
        has_run = False
        while self.line:
            first = self.line[0]
            if isinstance(first, tuple) and not first[0].is_reached:
                break
            if isinstance(first, LateEvent):
                first.is_reached = True
            elif callable(first):
                first()
            self.line.pop(0)
            has_run = True
        return has_run


class Card:
    """Streams in the place of CUDA's; copies and cuts are put in line, and done in the order that they allow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, refuses: bool = False) -> None:
        self.computing, self.copying = LateStream(), LateStream()
        self.current = self.computing
        self.registered: dict[int, int] = {}
        self.refuses, self.num_refused = refuses, 0
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Stream", lambda device: self.copying)
        monkeypatch.setattr(cuda, "stream", self._on)
        monkeypatch.setattr(cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=self._register, **self._undo()))
        card, plain_copy = self, torch.Tensor.copy_

        def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return plain_copy(target, source)
            card.current.line.append(lambda: plain_copy(target, source))
            return target

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)

    @contextlib.contextmanager
    def _on(self, stream: LateStream) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before

    def _register(self, address: int, num_bytes: int, flags: int) -> int:
        if self.refuses:
            self.num_refused += 1
            return 2
        self.registered[address] = num_bytes
        return 0

    def _undo(self) -> dict[str, object]:
        return {"cudaHostUnregister": self.registered.pop}

    def run(self, *, copies_first: bool) -> None:
        streams = (self.copying, self.computing) if copies_first else (self.computing, self.copying)
        while any(stream.run() for stream in streams):
            pass
        assert not self.copying.line
        assert not self.computing.line


def lent(arena: Arena, value: int, num_rows: int) -> torch.Tensor:
    found = arena.lend(num_rows * 30, 0.0)
    assert found is not None
    found[1][:] = value
    return torch.from_numpy(found[1].reshape(num_rows, 10, 3))


@pytest.mark.parametrize("copies_first", [False, True])
def test_no_picture_is_overwritten_before_it_is_read(monkeypatch: pytest.MonkeyPatch, copies_first: bool) -> None:
    card = Card(monkeypatch)
    arena = make_arena(1 << 20)
    assert arena is not None
    lane = uploads._CopyLane(CPU)
    seen: list[tuple[int, bool]] = []
    heights = (9, 9, 4, 12, 3, 3, 12, 12)
    for number, height in enumerate(heights):
        target = lane.bring(lent(arena, number, height), arena)
        assert target.shape == (height, 10, 3)
        card.computing.line.append(
            lambda target=target, number=number: seen.append((number, bool((target == number).all())))
        )
        lane.is_read()
        gc.collect()
    card.run(copies_first=copies_first)
    assert seen == [(number, True) for number in range(len(heights))]
    assert list(card.registered.values()) == [1 << 20], "pinned once, as a whole"


def test_memory_is_given_back_when_the_copy_is_over_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    arena = make_arena(4096)
    assert arena is not None
    lane = uploads._CopyLane(CPU)
    lane.bring(lent(arena, 7, 10), arena)
    lane.is_read()
    lane.settle()
    assert arena.lend(1, 0.0) is None
    card.run(copies_first=True)
    assert arena.lend(1, 0.0) is None, "nobody has asked"
    lane.settle()
    assert arena.lend(1, 0.0) is not None


def test_an_arena_is_unpinned_when_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    arena = make_arena(4096)
    assert arena is not None
    assert uploads.pin(arena, CPU)
    assert uploads.pin(arena, CPU)
    assert len(card.registered) == 1
    del arena
    gc.collect()
    assert not card.registered


def test_memory_that_cannot_be_pinned_goes_through_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, refuses=True)
    arena = make_arena(4096)
    assert arena is not None
    lane = uploads._CopyLane(CPU)
    for number in range(3):
        target = lane.bring(lent(arena, number, 10), arena)
        card.run(copies_first=True)
        assert (target == number).all()
        lane.is_read()
        assert arena.lend(120 * 30, 0.0) is not None, "its bytes are elsewhere already"
    assert card.num_refused == 1
