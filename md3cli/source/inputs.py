"""Where pictures are: what a path or an address means in its place, what it is called, whether --root allows it.

Pure but for links, which are followed to see where they lead.
"""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from md3cli.records import ImageItem, RowFailure, printable
from md3cli.remote.address import folder_of, is_address, is_within, join, shown, shown_name
from md3cli.source.kinds import STDIN, Input, Kind
from md3cli.source.names import existing_path
from md3cli.source.parquet import EmbeddedImage
from md3cli.source.walk import Glob


def image_item(name: str, path: str, offset: int = 0, size: int | None = None) -> ImageItem:
    """The picture at `path`, shown as `name`: valid UTF-8, with the exact bytes beside it where it is not."""
    try:
        name.encode()
    except UnicodeEncodeError:  # surrogate escapes
        data = os.fsencode(name)
        text, exact = data.decode("utf-8", "backslashreplace"), base64.b64encode(data).decode()
        return ImageItem(text, path, exact, offset, size)
    return ImageItem(name, path, None, offset, size)


def input_of(typed: str, kind: Kind, is_alone: bool) -> Input:
    """An INPUT with what the names of its pictures start with.

    Nothing, where it is alone; the INPUT as typed, where there are several. Of what is remote the whole address,
    but for the members of a tar and the rows of a manifest, which have names of their own.
    """
    if is_address(typed) and kind is Kind.FOLDER:
        typed = typed.rstrip("/")
    has_own_names = kind in (Kind.TAR, Kind.MANIFEST, Kind.STDIN)
    is_left_out = is_alone and (has_own_names or not is_address(typed))
    return Input(typed, kind, "" if is_left_out else shown(typed))


def row_folder(typed: str, root: Path | str | None) -> str:
    """What relative paths in a manifest or on stdin are relative to."""
    if root is not None:
        return str(root).rstrip("/") or "/"
    if is_address(typed):
        return folder_of(typed)
    return "" if typed == STDIN else os.path.dirname(typed)


def root_of(given: Input, root: Path | str | None) -> str:
    """What the names of the pictures of a lone INPUT are relative to: a folder, a tar, or an address."""
    if given.kind in (Kind.FOLDER, Kind.TAR):
        folder = given.typed
    elif given.kind is Kind.GLOB:
        folder = Glob.parse(given.typed).base
    elif given.kind is Kind.FILE:
        folder = folder_of(given.typed) if is_address(given.typed) else os.path.dirname(given.typed)
    else:
        folder = row_folder(given.typed, root)
    return shown(folder) if is_address(folder) else os.path.realpath(folder or ".")


class Confinement(NamedTuple):
    """`--root`: a folder with its links followed, or an address; None allows everything."""

    root: str | None
    typed: str

    @classmethod
    def to(cls, root: Path | str | None) -> Confinement:
        """The one that `--root` asks for."""
        if root is None:
            return cls(None, "")
        typed = str(root)
        return cls(typed if is_address(typed) else os.path.realpath(typed), typed)

    def failure_of(self, path: str) -> RowFailure | None:
        """The failure of a path or an address that, links followed, leaves the root."""
        if self.root is None or self._holds(self.root, path):
            return None
        return RowFailure("outside_root", f"outside of --root {printable(shown(self.typed))}")

    def _holds(self, root: str, path: str) -> bool:
        if is_address(path) or is_address(root):
            return is_address(path) and is_address(root) and is_within(path, root)
        real = os.path.realpath(path)
        return real == root or real.startswith(root.rstrip("/") + "/")


class RowPlaces(NamedTuple):
    """Where the pictures are that the rows of one manifest name.

    `folder` is what relative paths start from, `prefix` what their names start with, `may_fetch` whether rows may
    name addresses. Pictures inside the manifest itself are called below `cells`.
    """

    manifest: str
    cells: str
    folder: str
    prefix: str
    may_fetch: bool

    @classmethod
    def of(cls, given: Input, root: Path | str | None, *, is_alone: bool, may_fetch: bool) -> RowPlaces:
        """The places of the rows of INPUT `given`; a remote manifest may name addresses, for its user named one."""
        folder = row_folder(given.typed, root)
        prefix = "" if is_alone else shown(folder)
        return cls(given.typed, given.prefix, folder, prefix, may_fetch or is_address(given.typed))

    def item_of(self, image: str | EmbeddedImage) -> ImageItem:
        """The picture that a row's `image` means."""
        if type(image) is EmbeddedImage:
            name = os.path.join(self.cells, image.name)
            return replace(image_item(name, self.manifest, image.offset), row_group=image.row_group)
        assert type(image) is str
        if is_address(image):
            return image_item(shown_name(image), image)
        name = os.path.join(self.prefix, image) if self.prefix else image
        if is_address(self.folder):
            return image_item(name, join(self.folder, image))
        return image_item(name, existing_path(self.folder, image))
