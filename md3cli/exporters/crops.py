"""Crops: a JPEG file for each box, in a folder for each label, and a table that says where each was cut out.

`LABEL/STEM_N.jpg`: label and stem in plain letters, unique without case; N counts the label's boxes on the picture,
from 0. Boxes are those of detect and of segments, with `--pad` around them; a point has no extent. A picture is opened
once for all its crops, and each is written as it is cut, so that memory holds one for each thread. `crops.csv` tells of
each file the record it comes of, the number of the object there, and its pixels in the upright picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from md3cli.errors import ImageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.at_once import holding, in_order
from md3cli.exporters.files import staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.names import Names, stem_of
from md3cli.exporters.objects import label_of
from md3cli.exporters.pictures import FoundPicture, Pictures, as_seen
from md3cli.exporters.redrawn import JPEG_SIDE_PX, encoded, found_pictures
from md3cli.exporters.table import Table
from md3cli.images.rects import PixelRect, padded_rect
from md3cli.records import RecordDict, counted
from md3cli.refine.collection import Collection

TABLE = "crops.csv"
COLUMNS = ("file", "label", "image", "id", "index", "x_min", "y_min", "x_max", "y_max")
JPEG_QUALITY = 95


class Crop(NamedTuple):
    """A box that was cut out: its file, its label, its record and its number there, and its pixels."""

    file: str
    label: str
    record: RecordDict
    number: int
    rect: PixelRect

    @property
    def row(self) -> list[Any]:
        """Return what the table says of it."""
        return [self.file, self.label, self.record["image"], self.record.get("id"), self.number, *self.rect]


class Cut(NamedTuple):
    """What became of a picture: its crops, of how many boxes; `crops` is None where it cannot be read."""

    group: ImageGroup
    crops: list[Crop] | None
    num_boxes: int = 0


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write a file for each box of detect and segment records."""
    records, options = replace(records, is_numbered=True), as_seen(records, options)
    pictures = Pictures(records, options)
    pictures.require_root("crops")
    counts: Counter[str] = Counter()
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="crops") as folder,
        folder.create([PurePosixPath(TABLE)])[0] as file,
    ):
        survey, table = index.survey, Table(file, COLUMNS)
        folders, stems = _folders(survey.in_order()), Names(is_flat=True)
        todo = (
            (group, picture, stems.claimed(stem_of(group.file_name)))
            for group, picture in found_pictures(_with_boxes(index.images(), counts), pictures, out)
        )

        def work(one: tuple[ImageGroup, FoundPicture, str]) -> Cut:
            return _cut(*one, pictures, folders, folder.path, options.pad or 0.0)

        for cut in in_order(work, todo):
            if cut.crops is None:
                pictures.note_unreadable(cut.group.name)
                continue
            counts["images"] += bool(cut.crops)
            counts["crops"] += len(cut.crops)
            counts["left out"] += cut.num_boxes - len(cut.crops)
            for crop in cut.crops:
                table.write(crop.row)
        table.end()
    notes = (*survey.notes(), *survey.part_notes(have_place=False), *pictures.notes(), *_notes(counts))
    return ExportReport("crops", out, survey.num_records, counts["images"], survey.num_failures, notes)


def _folders(labels: Iterable[str]) -> Mapping[str, str]:
    """Return the folder of each label."""
    names = Names(is_flat=True)
    names.claimed(TABLE)  # stands beside them
    return {label: names.claimed(label) for label in labels}


def _with_boxes(groups: Iterable[ImageGroup], counts: Counter[str]) -> Iterator[ImageGroup]:
    """Yield the images with something to cut out: no other needs to be found or opened."""
    for group in groups:
        counts["points"] += sum(len(record.get("points") or ()) for record in group.records)
        if any(record.get("objects") or record.get("segments") for record in group.records):
            yield group


def _cut(
    group: ImageGroup,
    picture: FoundPicture,
    stem: str,
    pictures: Pictures,
    folders: Mapping[str, str],
    folder: Path,
    pad: float,
) -> Cut:
    """Cut all boxes of a picture out of it, and write them."""
    crops, num_boxes, numbers = list[Crop](), 0, Counter[str]()
    with holding(group.width, group.height):
        try:
            image = pictures.read(picture)
        except ImageError:
            return Cut(group, None)
        for record, thing, box in _boxes(group):
            num_boxes += 1
            # Another file may stand there now: boxes are shares, so they scale with it, as in overlays.
            rect = padded_rect(box, image.width, image.height, pad)
            if rect is None or max(rect.width, rect.height) > JPEG_SIDE_PX:
                continue
            label = label_of(thing, record)
            name = f"{folders[label]}/{stem}_{numbers[label]}.jpg"
            numbers[label] += 1
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(encoded(image.crop(rect), JPEG_QUALITY))
            crops.append(Crop(name, label, record, int(thing["index"]), rect))
    return Cut(group, crops, num_boxes)


def _boxes(group: ImageGroup) -> Iterator[tuple[RecordDict, Mapping[str, Any], Mapping[str, float]]]:
    """Yield (record, what was found, its box) of all boxes and segments of an image."""
    for record in group.records:
        yield from ((record, thing, thing) for thing in record.get("objects") or ())
        yield from ((record, thing, thing["bbox"]) for thing in record.get("segments") or ())


def _notes(counts: Counter[str]) -> Iterator[str]:
    if not counts["crops"]:
        yield "the records hold no boxes to cut out"
    if counts["points"]:
        yield f"{counted(counts['points'], 'point was', 'points were')} left out: a point has no extent to cut out"
    if counts["left out"]:
        yield (
            f"{counts['left out']:,} boxes were left out: nothing of them is inside the picture, or they are larger "
            f"than the {JPEG_SIDE_PX:,} pixels of a JPEG"
        )
