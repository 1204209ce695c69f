"""Many requests of a Python program through the engine: records in order, each followed by what it asks next.

A request is a parent where it says `then`; what it asks about each object are its children, which run as soon as its
record is there. Whole pictures are kept up to a number of bytes, so that parts need no second decoding where it can be
helped. A request with tiles becomes many jobs and one answer (refine/tiled.py). Apart from api.py, which has the
model's own methods.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from md3cli.config import DEFAULT_PAD
from md3cli.errors import ImageError, RequestError
from md3cli.images.crops import CropConfig, PreparedImage, WholeImage
from md3cli.images.parts import KEPT_BYTES, KeptImages, Part, cut_rect, cut_region, cut_whole, placed
from md3cli.images.rects import PixelRect
from md3cli.model.api_requests import (
    ApiRequest,
    prepare_picture,
    read_pad,
    read_request,
    read_then,
    read_tiles,
    whole_picture,
)
from md3cli.model.engine.generation import EncodedImage
from md3cli.records import Answer, ImageFacts, Job, RecordDict, RowFailure, RunIdentity, SourceRow
from md3cli.refine.follow import FollowUps, child_id
from md3cli.refine.tiled import TiledRequests
from md3cli.source.requests import check_request

T = TypeVar("T")


@dataclass(slots=True)
class _Entry:
    """A request in flight, and once its record is there the keys of its children, in order."""

    asked: ApiRequest
    record_id: str
    image: Any
    row: SourceRow | None = None  # of a parent
    parent: int | None = None
    pad: float = DEFAULT_PAD
    rect: PixelRect | None = None
    record: RecordDict | None = None
    is_yielded: bool = False
    children: deque[int] = field(default_factory=deque)


class _TileCutter:
    """Cuts tiles in the caller's thread, as all pictures of a Python program are prepared."""

    def __init__(self, crop_config: CropConfig) -> None:
        self.crop_config = crop_config

    def cut_rect(self, whole: WholeImage, rect: PixelRect) -> Future[Part]:
        """Return the future of a tile, which is there at once."""
        return _at_once(lambda: cut_rect(whole, rect, self.crop_config))


def _at_once(make: Callable[[], T]) -> Future[T]:
    done: Future[T] = Future()
    try:
        done.set_result(make())
    except ImageError as error:
        done.set_exception(error)
    return done


class Annotating:
    """One call of `Moondream.annotate`: `jobs` go into the engine, its answers into `take`, and `finished` has records.

    Keys are drawn from `keys`, which all calls of an engine share.
    """

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], keys: Iterator[int], identity: RunIdentity, config: CropConfig
    ) -> None:
        """Ask nothing yet."""
        self._rows, self._keys, self._identity, self._config = iter(rows), keys, identity, config
        self._entries: dict[int, _Entry] = {}
        self._parents: deque[int] = deque()  # in the order of the requests, those that are not yielded yet
        self._to_ask: deque[int] = deque()
        self._repeats: Counter[str] = Counter()
        self._num_open_parents = 0
        self._kept = KeptImages[int](KEPT_BYTES)
        cutter = _TileCutter(config)
        self._tiled = TiledRequests(lambda: cutter, keys)

    def jobs(self, look: Callable[[], None]) -> Iterator[Job | None]:
        """Yield what the engine is to do: tiles first, then children; None while all that is left waits for parents.

        `look` is called then: an answer may have come while something else was asked of the engine.
        """
        is_exhausted = False
        while self._tiled.has_jobs or self._to_ask or self._num_open_parents or not is_exhausted:
            if self._tiled.has_jobs:
                job = self._next_view()
            elif self._to_ask:
                job = self._job_of_child(self._to_ask.popleft())
            elif is_exhausted:
                look()
                yield None
                continue
            else:
                try:
                    job = self._job_of_row(next(self._rows))
                except StopIteration:
                    is_exhausted = True
                    continue
            if job is not None:
                yield job

    def is_mine(self, key: int) -> bool:
        """Return whether an answer is of this call."""
        return key in self._entries or self._tiled.has_asked(key)

    def take(self, answer: Answer) -> None:
        """Take an answer of the engine; once a request is answered in all its tiles, make its record."""
        self._take_all(self._tiled.collect([answer]))

    def _take_all(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            self._finish(answer)

    def _finish(self, answer: Answer) -> None:
        """Make a record of the answer to a request, and note what it asks next."""
        entry = self._entries[answer.key]
        facts = entry.asked.facts
        if entry.rect is not None and facts is not None and answer.result is not None:
            answer = replace(answer, result=placed(answer.result, entry.rect, facts.width, facts.height))
        entry.record = entry.asked.record(answer, self._identity, entry.record_id)
        if entry.row is not None:
            self._num_open_parents -= 1
            self._follow(answer.key, entry, entry.row, entry.record)

    def finished(self) -> Iterator[RecordDict]:
        """Yield the records that are next in order, each parent before its children."""
        while self._parents:
            parent = self._entries[self._parents[0]]
            if parent.record is None:
                return
            if not parent.is_yielded:
                parent.is_yielded = True
                yield parent.record
            while parent.children:
                child = self._entries[parent.children[0]]
                if child.record is None:
                    return
                del self._entries[parent.children.popleft()]
                yield child.record
            del self._entries[self._parents.popleft()]

    def _job_of_row(self, row: Mapping[str, Any]) -> Job | None:
        """Note a request; return its job, or None where it makes no sense and has failed."""
        key = next(self._keys)
        asked = ApiRequest.of(row)
        entry = self._entries[key] = _Entry(asked, "", None)
        self._parents.append(key)
        try:
            request = read_request(row)
            asked.request = replace(request, tiles=read_tiles(row.get("tile"), row.get("overlap"), request))
            check_request(asked.request, has_image=asked.item is not None)
            entry.image, entry.pad = row.get("image"), read_pad(row.get("pad"))
            then = read_then(row.get("then"), asked.request)
            if then:
                entry.row = SourceRow(asked.item, (asked.request,), then=then)
                self._num_open_parents += 1
            whole = self._whole_of_row(entry, key)
            image = None if asked.item is None else self._prepare(entry, whole)
        except (RequestError, ImageError) as error:
            entry.record_id = self._id_of(asked)
            self._finish(Answer(key, failure=RowFailure(error.type, str(error))))
            return None
        entry.record_id = self._id_of(asked)
        if entry.row is None:
            entry.image = None  # the engine has it
        if image is not None:
            asked.facts = ImageFacts(image.width, image.height, image.sha256)
        if asked.request.tiles is not None and whole is not None and asked.facts is not None:
            assert isinstance(image, PreparedImage)
            self._tiled.begin([(key, asked.request)], image, asked.facts, lambda: _at_once(lambda: whole))
            return self._next_view()
        return Job(key, image, asked.request)

    def _next_view(self) -> Job | None:
        """Return the job of the next tile; None where one has failed, and its request with it."""
        job = self._tiled.poll()
        self._take_all(self._tiled.collect(()))
        return job

    def _id_of(self, asked: ApiRequest) -> str:
        """Return the id of a request; equal ones are counted."""
        first_id = asked.id_of(self._identity, 0)
        self._repeats[first_id] += 1
        return asked.id_of(self._identity, self._repeats[first_id] - 1)

    @property
    def _background(self) -> str | None:
        background = self._identity.background
        return None if background == "none" else background

    def _prepare(self, entry: _Entry, whole: WholeImage | None) -> PreparedImage | EncodedImage:
        if whole is not None:
            return cut_whole(whole, self._config)
        if isinstance(entry.image, EncodedImage):
            return entry.image
        return prepare_picture(entry.image, self._config, self._background)

    def _whole_of_row(self, entry: _Entry, key: int) -> WholeImage | None:
        """Return the whole picture of a request that asks about parts of it; None of any other."""
        if entry.row is not None:
            return self._whole(entry, key)
        return None if entry.asked.request.tiles is None else whole_picture(entry.image, self._background)

    def _whole(self, entry: _Entry, key: int) -> WholeImage:
        """Return the whole picture of a parent, kept or read once more."""
        whole = self._kept.find(key)
        if whole is None:
            whole = whole_picture(entry.image, self._background)
            self._kept.keep(key, whole)
        return whole

    def _follow(self, key: int, parent: _Entry, row: SourceRow, record: RecordDict) -> None:
        """Note the children of a record, to be asked next."""
        asked = parent.asked
        name = asked.item.name if asked.item is not None else None
        for request in FollowUps(parent.pad).children_of(row, {0: record})[0]:
            child = ApiRequest(asked.item, request, asked.meta, asked.facts)
            record_id = child_id(parent.record_id, asked.request, request, name, self._identity)
            number = next(self._keys)
            self._entries[number] = _Entry(child, record_id, None, parent=key)
            parent.children.append(number)
            self._to_ask.append(number)

    def _job_of_child(self, key: int) -> Job | None:
        entry = self._entries[key]
        region = entry.asked.request.region
        assert entry.parent is not None
        assert region is not None
        parent = self._entries[entry.parent]
        try:
            part = cut_region(self._whole(parent, entry.parent), region, self._config)
            if part.facts != entry.asked.facts:
                raise ImageError("bad_request", "the picture has changed since its objects were found; ask again")
        except (RequestError, ImageError) as error:
            self._finish(Answer(key, failure=RowFailure(error.type, str(error))))
            return None
        entry.rect = part.rect
        return Job(key, part.picture, entry.asked.request)
