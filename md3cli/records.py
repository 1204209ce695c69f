"""The words that every room shares: task, request, picture, source row, job, answer, record.

A `Job` goes into the model's engine, an `Answer` comes out. A record is a plain dict that goes to JSON as it is;
`make_record` alone builds one, so that the order of its keys is decided here. At the end stand the ways to JSON and
back, and what may be shown of a text. Standard library only; knows nothing of models, files or formats.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from md3cli.images.crops import PreparedImage
    from md3cli.model.engine.generation import EncodedImage

SCHEMA = "md3/1"
OK_TAIL = b',"error":null}\n'  # how the line of a record that succeeded ends: `error` is the last key

_FILE_ERRORS = "not_found not_a_file permission empty not_an_image unsupported decode decoder_crash too_large timeout"
_OTHER_ERRORS = "outside_root bad_row bad_request io model"
ERROR_TYPES = frozenset(f"{_FILE_ERRORS} {_OTHER_ERRORS}".split())
RETRYABLE = frozenset({"io", "timeout", "permission", "model"})  # may pass later
MESSAGE_LIMIT_CHARS = 200

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False, allow_nan=False)

RecordDict = dict[str, Any]


class Task(StrEnum):
    """What is asked of an image."""

    CAPTION = "caption"
    QUERY = "query"
    DETECT = "detect"
    POINT = "point"
    SEGMENT = "segment"


CAPTION_LENGTHS = ("short", "normal", "long")


class Box(NamedTuple):
    """A box of an upright picture: 0-1 from the top left, unclamped, as a record holds it."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a picture that is asked about, in the words of what found it.

    `box` is an object's as its record holds it, without room around it; `pad` is that room, as a share of the box's
    own width and height. `of` is the id of the record, or of an annotation, and `index` the object's place in it, from
    0. `label` is what the object is called.
    """

    box: Box
    label: str
    of: str
    index: int
    pad: float = 0.0


TILED_TASKS = frozenset({Task.DETECT, Task.POINT})
AUTO_TILES = "auto"
MIN_TILE_PX, MOST_TILE_PX = 378, 2**20  # a crop of the real model; no picture has a longer side


@dataclass(frozen=True, slots=True)
class Tiles:
    """A picture looked at in overlapping squares, too: `size` is a side in pixels or `auto`, `overlap` in [0, 1).

    Raises:
        ValueError: they are not.
    """

    size: int | str
    overlap: float = 0.2

    def __post_init__(self) -> None:
        """Check what may have been written by anybody."""
        is_side = type(self.size) is int and MIN_TILE_PX <= self.size <= MOST_TILE_PX
        if not is_side and self.size != AUTO_TILES:
            size = printable(repr(self.size))[:60]
            raise ValueError(f"{size} is no tile; write auto, or its side in pixels, at least {MIN_TILE_PX}")
        if type(self.overlap) not in (int, float) or not 0 <= self.overlap < 1:
            raise ValueError(f"an overlap of {printable(repr(self.overlap))[:60]}; it is from 0 to less than 1")


@dataclass(frozen=True, slots=True)
class Request:
    """One question to one image, with every setting that can change the answer.

    `spatial_refs` holds points (x, y) and boxes (x_min, y_min, x_max, y_max), 0-1.
    `temperature` 0 is greedy. `length` counts for captions only; `reasoning` and `choices` (the only
    answers allowed; none allow all) count for queries only. `region` None asks about the whole picture; `tiles` count
    for detect and point only.
    """

    task: Task
    prompt: str | None = None
    length: str = "normal"
    reasoning: bool = True
    spatial_refs: tuple[tuple[float, ...], ...] = ()
    max_tokens: int = 768
    max_objects: int = 150
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0
    choices: tuple[str, ...] = ()
    tiles: Tiles | None = None
    region: Region | None = None


_SELDOM = ("tiles", "region")  # fields of a request that are left out where they are not used


def request_fields(request: Request) -> dict[str, Any]:
    """Return a request as JSON can hold it, without what it does not use."""
    found = asdict(request)
    for name in _SELDOM:
        if found[name] is None:
            del found[name]
    return found


def id_fields(request: Request) -> dict[str, Any]:
    """Return what of a request its id depends on: how a part of a picture is called is not of it."""
    found = request_fields(request)
    if request.region is not None:
        del found["region"]["label"]
    return found


@dataclass(slots=True, unsafe_hash=True)  # not frozen, though never changed: that takes four times as long to make
class ImageItem:
    """A picture to open: a file, or `size` bytes at `offset` of one (a member of a tar).

    With `row_group` it is the cell of a Parquet file's column `column`, at row `offset` of that row group. `path` may
    be an address (`s3://...`), which has to be fetched, and may carry surrogate escapes, as `os.fsdecode` makes them.

    `name` is the record's `image`: relative to INPUT's root, with `/`, always valid UTF-8. `name_b64` holds the exact
    bytes where the real name is not UTF-8.
    """

    name: str
    path: str
    name_b64: str | None = None
    offset: int = 0
    size: int | None = None
    row_group: int | None = None
    column: str = "image"


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why there is no answer: the `error` of a record."""

    type: str
    message: str

    def __post_init__(self) -> None:
        assert self.type in ERROR_TYPES, self.type


@dataclass(frozen=True, slots=True)
class Job:
    """One request for the engine; jobs whose images have the same `sha256` share one encoding.

    `image` None is a text-only query. `key` is the caller's, and comes back with the answer.
    """

    key: int
    image: PreparedImage | EncodedImage | None
    request: Request


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine made of a job: `result` holds the record's result keys, or `failure` says why there are none.

    `num_tiles` is how many tiles a picture was looked at in, without the whole picture.
    """

    key: int
    result: dict[str, Any] | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    output_tokens: int = 0
    failure: RowFailure | None = None
    num_tiles: int | None = None


@dataclass(slots=True, unsafe_hash=True)  # not frozen, though never changed: that takes four times as long to make
class SourceRow:
    """One picture of INPUT with all that is asked of it, in input order.

    `image` None is a text-only query. A row with `failure` (a manifest line that cannot be read, a path outside the
    root) becomes one error record, and nothing is opened. `typed` has the template of each prompt that was filled from
    the row and that names depend on; `refused` says of each prompt that could not be filled why. `then` is asked about
    each object that is found, its prompts with `{label}` in them.
    """

    image: ImageItem | None
    requests: tuple[Request, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    failure: RowFailure | None = None
    typed: Mapping[str, str] | None = None
    refused: Mapping[str, str] | None = None
    then: tuple[Request, ...] = ()

    @property
    def fit_requests(self) -> tuple[Request, ...]:
        """The requests that can be asked; none of a row with a failure."""
        if self.failure is not None:
            return ()
        refused = self.refused
        return self.requests if not refused else tuple(r for r in self.requests if r.prompt not in refused)

    @property
    def id_name(self) -> str | None:
        """The picture's name in ids; None is a text-only query."""
        return id_name(self.image.name, self.image.name_b64) if self.image is not None else None


def id_name(name: str, name_b64: object = None) -> str:
    """Return what ids call the picture that a record calls `name`, with `name_b64` as its `image_b64`."""
    # A name that is not UTF-8 is shown with escapes, which may be another file's real name. So the exact bytes are
    # part of it there, behind a half character, which no real name holds.
    return name if name_b64 is None else f"{name}\udc00{name_b64}"


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The settings of a run that are part of every record's id, as they were given (`auto` stays `auto`)."""

    model: str  # "moondream/moondream3-preview@<revision>", as the record shows it
    dtype: str = "auto"
    quant: str = "stored"
    adapter: str = ""
    background: str = "none"

    def id_parts(self) -> dict[str, str]:
        """Return what ids depend on."""
        return asdict(self) | {"model": self.model.rpartition("@")[2]}  # the same weights may lie under any name


ID_DIGITS = 32
ID_SCHEME = 1  # rises when `request_id` gives a request another id: records of two schemes must not be mixed


def request_id(image: str | None, request: Request, run: RunIdentity, repeat: int | str = 0) -> str:
    """Return the stable id of a request: 32 hex digits of a SHA-256.

    `image` is what `id_name` returns; None is a text-only query. `repeat` is k for the k-th repeat of the same request
    in a run, from 0; or the id of the list that names what is asked.
    """
    parts = [image, id_fields(request), run.id_parts(), repeat]
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]


def is_annotation_id(text: str) -> bool:
    """Return whether a text is a number, as annotations of COCO have for an id, and no id of a record."""
    return text.isdecimal() and len(text) < ID_DIGITS


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of a decoded picture: its upright size in pixels, and the file's digest."""

    width: int
    height: int
    sha256: str


def make_record(
    record_id: str,
    image: ImageItem | None,
    facts: ImageFacts | None,
    request: Request,
    run: RunIdentity,
    answer: Answer,
    meta: Mapping[str, Any],
) -> RecordDict:
    """Return the record of `answer`; one that failed has no result keys, and `error` says why.

    `facts` None means that no picture was decoded.
    """
    result = answer.result or {}
    failure = answer.failure
    if failure is None and answer.result is None:
        failure = RowFailure("model", "the model gave no answer")
    record: RecordDict = {"schema": SCHEMA, "id": record_id, "image": image.name if image else None}
    if image is not None and image.name_b64 is not None:
        record["image_b64"] = image.name_b64
    if facts is not None:
        record["width"], record["height"] = facts.width, facts.height
    record["task"], record["prompt"] = str(request.task), request.prompt
    if request.region is not None:
        record["region"] = region_fields(request.region)
    if failure is None:
        record |= {"length": request.length} if request.task is Task.CAPTION else {}
        record |= result
    if facts is not None:
        record["sha256"] = facts.sha256
    if failure is None:
        record["finish_reason"] = answer.finish_reason
        record["tokens"] = {"prompt": answer.prompt_tokens, "output": answer.output_tokens}
        if answer.num_tiles is not None and request.tiles is not None:
            record["tiles"] = asdict(request.tiles) | {"count": answer.num_tiles}
    record["model"] = run.model
    record["meta"] = dict(meta)
    record["error"] = None if failure is None else _error_of(failure)
    return record


def region_fields(region: Region) -> dict[str, Any]:
    """Return a part of a picture as its record holds it."""
    return region.box._asdict() | {"label": region.label, "of": region.of, "index": region.index}


def _error_of(failure: RowFailure) -> dict[str, Any]:
    message = printable(failure.message)[:MESSAGE_LIMIT_CHARS]
    return {"type": failure.type, "message": message, "retry": failure.type in RETRYABLE}


def compact_json(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8, without blanks.

    A lone surrogate has no UTF-8; it becomes `?` rather than a line that other readers refuse.

    Raises:
        ValueError: it holds NaN or infinity, which JSON does not have.
    """
    return _ENCODER.encode(value).encode("utf-8", "replace")


def strict_json(line: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no key twice, no NaN, no number that is infinite, no half character.

    Raises:
        ValueError, RecursionError: it is not that.
    """
    text = line.decode()
    value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=_finite)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raises ValueError for a key that comes twice, for nobody knows which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{printable(twice)[:100]}' comes twice")
    return found


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and infinities, which JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number too large")
    return value


def counted(count: int, one: str, many: str) -> str:
    """Return a count of things as a person says it: `1 point was`, `1,204 points were`."""
    return f"1 {one}" if count == 1 else f"{count:,} {many}"


def is_printable(char: str) -> bool:
    """Return False for what no terminal or XML may get: C0, DEL, C1, surrogates, bidi and line controls, U+FFFE/F."""
    code = ord(char)
    if code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code <= 0xDFFF:
        return False
    if code in (0x061C, 0x180E, 0xFEFF, 0xFFFE, 0xFFFF) or 0xFFF9 <= code <= 0xFFFB:
        return False
    return not (0x200B <= code <= 0x200F or 0x2028 <= code <= 0x202E or 0x2060 <= code <= 0x206F)


def are_printable(text: str) -> bool:
    """Return whether all characters of a text are `is_printable`."""
    return (text.isascii() and text.isprintable()) or all(map(is_printable, text))


def printable(text: str) -> str:
    """Return `text` with everything that could steer a terminal shown as `\\xNN` or `\\uNNNN`."""
    # Zero-width joiners inside emoji are escaped too: rather ugly than steered.
    if are_printable(text):
        return text
    return "".join(c if is_printable(c) else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" for c in text)
