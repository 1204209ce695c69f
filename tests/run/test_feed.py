"""From rows to ready requests: ids, what is done, pictures decoded ahead."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

import numpy as np

from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, PreparedImage, Tiling
from md3cli.images.pool import PicturePool
from md3cli.records import ImageItem, Request, RowFailure, RunIdentity, SourceRow, Task, request_id
from md3cli.run.feed import ROWS_AT_A_TIME, Feed, Ticket, rows_ahead
from md3cli.run.record_index import RequestIds

RUN = RunIdentity("m@1")
CAR, DOG = Request(Task.DETECT, "car"), Request(Task.DETECT, "dog")


class HandPool(PicturePool):
    """Pictures are ready when the test says so."""

    def __init__(self) -> None:
        self.futures: dict[str, Future[PreparedImage]] = {}

    def submit(self, item: ImageItem) -> Future[PreparedImage]:
        assert item.name not in self.futures, "decoded twice"
        self.futures[item.name] = Future()
        return self.futures[item.name]

    def finish(self, name: str) -> None:
        crops = np.zeros((2, 2, 2, 3), np.uint8)
        self.futures[name].set_result(PreparedImage(crops, Tiling(1, 1), 8, 6, f"sha of {name}"))

    def fail(self, name: str) -> None:
        self.futures[name].set_exception(ImageError("decode", "torn"))


def row(name: str | None, *requests: Request, failure: RowFailure | None = None) -> SourceRow:
    return SourceRow(ImageItem(name, f"/x/{name}") if name else None, requests, failure=failure)


class Rig:
    """A feed over `rows`, what it failed, and how far it read."""

    def __init__(
        self, *rows: SourceRow, num_ahead: int = 3, done: tuple[str, ...] = (), kept: tuple[str, ...] = ()
    ) -> None:
        self.pool, self.failed, self.num_read = HandPool(), [], 0
        self.feed = Feed(
            self._count(rows),
            next_id=RequestIds(RUN).next_id,
            is_done=lambda record_id, row, request: record_id in done,
            pool=self.pool,
            num_ahead=num_ahead,
            fail=lambda ticket, failure: self.failed.append((ticket.key, failure.type)),
            recall=lambda ticket: ticket.record_id in kept,
            reading=nullcontext,
        )

    def _count(self, rows: tuple[SourceRow, ...]) -> Any:
        for each in rows:
            self.num_read += 1
            yield each

    def poll(self) -> Ticket | None:
        ready = self.feed.poll()
        return None if ready is None else ready.ticket


def test_requests_become_ready_as_their_pictures_do() -> None:
    rig = Rig(row("a", CAR, DOG), row("b", CAR), row("c", CAR), row("d", CAR))
    assert rig.poll() is None
    assert rig.num_read == 3, "no further than so many pictures ahead"
    rig.pool.finish("b")
    ticket = rig.poll()
    assert ticket is not None
    assert (ticket.key, ticket.image.name, ticket.is_last_of_row) == (2, "b", True)
    rig.pool.finish("a")
    first, second = rig.poll(), rig.poll()
    assert [(t.key, t.request.prompt, t.is_last_of_row) for t in (first, second)] == [
        (0, "car", False),
        (1, "dog", True),
    ]
    assert (first.facts.width, first.facts.height, first.facts.sha256) == (8, 6, "sha of a")
    rig.pool.finish("c")
    rig.pool.futures.setdefault("d", Future())
    assert not rig.feed.is_exhausted


def test_what_is_done_is_not_decoded_and_takes_no_key() -> None:
    done = tuple(request_id(name, CAR, RUN) for name in "ab")
    rig = Rig(row("a", CAR), row("b", CAR, DOG), row("c", CAR), done=done)
    rig.poll()
    assert sorted(rig.pool.futures) == ["b", "c"]
    for name in "bc":
        rig.pool.finish(name)
    assert [(t.key, t.image.name, t.request.prompt) for t in (rig.poll(), rig.poll())] == [
        (0, "b", "dog"),
        (1, "c", "car"),
    ]
    assert (rig.feed.num_done_before, rig.feed.num_rows_done_before) == (2, 1)
    assert rig.poll() is None
    assert rig.feed.is_exhausted


def test_a_record_that_waits_for_its_turn_takes_a_key_and_is_not_decoded() -> None:
    kept = tuple(request_id(name, CAR, RUN) for name in "ab")
    rig = Rig(row("a", CAR), row("b", CAR, DOG), row("c", CAR), kept=kept)
    rig.poll()
    assert sorted(rig.pool.futures) == ["b", "c"]
    for name in "bc":
        rig.pool.finish(name)
    assert [(t.key, t.request.prompt) for t in (rig.poll(), rig.poll())] == [(2, "dog"), (3, "car")]
    assert (rig.feed.num_done_before, rig.feed.num_rows_done_before) == (0, 0)


def test_failures_never_become_ready() -> None:
    rig = Rig(
        row("a", CAR, failure=RowFailure("bad_row", "x")), row("b", CAR, DOG), row(None, Request(Task.QUERY, "?"))
    )
    ticket = rig.poll()
    assert ticket is not None
    assert (ticket.key, ticket.image, rig.failed) == (3, None, [(0, "bad_row")])
    rig.pool.fail("b")
    assert rig.poll() is None
    assert rig.failed[1:] == [(1, "decode"), (2, "decode")]
    assert rig.feed.is_exhausted


def test_rows_that_fail_are_handed_over_in_portions() -> None:
    bad = RowFailure("bad_row", "x")
    rig = Rig(row("good", CAR), *(row(str(i), CAR, failure=bad) for i in range(3 * ROWS_AT_A_TIME)))
    for portion in range(1, 4):
        assert rig.poll() is None
        assert len(rig.failed) == portion * ROWS_AT_A_TIME - 1
        rig.feed.wait(60)  # there are rows to read
    rig.pool.finish("good")
    assert rig.poll() is not None
    assert rig.poll() is None
    assert rig.feed.is_exhausted


def test_rows_of_the_same_picture_share_its_decoding() -> None:
    rig = Rig(row("a", CAR), row("a", DOG), row("b", CAR))
    rig.poll()
    rig.pool.finish("a")
    assert [t.request.prompt for t in (rig.poll(), rig.poll())] == ["car", "dog"]


def test_rows_ahead_are_bounded_by_bytes_and_number() -> None:
    assert rows_ahead(CropConfig(378, 14, 4, 12)) == 48
    assert rows_ahead(CropConfig(84, 14, 1, 4)) == 256
    assert rows_ahead(CropConfig(4000, 14, 4, 12)) == 4


def test_pictures_are_let_go_without_waiting_for_the_garbage_collector() -> None:
    rig = Rig(row("a", CAR), row("b", CAR))
    rig.poll()
    rig.pool.finish("a")
    ready = rig.feed.poll()
    assert ready is not None
    picture = weakref.ref(ready.picture.crops)
    gc.disable()
    try:
        del ready, rig.pool.futures["a"]
        assert picture() is None
    finally:
        gc.enable()
