"""Where the pictures of finished records are.

A record names its picture relative to INPUT; `run.json` beside the records says where INPUT was,
`--root` overrules it. Nothing outside that folder is opened, whatever the records say, because
records may come from elsewhere. Pictures are opened only through `md3cli.images`.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING

from md3cli.errors import ExportError, UsageError
from md3cli.exporters.options import ExportOptions
from md3cli.finished_run import load_run_info
from md3cli.records import ImageItem, printable

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".heic", ".heif"]
)  # what a folder INPUT is searched for


class Pictures:
    """Finds and opens the pictures of one export."""

    def __init__(self, records: Path, options: ExportOptions) -> None:
        self._options = options
        root = options.root or load_run_info(records).root
        self.root = None if root is None else Path(os.path.realpath(root))
        if options.root is not None and not options.root.is_dir():
            raise UsageError(f"--root {printable(str(options.root))} is no folder; name the one the pictures are in")

    def require_root(self, format: str) -> None:
        """Raise where this export cannot know the pictures' folder."""
        if self.root is None:
            raise UsageError(f"{format} needs the pictures: no run.json beside the records says where; add --root DIR")

    def find(self, name: str, name_b64: str | None) -> Path | None:
        """The file of a record's image inside the root, links followed; None where it is not there."""
        if self.root is None or "\0" in name:
            return None
        try:
            exact = os.fsdecode(base64.b64decode(name_b64, validate=True)) if name_b64 else name
        except binascii.Error:
            return None
        # A link to a file elsewhere is the user's own doing; a name that climbs out is not.
        path = Path(os.path.normpath(self.root / exact))
        if not path.is_relative_to(self.root):
            return None
        return path if path.is_file() else None

    def refuse_inside(self, out: Path, name: str) -> None:
        """Raise if replacing `out` would delete the picture `name`."""
        if self.root is not None and Path(os.path.normpath(self.root / name)).is_relative_to(os.path.realpath(out)):
            raise UsageError(f"{printable(str(out))} holds the pictures themselves; name another -o")

    def read(self, path: Path, name: str) -> Image:
        """The upright RGB picture.

        Raises:
            ImageError: it cannot be read any more.
        """
        from md3cli.images import ImageLimits, read_image

        limits = ImageLimits(self._options.max_pixels, self._options.max_file_size)
        return read_image(ImageItem(name, str(path)), limits, self._options.background).image

    def read_bytes(self, path: Path, name: str) -> bytes:
        """The file as it is, for formats that carry pictures.

        Raises:
            ImageError: it is too large or cannot be read.
        """
        from md3cli.images import read_bytes

        return read_bytes(ImageItem(name, str(path)), self._options.max_file_size)


def missing_note(num_missing: int, num_images: int, first: str, root: Path | None) -> str:
    """The sentence about pictures that were not found.

    Raises:
        ExportError: not one was found, so the root must be wrong.
    """
    where, example = printable(str(root)), printable(first)
    if num_missing == num_images:
        raise ExportError(f"none of the {num_images} pictures is below {where} (first: {example}); set --root DIR")
    return f"{num_missing} of {num_images} pictures cannot be read below {where}: left out (first: {example})"
