"""COCO: instances with scores, captions, keypoints on request; or the bare list of results.

Images go straight into the document, annotations wait in a temporary file and are joined at the end, so memory does
not grow with the records. Ids count from 1, because an annotation id 0 silently halves AP in pycocotools. `info`,
`licenses`, `area`, `iscrowd` and `segmentation` are always there because readers fail without them. No date is
written: the same records give the same bytes.

Results can only be scored with the ids of the ground truth: `--coco-ids-from gt.json` reuses its image ids by
`file_name` and its category ids by `name`, matched as `md3 eval` matches them. What that file lacks gets fresh ids
after its highest.

What is said about a part of a picture stands in `attributes` of the annotation that the part is of, by question. A part
whose annotation is not here is one of its own. Results have no attributes.

With `--split` OUT is a folder with `instances_train.json` and its like; with `--roboflow` one of pictures, a folder for
each set, with `_annotations.coco.json` beside them, as RF-DETR and other programs of that house want.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from md3cli.errors import ExportError, InputError, UsageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.copies import USUAL, Copy, copied, named_copies
from md3cli.exporters.files import StagedFolder, replaced_file, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex, Survey
from md3cli.exporters.names import Names
from md3cli.exporters.objects import PixelBox, PixelPoint, PixelSegment
from md3cli.exporters.pictures import Pictures
from md3cli.exporters.splits import Sets, one_set_notes
from md3cli.finished.names import NAMES_SHOWN, Matches, ambiguity_notes, match_images, match_labels
from md3cli.records import compact_json, counted, printable
from md3cli.refine.collection import Collection

Annotation = dict[str, Any]
AddImage = Callable[[ImageGroup, str], None]
_ROBOFLOW = "_annotations.coco.json"
_ROBOFLOW_NAMES = {"val": "valid", "validation": "valid"}


class CocoIds:
    """The ids of a document; `categories` is the list for the document, in order.

    `images` are the names that will be asked for; they are read only where another file is known. `given` are ids of
    labels, which count where no other file is known.

    Raises:
        InputError: the other file cannot be read, or has not one of `images`.
        ExportError: the other file is no COCO file, or has two images of one name.
    """

    def __init__(
        self,
        labels: Iterable[str],
        known: Path | None,
        images: Iterable[str] = (),
        given: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        labels = list(labels)
        document = _load(known) if known else {"images": [], "categories": []}
        by_name = {image["file_name"]: image["id"] for image in document["images"]}
        self._images = match_images(images, by_name) if known else Matches()
        self._known_images = {name: by_name[truth] for name, truth in self._images.found.items()}
        self._last_image = _highest(document["images"])
        self.categories = [{"supercategory": "", **category} for category in document["categories"]]
        ids = {category["name"]: category["id"] for category in reversed(document["categories"])}
        self._labels = match_labels(labels, ids) if known else Matches()
        self._categories = {label: ids[name] for label, name in self._labels.found.items()}
        last = _highest(document["categories"])
        self._new_labels = [label for label in labels if label not in self._categories]
        taken = dict(given) if known is None else {}
        numbers = (number for number in count(last + 1) if number not in taken.values())
        for label in self._new_labels:
            number = taken[label] if label in taken else next(numbers)
            self._categories[label] = number
            self.categories.append({"id": number, "name": label, "supercategory": ""})

    def known_image(self, name: str) -> Any:
        """Return the other file's id of an image, None where it has none."""
        return self._known_images.get(name)

    def image(self, name: str) -> Any:
        """Return the id of an image, each asked for once: the known one, else the next number."""
        known = self._known_images.get(name)
        if known is not None:
            return known
        self._last_image += 1
        return self._last_image

    def category(self, label: str) -> Any:
        """Return the id of a label's category."""
        return self._categories[label]

    def category_name(self, label: str) -> str:
        """Return what the document calls a label's category."""
        return self._labels.found.get(label, label)

    def notes(self, known: Path) -> Iterator[str]:
        """Yield what could not be matched to the other file, in sentences."""
        yield from ambiguity_notes("image", self._images)
        yield from ambiguity_notes("label", self._labels)
        if self._new_labels:
            shown = ", ".join(
                f"{printable(label)} ({self._categories[label]})" for label in self._new_labels[:NAMES_SHOWN]
            )
            more = ", …" if len(self._new_labels) > NAMES_SHOWN else ""
            yield f"{printable(str(known))} has no category for these labels, they got new ids: {shown}{more}"


def _highest(entries: list[dict[str, Any]]) -> int:
    return max((entry["id"] for entry in entries if isinstance(entry["id"], int)), default=0)


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {printable(str(path))} (--coco-ids-from): {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{printable(str(path))} (--coco-ids-from) is not JSON: {error}") from error
    try:
        images = [{"file_name": str(image["file_name"]), "id": image["id"]} for image in document["images"]]
        categories = [{**entry, "name": str(entry["name"]), "id": entry["id"]} for entry in document["categories"]]
    except (KeyError, TypeError) as error:
        raise ExportError(
            f"{printable(str(path))} (--coco-ids-from) is no COCO file: it needs images with id and file_name, "
            "and categories with id and name"
        ) from error
    counts = Counter(image["file_name"] for image in images)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise ExportError(
            f"{printable(str(path))} (--coco-ids-from) has {len(doubled)} names for several images each (first: "
            f"{printable(doubled[0])}), so their ids cannot be told; make the file names unique"
        )
    return {"images": images, "categories": categories}


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write one document of all images that have an answered record, or one for each set."""
    is_folder = options.splits is not None or options.is_roboflow
    if is_folder and out.suffix.lower() == ".json":
        raise UsageError(f"{printable(str(out))}: with --split or --roboflow coco is a folder; name one with -o")
    with closing(ImageIndex(records)) as index:
        names = (group.distinct_name for group in index.images())
        given = {label.name: label.id for label in records.refinement.labels.labels if label.id is not None}
        writer = _Writer(index.survey, options, names, given)
        more: Iterable[str] = ()
        if is_folder:
            with staged_folder(out, overwrite=options.overwrite, format="coco") as folder:
                write = _write_roboflow if options.is_roboflow else _write_sets
                more = tuple(write(records, out, options, index, writer, folder))
        else:
            with replaced_file(out, overwrite=options.overwrite) as file:
                (writer.write_results if options.coco_results else writer.write_document)(index, file)
            more = () if options.coco_results else one_set_notes(writer.num_images)  # results are for scoring
        survey = index.survey
        notes = (*writer.notes(survey), *more)
        return ExportReport("coco", out, survey.num_records, writer.num_images, survey.num_failures, notes)


def _write_sets(
    records: Collection, out: Path, options: ExportOptions, index: ImageIndex, writer: _Writer, folder: StagedFolder
) -> Iterator[str]:
    """Write a document for each set, and yield notes; ids are told apart over all of them."""
    sets = Sets(options.splits)
    paths = {name: folder.path / f"{writer.kind}_{name}.json" for name in sets.names}
    with ExitStack() as stack:
        documents = {name: stack.enter_context(writer.document(path)) for name, path in paths.items()}
        for group in index.images():
            documents[sets.add(group.name, group.records)](group, group.distinct_name)
    yield from sets.notes()


def _write_roboflow(
    records: Collection, out: Path, options: ExportOptions, index: ImageIndex, writer: _Writer, folder: StagedFolder
) -> Iterator[str]:
    """Write each set as a folder of pictures with its document beside them, as Roboflow does; yield notes."""
    pictures, sets = Pictures(records, options), Sets(options.splits)
    pictures.require_root("coco with --roboflow")
    folders = sets.folders(_ROBOFLOW_NAMES, "Roboflow")
    names = Names(is_flat=options.is_flat)
    copies = named_copies(
        index.images(), folder, folders, sets, names, USUAL, partial(Copy.of, pictures=pictures, out=out)
    )
    with ExitStack() as stack:
        documents = {}
        for part, name in folders.items():
            (folder.path / name).mkdir(exist_ok=True)
            documents[part] = stack.enter_context(writer.document(folder.path / name / _ROBOFLOW))
        for copy, is_there in copied(copies, pictures, USUAL, are_upright=options.is_flat):
            if is_there:
                documents[copy.part](copy.group, copy.name)
                sets.add(copy.group.name, copy.group.records)
    yield from (*pictures.notes(), *sets.notes())


class _Writer:
    def __init__(self, survey: Survey, options: ExportOptions, images: Iterable[str], given: Mapping[str, int]) -> None:
        self._options = options
        has_objects = bool(survey.tasks & {"detect", "segment"}) or (options.keypoints and "point" in survey.tasks)
        self._tells_of_parts = survey.num_part_texts > 0 and not options.coco_results
        has_objects = has_objects or self._tells_of_parts
        self._is_of_captions = "caption" in survey.tasks and not has_objects
        self._point_labels = survey.point_labels if options.keypoints else {}
        part_labels = survey.part_labels if self._tells_of_parts else {}
        labels = dict.fromkeys((*survey.categories(), *self._point_labels, *part_labels))
        self._ids = CocoIds(labels, options.coco_ids_from, images, given)
        self._has_masks = "segment" in survey.tasks
        self._model = survey.model
        self.num_images = 0
        self._num_annotations = 0
        self._num_points = 0
        self._num_unknown = 0
        self._first_unknown = ""
        self._first_dotted = ""  # question that FiftyOne does not take for a name

    @property
    def kind(self) -> str:
        """What COCO calls a document of this kind."""
        return "captions" if self._is_of_captions else "instances"

    def write_document(self, index: ImageIndex, file: BinaryIO) -> None:
        """Write the whole document."""
        with self._document(file) as add:
            for group in index.images():
                add(group, group.distinct_name)

    @contextmanager
    def document(self, path: Path) -> Iterator[AddImage]:
        """Begin a document, which is whole when the block ends well; yield what adds an image under a name."""
        with path.open("xb") as file, self._document(file) as add:
            yield add

    @contextmanager
    def _document(self, file: BinaryIO) -> Iterator[AddImage]:
        """Write a document; annotations wait in a temporary file, since all images come before them."""
        info = {"description": f"annotated by {self._model}", "version": "1.0", "year": 0}
        info |= dict.fromkeys(("contributor", "url", "date_created"), "")
        file.write(b'{"info":' + compact_json(info) + b',"licenses":[],"images":[')
        with tempfile.TemporaryFile(dir=os.path.dirname(file.name)) as annotations:  # where there is room for OUT
            images_start = file.tell()

            def add(group: ImageGroup, name: str) -> None:
                image_id = self._ids.image(group.distinct_name)
                file.write(b",\n" if file.tell() > images_start else b"\n")
                file.write(compact_json(self._image_entry(group, image_id, name)))
                self.num_images += 1
                for annotation in self._annotations(group, image_id):
                    self._num_annotations += 1
                    annotations.write(b",\n" if annotations.tell() else b"\n")
                    annotations.write(compact_json({"id": self._num_annotations, **annotation}))

            yield add
            annotations.seek(0)
            file.write(b'],\n"annotations":[')
            shutil.copyfileobj(annotations, file)
        file.write(b"]")
        if not self._is_of_captions:  # where there are categories, pycocotools asks every annotation for its own
            file.write(b',\n"categories":' + compact_json(self._categories()))
        file.write(b"}\n")

    def write_results(self, index: ImageIndex, file: BinaryIO) -> None:
        """Write the bare list that `COCO.loadRes` takes; images the ground truth lacks are left out."""
        file.write(b"[")
        for group in index.images():
            id_of = self._ids.known_image if self._options.coco_ids_from else self._ids.image
            image_id = id_of(group.distinct_name)
            if image_id is None:
                self._num_unknown += 1
                self._first_unknown = self._first_unknown or group.distinct_name
                continue
            self.num_images += 1
            for annotation in self._annotations(group, image_id):
                file.write(b",\n" if self._num_annotations else b"\n")
                file.write(compact_json(_as_result(annotation, is_box=not self._has_masks)))
                self._num_annotations += 1
        file.write(b"]\n")

    def notes(self, survey: Survey) -> Iterator[str]:
        """Yield what was left out of the document and where else it can be had, a sentence each."""
        yield from survey.notes()
        yield from survey.part_notes(have_place=not self._options.coco_results)
        if self._first_dotted and not self._options.coco_results:
            shown = printable(self._first_dotted)
            yield f"FiftyOne opens attributes whose names have a dot with extra_attrs=False only (first: {shown})"
        if self._num_points and not self._options.keypoints:
            were = counted(self._num_points, "point was", "points were")
            yield f"{were} left out; --keypoints writes them as one-keypoint categories"
        if "query" in survey.tasks:
            yield "answers have no place in COCO; --format parquet or csv has them"
        if "caption" in survey.tasks and not self._is_of_captions:
            yield "captions stand in each image's own `captions`, since readers of boxes take no other annotations"
        if self._options.coco_ids_from is not None:
            yield from self._ids.notes(self._options.coco_ids_from)
        if self._num_unknown:
            first = printable(self._first_unknown)
            known = self._options.coco_ids_from
            yield f"{self._num_unknown} images are not in {known} and were left out (first: {first})"

    def _image_entry(self, group: ImageGroup, image_id: Any, name: str) -> dict[str, Any]:
        size = {"width": group.width, "height": group.height}
        entry = {"id": image_id, **size, "file_name": name}
        rest = {"captions": [] if self._is_of_captions else group.captions(), "meta": group.meta()}
        return entry | {key: value for key, value in rest.items() if value}

    def _categories(self) -> list[dict[str, Any]]:
        """Return the categories; those that were pointed at are skeletons of one joint."""
        names = map(self._ids.category_name, self._point_labels)
        joints = {name: {"keypoints": [name], "skeleton": []} for name in names}
        return [category | joints.get(category["name"], {}) for category in self._ids.categories]

    def _annotations(self, group: ImageGroup, image_id: Any) -> Iterator[Annotation]:
        """Yield an image's annotations, without ids."""
        for box in group.told_boxes() if self._tells_of_parts else group.boxes():
            yield self._box(box, image_id, [box.corners], box.width * box.height)
        for segment in group.segments():
            yield self._segment(segment, group, image_id)
        for point in group.points():
            self._num_points += 1
            if self._options.keypoints:
                yield self._keypoint(point, image_id)
        if self._is_of_captions:
            for caption in group.captions():
                yield {"image_id": image_id, "caption": caption}

    def _box(self, box: PixelBox, image_id: Any, segmentation: Any, area: float) -> Annotation:
        annotation = {
            "image_id": image_id,
            "category_id": self._ids.category(box.label),
            "bbox": [round(value, 3) for value in (box.x, box.y, box.width, box.height)],
            "area": round(area, 3),
            "segmentation": segmentation,
            "iscrowd": 0,
        }
        annotation |= {} if box.score is None else {"score": box.score}
        dotted = (question for question in box.texts if "." in question or question.startswith("$"))
        self._first_dotted = self._first_dotted or next(dotted, "")
        return annotation | ({"attributes": dict(box.texts)} if box.texts else {})

    def _segment(self, segment: PixelSegment, group: ImageGroup, image_id: Any) -> Annotation:
        from md3cli.exporters.masks import fill, segmentation

        box = segment.box
        if not segment.has_mask:
            return self._box(box, image_id, [box.corners], box.width * box.height)
        mask = fill(segment.rings, group.width, group.height)
        return self._box(box, image_id, segmentation(segment.rings, mask), float(mask.area))

    def _keypoint(self, point: PixelPoint, image_id: Any) -> Annotation:
        x, y = round(point.x, 3), round(point.y, 3)
        annotation = {
            "image_id": image_id,
            "category_id": self._ids.category(point.label),
            "keypoints": [x, y, 2],
            "num_keypoints": 1,
            "bbox": [x, y, 0, 0],  # readers fail without one; a point has no extent
            "area": 0,
            "segmentation": [[x, y, x, y, x, y]],  # CVAT's reader refuses the whole file without the key
            "iscrowd": 0,
        }
        return annotation if point.score is None else {**annotation, "score": point.score}


def _as_result(annotation: Annotation, *, is_box: bool) -> Annotation:
    """Return what scoring reads of an annotation; a box's rectangle says nothing that `bbox` does not."""
    if "caption" in annotation:
        return annotation
    keys = ["keypoints"] if "keypoints" in annotation else ["bbox"] if is_box else ["bbox", "segmentation"]
    result = {key: annotation[key] for key in ["image_id", "category_id", *keys]}
    return {**result, "score": annotation.get("score", 1.0)}  # readers fail without one
