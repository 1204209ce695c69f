"""From source rows to requests that are ready to run: ids, what is done already, pictures decoded ahead.

Every request that is still to do gets a key, counted up in input order. Pictures are decoded ahead within a fixed
number of rows, and requests become ready as their pictures do, in any order; by the keys order.py restores the order.
What cannot be run fails here, without the engine. Knows nothing of records and journals but what its callbacks say.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from md3cli.config import DecodeOptions, RunConfig
from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, ImageLimits
from md3cli.images.pool import Picture, PicturePool, num_beside_gpu
from md3cli.records import ImageFacts, ImageItem, Request, RowFailure, SourceRow
from md3cli.remote.hosts import FetchOptions, HostRules
from md3cli.system import num_cores

AHEAD_BYTES = 256 * 2**20  # of crops decoded ahead
MIN_AHEAD, MAX_AHEAD = 4, 256  # rows decoded ahead
ROWS_AT_A_TIME = 1024  # read before what came of them is written
CHANNELS = 3
MAX_AUTO_WORKERS = 16


@dataclass(slots=True)
class Ticket:
    """One request on its way; `facts` are there once its picture is decoded."""

    key: int
    record_id: str
    image: ImageItem | None
    request: Request
    row: SourceRow
    is_last_of_row: bool
    facts: ImageFacts | None = None


@dataclass(slots=True)
class ReadyRequest:
    """A ticket the engine can run; `picture` None for a question without one."""

    ticket: Ticket
    picture: Picture | None


@dataclass(slots=True)
class _AheadRow:
    tickets: list[Ticket]
    future: Future[Picture]


def rows_ahead(crop_config: CropConfig) -> int:
    """Return how many pictures may be decoded and waiting, by the bytes of the largest common one.

    Whole pictures are larger; of those the memory that decoders share bounds the bytes.
    """
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
    ) -> None:
        self._rows, self._next_id, self._is_done, self._pool = rows, next_id, is_done, pool
        self._num_ahead, self._fail, self._recall, self._reading = num_ahead, fail, recall, reading
        self._wait_for_row = wait_for_row
        self._decoded: SimpleQueue[_AheadRow] = SimpleQueue()  # filled by the pool's threads
        self._newest: _AheadRow | None = None
        self._num_decoding = 0
        self._ready: deque[ReadyRequest] = deque()
        self._next_key = 0
        self._longest_whole: int | None = None
        self._is_source_exhausted = False
        self._is_row_late = False  # the next has not come yet: it is not waited for while there is something to do
        self.num_done_before = 0
        self.num_rows_done_before = 0

    @property
    def is_exhausted(self) -> bool:
        """Return whether nothing will become ready any more."""
        return self._is_source_exhausted and not self._num_decoding and not self._ready

    def serve(self, longest_whole: int | None) -> None:
        """Have pictures made as the engine wants them from now on (`PicturePool.serve_gpu`); None: it is on no GPU."""
        if longest_whole is not None and longest_whole != self._longest_whole:
            self._longest_whole = longest_whole
            self._pool.serve_gpu(longest_whole)

    def poll(self) -> ReadyRequest | None:
        """Return the next request that is ready; None when none is at the moment."""
        if not self._ready:
            self._fill()
            self._collect()
        return self._ready.popleft() if self._ready else None

    def wait(self, timeout_s: float) -> None:
        """Wait until a picture is decoded or a row has come, at most `timeout_s`; not where rows are to be read."""
        if self._ready or (self._wants_rows and not self._is_row_late):
            return
        if self._num_decoding:
            self._collect(timeout_s)
        elif self._is_row_late:
            self._wait_for_row(timeout_s)

    @property
    def _wants_rows(self) -> bool:
        return not self._is_source_exhausted and self._num_decoding < self._num_ahead and not self._ready

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
        if row.failure is not None:
            self._fail_all(tickets, row.failure)
        elif row.image is None:
            self._ready += [ReadyRequest(ticket, None) for ticket in tickets]
        else:
            self._decode(tickets, row.image)

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
        tickets: list[Ticket] = []
        for request in row.requests:
            record_id = self._next_id(row.id_name, request)
            if self._is_done(record_id, row, request):
                self.num_done_before += 1
                continue
            tickets.append(Ticket(self._next_key, record_id, row.image, request, row, is_last_of_row=False))
            self._next_key += 1
        if tickets:
            tickets[-1].is_last_of_row = True
        return tickets

    def _decode(self, tickets: list[Ticket], image: ImageItem) -> None:
        """Have a picture decoded; once only where the row before has the same one (many questions of an image)."""
        if self._newest is not None and self._newest.tickets[0].image == image:
            future = self._newest.future
        else:
            future = self._pool.submit(image)
        self._newest = _AheadRow(tickets, future)
        self._num_decoding += 1
        # The callback must not hold what holds the future: such a circle would keep pictures until the next gc.
        future.add_done_callback(lambda done: self._decoded.put(_AheadRow(tickets, done)))

    def _collect(self, timeout_s: float = 0.0) -> None:
        """Move all rows whose pictures are decoded to the ready ones; wait for the first one at most `timeout_s`."""
        try:
            self._settle(self._decoded.get(timeout=timeout_s) if timeout_s else self._decoded.get_nowait())
            while True:
                self._settle(self._decoded.get_nowait())
        except Empty:
            return

    def _settle(self, row: _AheadRow) -> None:
        self._num_decoding -= 1
        if self._newest is not None and row.future is self._newest.future:
            self._newest = None  # its picture is the engine's now, and not kept for a row that may never come
        try:
            picture = row.future.result()
        except ImageError as error:
            self._fail_all(row.tickets, RowFailure(error.type, str(error)))
            return
        facts = ImageFacts(picture.width, picture.height, picture.sha256)
        for ticket in row.tickets:
            ticket.facts = facts
        self._ready += [ReadyRequest(ticket, picture) for ticket in row.tickets]

    def _fail_all(self, tickets: list[Ticket], failure: RowFailure) -> None:
        for ticket in tickets:
            self._fail(ticket, failure)
