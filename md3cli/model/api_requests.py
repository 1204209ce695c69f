"""What a Python caller hands in, read and checked: pictures, settings, mappings of requests.

A value that makes no sense is a RequestError that names it in few words, whatever it is; a picture that cannot be read
is an ImageError. Fetches no address, and knows no model.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from md3cli.config import DEFAULT_PAD, MOST_PAD
from md3cli.errors import ImageError, RequestError, RowError
from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage, WholeImage, cut_crops, prepare_image, read_whole
from md3cli.model.engine.generation import EncodedImage
from md3cli.records import (
    TILED_TASKS,
    Answer,
    ImageFacts,
    ImageItem,
    RecordDict,
    Request,
    RunIdentity,
    Task,
    Tiles,
    make_record,
    printable,
    request_id,
)
from md3cli.remote.address import is_address
from md3cli.source.requests import ROW_COLUMNS, read_setting, refused_request
from md3cli.source.specs import are_followed, then_requests

ImageLike = Image.Image | EncodedImage | str | Path | bytes | np.ndarray
SpatialRefs = Iterable[Iterable[float]]
Settings = Mapping[str, Any] | None
SETTINGS = ("temperature", "top_p", "max_tokens", "max_objects", "seed")
_SHOWN_CHARS = 80
_PATH_CHARS = 1024  # what is longer is hardly a path
KNOWN_KEYS = ROW_COLUMNS | {"name", "meta", "choices", "pad", "tile", "overlap"}


@dataclass(slots=True)
class ApiRequest:
    """A request of `annotate` while it is in flight: what its record needs, whatever was given."""

    item: ImageItem | None
    request: Request
    meta: Mapping[str, Any]
    facts: ImageFacts | None = None

    @classmethod
    def of(cls, given: object) -> ApiRequest:
        """Read no more of `given` than an error record needs.

        Keys that mean nothing here come back in the record's `meta`, as a manifest's columns do.
        """
        row = given if isinstance(given, Mapping) else {}
        image, name, meta = row.get("image"), row.get("name"), row.get("meta")
        path = str(image) if isinstance(image, (str, Path)) else ""
        is_absent = image is None or (isinstance(image, str) and not image)
        item = None if is_absent else ImageItem(str(name or path) if isinstance(name, str | Path) else path, path)
        asked = {key: row[key] for key in ("task", "prompt") if isinstance(row.get(key), str)}
        others = {key: value for key, value in row.items() if key not in KNOWN_KEYS}
        others |= dict(meta) if isinstance(meta, Mapping) else {}
        return cls(item, refused_request(asked, Request(Task.QUERY)), others)

    def id_of(self, run: RunIdentity, repeat: int) -> str:
        """Return the id of the request, which was asked `repeat` times before."""
        return request_id(self.item.name if self.item is not None else None, self.request, run, repeat)

    def record(self, answer: Answer, run: RunIdentity, record_id: str) -> RecordDict:
        """Return the record of `answer`."""
        return make_record(record_id, self.item, self.facts, self.request, run, answer, self.meta)


def prepare_picture(image: ImageLike, config: CropConfig, background: str | None) -> PreparedImage:
    """Prepare a picture: a path, the bytes of a file, a PIL image, or an array uint8 [H, W, 3] or [H, W].

    `background` is a colour to lay transparent files on; None drops alpha.

    Raises:
        RequestError: `image` is nothing of these, or an address.
        ImageError: the picture cannot be read.
    """
    if isinstance(image, np.ndarray):
        image = _image_of(image)
    if isinstance(image, Image.Image):
        try:
            return prepare_pil(image, config)
        except Exception as error:  # a file that PIL has opened and not read yet: decoders raise anything
            raise ImageError("decode", f"it cannot be read ({describe_value(error)})") from error
    item, data = _file_of(image)
    return prepare_image(item, config, ImageLimits(), background, data=data)


def whole_picture(image: ImageLike, background: str | None) -> WholeImage:
    """Read a picture of which parts are asked; arguments and errors are those of `prepare_picture`."""
    if isinstance(image, EncodedImage):
        raise RequestError(
            "then and tile ask about parts of the picture, and an encoded one has none; give the picture itself"
        )
    if isinstance(image, np.ndarray):
        image = _image_of(image)
    if isinstance(image, Image.Image):
        try:
            rgb = image.convert("RGB")
            return WholeImage(np.array(rgb), _digest_of(rgb))
        except Exception as error:  # as in prepare_picture
            raise ImageError("decode", f"it cannot be read ({describe_value(error)})") from error
    item, data = _file_of(image)
    return read_whole(item, ImageLimits(), background, data=data)


def _file_of(image: object) -> tuple[ImageItem, bytes | None]:
    """Return the file that a picture is: bytes, or a path.

    Raises:
        RequestError: it is neither, or an address.
        ImageError: it has no bytes.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        if not (data := bytes(image)):
            raise ImageError("empty", "0 bytes")
        return ImageItem("", ""), data
    if not isinstance(image, str | os.PathLike):
        wanted = "a path, the bytes of a file, a PIL image or an array uint8 [H, W, 3]"
        raise RequestError(f"image is {describe_picture(image)}; give {wanted}")
    path = os.fsdecode(image)
    if is_address(path):
        raise RequestError(f"{describe_picture(path)}: no address is fetched here; open the picture, or use md3 itself")
    return ImageItem(path, path), None


def _image_of(array: np.ndarray) -> Image.Image:
    is_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_shape or array.size == 0:
        raise RequestError(f"image is {describe_picture(array)}; expected uint8 [H, W, 3] or [H, W], 0 to 255, RGB")
    return Image.fromarray(np.ascontiguousarray(array))


def describe_picture(image: object) -> str:
    """Describe a picture for a message: a path as it is, anything else by kind and size, never by its contents."""
    if isinstance(image, str | os.PathLike):
        path = os.fsdecode(image)
        if len(path) > _PATH_CHARS:  # a picture as base64 text, most likely
            return f"{printable(path[:_SHOWN_CHARS])}… (text of {len(path):,} characters, taken for a path)"
        return printable(path)
    kind = type(image).__name__
    if isinstance(image, bytes | bytearray | memoryview):
        return f"{kind} of length {len(image):,}"
    if isinstance(image, Image.Image):
        return f"a PIL image ({image.mode}, {image.width} x {image.height})"
    if hasattr(image, "shape") and hasattr(image, "dtype"):
        return f"{kind} ({image.dtype}, {list(image.shape)})"
    return f"a value of the type {kind}"


def prepare_pil(image: Image.Image, config: CropConfig) -> PreparedImage:
    """Prepare a picture in memory, as it is; its digest is that of the pixels."""
    rgb = image.convert("RGB")
    crops = cut_crops(rgb, config)
    return PreparedImage(crops.pixels, crops.tiling, rgb.width, rgb.height, _digest_of(rgb))


def _digest_of(rgb: Image.Image) -> str:
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def read_settings(settings: Settings) -> dict[str, Any]:
    """Read settings as fields of a `Request`.

    Raises:
        RequestError: a name is unknown, or a value makes no sense.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise RequestError(f"settings are {describe_value(settings)}, expected a mapping of {', '.join(SETTINGS)}")
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = [describe_value(name) for name in given if name not in SETTINGS]
    if unknown:
        raise RequestError(f"settings: unknown {', '.join(unknown[:5])}; known are {', '.join(SETTINGS)}")
    return {name: read_argument(name, value) for name, value in given.items()}


def read_refs(refs: SpatialRefs | None) -> tuple[tuple[float, ...], ...]:
    """Read points and boxes, 0-1, from any series of series of numbers."""
    try:
        given = () if refs is None else refs
        numbers = [[n if isinstance(n, bool) else float(n) for n in ref] for ref in given]
    except Exception as error:  # whatever a caller's object does when it is iterated over
        raise RequestError(f"spatial_refs are {describe_value(refs)}, expected points [x, y] and boxes") from error
    return read_argument("spatial_refs", numbers)  # type: ignore[no-any-return]


def read_prompt(name: str, prompt: object) -> str | None:
    """Return a question or the name of an object; `name` is the argument's name, for the message."""
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(f"{name} is {describe_value(prompt)}, expected text")
    return prompt


def read_flag(name: str, value: object) -> bool:
    """Return a flag, true or false, of Python or numpy."""
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{name} is {describe_value(value)}, expected True or False")
    return bool(value)


def describe_value(value: object) -> str:
    """Describe a value that was not expected, in a few printable characters, whatever it is."""
    text = " ".join(reprlib.repr(value).split())  # reprlib's: long values are cut, a class that fails is named
    return printable(f"{type(value).__name__} {text}"[:_SHOWN_CHARS])


def read_request(row: Mapping[str, Any]) -> Request:
    """Read a mapping of `annotate`; None and empty text stand for the default.

    Raises:
        RequestError: it makes no sense.
    """
    if not isinstance(row, Mapping):
        raise RequestError(f"a request is {describe_value(row)}, expected a mapping with image, task and prompt")
    given = {
        key: value for key, value in row.items() if value is not None and not (isinstance(value, str) and not value)
    }
    if not isinstance(given.get("name", ""), str | Path):
        raise RequestError(f"name is {describe_value(given['name'])}, expected text")
    if not isinstance(given.get("meta", {}), Mapping):
        raise RequestError(f"meta is {describe_value(given['meta'])}, expected a mapping")
    task = given.get("task", "")
    if not isinstance(task, str) or task not in tuple(Task):
        raise RequestError(f"task is {describe_value(task)}, expected one of {', '.join(Task)}")
    choices = given.get("choices", ())
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise RequestError(f"choices are {describe_value(choices)}, expected a list of texts")
    return Request(
        Task(task),
        read_prompt("prompt", given.get("prompt")),
        length=read_argument("length", given.get("length", "normal")),
        reasoning=read_flag("reasoning", given.get("reasoning", True)),
        spatial_refs=read_refs(given.get("spatial_refs")),
        choices=tuple(choices),
        **read_settings({name: given[name] for name in SETTINGS if name in given}),
    )


def read_then(value: object, request: Request) -> tuple[Request, ...]:
    """Read what `then` asks about each object that `request` finds: a SPEC, or several; none where it is left out.

    Raises:
        RequestError: it makes no sense, or the request finds no boxes.
    """
    if value is None or (isinstance(value, str) and not value):
        return ()
    if not are_followed([request]):
        raise RequestError(f"then asks about what detect and segment find, and this request is {request.task}")
    try:
        return then_requests(list(value) if isinstance(value, tuple) else value, request)
    except RowError as error:
        raise RequestError(str(error)) from error


def read_pad(value: object) -> float:
    """Read the room around a region, as a share of its width and height, 0 to 10; None is the usual room.

    Raises:
        RequestError: it is no such number.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None:
        return DEFAULT_PAD
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not 0 <= plain <= MOST_PAD:
        raise RequestError(f"pad is {describe_value(value)}, expected a share from 0 to {MOST_PAD:g}")
    return float(plain)


def read_tiles(tile: object, overlap: object, request: Request) -> Tiles | None:
    """Read the tiles in which `request` looks at a picture, too; None where `tile` is left out.

    Args:
        tile: their side in pixels, at least 378, or "auto".
        overlap: the share of a side that neighbours have in common, 0 to less than 1; None is 0.2.

    Raises:
        RequestError: they make no sense, or the request is none of detect and point.
    """
    size, share = (value.item() if isinstance(value, np.generic) else value for value in (tile, overlap))
    if size is None or (isinstance(size, str) and not size):
        if share is not None:
            raise RequestError("overlap is about tiles, and there are none; give tile, too, or leave it out")
        return None
    if request.task not in TILED_TASKS:
        raise RequestError(f"tile is for detect and point, and this request is {request.task}")
    if not isinstance(size, int | str):
        raise RequestError(f'tile is {describe_value(tile)}, expected a number of pixels or "auto"')
    if not isinstance(share, int | float | None):
        raise RequestError(f"overlap is {describe_value(overlap)}, expected a number from 0 to less than 1")
    try:
        tiles = Tiles(size) if share is None else Tiles(size, share)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return replace(tiles, overlap=float(tiles.overlap))  # 0 and 0.0 are one request


def read_argument(name: str, value: Any) -> Any:
    """Read a value of the setting `name` as cells of manifests are read; numpy's numbers are numbers, too."""
    plain = value.item() if isinstance(value, np.generic) else value
    if not isinstance(plain, bool | int | float | str) and name != "spatial_refs":
        raise RequestError(f"{name} is {describe_value(value)}, which no setting takes")
    try:
        return read_setting(name, plain)
    except RowError as error:
        raise RequestError(str(error)) from error
