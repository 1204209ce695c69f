"""Pictures of a data set: put where their names say, as they are where readers take them, else as PNG.

Several at once, a bounded number in flight. What is no picture, or not the record's, is not carried; trainers rewrite
files in place, through links too, so a picture is a copy unless the user asked for links. Knows no format's layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from md3cli.errors import ImageError
from md3cli.exporters.at_once import holding, in_order
from md3cli.exporters.files import StagedFolder
from md3cli.exporters.grouping import ImageGroup
from md3cli.exporters.names import Names, suffix_in
from md3cli.exporters.pictures import FoundPicture, Pictures, exif_turns, pillow_opens
from md3cli.exporters.redrawn import encoded, stays_jpeg
from md3cli.exporters.splits import Sets


@dataclass(frozen=True, slots=True)
class Kinds:
    """Which pictures a format's readers take.

    Attributes:
        taken: suffixes that they look for; a picture with another one is called `.jpg`.
        remade: suffixes of kinds that they cannot decode; these become PNG.
        formats: Pillow's names of what a file must be, whatever its suffix says, else it becomes PNG; None: anything.
        are_whole: a file must decode to its end in plain Pillow, too.
        not_opened: pairs of Pillow's format and mode that these readers stop at; such files become PNG.
    """

    taken: frozenset[str]
    remade: frozenset[str]
    formats: tuple[str, ...] | None = None
    are_whole: bool = False
    not_opened: frozenset[tuple[str, str]] = frozenset()

    def suffix_of(self, image: str) -> str:
        """Return the suffix that the picture called `image` gets."""
        suffix = suffix_in(image)
        if suffix.lower() in self.remade:
            return ".png"
        return suffix if suffix.lower() in self.taken else ".jpg"


USUAL = Kinds(  # by Ultralytics 8.3 and all after it; supervision, CVAT and labelme take no fewer
    taken=frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}),
    remade=frozenset({".gif", ".avif", ".heic", ".heif"}),
    formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF"),  # JPEG's opener gives MPO, too; others are "corrupt" to trainers
)


JPEG_QUALITY = 95  # of pictures that are drawn anew


class Copy(NamedTuple):
    """A picture and its place: the file `name` (with `/`) in `folder`.

    `picture` is None where it is not there, and `part` is its set's name.
    """

    group: ImageGroup
    folder: str
    name: str
    picture: FoundPicture | None
    part: str

    @classmethod
    def of(cls, group: ImageGroup, folder: str, name: str, part: str = "", *, pictures: Pictures, out: Path) -> Copy:
        """Find a group's picture, which belongs at `name` in `folder`.

        Raises:
            UsageError: it lies in `out`, which is to be replaced.
        """
        pictures.refuse_inside(out, group)
        picture = pictures.find(group.picture_record, has_twins=group.has_twins)
        return cls(group, folder, name, picture, part)


def named_copies(
    groups: Iterable[ImageGroup],
    folder: StagedFolder,
    folders: Mapping[str, str],
    sets: Sets,
    names: Names,
    kinds: Kinds,
    copy_of: Callable[[ImageGroup, str, str, str], Copy],
) -> Iterator[Copy]:
    """Yield where each picture goes in a data set without label files: its name alone must be its own.

    `folders` has the folder of each set. What stands at a place until the picture is put there is an empty file.
    """
    for group in groups:
        part, suffix = sets.place(group.name, group.records), kinds.suffix_of(group.name)
        is_kept = suffix.lower() == suffix_in(group.name).lower()
        found = names.of(group.file_name, suffix, keep_suffix=not is_kept)
        name = folder.write(found, b"", inside=folders[part])
        copy = copy_of(group, f"{folder.path}/{folders[part]}", str(name), part)
        if copy.picture is None:
            os.unlink(f"{copy.folder}/{name}")
        yield copy


def copied(
    copies: Iterable[Copy], pictures: Pictures, kinds: Kinds, *, are_upright: bool = False
) -> Iterator[tuple[Copy, bool]]:
    """Put each picture in its place, and yield it, in order, with whether it is there; `pictures` counts the others.

    With `are_upright` one that its EXIF turns is drawn anew, for readers that look at no EXIF (labelformat, globox,
    X-AnyLabeling) and would have its boxes somewhere else.

    Raises:
        OSError: a picture cannot be written.
    """

    def put(copy: Copy) -> tuple[Copy, bool]:
        if copy.picture is None:
            return copy, False
        target = Path(copy.folder, copy.name)
        try:
            with holding(copy.group.width, copy.group.height):
                _put(copy.picture, target, pictures, kinds, are_upright=are_upright)
        except ImageError:
            target.unlink(missing_ok=True)
            return copy, False
        return copy, True

    for copy, is_there in in_order(put, copies, is_quick=lambda copy: copy.picture is None):
        if copy.picture is not None and not is_there:
            pictures.note_unreadable(copy.group.name)
        yield copy, is_there


def missing_notes(pictures: Pictures, place: str = "under images/") -> Iterator[str]:
    """Yield sentences as `Pictures.notes`, where labels fit pictures that are put there later."""
    yield from pictures.file_notes()
    if pictures.num_missing:
        yield f"{pictures.num_missing} pictures were not found or not readable: add --root DIR, or put them {place}"


def _put(picture: FoundPicture, target: Path, pictures: Pictures, kinds: Kinds, *, are_upright: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    content = None
    if suffix_in(picture.name).lower() not in kinds.remade:
        content = pictures.read_bytes(picture)
    if content is None or not _is_taken(content, kinds):
        pictures.read(picture).save(target, "PNG")
    elif are_upright and exif_turns(content):
        target.write_bytes(encoded(pictures.read(picture), JPEG_QUALITY if stays_jpeg(target.name) else None))
    elif picture.size is not None or _is_restored(content):  # a member of a tar, or not to be linked
        target.write_bytes(content)
    else:
        pictures.copy(picture, target)


def _is_taken(content: bytes, kinds: Kinds) -> bool:
    if kinds.formats is None:
        return True
    return pillow_opens(content, kinds.formats, is_whole=kinds.are_whole, not_opened=kinds.not_opened)


def _is_restored(content: bytes) -> bool:
    """Return whether Ultralytics takes a JPEG for damaged: up to 8.3 it writes such a file anew, through hard links."""
    return content.startswith(b"\xff\xd8") and not content.endswith(b"\xff\xd9")
