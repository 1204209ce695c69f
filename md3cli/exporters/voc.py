"""Pascal VOC: `Annotations/<image>.xml`, `JPEGImages/<image>`, the sets' lists in `ImageSets/Main/`, `labelmap.txt`.

Pixels count from 1 and both corners belong to the box, as in the VOC development kit: readers subtract 1 from the first
corner only. A mask gives its box. CVAT and datumaro want the lists, of names without suffix (`default.txt` where there
is one set), and the label map, whose lines are `name:red,green,blue::`; so a name has no colon and no `#` in front.
FiftyOne reads the folder with `data_path="JPEGImages", labels_path="Annotations"`.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path, PurePosixPath

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.copies import USUAL, Copy, copied, missing_notes
from md3cli.exporters.files import StagedFolder, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.names import Names, beside_pictures
from md3cli.exporters.objects import PixelBox
from md3cli.exporters.palette import palette
from md3cli.exporters.pictures import Pictures
from md3cli.exporters.splits import Sets
from md3cli.records import counted, printable
from md3cli.refine.collection import Collection

_DEFAULT_LIST = "default"  # as CVAT calls it
_NOT_IN_LISTS = re.compile(r"\A[\s#]+|\s+(?=\.xml\Z)")


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one XML file for each image, and copy the picture if it is there."""
    pictures, sets = Pictures(records, options), Sets(options.splits)
    num_points = 0
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="voc") as folder,
        ExitStack() as lists,
    ):
        survey = index.survey
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder.path / name).mkdir(parents=True)
        main = folder.path / "ImageSets/Main"
        listed = {
            name: lists.enter_context((main / f"{name or _DEFAULT_LIST}.txt").open("x", encoding="utf-8", newline="\n"))
            for name in sets.names
        }
        labels = {label: _label(label) for label in survey.categories()}
        names = Names(is_flat=options.is_flat, fitted=_fitted)

        def annotated() -> Iterator[Copy]:
            for group in index.images():
                stem = _annotate(folder, group, names, labels)
                listed[sets.add(group.name, group.records)].write(f"{stem}\n")
                name = stem + USUAL.suffix_of(group.name)
                yield Copy.of(group, f"{folder.path}/JPEGImages", name, pictures=pictures, out=out)

        for copy, _ in copied(annotated(), pictures, USUAL, are_upright=options.is_flat):
            num_points += sum(1 for _ in copy.group.points())
        (folder.path / "labelmap.txt").write_text(_label_map(labels), encoding="utf-8", newline="\n")
        notes_of_sets = [*sets.notes()]  # refuses sets before they are OUT
    notes = [*survey.notes(), *survey.part_notes(have_place=False), *missing_notes(pictures)]
    if num_points:
        notes.append(f"{counted(num_points, 'point was', 'points were')} left out: Pascal VOC has no place for them")
    if changed := [printable(label) for label, name in labels.items() if label != name]:
        notes.append(f"labels that a label map cannot hold were changed: {', '.join(changed)}")
    notes += notes_of_sets
    return ExportReport("voc", out, survey.num_records, sets.counts.total(), survey.num_failures, tuple(notes))


def _annotate(folder: StagedFolder, group: ImageGroup, names: Names, labels: dict[str, str]) -> str:
    """Write the XML of an image, and return its name without suffix, as the lists have it."""
    inside = (PurePosixPath("Annotations") / name for name in names.of(group.file_name, ".xml"))
    file, path = folder.create(inside)
    stem = path.relative_to("Annotations").with_suffix("")
    with file:
        file.write(_document(group, stem.with_name(stem.name + USUAL.suffix_of(group.name)), labels))
    return str(stem)


def _fitted(name: PurePosixPath) -> PurePosixPath:
    """Return `name` as a line of the lists can hold it: readers strip lines, and skip those that begin with `#`."""
    return PurePosixPath(_NOT_IN_LISTS.sub(lambda found: "_" * len(found[0]), str(beside_pictures(name))))


def _label(label: str) -> str:
    """Return a label as a line of `labelmap.txt` can hold it."""
    name = printable(label).replace(":", "_").strip()
    return f"_{name[1:]}" if name.startswith("#") else name


def _label_map(labels: dict[str, str]) -> str:
    colours = palette(list(labels))
    shown = {name: colours[label].colour for label, name in labels.items()}  # a name twice is refused
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in shown.items()]
    background = [] if "background" in shown else ["background:0,0,0::"]
    return "\n".join(["# label:color_rgb:parts:actions", *background, *lines, ""])


def _document(group: ImageGroup, name: PurePosixPath, labels: dict[str, str]) -> bytes:
    root = ET.Element("annotation")
    _add(root, "folder", "" if str(name.parent) == "." else str(name.parent))
    # With its folders, as CVAT writes it: datumaro looks for the last part alone on top, where another picture may be.
    _add(root, "filename", str(name))
    size = _add(root, "size")
    for tag, pixels in (("width", group.width), ("height", group.height), ("depth", 3)):
        _add(size, tag, str(pixels))
    _add(root, "segmented", "0")
    for box in (*group.boxes(), *(segment.box for segment in group.segments())):
        _add_object(root, box, labels[box.label], group.width, group.height)
    ET.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode").encode() + b"\n"


def _add_object(root: ET.Element, box: PixelBox, label: str, width: int, height: int) -> None:
    found = _add(root, "object")
    _add(found, "name", label)
    _add(found, "pose", "Unspecified")
    _add(found, "truncated", str(int(box.is_truncated)))
    _add(found, "difficult", "0")
    corners = _add(found, "bndbox")
    left, right = _pixels(box.x, box.x + box.width, width)
    top, bottom = _pixels(box.y, box.y + box.height, height)
    for tag, pixel in (("xmin", left), ("ymin", top), ("xmax", right), ("ymax", bottom)):
        _add(corners, tag, str(pixel))


def _pixels(start: float, end: float, size: int) -> tuple[int, int]:
    """Return first and last pixel of a stretch, counted from 1; a stretch thinner than a pixel keeps one.

    The first is rounded down: labelformat, globox and datumaro do not subtract 1 from it, and stay within a pixel so.
    """
    first = min(math.floor(start + 1e-6), size - 1)  # 0.1 * 120 is whole, whatever its last bits say
    return first + 1, max(round(end), first + 1)


def _add(parent: ET.Element, tag: str, text: str | None = None) -> ET.Element:
    child = ET.SubElement(parent, tag)
    child.text = None if text is None else printable(text)  # XML has no way to write most control characters
    return child
