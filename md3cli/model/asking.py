"""What a Python caller hands in, read and checked: pictures, settings, request mappings."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from md3cli.errors import RequestError, RowError
from md3cli.images import CropConfig, PreparedImage, cut_crops
from md3cli.model.tasks import Answer, EncodedImage
from md3cli.records import (
    ImageFacts,
    ImageItem,
    RecordDict,
    Request,
    RunIdentity,
    Task,
    make_error_record,
    make_record,
    request_id,
)
from md3cli.row_requests import ROW_COLUMNS, read_setting, refused_request

ImageLike = Image.Image | EncodedImage | str | Path
SpatialRefs = Iterable[Iterable[float]]
SETTINGS = ("temperature", "top_p", "max_tokens", "max_objects", "seed")
KNOWN_KEYS = ROW_COLUMNS | {"name", "meta", "choices"}


class Asked:
    """What a record needs of its request, kept while the request is in flight.

    Keys of the mapping that mean nothing here come back in the record's `meta`, as a manifest's columns do.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        image = row.get("image")
        path = str(image) if isinstance(image, (str, Path)) else ""
        name = row.get("name") or path
        self.item = None if image is None or image == "" else ImageItem(str(name), path)
        meta = row.get("meta")
        others = {key: value for key, value in row.items() if key not in KNOWN_KEYS}
        self.meta: Mapping[str, Any] = others | dict(meta) if isinstance(meta, Mapping) else others
        self.request = refused_request(row, Request(Task.QUERY))
        self.facts: ImageFacts | None = None

    def record(self, answer: Answer, run: RunIdentity, repeats: Counter[str]) -> RecordDict:
        """The record of `answer`; `repeats` counts requests seen, so that a repeated one has an id of its own."""
        name = self.item.name if self.item is not None else None
        first_id = request_id(name, self.request, run)
        record_id = request_id(name, self.request, run, repeats[first_id])
        repeats[first_id] += 1
        if answer.failure is not None or answer.result is None:
            assert answer.failure is not None
            return make_error_record(
                record_id, self.item, self.facts, self.request, run, failure=answer.failure, meta=self.meta
            )
        return make_record(
            record_id,
            self.item,
            self.facts,
            self.request,
            run,
            result=answer.result,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            meta=self.meta,
        )


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
    return {name: _checked(name, value) for name, value in given.items()}


def read_refs(refs: SpatialRefs | None) -> tuple[tuple[float, ...], ...]:
    """Points and boxes, 0-1, from any numbers that can be iterated over.

    Raises:
        RequestError: they are something else, or out of range.
    """
    try:
        numbers = [[float(number) for number in ref] for ref in refs or ()]
    except (TypeError, ValueError) as error:
        raise RequestError(f"spatial_refs are {refs!r:.60}, expected points [x, y] and boxes") from error
    return _checked("spatial_refs", numbers)  # type: ignore[no-any-return]


def read_prompt(prompt: object) -> str | None:
    """A question or the name of an object.

    Raises:
        RequestError: it is no text.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(f"prompt is {prompt!r:.60}, expected text")
    return prompt


def read_request(row: Mapping[str, Any]) -> Request:
    """A request mapping of `annotate` as a `Request`; None and empty text stand for the default.

    Raises:
        RequestError: a value of the wrong type or out of range.
    """
    given = {
        key: value for key, value in row.items() if value is not None and not (isinstance(value, str) and not value)
    }
    try:
        task = Task(given.get("task", ""))
    except ValueError as error:
        raise RequestError(f"task is {row.get('task')!r:.60}, expected one of {', '.join(Task)}") from error
    choices = given.get("choices", ())
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise RequestError(f"choices are {choices!r:.60}, expected a list of texts")
    return Request(
        task,
        read_prompt(given.get("prompt")),
        length=_checked("length", given.get("length", "normal")),
        reasoning=_checked("reasoning", given.get("reasoning", True)),
        spatial_refs=read_refs(given.get("spatial_refs")),
        choices=tuple(choices),
        **read_settings({name: given[name] for name in SETTINGS if name in given}),
    )


def _checked(name: str, value: Any) -> Any:
    try:
        return read_setting(name, value)
    except RowError as error:
        raise RequestError(str(error)) from error
