"""Label Studio: tasks with predictions, and the labelling interface they fit.

`OUT.json` gets its interface beside it as `OUT.xml`; any other OUT is a folder with `tasks.json` and `interface.xml`.
Coordinates are percent of the image. What is said about an object stands at its region: a text area that shows itself
for the region that is chosen. A task's data hold the picture's URL, and as `meta` what the records carry along.
The URL is Label Studio's own for local files, or `url_prefix` and the name. Label Studio refuses a storage that is the
document root itself, so the root is the parent of the pictures' folders and URLs begin with a folder's name.
Tried in a server of version 1.23.2 (tests/programs/test_label_studio.py).
"""

from __future__ import annotations

import base64
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import replaced_file, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex, Survey
from md3cli.exporters.objects import NO_TEXTS, Texts, joined_ring
from md3cli.exporters.palette import palette
from md3cli.exporters.pictures import Pictures
from md3cli.records import compact_json, printable
from md3cli.refine.collection import Collection

LOCAL_FILES = "/data/local-files/?d="
UPLOAD_LIMIT_BYTES = 250 * 2**20  # its DATA_UPLOAD_MAX_MEMORY_SIZE, unless its environment has another
PART_TEXT = "about"  # the control for what is said of a region
POINT_SIZE_PERCENT = 0.75
PERCENT_DECIMALS = 6  # both edges of a box in a picture of 100,000 pixels stay within 0.001 pixels

Result = dict[str, Any]


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write all images as tasks of one project."""
    with closing(ImageIndex(records)) as index, ExitStack() as outputs:
        if out.suffix.lower() == ".json":
            files = [replaced_file(path, overwrite=options.overwrite) for path in (out.with_suffix(".xml"), out)]
            interface, tasks = (outputs.enter_context(file) for file in files)
        else:
            folder = outputs.enter_context(staged_folder(out, overwrite=options.overwrite, format="labelstudio")).path
            interface = outputs.enter_context((folder / "interface.xml").open("wb"))
            tasks = outputs.enter_context((folder / "tasks.json").open("wb"))
        survey = index.survey
        if options.url_prefix is None:
            urls = _LocalUrls(Pictures(records, options))
            num_images = _write_tasks(index, tasks.write, urls.of)
            url_notes = [*urls.notes()]
        else:
            prefix = options.url_prefix
            num_images = _write_tasks(index, tasks.write, lambda group: prefix + _quoted_name(group))
            url_notes = []
        interface.write(_interface(survey).encode())  # last: which parts have boxes of their own is known now
        notes = (*survey.notes(), *survey.part_notes(have_place=True), *_coco_notes(survey), *url_notes)
        notes = (*notes, *_size_notes(tasks.tell()))
        return ExportReport("labelstudio", out, survey.num_records, num_images, survey.num_failures, notes)


def _size_notes(num_bytes: int) -> Iterator[str]:
    """Yield in words what to set where Label Studio would refuse a file of tasks for its size."""
    limit = num_bytes + 2**20  # with what goes around the file
    if limit > UPLOAD_LIMIT_BYTES:
        needed = f"DATA_UPLOAD_MAX_MEMORY_SIZE={limit}"
        yield f"Label Studio will refuse the tasks ({num_bytes:,} bytes) unless it starts with {needed}"


def _coco_notes(survey: Survey) -> Iterator[str]:
    """Yield in words what Label Studio loses of points, and of boxes that share their labels, when it exports COCO."""
    if "point" not in survey.tasks:
        return
    shared = [printable(label) for label in survey.categories() if label in survey.point_labels]
    merged = (
        f' and calls boxes and masks of labels that points have, too, "default" ({", ".join(shared)})' if shared else ""
    )
    yield f"Label Studio's COCO export keeps one point of a label in a picture{merged}; its JSON export keeps all"


class _LocalUrls:
    """Label Studio's URLs of pictures on this disk, below one document root; counts what its server cannot open."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self._folders = [root.path for root in pictures.roots if root.path.is_dir()]
        self._document_root = _common_folder([folder.parent for folder in self._folders])
        self._starts = tuple(os.path.join(folder, "") for folder in self._folders)
        self._not_shown: Counter[str] = Counter()  # by reason
        self._first: dict[str, str] = {}  # name, by reason

    def of(self, group: ImageGroup) -> str:
        """Return the URL of an image's picture, one that opens nothing where its server could not open the file."""
        if self._document_root is None:
            return LOCAL_FILES + _quoted_name(group)
        picture = self._pictures.find(group.picture_record)
        if picture is None:
            self._note("are not there", group)
            return f"{LOCAL_FILES}{quote(os.fsencode(self._folders[0].name))}/{_quoted_name(group)}"
        if picture.size is not None or picture.row_group is not None:
            self._note("are inside a tar or a Parquet file", group)
        elif not picture.path.startswith(self._starts):
            self._note("lie outside the folder", group)
        elif picture.name_b64 is not None:
            self._note("have names that are not UTF-8", group)
        path = Path(os.path.relpath(picture.path, self._document_root))
        return LOCAL_FILES + quote(os.fsencode(path.as_posix()))

    def _note(self, reason: str, group: ImageGroup) -> None:
        self._not_shown[reason] += 1
        self._first.setdefault(reason, group.name)

    def notes(self) -> Iterator[str]:
        """Yield in words what has to be set in Label Studio before it shows the pictures, and which it will not."""
        if self._document_root is None:
            yield "Label Studio will not find the pictures: no folder is known; add --root DIR or --url-prefix URL"
            return
        for reason, count in self._not_shown.items():
            yield f"Label Studio will not show {count} pictures that {reason} (first: {printable(self._first[reason])})"
        yield (
            "before Label Studio starts, set LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and "
            f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={printable(str(self._document_root))}"
        )
        folders = " and another with the path ".join(printable(str(folder)) for folder in self._folders)
        yield (
            "in the project: take the interface (.xml) as the labelling setup's code, add a Local Files source storage "
            f"with the path {folders} (no sync needed), then import the tasks"
        )


def _common_folder(folders: list[Path]) -> Path | None:
    """Return the folder that holds all; None without folders, and for folders on several drives."""
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:
        return None


def _quoted_name(group: ImageGroup) -> str:
    return quote(base64.b64decode(group.name_b64) if group.name_b64 else group.name.encode())


def _write_tasks(index: ImageIndex, write: Callable[[bytes], object], url_of: Callable[[ImageGroup], str]) -> int:
    """Write the array of tasks one by one; returns how many."""
    num_images = 0
    write(b"[")
    for group in index.images():
        url = group.name if "://" in group.name else url_of(group)
        data = {"image": url, **({"meta": meta} if (meta := group.meta()) else {})}
        task = {"data": data, "predictions": [_prediction(group, index.survey.model)]}
        write((b",\n" if num_images else b"\n") + compact_json(task))
        num_images += 1
    write(b"\n]\n")
    return num_images


def _prediction(group: ImageGroup, model: str) -> dict[str, Any]:
    results: list[Result] = []
    size = {"original_width": group.width, "original_height": group.height, "image_rotation": 0}
    numbers = itertools.count(1)
    for result, texts in _regions(group):
        shared = {"id": f"r{next(numbers)}", "to_name": "image", **size}
        results.append(result | shared)
        if texts:  # of the same id and shape: so Label Studio knows what is of a region
            said = [f"{question}\n{text}" for question, text in texts.items()]
            shape = {key: value for key, value in result["value"].items() if key != result["type"]}
            told = {"type": "textarea", "from_name": PART_TEXT, "value": {**shape, "text": said}}
            results.append(told | shared)
    for result in _texts(group):
        results.append(result | {"id": f"r{next(numbers)}", "to_name": "image", **size})
    scores = [result["score"] for result in results if result.get("score") is not None]
    mean = {"score": round(sum(scores) / len(scores), 3)} if scores else {}
    return {"model_version": model, **mean, "result": results}


def _regions(group: ImageGroup) -> Iterator[tuple[Result, Texts]]:
    """Yield what was found, each with the texts about it."""
    across, down = 100 / group.width, 100 / group.height
    for box in group.told_boxes():
        value = _percent(
            {"x": box.x * across, "y": box.y * down, "width": box.width * across, "height": box.height * down}
        )
        yield _region("rectanglelabels", {**value, "rotation": 0}, box.label, box.score), box.texts
    for segment in group.segments():
        box, points = segment.box, [[_limited(x * across), _limited(y * down)] for x, y in joined_ring(segment.rings)]
        yield _region("polygonlabels", {"points": points, "closed": True}, box.label, box.score), box.texts
    for point in group.points():
        value = _percent({"x": point.x * across, "y": point.y * down, "width": POINT_SIZE_PERCENT})
        yield _region("keypointlabels", value, point.label, point.score), NO_TEXTS


def _percent(values: dict[str, float]) -> dict[str, float]:
    return {key: _limited(value) for key, value in values.items()}


def _limited(percent: float) -> float:
    # A last-digit 100.00000000000001 is refused on import.
    return round(min(max(percent, 0.0), 100.0), PERCENT_DECIMALS)


def _region(type: str, value: dict[str, Any], label: str, score: float | None) -> Result:
    region = {"type": type, "from_name": type, "value": {**value, type: [printable(label)]}}
    return region if score is None else {**region, "score": score}


def _texts(group: ImageGroup) -> Iterator[Result]:
    answers = [f"{question}\n{answer}" for question, answer in group.answers()]
    for name, texts in (("caption", group.captions()), ("answer", answers)):
        if texts:
            yield {"type": "textarea", "from_name": name, "value": {"text": texts}}


def _interface(survey: Survey) -> str:
    """Return the labelling interface: one control for each kind of result that the records can hold."""
    labels = list(dict.fromkeys((*survey.categories(), *(survey.part_labels if survey.num_own_parts else ()))))
    tasks = survey.tasks | ({"detect"} if survey.num_own_parts else set())
    # The first control with labels of boxes or masks gives them their numbers: said twice, COCO has them twice.
    numbered = "detect" if "detect" in tasks else "segment"
    controls = [
        ("detect", _labels_control("RectangleLabels", labels, survey, "category" if numbered == "detect" else None)),
        ("segment", _labels_control("PolygonLabels", labels, survey, "category" if numbered == "segment" else None)),
        ("point", _labels_control("KeyPointLabels", survey.point_labels, survey, "model_index")),
        ("caption", '  <TextArea name="caption" toName="image" editable="true" rows="4"/>\n'),
        ("query", '  <TextArea name="answer" toName="image" editable="true" rows="4"/>\n'),
    ]
    chosen = "".join(control for task, control in controls if task in tasks)
    if survey.num_part_texts:
        chosen += f'  <TextArea name="{PART_TEXT}" toName="image" perRegion="true" editable="true" rows="4"/>\n'
    return f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n{chosen}</View>\n'


def _labels_control(tag: str, labels: Iterable[str], survey: Survey, place: str | None) -> str:
    """Return a control of labels; `place` is the attribute that holds a label's number, counted from 0.

    Without `category` its COCO and YOLO exports order labels by name, and without `model_index` they stop at points.
    """
    lines = []
    styles = palette(survey.in_order())
    for number, label in enumerate(labels):
        numbered = "" if place is None else f' {place}="{number}"'
        lines.append(
            f'    <Label value={quoteattr(printable(label))} background="{styles[label].colour.hex}"{numbered}/>\n'
        )
    return f'  <{tag} name="{tag.lower()}" toName="image">\n{"".join(lines)}  </{tag}>\n'
