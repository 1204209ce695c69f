"""YOLO: `data.yaml`, `labels/<image>.txt`, and copies of the pictures under `images/`.

A line is `class x-centre y-centre width height` in 0-1, or a polygon; where masks were asked for every line of the data
set is a polygon, since trainers take a mixed file for damaged. No score is written: a sixth column makes trainers
refuse a file. An image without objects has an empty file. A label's name is its image's with the suffix exchanged;
where `a.jpg` and `a.png` would share one, the second is `a.png.txt` and its picture `a.png.png`, so that trainers still
find them together. Trainers look for a picture's label where the LAST `/images/` of its path is `/labels/`, while other
readers take the two trees to mirror each other: so no folder below is called `images` (it becomes `images_`). Pictures
whose suffix or kind trainers skip get one that they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath

from md3cli.errors import ImageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import StagedFolder, candidates, portable, relative_name, staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.objects import Ring, joined_ring
from md3cli.exporters.pictures import FoundPicture, Pictures
from md3cli.refine.collection import Collection
from md3cli.source.walk import IMAGE_SUFFIXES

_TAKEN = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})  # by Ultralytics 8.3 and all after it
_NOT_TAKEN = frozenset({".gif", ".avif", ".heic", ".heif"})  # written as PNG instead; others are called .jpg


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write a data set that `yolo train data=OUT/data.yaml` takes as it is, if the pictures are found."""
    pictures = Pictures(records, options)
    num_images = num_points = 0
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="yolo") as folder,
    ):
        survey = index.survey
        classes = {label: number for number, label in enumerate(survey.categories())}
        (folder.path / "images").mkdir()
        (folder.path / "labels").mkdir()
        for group in index.images():
            pictures.refuse_inside(out, group)
            lines = _lines(group, classes, are_polygons="segment" in survey.tasks)
            _add_image(folder, group, lines, pictures)
            num_points += sum(1 for _ in group.points())
            num_images += 1
        (folder.path / "data.yaml").write_text(_data_yaml(list(classes)), encoding="utf-8")
    notes = [*survey.notes()]
    if pictures.num_missing:
        notes.append(
            f"{pictures.num_missing} pictures were not found or not readable: add --root DIR, or put them under images/"
        )
    if num_points:
        notes.append(f"{num_points} points were left out: YOLO has no place for them")
    return ExportReport("yolo", out, survey.num_records, num_images, survey.num_failures, tuple(notes))


def _lines(group: ImageGroup, classes: dict[str, int], *, are_polygons: bool) -> Iterator[str]:
    size = (group.width, group.height)
    for box in group.boxes():
        if are_polygons:
            yield _polygon_line(classes[box.label], box.ring, *size)
        else:
            centre = ((box.x + box.width / 2) / size[0], (box.y + box.height / 2) / size[1])
            extent = (box.width / size[0], box.height / size[1])
            yield " ".join([str(classes[box.label]), *(f"{value:.6f}" for value in (*centre, *extent))])
    for segment in group.segments():
        yield _polygon_line(classes[segment.box.label], joined_ring(segment.rings), *size)


def _polygon_line(number: int, ring: Ring, width: int, height: int) -> str:
    return " ".join([str(number), *(f"{x / width:.6f} {y / height:.6f}" for x, y in ring)])


def _add_image(folder: StagedFolder, group: ImageGroup, lines: Iterator[str], pictures: Pictures) -> None:
    """Write the label file, and copy the picture if it is there."""
    file, label = folder.create(PurePosixPath("labels") / name for name in _names(group.file_name))
    with file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    picture = pictures.find(group.picture_record, has_twins=group.has_twins)
    if picture is None:
        return
    image = folder.path / "images" / label.relative_to("labels").with_name(label.stem + _picture_suffix(group.name))
    image.parent.mkdir(parents=True, exist_ok=True)
    try:
        _place(picture, image, pictures)
    except ImageError:
        pictures.note_unreadable(group.name)


def _names(image: str) -> Iterator[PurePosixPath]:
    """Yield names of a label file, best first, none hidden or in a folder `images`: trainers pass those over.

    Nor is one in a folder called as a picture: in a tar or a bucket `b.jpg` and `b.jpg/c.jpg` both exist.
    """
    has_suffix = _is_picture_name(relative_name(image).name)
    for name in map(portable, candidates(image, ".txt", keep_suffix=not has_suffix)):
        parts = [f"_{part[1:]}" if part.startswith(".") else part for part in name.parts]
        folders = (f"{part}_" if part == "images" or _is_picture_name(part) else part for part in parts[:-1])
        yield PurePosixPath(*folders, parts[-1])


def _is_picture_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _picture_suffix(image: str) -> str:
    suffix = relative_name(image).suffix
    return suffix if suffix.lower() in _TAKEN else ".png" if suffix.lower() in _NOT_TAKEN else ".jpg"


def _place(picture: FoundPicture, image: Path, pictures: Pictures) -> None:
    """Copy the picture, or write as PNG what trainers do not take: they rewrite files in place, through links too."""
    if Path(picture.name).suffix.lower() in _NOT_TAKEN:
        pictures.read(picture).save(image, "PNG")
        return
    content = pictures.read_bytes(picture)  # what is no picture, or not the record's, is not carried
    if picture.size is not None:
        image.write_bytes(content)
        return
    pictures.copy(picture, image)


def _data_yaml(labels: list[str]) -> str:
    head = 'path: ""  # the folder of this file\ntrain: images\nval: images\nnames:\n'
    return head + "".join(f"  {number}: {_yaml_string(label)}\n" for number, label in enumerate(labels))


def _yaml_string(text: str) -> str:
    """Return `text` in double quotes, anything a YAML reader may refuse escaped (YAML 1.2, section 5.7)."""

    def escaped(char: str) -> str:
        if char in '"\\':
            return "\\" + char
        if char.isprintable():
            return char
        return f"\\U{ord(char):08x}"

    return '"' + "".join(map(escaped, text)) + '"'
