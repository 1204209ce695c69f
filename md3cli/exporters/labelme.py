"""labelme and X-AnyLabeling: a JSON for each image, beside its picture; a folder of both, or beside the user's own.

Both programs take the JSON of a picture by its name without suffix. So where `a.jpg` and `a.png` would share one, the
second is `a.png.json`, and its copy `a.png.png`. Beside the user's pictures nothing is renamed: such a JSON is opened
itself. A box is a rectangle of two points, a mask a polygon, a point a point, in pixels of the upright picture, as
labelme shows it; what is said about it is the shape's `description`, and its `attributes` in X-AnyLabeling.
X-AnyLabeling shows pictures as they are stored, so copies are stored upright. `score`, and of the image `description`
and `chat_history`, are X-AnyLabeling's; labelme keeps them.
Source: the loaders of labelme 5.11 and 6.3 and of X-AnyLabeling 4.2 (`label_file.py` in both, `shape.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.beside import BesidePictures
from md3cli.exporters.copies import USUAL, Copy, copied, missing_notes
from md3cli.exporters.files import StagedFolder, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.names import Names, beside_pictures, suffix_in
from md3cli.exporters.objects import NO_TEXTS, Ring, Texts, joined_ring
from md3cli.exporters.pictures import Pictures
from md3cli.records import counted, printable
from md3cli.refine.collection import Collection

KINDS = replace(  # labelme 6.3 stops at these
    USUAL, not_opened=frozenset({("JPEG", "CMYK"), ("PNG", "I;16"), ("PNG", "I"), ("BMP", "P"), ("TIFF", "P")})
)
VERSION = "5.11.4"  # of labelme, whose keys these are; 6 reads them, too


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one JSON for each image, in a folder with the pictures, or with `beside` next to the user's own.

    Raises:
        UsageError: `existing` joins texts; or a file stands there, and the user did not say what becomes of it.
    """
    if options.existing in ("append", "prepend"):
        raise UsageError(f"--existing {options.existing} is for texts; labelme takes refuse, skip or replace")
    if options.beside:
        return _export_beside(records, options)
    pictures, names = Pictures(records, options), Names(is_flat=False, fitted=beside_pictures)
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="labelme") as folder,
    ):
        documented = _documented(index, folder, names, pictures, out)
        num_images = sum(1 for _ in copied(documented, pictures, KINDS, are_upright=True))
    survey = index.survey
    notes = (*survey.notes(), *survey.part_notes(have_place=True), *missing_notes(pictures, "beside the JSON files"))
    return ExportReport("labelme", out, survey.num_records, num_images, survey.num_failures, tuple(notes))


def _documented(index: ImageIndex, folder: StagedFolder, names: Names, pictures: Pictures, out: Path) -> Iterator[Copy]:
    """Write the JSON of each image, and yield where its picture belongs."""
    for group in index.images():
        file, name = folder.create(names.about(group.file_name, ".json"))
        image = name.with_name(name.stem + KINDS.suffix_of(group.name))
        with file:
            file.write(_document(group, image.name))
        yield Copy.of(group, str(folder.path), str(image), pictures=pictures, out=out)


def _export_beside(records: Collection, options: ExportOptions) -> ExportReport:
    """Write the JSON files next to the pictures, which stay as they are; nothing at all where one is refused."""
    num_strange = 0
    with (
        closing(ImageIndex(records)) as index,
        closing(BesidePictures(records, options, "labelme", ".json")) as beside,
    ):
        for group in index.images():
            beside.add(group, partial(_document, group))
            num_strange += suffix_in(group.name).lower() in KINDS.remade
        beside.write()
        survey, notes = (
            index.survey,
            [*index.survey.notes(), *index.survey.part_notes(have_place=True), *beside.notes()],
        )
        if num_strange:
            notes.append(
                f"{counted(num_strange, 'picture is', 'pictures are')} GIF, AVIF or HEIC, which labelme may not open; "
                "with -o they are PNG"
            )
        num_images = beside.pictures.num_found
        return ExportReport("labelme", beside.root, survey.num_records, num_images, survey.num_failures, tuple(notes))


def _document(group: ImageGroup, image: str) -> bytes:
    """Return the JSON of an image; `image` is the picture's path from there."""
    document: dict[str, Any] = {
        "version": VERSION,
        "flags": {},
        "shapes": [*_shapes(group)],
        "imagePath": image,
        "imageData": None,
        "imageHeight": group.height,
        "imageWidth": group.width,
    }
    if captions := group.captions():
        document["description"] = "\n".join(captions)
    if answers := group.answers():
        document["chat_history"] = [*_chat(answers)]
    # A name that is not UTF-8 has surrogates, which JSON holds as escapes and Python's readers turn back.
    is_utf8 = not any("\ud800" <= char <= "\udfff" for char in image)
    text = json.dumps(document, ensure_ascii=not is_utf8, indent=2)
    return text.encode("utf-8", "replace") + b"\n"


def _shapes(group: ImageGroup) -> Iterator[dict[str, Any]]:
    for box in group.told_boxes():
        corners = [(box.x, box.y), (box.x + box.width, box.y + box.height)]
        yield _shape("rectangle", corners, box.label, box.score, box.texts)
    for segment in group.segments():
        yield _shape("polygon", joined_ring(segment.rings), segment.box.label, segment.box.score, segment.box.texts)
    for point in group.points():
        yield _shape("point", [(point.x, point.y)], point.label, point.score)


def _shape(kind: str, points: Ring, label: str, score: float | None, texts: Texts = NO_TEXTS) -> dict[str, Any]:
    return {
        "label": printable(label),
        **({} if score is None else {"score": score}),
        "points": [[round(x, 2), round(y, 2)] for x, y in points],
        "group_id": None,
        "description": "\n".join(f"{question}: {text}" for question, text in texts.items()),
        "shape_type": kind,
        "flags": {},
        "mask": None,
        **({"attributes": dict(texts)} if texts else {}),
    }


def _chat(answers: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for question, answer in answers:
        yield {"role": "user", "content": question, "image": None}
        yield {"role": "assistant", "content": answer, "image": None}
