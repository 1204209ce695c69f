"""Where the pictures of finished records are.

A record names its picture relative to INPUT; `run.json` beside the records says where INPUT was (a
folder, or a tar), `--root` overrules it. A name that leads out of there is not followed, because
records may come from elsewhere and some formats carry whole files. Pictures are opened only through
`md3cli.images`.
"""

from __future__ import annotations

import base64
import binascii
import os
import tarfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from md3cli.errors import ExportError, UsageError
from md3cli.exporters.grouping import ImageGroup
from md3cli.exporters.options import ExportOptions
from md3cli.finished_run import load_run_info
from md3cli.records import ImageItem, printable

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif"]
)  # what a folder INPUT is searched for


class Pictures:
    """Finds and opens the pictures of one export, and counts those that are not there.

    `root` is the folder or tar, None where nothing says it or it is gone.
    """

    def __init__(self, records: Path, options: ExportOptions) -> None:
        self._options = options
        root = options.root or load_run_info(records).root
        self.root = Path(os.path.realpath(root)) if root is not None and root.exists() else None
        self.num_found = 0
        self.num_missing = 0
        self._first_missing = ""

    def require_root(self, format: str) -> None:
        """Raise where this export cannot know where the pictures are."""
        if self.root is None:
            raise UsageError(f"{format} needs the pictures, and run.json does not say where they are; add --root DIR")

    def find(self, name: str, name_b64: str | None = None) -> ImageItem | None:
        """The picture of a record; None, and counted, where it is not there."""
        item = self._look_up(name, name_b64)
        self.num_found += item is not None
        self.num_missing += item is None
        if item is None:
            self._first_missing = self._first_missing or name
        return item

    def note_unreadable(self, name: str) -> None:
        """Count a picture that was found and cannot be read after all."""
        self.num_found -= 1
        self.num_missing += 1
        self._first_missing = self._first_missing or name

    def refuse_inside(self, out: Path, group: ImageGroup) -> None:
        """Raise if replacing `out` would delete the image's picture."""
        if self.root is not None and Path(os.path.normpath(self.root / group.name)).is_relative_to(
            os.path.realpath(out)
        ):
            raise UsageError(f"{printable(str(out))} holds the pictures themselves; name another -o")

    def read(self, item: ImageItem) -> Image:
        """The upright RGB picture.

        Raises:
            ImageError: it cannot be read any more.
        """
        from md3cli.images import ImageLimits, read_image

        limits = ImageLimits(self._options.max_pixels, self._options.max_file_size)
        return read_image(item, limits, self._options.background).image

    def read_bytes(self, item: ImageItem) -> bytes:
        """The file as it is, for formats that carry pictures.

        Raises:
            ImageError: it is too large or cannot be read.
        """
        from md3cli.images import read_bytes

        return read_bytes(item, self._options.max_file_size)

    def missing_note(self) -> tuple[str, ...]:
        """The sentence about pictures that are not there, if any.

        Raises:
            ExportError: not one is there, so the root must be wrong.
        """
        if not self.num_missing:
            return ()
        where, example = printable(str(self.root)), printable(self._first_missing)
        if not self.num_found:
            raise ExportError(
                f"none of {self.num_missing} pictures is below {where} (first: {example}); set --root DIR"
            )
        return (f"{self.num_missing} pictures cannot be read below {where}, they are left out (first: {example})",)

    def _look_up(self, name: str, name_b64: str | None) -> ImageItem | None:
        if self.root is None or "\0" in name:
            return None
        if self.root.is_file():
            return self._tar_items.get(name)
        try:
            exact = os.fsdecode(base64.b64decode(name_b64, validate=True)) if name_b64 else name
        except binascii.Error:
            return None
        # A link inside the root is the user's own doing; a name that climbs out need not be.
        path = os.path.normpath(self.root / exact)
        if self._options.is_confined and not Path(path).is_relative_to(self.root):
            return None
        return ImageItem(name, path, name_b64) if os.path.isfile(path) else None

    @cached_property
    def _tar_items(self) -> dict[str, ImageItem]:
        """The members of a tar; the one table here that grows with the pictures (300 bytes each)."""
        assert self.root is not None
        try:
            with tarfile.open(self.root, "r:") as tar:
                return {
                    (name := member.name.removeprefix("./")): ImageItem(
                        name, str(self.root), offset=member.offset_data, size=member.size
                    )
                    for member in tar
                    if member.isreg()
                }
        except (tarfile.TarError, OSError):
            return {}
