"""INPUT as the user typed it, turned into a lazy stream of rows: a picture and what is asked of it.

Opens no picture and decides nothing about its content. Rows come in input order; memory is bounded
by one folder's names a level, one manifest line, or one tar header.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from md3cli.errors import InputError, MissingExtraError, RowError, UsageError
from md3cli.input_kinds import STDIN, Input, Kind, check_readable, kind_of
from md3cli.manifest import ManifestRow, manifest_rows, open_regular, path_rows
from md3cli.records import ImageItem, Request, RowFailure, SourceRow, Task, printable
from md3cli.row_requests import ROW_COLUMNS, refuse_address, row_image, row_requests
from md3cli.tar_index import tar_members
from md3cli.walk import Glob, PathFilter, Walk, has_image_suffix


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Which pictures: INPUT as typed (none for a text-only query) and what narrows it.

    `shard` (i, n) keeps the images whose name hashes to i modulo n. `limit` counts rows.
    """

    inputs: tuple[str, ...] = ()
    recursive: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int | None = None
    shard: tuple[int, int] | None = None
    root: Path | None = None
    remote: bool = False
    follow_links: bool = False


def open_source(
    spec: SourceSpec,
    requests: tuple[Request, ...],
    *,
    defaults: Request | None = None,
    stdin: IO[bytes] | None = None,
) -> Source:
    """The rows of `spec`, each asked `requests` unless a manifest row says otherwise.

    `defaults` holds the settings for manifest rows where the command makes no request of its own.
    `stdin` is read for INPUT `-`, by default the process's own.

    Raises:
        InputError: an INPUT does not exist, cannot be opened, or is of a kind that is not read.
        UsageError: `--root` is no folder.
        MissingExtraError: a URL, or `remote`.
    """
    if spec.remote:
        raise MissingExtraError("--remote", "remote")
    if spec.root is not None and not spec.root.is_dir():
        raise UsageError(f"--root {printable(str(spec.root))} is not a folder; name the one that the images are in")
    is_alone = len(spec.inputs) == 1
    inputs = tuple(Input(typed, kind_of(typed, is_alone), "" if is_alone else typed) for typed in spec.inputs)
    for given in inputs:
        check_readable(given, is_alone)
    defaults = requests[0] if requests else defaults or Request(Task.QUERY)
    if stdin is None and STDIN in spec.inputs:
        if sys.stdin is None:
            raise InputError("stdin is closed, so there is nothing to read for INPUT -; pipe a list of paths to it")
        stdin = sys.stdin.buffer
    return Source(spec, inputs, requests, defaults, stdin or io.BytesIO())


class _Found(NamedTuple):
    """A row before shards and limits; `key` is what its shard is computed from."""

    key: str
    row: SourceRow


class Source:
    """Iterable over the rows of INPUT, again and again (but for stdin).

    Attributes:
        skipped: entries left out by the last iteration so far, by reason.
        root: the folder (or tar) that the names of the pictures are relative to.
    """

    def __init__(
        self,
        spec: SourceSpec,
        inputs: tuple[Input, ...],
        requests: tuple[Request, ...],
        defaults: Request,
        stdin: IO[bytes],
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self._spec = spec
        self._inputs = inputs
        self._requests = requests
        self._defaults = defaults
        self._stdin = stdin
        self._filter = PathFilter.of(spec.include, spec.exclude)
        self._confine_to = os.path.realpath(spec.root) if spec.root is not None else None
        self.root = self._find_root()

    def __iter__(self) -> Iterator[SourceRow]:
        """The rows; the first step raises InputError where INPUT cannot be read."""
        self.skipped = Counter()
        return self._rows(self.skipped)

    def count_rows(self, budget_s: float = 1.0) -> int | None:
        """How many rows there are, for a progress bar; None for stdin, or when that takes longer than `budget_s`."""
        if any(given.kind is Kind.STDIN for given in self._inputs):
            return None
        deadline = time.monotonic() + budget_s
        num_rows = 0
        for _ in self._rows(Counter()):
            num_rows += 1
            if num_rows % 64 == 0 and time.monotonic() > deadline:
                return None
        return num_rows

    def _find_root(self) -> str:
        if len(self._inputs) != 1:
            return os.path.realpath(self._spec.root or ".") if not self._inputs else os.getcwd()
        typed, kind, _ = self._inputs[0]
        if kind in (Kind.FOLDER, Kind.TAR):
            return os.path.realpath(typed)
        if kind is Kind.GLOB:
            return os.path.realpath(Glob.parse(typed).base or ".")
        if kind is Kind.FILE:
            return os.path.realpath(os.path.dirname(typed) or ".")
        return os.path.realpath(self._row_folder(typed))

    def _row_folder(self, typed: str) -> str:
        """What relative paths in a manifest or on stdin are relative to."""
        if self._spec.root is not None:
            return str(self._spec.root)
        return "" if typed == STDIN else os.path.dirname(typed)

    # -- rows ------------------------------------------------------------------------------------

    def _rows(self, skipped: Counter[str]) -> Iterator[SourceRow]:
        found = self._found(skipped)
        if self._spec.shard is not None:
            found = _in_shard(found, self._spec.shard, skipped)
        return (row for _, row in islice(found, self._spec.limit))

    def _found(self, skipped: Counter[str]) -> Iterator[_Found]:
        if not self._inputs:
            yield _Found("", SourceRow(None, self._requests))
        for given in self._inputs:
            if given.kind is Kind.FOLDER or given.kind is Kind.GLOB:
                yield from self._walked(given, skipped)
            elif given.kind is Kind.TAR:
                yield from self._tar_members(given.typed, given.prefix, skipped)
            elif given.kind is Kind.FILE:
                yield self._picture(given.prefix or os.path.basename(given.typed), given.typed)
            else:
                yield from self._manifest(given, skipped)

    def _picture(self, name: str, path: str) -> _Found:
        image = image_item(name, path)
        return _Found(image.name, SourceRow(image, self._requests, failure=self._outside(path)))

    def _outside(self, path: str) -> RowFailure | None:
        """The failure of a path that, links followed, leaves `--root`."""
        if self._confine_to is None:
            return None
        real = os.path.realpath(path)
        if real == self._confine_to or real.startswith(self._confine_to.rstrip("/") + "/"):
            return None
        return RowFailure("outside_root", f"outside of --root {printable(str(self._spec.root))}")

    def _walked(self, given: Input, skipped: Counter[str]) -> Iterator[_Found]:
        glob = Glob.parse(given.typed) if given.kind is Kind.GLOB else None
        folder = given.typed if glob is None else glob.base or "."
        prefix = given.prefix if glob is None or not given.prefix else glob.base
        walk = Walk(self._spec.recursive, self._spec.follow_links, self._filter, skipped)
        path_head, name_head = os.path.join(folder, ""), os.path.join(prefix, "")
        for relative in walk.files(folder, glob):
            path, name = path_head + relative, name_head + relative
            if relative.lower().endswith(".tar"):
                yield from self._tar_members(path, name, skipped)
            else:
                yield self._picture(name, path)

    def _tar_members(self, path: str, prefix: str, skipped: Counter[str]) -> Iterator[_Found]:
        """Pictures inside a tar, by suffix, as byte ranges of it; damage is one more row."""
        try:
            with open_regular(path) as file:
                for member in tar_members(file, path):
                    name = member.name.removeprefix("./")
                    if reason := self._why_not(member, name):
                        skipped[reason] += 1
                    elif not member.isdir():
                        image = image_item(os.path.join(prefix, name), path, member.offset_data, member.size)
                        yield _Found(image.name, SourceRow(image, self._requests, failure=self._outside(path)))
        except (InputError, RowError) as error:
            if isinstance(error, InputError) and not prefix:
                raise
            failure = RowFailure("decode", str(error))
            image = image_item(prefix or os.path.basename(path), path)
            yield _Found(image.name, SourceRow(image, self._requests, failure=failure))

    def _why_not(self, member: tarfile.TarInfo, name: str) -> str:
        """Why a tar's member is left out; empty where it is not, and for folders."""
        if member.isdir():
            return ""
        if any(part.startswith(".") for part in name.split("/")):
            return "hidden"
        if not has_image_suffix(name):
            return "other suffix"
        if not member.isreg() or member.issparse():
            return "links inside a tar"
        return "" if self._filter.keeps(name) else "excluded"

    def _manifest(self, given: Input, skipped: Counter[str]) -> Iterator[_Found]:
        folder = self._row_folder(given.typed)
        prefix = folder if len(self._inputs) > 1 else ""
        is_stdin = given.kind is Kind.STDIN
        rows = path_rows(self._stdin, has_json=True) if is_stdin else manifest_rows(given.typed)
        for entry in rows:
            row = self._manifest_row(entry, folder, prefix)
            if row.image is not None and not self._filter.keeps(row.image.name):
                skipped["excluded"] += 1
            else:
                yield _Found(row.image.name if row.image else f"{given.typed} {entry.where}", row)

    def _manifest_row(self, entry: ManifestRow, folder: str, prefix: str) -> SourceRow:
        """What a manifest's row asks; a failure keeps as much of the row as could be read."""
        image: ImageItem | None = None
        asked = self._requests[:1] or (self._defaults,)
        columns = entry.columns or {}
        try:
            if entry.columns is None:
                raise RowError("bad_row", entry.problem)
            if name := row_image(columns):
                path = name if name.startswith("/") or not folder else f"{folder}/{name}"
                image = image_item(os.path.join(prefix, name) if prefix else name, path)
                refuse_address(name)
            asked = row_requests(columns, self._requests, self._defaults)
            failure = self._outside(image.path) if image else None
        except RowError as error:
            failure = RowFailure(error.type, f"{entry.where}: {error}")
        meta = {column: value for column, value in columns.items() if column not in ROW_COLUMNS}
        return SourceRow(image, asked, meta, failure)


def image_item(name: str, path: str, offset: int = 0, size: int | None = None) -> ImageItem:
    """The picture at `path`, shown as `name`: valid UTF-8, with the exact bytes beside it where it is not."""
    try:
        name.encode()
    except UnicodeEncodeError:  # surrogate escapes
        data = os.fsencode(name)
        shown, exact = data.decode("utf-8", "backslashreplace"), base64.b64encode(data).decode()
        return ImageItem(shown, path, exact, offset, size)
    return ImageItem(name, path, None, offset, size)


def _in_shard(found: Iterator[_Found], shard: tuple[int, int], skipped: Counter[str]) -> Iterator[_Found]:
    index, count = shard
    for item in found:
        digest = hashlib.sha256(item.key.encode("utf-8", "surrogateescape")).digest()
        if int.from_bytes(digest[:8], "big") % count == index:
            yield item
        else:
            skipped["other shards"] += 1
