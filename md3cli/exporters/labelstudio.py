"""Label Studio: tasks with predictions, and the labelling interface they fit.

`OUT.json` gets its interface beside it as `OUT.xml`; any other OUT is a folder with `tasks.json`
and `interface.xml`. Coordinates are percent of the image. A picture's URL is Label Studio's own
for local files, or `url_prefix` and the name. Label Studio refuses a storage that is the document root
itself, so the root is the parent of the pictures' folder and URLs begin with the folder's name.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import replaced_file, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex, Survey
from md3cli.exporters.objects import joined_ring
from md3cli.exporters.palette import Style, palette
from md3cli.exporters.pictures import Pictures
from md3cli.records import compact_json, printable
from md3cli.refine.collection import Collection

LOCAL_FILES = "/data/local-files/?d="
POINT_SIZE_PERCENT = 0.75

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
        interface.write(_interface(survey).encode())
        root = Pictures(records, options).root if options.url_prefix is None else None
        prefix = options.url_prefix
        if prefix is None:
            prefix = LOCAL_FILES + (f"{quote(os.fsencode(root.name))}/" if root is not None and root.name else "")
        num_images = _write_tasks(index, tasks.write, prefix)
        return ExportReport(
            "labelstudio",
            out,
            survey.num_records,
            num_images,
            survey.num_failures,
            (*survey.notes(), *(_setup_notes(root) if options.url_prefix is None else ())),
        )


def _setup_notes(root: Path | None) -> Iterator[str]:
    """Return in words what has to be set in Label Studio before it shows local pictures."""
    if root is None or not root.is_dir():
        yield "Label Studio will not find the pictures: their folder is not known; add --root DIR or --url-prefix URL"
        return
    yield (
        "before Label Studio starts, set LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and "
        f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={printable(str(root.parent))}"
    )
    yield (
        "in the project: take the interface (.xml) as the labelling setup's code, add a Local Files source storage "
        f"with the path {printable(str(root))} (no sync needed), then import the tasks"
    )


def _write_tasks(index: ImageIndex, write: Callable[[bytes], object], url_prefix: str) -> int:
    """Write the array of tasks one by one; returns how many."""
    num_images = 0
    write(b"[")
    for group in index.images():
        task = {
            "data": {"image": image_url(group, url_prefix)},
            "predictions": [_prediction(group, index.survey.model)],
        }
        write((b",\n" if num_images else b"\n") + compact_json(task))
        num_images += 1
    write(b"\n]\n")
    return num_images


def image_url(group: ImageGroup, url_prefix: str) -> str:
    """Return where Label Studio finds the picture."""
    if "://" in group.name:
        return group.name
    exact = base64.b64decode(group.name_b64) if group.name_b64 else group.name.encode()
    return url_prefix + quote(exact)


def _prediction(group: ImageGroup, model: str) -> dict[str, Any]:
    results = [*_regions(group), *_texts(group)]
    for number, result in enumerate(results, start=1):
        size = {"original_width": group.width, "original_height": group.height, "image_rotation": 0}
        result |= {"id": f"r{number}", "to_name": "image", **size}
    scores = [result["score"] for result in results if result.get("score") is not None]
    mean = {"score": round(sum(scores) / len(scores), 3)} if scores else {}
    return {"model_version": model, **mean, "result": results}


def _regions(group: ImageGroup) -> Iterator[Result]:
    across, down = 100 / group.width, 100 / group.height
    for box in group.boxes():
        value = _percent(
            {"x": box.x * across, "y": box.y * down, "width": box.width * across, "height": box.height * down}
        )
        yield _region("rectanglelabels", {**value, "rotation": 0}, box.label, box.score)
    for segment in group.segments():
        points = [[_limited(x * across), _limited(y * down)] for x, y in joined_ring(segment.rings)]
        yield _region("polygonlabels", {"points": points, "closed": True}, segment.box.label, segment.box.score)
    for point in group.points():
        value = _percent({"x": point.x * across, "y": point.y * down, "width": POINT_SIZE_PERCENT})
        yield _region("keypointlabels", value, point.label, point.score)


def _percent(values: dict[str, float]) -> dict[str, float]:
    return {key: _limited(value) for key, value in values.items()}


def _limited(percent: float) -> float:
    return round(min(max(percent, 0.0), 100.0), 4)  # a last-digit 100.00000000000001 is refused on import


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
    labels = survey.categories()
    styles = palette(survey.in_order())
    controls = [
        ("detect", _labels_control("RectangleLabels", labels, styles)),
        ("segment", _labels_control("PolygonLabels", labels, styles)),
        ("point", _labels_control("KeyPointLabels", survey.point_labels, styles)),
        ("caption", '  <TextArea name="caption" toName="image" editable="true" rows="4"/>\n'),
        ("query", '  <TextArea name="answer" toName="image" editable="true" rows="4"/>\n'),
    ]
    chosen = "".join(control for task, control in controls if task in survey.tasks)
    return f'<View>\n  <Image name="image" value="$image" zoom="true"/>\n{chosen}</View>\n'


def _labels_control(tag: str, labels: Iterable[str], styles: Mapping[str, Style]) -> str:
    lines = []
    for number, label in enumerate(labels):
        # Its COCO export stops at keypoints whose label has no place of its own.
        place = f' model_index="{number}"' if tag == "KeyPointLabels" else ""
        colour = styles[label].colour.hex
        lines.append(f'    <Label value={quoteattr(printable(label))} background="{colour}"{place}/>\n')
    return f'  <{tag} name="{tag.lower()}" toName="image">\n{"".join(lines)}  </{tag}>\n'
