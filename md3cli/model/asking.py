"""What a Python caller hands in, read and checked: pictures, settings, request mappings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from md3cli.errors import RequestError
from md3cli.images import CropConfig, PreparedImage, cut_crops
from md3cli.model.tasks import Answer, EncodedImage
from md3cli.records import CAPTION_LENGTHS, ImageFacts, ImageItem, Request, Task

ImageLike = Image.Image | EncodedImage | str | Path
SpatialRefs = Iterable[Iterable[float]]
SETTINGS = ("temperature", "top_p", "max_tokens", "max_objects", "seed")


class Asked:
    """What a record needs of its request, kept while the request is in flight."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        image = row.get("image")
        name = row.get("name") or (str(image) if isinstance(image, (str, Path)) else "")
        self.item = None if image is None else ImageItem(name, str(image) if isinstance(image, (str, Path)) else "")
        self.meta: Mapping[str, Any] = row.get("meta") or {}
        self.request = Request(Task.QUERY)
        self.facts: ImageFacts | None = None


def prepare_pil(image: Image.Image, config: CropConfig) -> PreparedImage:
    """A picture in memory, as it is; its digest is of the pixels."""
    rgb = image.convert("RGB")
    crops = cut_crops(rgb, config)
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()
    return PreparedImage(crops.pixels, crops.tiling, rgb.width, rgb.height, digest)


def result_of(answer: Answer) -> dict[str, Any]:
    if answer.failure is not None:
        raise RequestError(answer.failure.message, answer.failure.type)
    assert answer.result is not None
    return answer.result


def read_settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings as `Request` fields.

    Raises:
        RequestError: an unknown name or a value out of range.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    unknown = [name for name in given if name not in SETTINGS]
    if unknown:
        raise RequestError(f"settings: unknown {', '.join(unknown)}; known are {', '.join(SETTINGS)}")
    for name in ("max_tokens", "max_objects"):
        if name in given and (isinstance(given[name], bool) or not isinstance(given[name], int) or given[name] < 1):
            raise RequestError(f"settings: {name} is {given[name]!r}, expected a whole number from 1")
    if "temperature" in given and not 0 <= given["temperature"] < float("inf"):
        raise RequestError(f"settings: temperature is {given['temperature']!r}, expected 0 or more")
    if "top_p" in given and not 0 < given["top_p"] <= 1:
        raise RequestError(f"settings: top_p is {given['top_p']!r}, expected more than 0 and at most 1")
    return given


def read_refs(refs: SpatialRefs | None) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(ref) for ref in refs or ())


def read_request(row: Mapping[str, Any]) -> Request:
    """A request mapping of `annotate` as a `Request`."""
    try:
        task = Task(row.get("task", ""))
    except ValueError as error:
        raise RequestError(f"task is {row.get('task')!r}, expected one of {', '.join(Task)}") from error
    length = row.get("length", "normal")
    if length not in CAPTION_LENGTHS:
        raise RequestError(f"length is {length!r}, expected one of {', '.join(CAPTION_LENGTHS)}")
    settings = {name: row[name] for name in SETTINGS if name in row}
    return Request(
        task,
        row.get("prompt"),
        length=length,
        reasoning=bool(row.get("reasoning", True)),
        spatial_refs=read_refs(row.get("spatial_refs")),
        choices=tuple(row.get("choices") or ()),
        **read_settings(settings),
    )
