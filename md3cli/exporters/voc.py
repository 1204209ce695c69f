"""Pascal VOC: `Annotations/<image>.xml`, one for each image, sub-folders kept.

Pixels count from 1 and both corners belong to the box, as in the VOC development kit: readers
subtract 1 from the first corner only. A mask gives its box.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path, PurePosixPath

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import candidates, relative_name, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.objects import PixelBox
from md3cli.records import printable
from md3cli.refine.collection import Collection


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one XML file for each image."""
    num_images = num_points = 0
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="voc") as folder,
    ):
        survey = index.survey
        (folder.path / "Annotations").mkdir()
        for group in index.images():
            names = (PurePosixPath("Annotations") / name for name in candidates(group.file_name, ".xml"))
            file, _ = folder.create(names)
            with file:
                file.write(_document(group))
            num_points += sum(1 for _ in group.points())
            num_images += 1
    notes = [*survey.notes()]
    if num_points:
        notes.append(f"{num_points} points were left out: Pascal VOC has no place for them")
    return ExportReport("voc", out, survey.num_records, num_images, survey.num_failures, tuple(notes))


def _document(group: ImageGroup) -> bytes:
    name = relative_name(group.name)
    root = ET.Element("annotation")
    _add(root, "folder", "" if str(name.parent) == "." else str(name.parent))
    _add(root, "filename", name.name)
    size = _add(root, "size")
    for tag, pixels in (("width", group.width), ("height", group.height), ("depth", 3)):
        _add(size, tag, str(pixels))
    _add(root, "segmented", "0")
    for box in (*group.boxes(), *(segment.box for segment in group.segments())):
        _add_object(root, box, group.width, group.height)
    ET.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode").encode() + b"\n"


def _add_object(root: ET.Element, box: PixelBox, width: int, height: int) -> None:
    found = _add(root, "object")
    _add(found, "name", box.label)
    _add(found, "pose", "Unspecified")
    _add(found, "truncated", str(int(box.is_truncated)))
    _add(found, "difficult", "0")
    corners = _add(found, "bndbox")
    left, right = _pixels(box.x, box.x + box.width, width)
    top, bottom = _pixels(box.y, box.y + box.height, height)
    for tag, pixel in (("xmin", left), ("ymin", top), ("xmax", right), ("ymax", bottom)):
        _add(corners, tag, str(pixel))


def _pixels(start: float, end: float, size: int) -> tuple[int, int]:
    """Return first and last pixel of a stretch, counted from 1; a stretch thinner than a pixel keeps one."""
    first = min(round(start), size - 1)
    return first + 1, max(round(end), first + 1)


def _add(parent: ET.Element, tag: str, text: str | None = None) -> ET.Element:
    child = ET.SubElement(parent, tag)
    child.text = None if text is None else printable(text)  # XML has no way to write most control characters
    return child
