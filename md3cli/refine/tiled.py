"""Requests that look at a picture in tiles: many jobs of the engine that become one answer.

The whole picture is asked about first, then its tiles, row by row, and what several requests ask of a tile is asked
together: it is cut and encoded once, and they share what the engine has prefilled. Tiles are cut a few ahead, of one
picture at a time, whose pixels are held until the last one is cut; so memory does not grow with their number. What is
found is joined by refine/seams.py. A run and `Moondream.annotate` use it. Knows nothing of records and journals.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from md3cli.errors import ImageError, RequestError
from md3cli.images.crops import CropConfig, PreparedImage, WholeImage
from md3cli.images.parts import Part, placed
from md3cli.images.rects import PixelRect
from md3cli.images.tiles import tiles_of
from md3cli.records import Answer, ImageFacts, Job, Request, RowFailure
from md3cli.refine.refinement import FOUND_BY_TASK
from md3cli.refine.seams import View, join_tiles

TILES_AHEAD = 8  # cut, or being cut: 45 MB of crops of the real model
WHOLE = 0  # the view that is the whole picture; tile i is view i + 1


class TileCutter(Protocol):
    """Cuts tiles of pictures that are at hand, as `PartCutter` of images/cutter.py does."""

    @property
    def crop_config(self) -> CropConfig: ...

    def cut_rect(self, whole: WholeImage, rect: PixelRect) -> Future[Part]: ...


@dataclass(slots=True, eq=False)
class _Tiled:
    """A request whose views are not all answered; `request` is that of a view."""

    key: int
    request: Request
    facts: ImageFacts
    rects: tuple[PixelRect, ...]
    num_open: int  # views without an answer
    answers: dict[int, Answer] = field(default_factory=dict)


@dataclass(slots=True)
class _Cutting:
    """Tiles that are no jobs yet, of requests about one picture: views to be cut, and those cut or being cut."""

    group: list[_Tiled]
    facts: ImageFacts
    rects: tuple[PixelRect, ...]
    whole: Future[WholeImage]
    uncut: deque[int]
    coming: deque[tuple[int, Future[Part]]] = field(default_factory=deque)

    @property
    def next_view(self) -> int:
        return self.coming[0][0] if self.coming else self.uncut[0]


class TiledRequests:
    """Makes jobs of requests with tiles, and one answer of the answers to them; for one thread."""

    def __init__(self, cutter: Callable[[], TileCutter], keys: Iterator[int] | None = None) -> None:
        """Ask nothing yet.

        Args:
            cutter: gives what cuts tiles, and is asked for when there are any.
            keys: of its jobs, which no other job has; None counts down from -1.
        """
        self._cutter = cutter
        self._keys = itertools.count(-1, -1) if keys is None else keys
        self._asked: dict[int, tuple[_Tiled, int]] = {}  # by the key of a job: its request and view
        self._ready: deque[Job] = deque()  # all about one view
        self._cutting: _Cutting | None = None
        self._finished: list[Answer] = []

    @property
    def has_jobs(self) -> bool:
        """Return whether jobs are still to come; no other request may be begun meanwhile."""
        return bool(self._ready) or self._cutting is not None

    @property
    def is_idle(self) -> bool:
        """Return whether nothing is under way."""
        return not (self._cutting or self._asked or self._finished)

    def has_asked(self, key: int) -> bool:
        """Return whether an answer is to one of its jobs."""
        return key in self._asked

    def begin(
        self,
        asked: Sequence[tuple[int, Request]],
        picture: PreparedImage,
        facts: ImageFacts,
        whole: Callable[[], Future[WholeImage]],
    ) -> None:
        """Begin requests about one picture in the same tiles: each tile is cut once, and all ask about it.

        Args:
            asked: the requests, all with the same tiles, each behind the key of its answer; at least one.
            picture: what is asked about the whole picture.
            facts: of that picture; one that turns out to be another fails the requests (`io`).
            whole: gives the pixels that tiles are cut from, and is called where there are several.
        """
        tiles = asked[0][1].tiles
        assert tiles is not None
        assert not self.has_jobs
        try:
            rects = tiles_of(facts.width, facts.height, tiles, self._cutter().crop_config)
        except RequestError as error:
            failure = RowFailure("bad_request", str(error))
            self._finished += [Answer(key, failure=failure) for key, _ in asked]
            return
        views = range(1, len(rects) + 1) if len(rects) > 1 else ()  # one tile is the whole picture
        tiled = [_Tiled(key, replace(request, tiles=None), facts, rects, 1 + len(views)) for key, request in asked]
        if views:
            self._cutting = _Cutting(tiled, facts, rects, whole(), deque(views))
        self._ask(tiled, WHOLE, picture)

    def poll(self) -> Job | None:
        """Return the next job; None while no tile is cut, and where none is left."""
        while not self._ready and (cutting := self._cutting) is not None:
            try:
                self._cut_ahead(cutting)
                if not (cutting.coming and cutting.coming[0][1].done()):
                    return None
                self._ask(cutting.group, cutting.next_view, cutting.coming[0][1].result().picture)
            except ImageError as error:
                answer = Answer(0, failure=RowFailure(error.type, str(error)))
                for tiled in list(cutting.group):
                    self._settle(tiled, cutting.next_view, answer)
                break
            cutting.coming.popleft()
            if not (cutting.coming or cutting.uncut):
                self._cutting = None
        return self._ready.popleft() if self._ready else None

    def wait(self, timeout_s: float) -> None:
        """Wait until the next tile is cut, at most `timeout_s`."""
        if (cutting := self._cutting) is not None:
            next_one: Future[Any] = cutting.coming[0][1] if cutting.coming else cutting.whole
            wait([next_one], timeout_s)

    def collect(self, answers: Iterable[Answer]) -> list[Answer]:
        """Take what the engine has answered; return the answers to whole requests, with tiles or without."""
        for answer in answers:
            if answer.key in self._asked:
                self._settle(*self._asked.pop(answer.key), answer)
            else:
                self._finished.append(answer)
        finished, self._finished = self._finished, []
        return finished

    def _ask(self, group: Iterable[_Tiled], view: int, picture: PreparedImage) -> None:
        """Make jobs of a view, one of each request."""
        for tiled in group:
            job = Job(next(self._keys), picture, tiled.request)
            self._asked[job.key] = (tiled, view)
            self._ready.append(job)

    def _cut_ahead(self, cutting: _Cutting) -> None:
        """Have the next tiles cut, once the picture's pixels are there.

        Raises:
            ImageError: they cannot be had, or are not those that were asked about.
        """
        if not (cutting.uncut and cutting.whole.done()):
            return
        whole = cutting.whole.result()
        if whole.sha256 != cutting.facts.sha256:
            raise ImageError("io", "the picture changed while it was read")
        while cutting.uncut and len(cutting.coming) < TILES_AHEAD:
            view = cutting.uncut.popleft()
            cutting.coming.append((view, self._cutter().cut_rect(whole, cutting.rects[view - 1])))

    def _settle(self, tiled: _Tiled, view: int, answer: Answer) -> None:
        """Note the answer to a view, and finish a request that needs no other; a failed one is asked no further.

        Views are asked in order, so that of two that fail the first is always known.
        """
        tiled.answers[view] = answer
        tiled.num_open -= 1
        cutting = self._cutting
        if answer.failure is not None and cutting is not None and tiled in cutting.group:
            cutting.group.remove(tiled)
            tiled.num_open -= len({*cutting.uncut, *(coming for coming, _ in cutting.coming)} - {view})
            if not cutting.group:
                self._cutting = None
        if not tiled.num_open:
            self._finished.append(_one_answer(tiled))


def _one_answer(tiled: _Tiled) -> Answer:
    """Return what the answers to all views say together; the first failure where there is one."""
    parts = [tiled.answers[view] for view in sorted(tiled.answers)]
    for view, part in sorted(tiled.answers.items()):
        if part.failure is not None:
            where = "" if view == WHOLE else f"tile {view} of {len(tiled.rects)}: "
            return Answer(tiled.key, failure=replace(part.failure, message=where + part.failure.message))
    width, height, kind = tiled.facts.width, tiled.facts.height, FOUND_BY_TASK[tiled.request.task]
    whole, *of_tiles = (part.result or {kind: []} for part in parts)
    views = [
        View(rect, placed(result, rect, width, height)[kind])
        for rect, result in zip(tiled.rects, of_tiles, strict=False)
    ]
    joined = join_tiles(whole[kind], views, width, height, tiled.request.max_objects)
    is_short = joined.is_short or any(part.finish_reason == "length" for part in parts)
    return Answer(
        tiled.key,
        {**whole, kind: joined.found},
        "length" if is_short else "stop",
        sum(part.prompt_tokens for part in parts),
        sum(part.output_tokens for part in parts),
        num_tiles=len(tiled.rects),
    )
