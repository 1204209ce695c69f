"""Requests with tiles: the jobs they become, the one answer of them, what fails them, and how much is cut ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, ImageLimits, WholeImage
from md3cli.images.cutter import PartCutter
from md3cli.images.parts import part_key
from md3cli.images.pool import PicturePool
from md3cli.images.rects import PixelRect
from md3cli.images.tiles import tile_rects
from md3cli.records import Answer, ImageFacts, ImageItem, Job, Request, RowFailure, Task, Tiles
from md3cli.refine.tiled import TILES_AHEAD, TiledRequests

CONFIG = CropConfig(crop_size=28, patch_size=14, overlap_margin=0, max_crops=4)
WIDTH, HEIGHT = 1000, 800
TILES = Tiles(400, 0.25)
RECTS = tile_rects(WIDTH, HEIGHT, 400, 0.25)
SMALL = [(310, 40, 350, 80), (500, 500, 540, 530)]  # in the overlap of two tiles, and of four
LARGE = (150, 200, 620, 330)  # over a seam, and larger than the overlap
REQUEST = Request(Task.DETECT, "dot", tiles=TILES)


@pytest.fixture
def item(tmp_path: Path) -> ImageItem:
    Image.new("RGB", (WIDTH, HEIGHT), (9, 120, 40)).save(tmp_path / "a.png")
    return ImageItem("a.png", str(tmp_path / "a.png"))


@pytest.fixture(params=[0, 2])
def cutter(request: pytest.FixtureRequest) -> Iterator[PartCutter]:
    with PicturePool(request.param, CONFIG, ImageLimits()) as pool:
        made = PartCutter(pool)
        yield made
        made.close()


@dataclass
class Oracle:
    """An engine that sees of each view what lies in it; what comes in is answered last first, `batch` at a time."""

    boxes: list[tuple[int, int, int, int]]
    failing: frozenset[int] = frozenset()
    failing_prompt: str = "dot"
    batch: int = 4
    rects: dict[str, PixelRect] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    finish: Callable[[PixelRect], str] = lambda rect: "stop"

    def knows(self, whole: WholeImage) -> None:
        self.rects = {part_key(whole, rect): rect for rect in (PixelRect(0, 0, WIDTH, HEIGHT), *RECTS)}

    def add(self, job: Job) -> None:
        assert job.request.tiles is None
        self.jobs.append(job)
        self.waiting.append(job)

    def step(self) -> list[Answer]:
        taken, self.waiting = self.waiting[: self.batch], self.waiting[self.batch :]
        return [self._answer(job) for job in reversed(taken)]

    def _answer(self, job: Job) -> Answer:
        assert job.image is not None
        rect = self.rects[job.image.sha256]
        is_failing = rect in RECTS and RECTS.index(rect) + 1 in self.failing
        if is_failing and job.request.prompt == self.failing_prompt:
            return Answer(job.key, failure=RowFailure("model", f"nothing of {rect.left}"))
        cut = [
            (max(b[0], rect.left), max(b[1], rect.top), min(b[2], rect.right), min(b[3], rect.bottom))
            for b in self.boxes
        ]
        found = [self._thing(box, rect) for box in cut if box[0] < box[2] and box[1] < box[3]]
        result = {"objects": found} if job.request.task is Task.DETECT else {"points": [_point(box) for box in found]}
        return Answer(job.key, result, self.finish(rect), 10, 3)

    def _thing(self, box: tuple[int, int, int, int], rect: PixelRect) -> dict[str, Any]:
        x = [(place - rect.left) / rect.width for place in (box[0], box[2])]
        y = [(place - rect.top) / rect.height for place in (box[1], box[3])]
        return {"label": "dot", "x_min": x[0], "y_min": y[0], "x_max": x[1], "y_max": y[1], "score": 0.5}


def _point(box: dict[str, Any]) -> dict[str, Any]:
    x, y = (box["x_min"] + box["x_max"]) / 2, (box["y_min"] + box["y_max"]) / 2
    return {"label": "dot", "x": x, "y": y, "score": 0.5}


def answered(
    cutter: PartCutter, item: ImageItem, oracle: Oracle, request: Request = REQUEST, facts: ImageFacts | None = None
) -> Answer:
    """What becomes of a request with the key 0."""
    (answer,) = all_answered(cutter, item, oracle, [request], facts)
    return answer


def all_answered(
    cutter: PartCutter,
    item: ImageItem,
    oracle: Oracle,
    requests: Sequence[Request],
    facts: ImageFacts | None = None,
) -> list[Answer]:
    """What becomes of requests with the keys 0, 1, ..., by a loop as drive.py has it."""
    whole = cutter.whole(item).result(60)
    oracle.knows(whole)
    tiled = TiledRequests(lambda: cutter)
    facts = facts or ImageFacts(whole.width, whole.height, whole.sha256)
    picture = cutter.submit(item).result(60)
    tiled.begin(list(enumerate(requests)), picture, facts, lambda: cutter.whole(item))
    answers: list[Answer] = []
    while not tiled.is_idle:
        while len(oracle.waiting) < 2 * oracle.batch and (job := tiled.poll()) is not None:
            oracle.add(job)
        if not oracle.waiting:
            tiled.wait(240)
        answers += tiled.collect(oracle.step())
    return sorted(answers, key=lambda answer: answer.key)


def pixels(answer: Answer) -> list[tuple[int, ...]]:
    assert answer.result is not None
    keys = (("x_min", WIDTH), ("y_min", HEIGHT), ("x_max", WIDTH), ("y_max", HEIGHT))
    return sorted(tuple(round(one[key] * size) for key, size in keys) for one in answer.result["objects"])


def test_the_whole_picture_and_all_tiles_are_asked_and_say_one_thing(cutter: PartCutter, item: ImageItem) -> None:
    oracle = Oracle([*SMALL, LARGE])
    answer = answered(cutter, item, oracle)
    assert pixels(answer) == sorted([*SMALL, LARGE])
    assert [oracle.rects[job.image.sha256] for job in oracle.jobs if job.image] == [(0, 0, WIDTH, HEIGHT), *RECTS]
    assert (answer.key, answer.finish_reason, answer.num_tiles) == (0, "stop", len(RECTS))
    assert (answer.prompt_tokens, answer.output_tokens) == (10 * (1 + len(RECTS)), 3 * (1 + len(RECTS)))


def test_points_come_once(cutter: PartCutter, item: ImageItem) -> None:
    answer = answered(cutter, item, Oracle(SMALL), replace(REQUEST, task=Task.POINT))
    assert answer.result is not None
    found = sorted((round(one["x"] * WIDTH), round(one["y"] * HEIGHT)) for one in answer.result["points"])
    assert found == [(330, 60), (520, 515)]


def test_a_picture_no_larger_than_a_tile_is_asked_about_once(cutter: PartCutter, item: ImageItem) -> None:
    oracle = Oracle(SMALL)
    answer = answered(cutter, item, oracle, replace(REQUEST, tiles=Tiles(1000, 0.2)))
    assert len(oracle.jobs) == 1
    assert (pixels(answer), answer.num_tiles, answer.prompt_tokens) == (sorted(SMALL), 1, 10)


def test_the_first_tile_that_fails_fails_the_request_and_later_ones_are_left_out(
    cutter: PartCutter, item: ImageItem
) -> None:
    oracle = Oracle(SMALL, frozenset({3, 4, 7}), batch=1)
    answer = answered(cutter, item, oracle)
    assert answer.failure == RowFailure("model", f"tile 3 of {len(RECTS)}: nothing of {RECTS[2].left}")
    assert len(oracle.jobs) < 1 + len(RECTS)


@pytest.mark.parametrize("reason", ["tile", "objects"])
def test_it_is_cut_off_where_any_tile_is_or_more_is_found_than_asked_for(
    cutter: PartCutter, item: ImageItem, reason: str
) -> None:
    oracle, request = Oracle(SMALL), REQUEST
    if reason == "tile":
        oracle.finish = lambda rect: "length" if rect == RECTS[5] else "stop"
    else:
        request = replace(REQUEST, max_objects=1)
    answer = answered(cutter, item, oracle, request)
    assert answer.finish_reason == "length"
    assert len(pixels(answer)) == (2 if reason == "tile" else 1)


def test_a_picture_that_changed_meanwhile_fails(cutter: PartCutter, item: ImageItem) -> None:
    answer = answered(cutter, item, Oracle(SMALL), facts=ImageFacts(WIDTH, HEIGHT, "0" * 64))
    assert answer.failure == RowFailure("io", f"tile 1 of {len(RECTS)}: the picture changed while it was read")


def test_too_many_tiles_fail_before_any_is_cut(cutter: PartCutter, item: ImageItem) -> None:
    oracle = Oracle(SMALL)
    answer = answered(cutter, item, oracle, replace(REQUEST, tiles=Tiles(378, 0.9999)))
    assert answer.failure is not None
    assert answer.failure.type == "bad_request"
    assert not oracle.jobs


def test_only_a_few_tiles_are_cut_ahead(cutter: PartCutter, item: ImageItem, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, num_cut, num_asked = Tiles(378, 0.9), 0, 0
    cut_rect = cutter.cut_rect

    def counted(whole: WholeImage, rect: PixelRect) -> Any:
        nonlocal num_cut
        num_cut += 1
        assert num_cut - num_asked <= TILES_AHEAD
        return cut_rect(whole, rect)

    monkeypatch.setattr(cutter, "cut_rect", counted)
    whole = cutter.whole(item).result(60)
    tiled = TiledRequests(lambda: cutter)
    picture, facts = cutter.submit(item).result(60), ImageFacts(WIDTH, HEIGHT, whole.sha256)
    tiled.begin([(7, replace(REQUEST, tiles=tiles))], picture, facts, lambda: cutter.whole(item))
    assert tiled.poll() is not None
    while tiled.has_jobs:
        tiled.wait(240)
        num_asked += tiled.poll() is not None
    assert num_asked == num_cut == len(tile_rects(WIDTH, HEIGHT, 378, 0.9)) > 10 * TILES_AHEAD


def test_a_tile_that_cannot_be_cut_fails_the_request(
    cutter: PartCutter, item: ImageItem, monkeypatch: pytest.MonkeyPatch
) -> None:
    part_of = cutter.part_of

    def failing(whole: WholeImage, rect: PixelRect) -> Any:
        if rect == RECTS[1]:
            raise ImageError("too_large", "too little memory")
        return part_of(whole, rect)

    monkeypatch.setattr(cutter, "part_of", failing)
    answer = answered(cutter, item, Oracle(SMALL))
    assert answer.failure == RowFailure("too_large", f"tile 2 of {len(RECTS)}: too little memory")


def test_what_is_asked_of_one_picture_is_asked_tile_by_tile(cutter: PartCutter, item: ImageItem) -> None:
    oracle = Oracle(SMALL, frozenset({2}), failing_prompt="ring")
    requests = [replace(REQUEST, prompt=prompt) for prompt in ("dot", "ring", "spot")]
    dot, ring, spot = all_answered(cutter, item, oracle, requests)
    assert pixels(dot) == pixels(spot) == sorted(SMALL)
    assert ring.failure is not None
    assert ring.failure.message.startswith("tile 2 of 9: ")
    views = [oracle.rects[job.image.sha256] for job in oracle.jobs if job.image and job.request.prompt != "ring"]
    assert views == [rect for rect in (PixelRect(0, 0, WIDTH, HEIGHT), *RECTS) for _ in range(2)]
    prompts = [job.request.prompt for job in oracle.jobs]
    assert prompts[:6] == ["dot", "ring", "spot"] * 2
    assert prompts[-2:] == ["dot", "spot"], "a request that has failed is not asked of later tiles"


def test_answers_to_other_requests_pass(cutter: PartCutter) -> None:
    other = Answer(3, {"answer": "yes"})
    assert TiledRequests(lambda: cutter).collect([other]) == [other]
