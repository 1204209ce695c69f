"""From source rows to requests that are ready to run: ids, what is done already, pictures decoded ahead.

Every request that is still to do gets a place, counted up in input order. Pictures are decoded ahead within a fixed
number of rows, and requests become ready as their pictures do, in any order; by the places order.py restores the order.
What a finished record asks next (follow.py) goes before all rows that are still to be read. What cannot be run fails
here, without the engine. Knows nothing of records and journals but what its callbacks say.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import NamedTuple

from md3cli.config import DecodeOptions, RunConfig
from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, Cutter, ImageLimits, PreparedImage
from md3cli.images.cutter import PartCutter
from md3cli.images.parts import Part
from md3cli.images.pool import PicturePool, num_beside_gpu
from md3cli.images.rects import PixelRect
from md3cli.records import ImageFacts, ImageItem, RecordDict, Request, RowFailure, RunIdentity, SourceRow
from md3cli.refine.follow import FollowUps
from md3cli.remote.hosts import FetchOptions, HostRules
from md3cli.system import num_cores

AHEAD_BYTES = 256 * 2**20  # of crops decoded ahead
MIN_AHEAD, MAX_AHEAD = 4, 256  # rows decoded ahead
ROWS_AT_A_TIME = 1024  # read before what came of them is written
CHANNELS = 3
UNFORESEEN = RowFailure("bad_request", "INPUT changed while it was read: until then no row had a `then`; start again")
CHANGED = RowFailure("bad_request", "the picture has changed since its objects were found; start over with --overwrite")
MAX_AUTO_WORKERS = 16


class Place(NamedTuple):
    """Where a record stands among those of a run: behind which request of INPUT, and as which of its children.

    `child` is 0 for the record of the request itself.
    """

    number: int
    child: int = 0


@dataclass(slots=True)
class Ticket:
    """One request on its way; `facts` are there once its picture is decoded, and known before for a child.

    `key` is the engine's. `rect` is the part of the picture that was cut out for it.
    """

    key: int
    place: Place
    record_id: str
    image: ImageItem | None
    request: Request
    row: SourceRow
    is_last_of_row: bool = False
    facts: ImageFacts | None = None
    rect: PixelRect | None = None
    family: Family | None = None


@dataclass(slots=True)
class Family:
    """The requests of a row whose records may ask more, by their place in the row, and those records so far."""

    row: SourceRow
    tickets: dict[int, Ticket] = field(default_factory=dict)
    records: dict[int, RecordDict] = field(default_factory=dict)

    def place_of(self, ticket: Ticket) -> int:
        """Return which of the row's requests a ticket is of."""
        return next(place for place, other in self.tickets.items() if other is ticket)


@dataclass(slots=True)
class ReadyRequest:
    """A ticket the engine can run; `picture` None for a question without one."""

    ticket: Ticket
    picture: PreparedImage | None


@dataclass(slots=True)
class _Ahead:
    """Tickets that wait for one picture; `is_next`: they go before rows that are still to be read."""

    tickets: list[Ticket]
    future: Future[PreparedImage] | Future[Part]
    is_next: bool


@dataclass(frozen=True, slots=True)
class Following:
    """How a feed asks what records ask next.

    Args:
        ups: says which children a record has.
        run: is part of their ids.
        record_of: gives the record of a request that is done.
        passed: told of each request that is done, when its turn comes.
        grown: told of the number of a request of INPUT how many children its record has, once that is known.
    """

    ups: FollowUps
    run: RunIdentity
    record_of: Callable[[str], RecordDict | None]
    passed: Callable[[Ticket], None] = lambda ticket: None
    grown: Callable[[int, int], None] = lambda number, count: None


def rows_ahead(crop_config: CropConfig) -> int:
    """Return how many pictures may be decoded and waiting, by the bytes of the largest common one."""
    largest = (1 + crop_config.max_crops) * crop_config.crop_size**2 * CHANNELS
    return max(MIN_AHEAD, min(MAX_AHEAD, AHEAD_BYTES // largest))


def num_auto_workers() -> int:
    """Return a decode worker for each core that this process may use, and at most MAX_AUTO_WORKERS."""
    return min(MAX_AUTO_WORKERS, num_cores())


def make_pool(config: RunConfig, crop_config: CropConfig) -> PicturePool:
    """Make the picture pool of a run."""
    return make_decode_pool(config.decode, config.model.background, crop_config)


def make_decode_pool(options: DecodeOptions, background: str, crop_config: CropConfig) -> PicturePool:
    """Make a picture pool as `options` say."""
    hosts = HostRules(frozenset(options.named_hosts), options.may_fetch_private, options.root)
    return PicturePool(
        options.workers or num_auto_workers(),
        crop_config,
        ImageLimits(options.max_pixels, options.max_file_size),
        background=background,
        timeout_s=options.timeout_s,
        fetching=FetchOptions(options.max_file_size, options.fetch_timeout_s, hosts),
        num_beside_gpu=options.workers or num_beside_gpu(num_auto_workers()),
    )


class Feed:
    """Requests of `rows` that are still to do, as they become ready.

    Args:
        next_id: gives the id of the next request in input order, of a picture's name and the request.
        is_done: says whether a request's record stands in OUTPUT; asked by its id, row and request before anything
            is opened.
        pool: decodes the pictures.
        num_ahead: rows in decoding or decoded at a time.
        fail: called with each ticket that fails before the engine sees it.
        recall: says whether the record of a ticket is there already and only waits to be written.
        reading: entered while rows are read, which may wait for a slow disk.
        following: where records may ask more; None: none does.
        wait_for_row: waits until the next row may have come, at most the seconds it is given, after `rows` gave None.
    """

    def __init__(
        self,
        rows: Iterator[SourceRow | None],
        *,
        next_id: Callable[[str | None, Request], str],
        is_done: Callable[[str, SourceRow, Request], bool],
        pool: PicturePool,
        num_ahead: int,
        fail: Callable[[Ticket, RowFailure], None],
        recall: Callable[[Ticket], bool],
        reading: Callable[[], AbstractContextManager[None]],
        wait_for_row: Callable[[float], None] = time.sleep,
        following: Following | None = None,
    ) -> None:
        self._rows, self._next_id, self._is_done, self._pool = rows, next_id, is_done, pool
        self._num_ahead, self._fail, self._recall, self._reading = num_ahead, fail, recall, reading
        self._wait_for_row, self._following = wait_for_row, following
        self._decoded: SimpleQueue[_Ahead] = SimpleQueue()  # filled by the pool's threads
        self._newest: _Ahead | None = None
        self._num_decoding = self._num_cutting = 0  # rows, and parts of pictures
        self._ready: deque[ReadyRequest] = deque()
        self._to_cut: list[tuple[Place, Ticket]] = []  # a heap: what is written first goes first
        self._ready_next: deque[ReadyRequest] = deque()  # parts, which go first
        self._next_key = self._next_number = 0
        self._is_beside_gpu = False
        self._cutter: Cutter | None = None
        self._is_source_exhausted = False
        self._is_row_late = False  # the next has not come yet: it is not waited for while there is something to do
        self.num_done_before = 0
        self.num_rows_done_before = 0

    @property
    def is_exhausted(self) -> bool:
        """Return whether nothing will become ready any more."""
        return self._is_source_exhausted and not (self._num_decoding or self._ready or self._has_parts)

    @property
    def _has_parts(self) -> bool:
        return bool(self._to_cut or self._num_cutting or self._ready_next)

    @cached_property
    def parts(self) -> PartCutter:
        """What cuts parts of pictures."""
        parts = PartCutter(self._pool)
        if self._is_beside_gpu:
            parts.serve_gpu(self._cutter)
        return parts

    def close(self) -> None:
        """Let go of the pictures that are kept for parts of them; nothing becomes ready any more."""
        if "parts" in vars(self):
            self.parts.close()

    def serve_gpu(self, cutter: Cutter | None) -> None:
        """From now on have pictures made as an engine on a GPU wants them (`PicturePool.serve_gpu`)."""
        if self._is_beside_gpu and cutter is self._cutter:
            return
        self._is_beside_gpu, self._cutter = True, cutter
        self._pool.serve_gpu(cutter)
        if "parts" in vars(self):
            self.parts.serve_gpu(cutter)

    def poll(self) -> ReadyRequest | None:
        """Return the next request that is ready; None when none is at the moment."""
        if self._has_parts:
            self._cut_ahead()
            self._collect()
        if not (self._ready or self._ready_next):
            self._fill()
            self._collect()
        if self._ready_next:
            return self._ready_next.popleft()
        return self._ready.popleft() if self._ready else None

    def poll_beside(self, ready: ReadyRequest) -> ReadyRequest | None:
        """Return the next request that is ready, where it is about the same picture, looked at in the same tiles."""
        queue = self._ready_next or self._ready
        if (
            not queue
            or queue[0].picture is not ready.picture
            or queue[0].ticket.request.tiles != ready.ticket.request.tiles
        ):
            return None
        return queue.popleft()

    def follow(self, ticket: Ticket, record: RecordDict) -> None:
        """Ask what the record of a ticket asks next, if anything, before all rows that are still to be read."""
        family, following = ticket.family, self._following
        if family is None or following is None:
            return
        place = family.place_of(ticket)
        family.records[place] = record
        known = {place: record}
        if following.ups.needs_all(family.row):
            if len(family.records) < len(family.tickets):
                return
            known = family.records
        for place, children in following.ups.children_of(family.row, known).items():
            self._ask(following, family.tickets[place], known[place], children)

    def wait(self, timeout_s: float) -> None:
        """Wait until a picture is decoded or a row has come, at most `timeout_s`; not where rows are to be read."""
        if self._ready or self._ready_next or (self._wants_rows and not self._is_row_late):
            return
        if self._num_decoding or self._num_cutting:
            self._collect(timeout_s)
        elif self._is_row_late:
            self._wait_for_row(timeout_s)

    @property
    def _wants_rows(self) -> bool:
        is_full = self._num_decoding >= self._num_ahead or self._ready or self._to_cut
        return not (self._is_source_exhausted or is_full)

    def _fill(self) -> None:
        """Read rows until enough pictures are in decoding."""
        self._is_row_late = False
        with self._reading():
            for _ in range(ROWS_AT_A_TIME):  # no more, because rows that fail here, or came early, wait to be written
                if not self._wants_rows:
                    return
                try:
                    row = next(self._rows)
                except StopIteration:
                    self._is_source_exhausted = True
                    return
                if row is None:
                    self._is_row_late = True
                    return
                self._take(row)

    def _take(self, row: SourceRow) -> None:
        tickets = self._tickets(row)
        self.num_rows_done_before += not tickets
        tickets = self._fit([ticket for ticket in tickets if not self._recall(ticket)], row)
        if not tickets:
            return
        if row.then and self._following is None:
            self._fail_all(tickets, UNFORESEEN)
            return
        if row.failure is not None:
            self._fail_all(tickets, row.failure)
        elif row.image is None:
            self._ready += [ReadyRequest(ticket, None) for ticket in tickets]
        else:
            for ticket in tickets:
                if ticket.request.region is not None:
                    heapq.heappush(self._to_cut, (ticket.place, ticket))
            about_whole = [ticket for ticket in tickets if ticket.request.region is None]
            if about_whole:
                self._decode(about_whole, row.image)
            self._cut_ahead()

    def _fit(self, tickets: list[Ticket], row: SourceRow) -> list[Ticket]:
        """Fail the tickets whose prompts the row cannot fill, and return the others."""
        if not row.refused:
            return tickets
        refused = {ticket.key: why for ticket in tickets if (why := row.refused.get(ticket.request.prompt or ""))}
        for ticket in tickets:
            if ticket.key in refused:
                self._fail(ticket, RowFailure("bad_request", refused[ticket.key]))
        return [ticket for ticket in tickets if ticket.key not in refused]

    def _tickets(self, row: SourceRow) -> list[Ticket]:
        """Return a ticket for each request of a row that is still to do."""
        if self._following is not None:
            return self._tickets_of_parents(self._following, row)
        tickets: list[Ticket] = []
        for request in row.requests:
            record_id = self._next_id(row.id_name, request)
            if self._is_done(record_id, row, request):
                self.num_done_before += 1
                continue
            tickets.append(self._ticket(Place(self._next_number), record_id, request, row))
            self._next_number += 1
        if tickets:
            tickets[-1].is_last_of_row = True
        return tickets

    def _tickets_of_parents(self, following: Following, row: SourceRow) -> list[Ticket]:
        """Return the same where records may ask more; one that is done may ask what has not been asked yet."""
        family, tickets, done = Family(row), list[Ticket](), list[Ticket]()
        for place, request in enumerate(row.requests):
            record_id = self._next_id(row.id_name, request)
            ticket = self._ticket(Place(self._next_number), record_id, request, row)
            self._next_number += 1
            if following.ups.may_follow(row, request):
                ticket.family = family
                family.tickets[place] = ticket
            (done if self._is_done(record_id, row, request) else tickets).append(ticket)
        if tickets:
            tickets[-1].is_last_of_row = True
        for ticket in done:
            self.num_done_before += 1
            following.passed(ticket)
            if ticket.family is not None:
                self.follow(ticket, following.record_of(ticket.record_id) or {})
        return tickets

    def _ticket(self, place: Place, record_id: str, request: Request, row: SourceRow) -> Ticket:
        self._next_key += 1
        return Ticket(self._next_key - 1, place, record_id, row.image, request, row)

    def _ask(self, following: Following, parent: Ticket, record: RecordDict, children: Sequence[Request]) -> None:
        """Have the children of a record asked, but for those that are done."""
        row, name = parent.row, parent.row.id_name
        following.grown(parent.place.number, len(children))
        for number, request in enumerate(children, 1):
            record_id = following.ups.id_of(parent.record_id, parent.request, request, name, following.run)
            ticket = self._ticket(Place(parent.place.number, number), record_id, request, row)
            ticket.facts = ImageFacts(record["width"], record["height"], record["sha256"])
            if self._is_done(record_id, row, request):
                self.num_done_before += 1
                following.passed(ticket)
            elif not self._recall(ticket):
                heapq.heappush(self._to_cut, (ticket.place, ticket))

    def _cut_ahead(self) -> None:
        """Have parts of pictures cut, and pictures made ready for what is asked of them next; in order, some ahead."""
        while self._to_cut and self._num_cutting + len(self._ready_next) < self._num_ahead:
            _, first = heapq.heappop(self._to_cut)
            tickets, region, image = [first], first.request.region, first.image
            while self._to_cut and (after := self._to_cut[0][1]).image is image and after.request.region == region:
                tickets.append(heapq.heappop(self._to_cut)[1])
            assert image is not None
            future = self.parts.submit(image) if region is None else self.parts.cut(image, region)
            self._num_cutting += 1
            self._watch(_Ahead(tickets, future, is_next=True))

    def _decode(self, tickets: list[Ticket], image: ImageItem) -> None:
        """Have a picture decoded; once only where the row before has the same one (many questions of an image)."""
        if self._newest is not None and self._newest.tickets[0].image == image:
            future = self._newest.future
        else:
            has_parts = any(ticket.family is not None or ticket.request.tiles is not None for ticket in tickets)
            future = self.parts.submit(image) if has_parts else self._pool.submit(image)
        self._newest = _Ahead(tickets, future, is_next=False)
        self._num_decoding += 1
        self._watch(self._newest)

    def _watch(self, ahead: _Ahead) -> None:
        """Have tickets settled once their picture is there."""
        # The callback must not hold what holds the future: such a circle would keep pictures until the next gc.
        tickets, is_next, decoded = ahead.tickets, ahead.is_next, self._decoded
        ahead.future.add_done_callback(lambda done: decoded.put(_Ahead(tickets, done, is_next)))

    def _collect(self, timeout_s: float = 0.0) -> None:
        """Move all rows whose pictures are decoded to the ready ones; wait for the first one at most `timeout_s`."""
        try:
            self._settle(self._decoded.get(timeout=timeout_s) if timeout_s else self._decoded.get_nowait())
            while True:
                self._settle(self._decoded.get_nowait())
        except Empty:
            return

    def _settle(self, ahead: _Ahead) -> None:
        if ahead.is_next:
            self._num_cutting -= 1
        else:
            self._num_decoding -= 1
        if self._newest is not None and ahead.future is self._newest.future:
            self._newest = None  # its picture is the engine's now, and not kept for a row that may never come
        try:
            found = ahead.future.result()
        except ImageError as error:
            self._fail_all(ahead.tickets, RowFailure(error.type, str(error)))
            return
        rect, picture = (found.rect, found.picture) if isinstance(found, Part) else (None, found)
        facts = found.facts if isinstance(found, Part) else ImageFacts(found.width, found.height, found.sha256)
        for ticket in ahead.tickets:
            if ticket.facts not in (None, facts):
                self._fail(ticket, CHANGED)
                continue
            ticket.facts, ticket.rect = facts, rect
            (self._ready_next if ahead.is_next else self._ready).append(ReadyRequest(ticket, picture))

    def _fail_all(self, tickets: list[Ticket], failure: RowFailure) -> None:
        for ticket in tickets:
            self._fail(ticket, failure)
