"""YOLO: `data.yaml`, `labels/<image>.txt`, and copies of the pictures under `images/`; a folder for each set in both.

A line is `class x-centre y-centre width height` in 0-1, or a polygon; where masks were asked for every line of the data
set is a polygon, since trainers take a mixed file for damaged. No score is written: a sixth column makes trainers
refuse a file. An image without objects has an empty file. A label's name is its image's with the suffix exchanged;
where `a.jpg` and `a.png` would share one, the second is `a.png.txt` and its picture `a.png.png`, so that trainers still
find them together. Trainers look for a picture's label where the LAST `/images/` of its path is `/labels/`, while other
readers take the two trees to mirror each other: so no folder below is called `images` (it becomes `images_`). Pictures
whose suffix or kind trainers skip get one that they take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath

from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.copies import USUAL, Copy, copied, missing_notes
from md3cli.exporters.files import staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.names import Names, beside_pictures
from md3cli.exporters.objects import Ring, joined_ring
from md3cli.exporters.pictures import Pictures
from md3cli.exporters.small_files import SmallFiles
from md3cli.exporters.splits import Sets
from md3cli.records import counted
from md3cli.refine.collection import Collection

_SUFFIX = ".txt"
# Folders that readers look for in a path, and keys that mean something else in data.yaml (`download` runs a program).
_TAKEN = frozenset({"images", "labels", "path", "names", "nc", "download", "channels", "kpt_shape", "flip_idx"})


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write a data set that `yolo train data=OUT/data.yaml` takes as it is, if the pictures are found."""
    pictures, sets = Pictures(records, options), Sets(options.splits)
    if taken := [name for name in sets.names if name.lower() in _TAKEN]:
        raise UsageError(f"{taken[0]} is a word of YOLO's own; name the set otherwise in --split")
    num_points = 0
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="yolo") as folder,
        SmallFiles(folder, are_unique=options.is_flat) as files,
    ):
        survey = index.survey
        for name in sets.names:
            for kind in ("images", "labels"):
                (folder.path / kind / name).mkdir(parents=True, exist_ok=True)
        names = Names(is_flat=options.is_flat, fitted=_fitted)
        labelled = _labelled(index, files, sets, names, partial(Copy.of, pictures=pictures, out=out))
        for copy, _ in copied(labelled, pictures, USUAL, are_upright=options.is_flat):
            num_points += sum(1 for _ in copy.group.points()) if "point" in survey.tasks else 0
        (folder.path / "data.yaml").write_text(_data_yaml(survey.categories(), sets), encoding="utf-8")
        notes_of_sets = [*sets.notes()]  # refuses sets before they are OUT
    notes = [*survey.notes(), *survey.part_notes(have_place=False), *missing_notes(pictures)]
    if num_points:
        notes.append(f"{counted(num_points, 'point was', 'points were')} left out: YOLO has no place for them")
    notes += notes_of_sets
    return ExportReport("yolo", out, survey.num_records, sets.counts.total(), survey.num_failures, tuple(notes))


def _labelled(
    index: ImageIndex, files: SmallFiles, sets: Sets, names: Names, copy_of: Callable[[ImageGroup, str, str], Copy]
) -> Iterator[Copy]:
    """Write the label file of each image, and yield where its picture belongs."""
    classes = {label: number for number, label in enumerate(index.survey.categories())}
    are_polygons = "segment" in index.survey.tasks
    for group in index.images():
        part = sets.add(group.name, group.records)
        lines = "".join(f"{line}\n" for line in _lines(group, classes, are_polygons=are_polygons))
        label = files.write(names.about(group.file_name, _SUFFIX), lines.encode(), inside=f"labels/{part}")
        name = str(label).removesuffix(_SUFFIX) + USUAL.suffix_of(group.name)
        yield copy_of(group, f"{files.folder.path}/images/{part}", name)


def _lines(group: ImageGroup, classes: dict[str, int], *, are_polygons: bool) -> Iterator[str]:
    size = (group.width, group.height)
    for box in group.boxes():
        if are_polygons:
            yield _polygon_line(classes[box.label], box.ring, *size)
        else:
            x, y = (box.x + box.width / 2) / size[0], (box.y + box.height / 2) / size[1]
            yield f"{classes[box.label]} {x:.6f} {y:.6f} {box.width / size[0]:.6f} {box.height / size[1]:.6f}"
    for segment in group.segments():
        yield _polygon_line(classes[segment.box.label], joined_ring(segment.rings), *size)


def _polygon_line(number: int, ring: Ring, width: int, height: int) -> str:
    return " ".join([str(number), *(f"{x / width:.6f} {y / height:.6f}" for x, y in ring)])


def _fitted(name: PurePosixPath) -> PurePosixPath:
    """Return `name` neither hidden nor in a folder `images`, which trainers pass over."""
    parts = [f"_{part[1:]}" if part.startswith(".") else part for part in beside_pictures(name).parts]
    return PurePosixPath(*(f"{part}_" if part == "images" else part for part in parts[:-1]), parts[-1])


def _data_yaml(labels: Iterable[str], sets: Sets) -> str:
    """Return the document.

    Trainers want both `train` and `val`, and stop at an empty folder: for one that is missing or empty another stands.
    """
    filled = [name for name in sets.names if sets.counts[name]] or sets.names
    paths = {"train": "images"} if sets.splits is None else {name: f"images/{name}" for name in filled}
    first = next(iter(paths.values()))
    paths = {"train": paths.get("train", first), "val": paths.get("val", paths.get("test", first)), **paths}
    head = 'path: ""  # the folder of this file\n' + "".join(f"{name}: {path}\n" for name, path in paths.items())
    return head + "names:\n" + "".join(f"  {number}: {_yaml_string(label)}\n" for number, label in enumerate(labels))


def _yaml_string(text: str) -> str:
    """Return `text` in double quotes, anything a YAML reader may refuse escaped (YAML 1.2, section 5.7)."""

    def escaped(char: str) -> str:
        if char in '"\\':
            return "\\" + char
        if char.isprintable():
            return char
        return f"\\U{ord(char):08x}"

    return '"' + "".join(map(escaped, text)) + '"'
