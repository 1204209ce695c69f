"""Pictures that an export draws anew: which are found, how their files are called, and the files themselves.

A picture keeps its name and place: JPEG stays JPEG, PNG stays PNG, any other becomes `name.webp.png`. A file is made
of pixels alone: nothing of the original's metadata (EXIF, GPS, XMP, comments, profiles) is carried over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from md3cli.exporters.grouping import ImageGroup
from md3cli.exporters.names import candidates, relative_name
from md3cli.exporters.pictures import FoundPicture, Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG_SIDE_PX = 65_500  # libjpeg writes no more
_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})


def found_pictures(
    groups: Iterable[ImageGroup], pictures: Pictures, out: Path
) -> Iterator[tuple[ImageGroup, FoundPicture]]:
    """Yield each image whose picture is there; `pictures` counts the others.

    Raises:
        UsageError: a picture lies in `out`, which is to be replaced.
    """
    for group in groups:
        pictures.refuse_inside(out, group)
        picture = pictures.find(group.picture_record, has_twins=group.has_twins)
        if picture is not None:
            yield group, picture


def stays_jpeg(name: str) -> bool:
    """Return whether the picture called `name` is drawn anew as a JPEG file."""
    return relative_name(name).suffix.lower() in _JPEG_SUFFIXES


def redrawn_names(name: str) -> Iterator[PurePosixPath]:
    """Yield names for the new file of the picture called `name`, the best first."""
    suffix = relative_name(name).suffix
    is_kept = stays_jpeg(name) or suffix.lower() == ".png"
    return candidates(name, suffix if is_kept else ".png", keep_suffix=not is_kept)


def encoded(image: Image, quality: int | None) -> bytes:
    """Return the file of a picture, with nothing but its pixels in it: JPEG of a quality, or PNG where it is None."""
    image.info.clear()  # EXIF, XMP, comment, profile: the writers would carry some of it over
    file = BytesIO()
    if quality is None:
        image.save(file, "PNG", compress_level=4)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0)  # thin lines and sharp edges smear at 4:2:0
    return file.getvalue()
