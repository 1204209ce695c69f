"""CVAT for images 1.1: `annotations.xml`, the pictures under `images/`, and `labels.json` for the task they go into.

CVAT looks for an `<image>`'s picture by its path without suffix; one that it does not know it takes for the frame whose
number is the `id`, silently. So no two names differ in suffix or case alone, and once one picture is there, those that
are not are left out. Boxes are boxes, masks polygons, points points; each has its score as an attribute, which a task
keeps if its labels declare it, as `labels.json` does. Captions and answers are tags of the image with a text; those
about a part are attributes of its shape, called by their questions and declared for its label.
Source: CVAT's loader (`dataset_manager/formats/cvat.py`, `match_dm_item`), its limits from cvat-sdk 2.80.
"""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Container, Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, Any
from xml.sax.saxutils import escape, quoteattr

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.copies import USUAL, Copy, copied
from md3cli.exporters.files import staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex, Survey
from md3cli.exporters.names import Names, beside_pictures
from md3cli.exporters.objects import PixelBox, PixelPoint, Ring, Texts, joined_ring
from md3cli.exporters.palette import palette
from md3cli.exporters.pictures import Pictures
from md3cli.records import printable
from md3cli.refine.collection import Collection

LABEL_CHARS = 64  # CVAT refuses a task with a longer label
TEXT_CHARS = 4096  # and a longer value of an attribute
NAME_CHARS = 64  # and a longer name of one
MOST_QUESTIONS = 100  # of a label: each is a field of CVAT's form for it, and is held in memory
_NOT_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")  # of what may be left in a name (XML 1.0, section 2.2)
_SCORE = {
    "name": "score",
    "mutable": False,
    "input_type": "number",
    "default_value": "1",  # of what a person draws
    "values": ["0", "1", "0.001"],  # least, greatest, step; the raw editor refuses a number that comes twice
}
_TEXT = {"mutable": False, "input_type": "text", "default_value": "", "values": [""]}
_TAGS = {"caption": ("caption", ("text",)), "query": ("answer", ("question", "text"))}  # task -> tag, its attributes


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write annotations that CVAT takes into a task made of OUT's pictures, or of the user's own."""
    pictures = Pictures(records, options)
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="cvat") as folder,
        TemporaryFile(dir=folder.path) as there,
        TemporaryFile(dir=folder.path) as missing,
    ):
        survey, labels = index.survey, _Labels(index.survey)
        images = folder.path / "images"
        images.mkdir()
        texts = _Elements(there, labels), _Elements(missing, labels)
        for copy, is_there in copied(_placed(index, images, pictures, out), pictures, USUAL):
            texts[not is_there].add(copy.group, copy.name)
        chosen = texts[not texts[0].num_images]
        with (folder.path / "annotations.xml").open("wb") as file:
            chosen.write(file, printable(out.name))
        (folder.path / "labels.json").write_text(json.dumps(labels.entries, indent=1) + "\n", encoding="utf-8")
    notes = (
        *survey.notes(),
        *survey.part_notes(have_place=True),
        *_notes(pictures),
        *labels.notes(),
        *_setup_notes(out, pictures),
    )
    return ExportReport("cvat", out, survey.num_records, chosen.num_images, survey.num_failures, notes)


def _placed(index: ImageIndex, images: Path, pictures: Pictures, out: Path) -> Iterator[Copy]:
    names = Names(is_flat=False, fitted=_fitted)
    for group in index.images():
        name = names.first_free(group.file_name, USUAL.suffix_of(group.name))
        yield Copy.of(group, str(images), str(name), pictures=pictures, out=out)


def _fitted(name: PurePosixPath) -> PurePosixPath:
    return beside_pictures(PurePosixPath(_NOT_XML.sub("_", text)) if _NOT_XML.search(text := str(name)) else name)


class _Labels:
    """The labels of the task: trimmed and of at most 64 characters, as CVAT keeps them, each once; with their colours.

    `of` has the name for each label of an object, `tag_of` the tag for the texts of a task. `entries` are the labels as
    CVAT's raw editor and `cvat-cli task create --labels` take them.
    """

    def __init__(self, survey: Survey) -> None:
        self.entries: list[dict[str, Any]] = []
        self.num_cut_texts = 0
        self.num_left_out = 0
        self._questions: dict[str, dict[str, str]] = {}  # label -> question -> name of the attribute
        self._taken: set[str] = set()
        styles = palette((*survey.in_order(), *(tag for tag, _ in _TAGS.values())))
        self.of = {
            label: self._declared(label, "any", [_SCORE], styles[label].colour.hex) for label in survey.in_order()
        }
        self.tag_of = {
            task: self._declared(tag, "tag", [{"name": text, **_TEXT} for text in texts], styles[tag].colour.hex)
            for task, (tag, texts) in _TAGS.items()
            if task in survey.tasks
        }

    def value(self, text: str) -> str:
        """Return a text as an attribute can hold it; what is too long is cut and counted."""
        shown = "\n".join(map(printable, text.splitlines()))
        self.num_cut_texts += len(shown) > TEXT_CHARS
        return shown[:TEXT_CHARS]

    def told(self, label: str, texts: Texts) -> dict[str, str]:
        """Return what is said about a shape as attributes of its label, which are declared; what is too many goes."""
        held = dict[str, str]()
        for question, text in texts.items():
            name = self._attribute(label, question)
            self.num_left_out += name is None
            held |= {} if name is None else {name: self.value(text)}
        return held

    def _attribute(self, label: str, question: str) -> str | None:
        known = self._questions.setdefault(label, {})
        if question not in known and len(known) < MOST_QUESTIONS:
            name = _free(printable(question).strip()[:NAME_CHARS].strip() or "question", {"score", *known.values()})
            known[question] = name
            entry = next(entry for entry in self.entries if entry["name"] == self.of[label])
            entry["attributes"] = [*entry["attributes"], {"name": name, **_TEXT}]
        return known.get(question)

    def notes(self) -> Iterator[str]:
        """Yield what CVAT cannot hold as it is."""
        changed = [f"{printable(label)} to {name}" for label, name in self.of.items() if printable(label) != name]
        if changed:
            yield f"labels that CVAT does not take were changed: {', '.join(changed)}"
        if self.num_left_out:
            yield f"{self.num_left_out} answers were left out: a label has at most {MOST_QUESTIONS} questions here"
        if self.num_cut_texts:
            yield f"{self.num_cut_texts} texts were cut to {TEXT_CHARS} characters, the most that CVAT takes"

    def _declared(self, label: str, type: str, attributes: list[dict[str, Any]], colour: str) -> str:
        name = _free(printable(label).strip()[:LABEL_CHARS].strip() or "object", self._taken)
        self._taken.add(name)
        self.entries.append({"name": name, "color": colour, "type": type, "attributes": attributes})
        return name


def _free(short: str, taken: Container[str]) -> str:
    """Return a name of at most 64 characters that is not taken."""
    name, number = short, 1
    while name in taken:
        number += 1
        name = f"{short[: LABEL_CHARS - len(str(number)) - 1]}~{number}"
    return name


class _Elements:
    """The `<image>` elements of one document, numbered from 0, in a temporary file: their count stands before them."""

    def __init__(self, file: IO[bytes], labels: _Labels) -> None:
        self._file = file
        self._labels = labels
        self.num_images = 0

    def add(self, group: ImageGroup, name: str) -> None:
        """Add an image whose picture is `name` below `images/`."""
        # Written as text: with an element tree for each picture the export took a third longer.
        size = f'width="{group.width}" height="{group.height}"'
        head = f'  <image id="{self.num_images}" name={quoteattr(name)} {size}>\n'
        inside = "".join((*_shapes(group, self._labels), *_tags(group, self._labels)))
        self._file.write(f"{head}{inside}  </image>\n".encode())
        self.num_images += 1

    def write(self, file: IO[bytes], name: str) -> None:
        """Write the document, called `name`, with all that was added."""
        head = ET.Element("annotations")
        _add(head, "version", "1.1")
        task = _add(_add(head, "meta"), "task")
        for tag, text in (("name", name), ("size", str(self.num_images)), ("mode", "annotation")):
            _add(task, tag, text)
        labels = _add(task, "labels")
        for entry in self._labels.entries:
            _add_label(labels, entry)
        ET.indent(head)
        text = ET.tostring(head, encoding="unicode").removesuffix("</annotations>")
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n' + text.encode())
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)
        file.write(b"</annotations>\n")


def _add_label(labels: ET.Element, entry: dict[str, Any]) -> None:
    label = _add(labels, "label")
    for key in ("name", "color", "type"):
        _add(label, key, entry[key])
    attributes = _add(label, "attributes")
    for declared in entry["attributes"]:
        attribute = _add(attributes, "attribute")
        for key, value in declared.items():
            _add(attribute, key, "\n".join(value) if key == "values" else str(value))


def _shapes(group: ImageGroup, labels: _Labels) -> Iterator[str]:
    for box in group.told_boxes():
        left, top, right, bottom = box.x, box.y, box.x + box.width, box.y + box.height
        corners = f'xtl="{left:.2f}" ytl="{top:.2f}" xbr="{right:.2f}" ybr="{bottom:.2f}"'
        yield _shape("box", labels, box, corners)
    for segment in group.segments():
        yield _shape("polygon", labels, segment.box, _points(joined_ring(segment.rings)))
    for point in group.points():
        yield _shape("points", labels, point, _points([(point.x, point.y)]))


def _shape(tag: str, labels: _Labels, found: PixelBox | PixelPoint, place: str) -> str:
    facts = f'label={quoteattr(labels.of[found.label])} source="auto" occluded="0" {place} z_order="0"'
    score = {} if found.score is None else {"score": f"{found.score:.3f}"}
    texts = labels.told(found.label, found.texts) if isinstance(found, PixelBox) and found.texts else {}
    return _element(tag, facts, score | texts)


def _points(ring: Ring) -> str:
    return f'points="{";".join(f"{x:.2f},{y:.2f}" for x, y in ring)}"'


def _tags(group: ImageGroup, labels: _Labels) -> Iterator[str]:
    texts = [(labels.tag_of["caption"], {"text": caption}) for caption in group.captions()]
    texts += [(labels.tag_of["query"], {"question": question, "text": answer}) for question, answer in group.answers()]
    for label, attributes in texts:
        held = {name: labels.value(text) for name, text in attributes.items()}
        yield _element("tag", f'label={quoteattr(label)} source="auto"', held)


def _element(tag: str, facts: str, attributes: dict[str, str]) -> str:
    lines = [
        f"      <attribute name={quoteattr(name)}>{escape(text)}</attribute>\n" for name, text in attributes.items()
    ]
    return f"    <{tag} {facts}>\n{''.join(lines)}    </{tag}>\n" if lines else f"    <{tag} {facts}/>\n"


def _add(parent: ET.Element, tag: str, text: str | None = None) -> ET.Element:
    child = ET.SubElement(parent, tag)
    child.text = text
    return child


def _notes(pictures: Pictures) -> Iterator[str]:
    """Yield sentences as `Pictures.notes`: CVAT takes no image that its task has no picture of."""
    if pictures.num_found or not pictures.num_missing:
        yield from pictures.notes()
    else:
        yield (
            "no picture was found, so images/ is empty: add --root DIR, or make the task of pictures with the names in "
            "annotations.xml"
        )


def _setup_notes(out: Path, pictures: Pictures) -> Iterator[str]:
    """Yield in words how the files come into CVAT: names have to be those below `images/`, folders and all."""
    if pictures.num_found:
        shown = printable(str(out))
        yield (
            f"in CVAT: zip what is in {shown}/images (the pictures, not the folder), make a task of the zip with the "
            f'labels of {shown}/labels.json (Raw), and upload {shown}/annotations.xml to it as "CVAT 1.1"'
        )
