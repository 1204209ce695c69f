"""Overlay: every picture with its boxes, masks and points drawn on it, in a folder of pictures only.

A picture keeps its name and place: JPEG stays JPEG (quality 90), PNG stays PNG, any other becomes
`name.webp.png`. Nothing of the original's metadata (EXIF, GPS, XMP, comments, profiles) is carried
over. Images whose picture is not there any more are left out and counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image

from md3cli.errors import ImageError
from md3cli.exporters.drawing import draw_records
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.names import candidates, relative_name
from md3cli.exporters.options import ExportOptions, ExportReport
from md3cli.exporters.pictures import Pictures
from md3cli.exporters.publishing import StagedFolder, staged_folder

JPEG_QUALITY = 90
_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})


def export(records: Path, out: Path, options: ExportOptions) -> ExportReport:
    """One picture for each image that has an answered record."""
    pictures = Pictures(records, options)
    pictures.require_root("overlay")
    num_images = 0
    with (
        ImageIndex(records) as index,
        staged_folder(out, overwrite=options.overwrite, format="overlay") as folder,
    ):
        for group in index.images():
            pictures.refuse_inside(out, group)
            image = _drawn(group, pictures)
            if image is not None:
                _save(folder, group.file_name, image)
                num_images += 1
        survey = index.survey
        notes = (*survey.notes(), *pictures.missing_note())
    return ExportReport("overlay", out, survey.num_records, num_images, survey.num_failures, notes)


def _drawn(group: ImageGroup, pictures: Pictures) -> Image.Image | None:
    item = pictures.find(group.picture_record, has_twins=group.has_twins)
    if item is None:
        return None
    try:
        image = pictures.read(item)
    except ImageError:
        pictures.note_unreadable(group.name)
        return None
    if image.size != (group.width, group.height):  # another file stands there now: boxes scale with it
        group = group._replace(width=image.width, height=image.height)
    draw_records(image, group)
    return image


def _save(folder: StagedFolder, name: str, image: Image.Image) -> None:
    image.info.clear()  # EXIF, XMP, comment, profile: the writers would carry some of it over
    suffix = relative_name(name).suffix
    is_jpeg = suffix.lower() in _JPEG_SUFFIXES
    if is_jpeg or suffix.lower() == ".png":
        names = candidates(name, suffix)
    else:
        names = candidates(name, ".png", keep_suffix=True)
    file, _ = folder.create(names)
    with file:
        _encode(image, file, is_jpeg)


def _encode(image: Image.Image, file: BinaryIO, is_jpeg: bool) -> None:
    if is_jpeg:
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # thin coloured lines smear at 4:2:0
    else:
        image.save(file, "PNG", compress_level=4)
