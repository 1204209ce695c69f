"""INPUT as the user typed it, turned into a lazy stream of rows: a picture and what is asked of it.

Opens no picture and decides nothing about its content. Rows come in input order; memory is bounded by one folder's
names a level, one manifest line, or one key of a tar.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, cached_property
from itertools import takewhile
from typing import IO, Any, NamedTuple

from md3cli.config import ColumnOptions, SourceSpec
from md3cli.errors import InputError, MissingExtraError, NoImageColumnError, RowError, UsageError
from md3cli.records import ImageItem, Request, RowFailure, SourceRow, Task, printable
from md3cli.remote.address import is_address, shown
from md3cli.remote.hosts import is_installed, require_extra
from md3cli.source.coco import CocoFile
from md3cli.source.columns import ColumnRules
from md3cli.source.inputs import (
    Confinement,
    Input,
    RowPlaces,
    check_readable,
    confined,
    image_item,
    inputs_of,
    root_of,
    start_of_walk,
)
from md3cli.source.listed import check_regions, notes_on_files, with_files
from md3cli.source.look import FirstRows, check_asked, check_columns, notes_on
from md3cli.source.manifest import LiveLines, ManifestRow, manifest_rows, open_input, path_rows
from md3cli.source.rows import Asked, RowMaker
from md3cli.source.walk import PARQUET, SHARDS, STDIN, TAR, Kind, PathFilter, Walk, has_image_suffix, suffix_of
from md3cli.source.webdataset import tar_pictures


def open_source(
    spec: SourceSpec,
    requests: tuple[Request, ...],
    *,
    then: tuple[Request, ...] = (),
    defaults: Request | None = None,
    stdin: IO[bytes] | None = None,
    narrowed: Callable[[SourceRow], SourceRow] | None = None,
) -> Source:
    """Return the rows of `spec`, each asked `requests` unless a manifest row says otherwise.

    `then` are templates of what is asked about each object that a row's detect and segment find, where the row says
    nothing else. `defaults` holds the settings for manifest rows where the command makes no request of its own. `stdin`
    is read for INPUT `-`; None: the process's own. `narrowed` returns a row with those of its requests that are to be
    asked; a row that has none left is left out.

    Raises:
        InputError: an INPUT does not exist, cannot be opened, or is of a kind that is not read.
        UsageError: `--root` is no folder, something is remote and `offline` forbids it, or what is to be made of the
            columns makes no sense.
        MissingExtraError: something is remote, and what fetches it is not installed.
    """
    _check_remote(spec)
    rules = ColumnRules(spec.columns, requests)
    if not spec.inputs and spec.columns.identity():
        raise UsageError("--map, --const, --template and --regions are about the rows of INPUT, and there is no INPUT")
    is_alone = len(spec.inputs) == 1
    inputs = tuple(given for typed in spec.inputs for given in inputs_of(typed, is_alone))
    check_regions(inputs, rules, requests, then)
    for given in inputs:
        if given.kind is not Kind.COCO:
            check_readable(given, is_alone and given.base is None, rules.renamed)
    inputs, files = with_files(inputs, spec, rules)
    if stdin is None and STDIN in spec.inputs:
        if sys.stdin is None:
            raise InputError("stdin is closed, so there is nothing to read for INPUT -; pipe a list of paths to it")
        stdin = sys.stdin.buffer
    defaults = requests[0] if requests else defaults or Request(Task.QUERY)
    asked = Asked(requests, then, defaults)
    return Source(spec, inputs, asked, rules, stdin or io.BytesIO(), files, narrowed)


def _check_remote(spec: SourceSpec) -> None:
    root = None if spec.root is None else str(spec.root)
    remote = [text for text in (*spec.inputs, root) if text is not None and is_address(text)]
    if spec.offline and (remote or spec.remote):
        raise UsageError(f"{printable(shown(remote[0])) if remote else '--remote'} and --offline exclude each other")
    if spec.remote and not is_installed("aiohttp"):
        raise MissingExtraError("--remote", "remote")
    for address in remote:
        require_extra(address)
    if root is not None and not is_address(root) and not os.path.isdir(root):
        raise UsageError(f"--root {printable(root)} is not a folder; name the one that the images are in")


# In `Source.skipped`.
OTHER_SHARDS, HAVE_LABELS = "other shards", "questions that have labels"
DOUBLED, WITHOUT_BOXES = "entries of pictures that are listed before", "pictures without boxes"

# What a row's shard is computed from, and the row, before shards and limits; None: the next has not come yet.
_Found = tuple[str, SourceRow] | None


class RowCount(NamedTuple):
    """How many rows INPUT has, and how many requests they are asked in all."""

    rows: int
    requests: int


class Source:
    """The rows of INPUT, to be iterated over again and again (but for stdin).

    Attributes:
        skipped: entries left out by the last iteration so far, by reason.
        root: the folder (or tar) that the names of the pictures are relative to.
        watched_lines: lines of a manifest that could not be read by an earlier start; set before an iteration.
        readable_lines: those of them that could be read by an iteration since.
    """

    def __init__(
        self,
        spec: SourceSpec,
        inputs: tuple[Input, ...],
        asked: Asked,
        rules: ColumnRules,
        stdin: IO[bytes],
        files: Mapping[str, CocoFile],
        narrowed: Callable[[SourceRow], SourceRow] | None = None,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.watched_lines: frozenset[int] = frozenset()
        self.readable_lines: set[int] = set()
        self._spec, self._rules = spec, rules
        self._inputs, self._files, self._narrowed = inputs, files, narrowed
        self._requests = asked.requests
        self._stdin_file, self._may_wait = stdin, True
        self._has_walked_rows = False  # rows of Parquet files, which may ask what they like
        self._filter = PathFilter.of(spec.include, spec.exclude)
        self._made = RowMaker(asked, rules, Confinement.to(spec.root))
        self.root = self._find_root()

    def __iter__(self) -> Iterator[SourceRow]:
        """Yield the rows; the first step raises InputError where INPUT cannot be read."""
        return filter(None, self._all_rows(may_wait=True))

    def rows_so_far(self) -> Iterator[SourceRow | None]:
        """Yield the rows, and None where the next one has not come on stdin yet: `wait` for it, and go on."""
        return self._all_rows(may_wait=False)

    def wait(self, timeout_s: float) -> None:
        """Wait until more comes on stdin, at most `timeout_s` seconds."""
        self._stdin.wait(timeout_s)

    @cached_property
    def _stdin(self) -> LiveLines:
        return LiveLines(self._stdin_file)

    def _all_rows(self, *, may_wait: bool) -> Iterator[SourceRow | None]:
        self.skipped = Counter()
        self._may_wait = may_wait
        return self._rows(self.skipped)

    def is_empty(self) -> bool:
        """Return whether the whole of INPUT, whatever the shard, has no row; `skipped` then says what was left out.

        Raises:
            InputError: INPUT cannot be read.
        """
        self.skipped = Counter()
        return next(self._found(self.skipped), None) is None

    def has_picture(self, is_wanted: Callable[[str], bool]) -> bool:
        """Return whether the whole of INPUT, whatever the shard, has a picture whose name is wanted.

        Raises:
            InputError: INPUT cannot be read.
        """
        rows = (item[1] for item in self._found(Counter()) if item is not None)
        return any(row.image is not None and is_wanted(row.image.name) for row in rows)

    @property
    def asks_nothing_else(self) -> bool:
        """Return whether the command alone says what is asked, of all of INPUT; True may become False as rows are read.

        A record of a template's is known by its own prompt; constants may be settings, of which a record tells nothing.
        """
        spec = self._spec
        is_narrowed = bool(spec.include or spec.exclude or spec.limit is not None or spec.shard or self._narrowed)
        is_narrowed = is_narrowed or bool(spec.columns.constants or spec.columns.renamed)
        kinds = {given.kind for given in self._inputs}
        is_of_boxes = self._rules.region_pad is not None
        of_pictures = {Kind.FOLDER, Kind.GLOB, Kind.FILE, Kind.TAR, Kind.COCO}
        return not (is_narrowed or is_of_boxes or self._has_walked_rows) and kinds <= of_pictures

    @cached_property
    def may_ask_then(self) -> bool:
        """Whether rows may say what is asked about each object; a folder that holds Parquet files has nothing else."""
        walked, rows = (Kind.FOLDER, Kind.GLOB), (Kind.MANIFEST, Kind.STDIN)
        return any(
            given.kind in rows or (given.kind in walked and self._first_file(given).lower().endswith(PARQUET))
            for given in self._inputs
        )

    @property
    def has_one_row(self) -> bool:
        """Return whether INPUT is a single picture, or there is none."""
        return [given.kind for given in self._inputs] in ([], [Kind.FILE])

    def first_look(self) -> list[str]:
        """Look at the first rows before anything slow; return what the user should know of the columns, a line each.

        stdin is not looked at; its first row decides when it comes.

        Raises:
            InputError: INPUT cannot be read.
            UsageError: a column that --map or a prompt names is not there, or nothing says what to ask.
        """
        rows, options = FirstRows(), self._spec.columns
        needs_columns = bool(options.renamed or set(self._rules.placeholders) - self._rules.constants.keys())
        for given in self._inputs:
            path = self._first_file(given) if needs_columns or given.kind in (Kind.MANIFEST, Kind.COCO) else ""
            if given.kind is Kind.MANIFEST or path.lower().endswith(PARQUET):
                may_fail = given.kind is not Kind.MANIFEST and not is_address(path)
                rows.take(manifest_rows(path, self._rules.renamed), self._rules, self._requests, may_fail=may_fail)
            elif path.lower().endswith(TAR):
                rows.take_sidecars(self._sidecars(path), self._rules)
            elif given.kind is Kind.COCO:
                rows.take_sidecars((picture.data for picture in self._files[path].pictures), self._rules)
        if any(given.kind is Kind.STDIN for given in self._inputs):
            return []
        where = printable(shown(self._spec.inputs[0])) if len(self._spec.inputs) == 1 else "INPUT"
        check_columns(rows, options, self._rules, where)
        if all(given.kind is Kind.MANIFEST for given in self._inputs):
            check_asked(rows, self._requests, self._rules, where)
        return [*notes_on(rows, self._requests, self._rules, where), *notes_on_files(self._inputs, self._files)]

    def _first_file(self, given: Input) -> str:
        """Return INPUT where it is a file, or what its walk finds first; empty where that is nothing."""
        if given.kind is not Kind.GLOB and given.kind is not Kind.FOLDER:
            return given.typed
        folder, glob = start_of_walk(given)
        first = next(self._walk(folder, Counter()).files(folder, glob), "")
        return os.path.join(folder, first)

    def _sidecars(self, path: str) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of the pictures of a tar, as far as it can be read."""
        with suppress(InputError, RowError), open_input(path) as file:
            for picture in tar_pictures(file, shown(path), self._why_not, Counter()):
                yield picture.columns

    def count(self, budget_s: float = 1.0) -> RowCount | None:
        """Count rows and requests beforehand; None for stdin, for what is remote, and after `budget_s` seconds."""
        if any(given.kind is Kind.STDIN or is_address(given.typed) for given in self._inputs):
            return None
        deadline = time.monotonic() + budget_s
        num_rows = num_requests = 0
        for row in filter(None, self._rows(Counter())):
            num_rows += 1
            num_requests += len(row.requests)
            if num_rows % 64 == 0 and time.monotonic() > deadline:
                return None
        return RowCount(num_rows, num_requests)

    def _find_root(self) -> str:
        if len(self._spec.inputs) != 1:
            return os.getcwd() if self._inputs else Confinement.to(self._spec.root).root or os.getcwd()
        return root_of(self._inputs[0], self._spec.root)

    # -- rows ------------------------------------------------------------------------------------

    def _rows(self, skipped: Counter[str]) -> Iterator[SourceRow | None]:
        found = self._found(skipped)
        if self._spec.shard is not None:
            found = _in_shard(found, self._spec.shard, skipped)
        if self._narrowed is not None:
            found = _with_requests_left(found, self._narrowed, skipped)
        if self._spec.limit is not None:
            found = _up_to(self._spec.limit, found)
        return (None if item is None else item[1] for item in found)

    def _found(self, skipped: Counter[str]) -> Iterator[_Found]:
        if not self._inputs:
            yield ("", SourceRow(None, self._requests))
        for given in self._inputs:
            if given.kind is Kind.FOLDER or given.kind is Kind.GLOB:
                yield from self._walked(given, skipped)
            elif given.kind is Kind.TAR:
                yield from self._tar_members(given.typed, given.prefix, skipped)
            elif given.kind is Kind.FILE:
                yield self._picture(given.prefix or os.path.basename(given.typed), given.typed)
            elif given.kind is Kind.COCO:
                yield from self._listed_pictures(given, skipped)
            else:
                yield from self._manifest(given, skipped)

    def _named(self, row: SourceRow) -> _Found:
        assert row.image is not None
        return (row.image.name, row)

    def _picture(self, name: str, path: str) -> _Found:
        return self._named(self._made.of_picture(image_item(name, path)))

    def _listed_pictures(self, given: Input, skipped: Counter[str]) -> Iterator[_Found]:
        """Yield the pictures of a COCO file; where its boxes are asked about, those that have any."""
        found, places = self._files[given.typed], self._places_of(given)
        skipped.update({DOUBLED: found.num_doubled} if found.num_doubled else {})
        for place, picture in enumerate(found.pictures):
            boxes = found.boxes_of(place)
            row = self._made.of_listed(picture, boxes, places, from_addresses=self._spec.remote)
            name = row.image.name if row.image is not None else None
            if name is not None and not self._filter.keeps(name):
                skipped["excluded"] += 1
            elif self._rules.region_pad is not None and not row.requests:
                skipped[WITHOUT_BOXES] += 1
            else:
                yield name or f"{given.typed} {picture.where}", row

    def _places_of(self, given: Input) -> RowPlaces:
        is_alone = len(self._inputs) == 1 and given.kind is self._inputs[0].kind
        return RowPlaces.of(given, self._spec.root, is_alone=is_alone, may_fetch=self._spec.remote)

    def _walked(self, given: Input, skipped: Counter[str]) -> Iterator[_Found]:
        folder, glob = start_of_walk(given)
        path_head, name_head = os.path.join(folder, ""), os.path.join(given.prefix, "")
        base = given.base if given.prefix else folder.rstrip("/") or "/"
        for relative in self._walk(folder, skipped).files(folder, glob):
            path, name = path_head + relative, name_head + relative
            suffix = suffix_of(relative)
            if suffix == TAR:
                yield from self._tar_members(path, name, skipped)
            elif suffix == PARQUET:
                yield from self._parquet_rows(Input(path, Kind.MANIFEST, name, base), skipped, None if glob else folder)
            else:
                yield self._picture(name, path)

    def _walk(self, folder: str, skipped: Counter[str]) -> Walk:
        """Return the walk of a folder.

        Shards of a suffix are taken where the folder has no pictures, and no shards that come before them in SHARDS:
        Parquet files beside tars are what img2dataset notes about those. It is looked for when the first one is met.
        """
        walk = self._plain_walk(folder, skipped)

        def takes(suffix: str) -> bool:
            before = self._plain_walk(folder, Counter())
            before.takes = frozenset(takewhile(lambda other: other != suffix, SHARDS)).__contains__
            return next(before.files(folder), None) is None

        walk.takes = cache(takes)
        return walk

    def _plain_walk(self, folder: str, skipped: Counter[str]) -> Walk:
        if not is_address(folder):
            return Walk(self._spec.recursive, self._spec.follow_links, self._filter, skipped, self._spec.own_files)
        from md3cli.source.remote_inputs import walk_of

        return walk_of(folder, self._filter, skipped, is_recursive=self._spec.recursive)

    def _tar_members(self, path: str, prefix: str, skipped: Counter[str]) -> Iterator[_Found]:
        """Yield the pictures inside a tar, by suffix, as byte ranges of it; damage is one more row."""
        try:
            with open_input(path) as file:
                for picture in tar_pictures(file, shown(path), self._why_not, skipped):
                    # An absolute name stays inside the tar, too.
                    name = f"{prefix}/{picture.name}" if prefix else picture.name
                    image = image_item(name, path, picture.offset, picture.size)
                    yield self._named(self._made.of_picture(image, picture.columns))
        except (InputError, RowError) as error:
            if isinstance(error, InputError) and (not prefix or is_address(path)):
                raise
            yield self._damaged(prefix or os.path.basename(path), path, error)

    def _parquet_rows(self, given: Input, skipped: Counter[str], folder: str | None) -> Iterator[_Found]:
        """Yield the rows of a Parquet file that a walk met; one that is damaged is one row, as a tar is.

        Where the user named `folder` and no Parquet file, its rows are not trusted to name pictures anywhere else.

        Raises:
            InputError: it is remote and cannot be opened, or it has no column of pictures, nor had any before it.
        """
        try:
            confinement = Confinement.to(folder if self._spec.root is None else None)
            for name, row in filter(None, self._manifest(given, skipped)):
                self._has_walked_rows = True
                yield name, confined(row, confinement, may_fetch=self._spec.remote)
        except InputError as error:
            if is_address(given.typed) or (isinstance(error, NoImageColumnError) and not self._has_walked_rows):
                raise  # what suits none of them is told at once, what suits one of them stops no run
            yield self._damaged(given.prefix, given.typed, error)

    def _damaged(self, name: str, path: str, error: Exception) -> _Found:
        image = image_item(name, path)
        return (image.name, SourceRow(image, self._requests, failure=RowFailure("decode", str(error))))

    def _why_not(self, member: tarfile.TarInfo, name: str) -> str:
        """Return why a tar's member is left out; empty where it is not."""
        if not has_image_suffix(name):
            return "other suffix"
        if not member.isreg() or member.issparse():
            return "links inside a tar"
        return "" if self._filter.keeps(name) else "excluded"

    def _manifest(self, given: Input, skipped: Counter[str]) -> Iterator[_Found]:
        places = self._places_of(given)
        is_stdin = given.kind is Kind.STDIN
        rows: Iterator[ManifestRow | None] = manifest_rows(given.typed, self._rules.renamed)
        if is_stdin:
            self._stdin.may_wait = self._may_wait
            rows = self._refuse_first(path_rows(self._stdin, has_json=True, renamed=self._rules.renamed))
        is_list = is_stdin or given.typed.lower().endswith(".txt")
        is_unfiltered = not (self._spec.include or self._spec.exclude)
        for entry in rows:
            if entry is None:
                yield None
                continue
            row = self._made.of_manifest(entry, places)
            if self.watched_lines and entry.number in self.watched_lines:
                self._note_watched(entry.number, row)
            name = row.image.name if row.image is not None else None
            if is_list and _is_comment(row.image):
                skipped["comments"] += 1
            elif name is not None and not (is_unfiltered or self._filter.keeps(name)):
                skipped["excluded"] += 1
            else:
                yield name or f"{given.typed} {entry.where}", row

    def _refuse_first(self, rows: Iterator[ManifestRow | None]) -> Iterator[ManifestRow | None]:
        """Yield the rows of stdin; of the first that is no remark as much is demanded as of a manifest's columns."""
        is_first = True
        for row in rows:
            if is_first and row is not None and row.columns is not None and not _may_be_remark(row.columns):
                found, where = FirstRows(dict.fromkeys(row.columns), num_rows=1), f"stdin, {row.where},"
                check_columns(found, ColumnOptions(), self._rules, where)
                check_asked(found, self._requests, self._rules, where)
                is_first = False
            yield row

    def _note_watched(self, number: int, row: SourceRow) -> None:
        """Note whether a watched line can be read: it can where every manifest of INPUT can be read at that line."""
        if row.failure is not None and row.failure.type == "bad_row":
            self.watched_lines -= {number}
            self.readable_lines.discard(number)
        else:
            self.readable_lines.add(number)


def _may_be_remark(columns: Mapping[str, Any]) -> bool:
    return len(columns) == 1 and str(columns.get("image", "")).startswith("#")


def _is_comment(image: ImageItem | None) -> bool:
    """Return whether a line of a list is a remark: it starts with `#`, and no file of that name is there."""
    if image is None or not image.name.startswith("#"):
        return False
    return is_address(image.path) or not os.path.lexists(image.path)


def _in_shard(found: Iterator[_Found], shard: tuple[int, int], skipped: Counter[str]) -> Iterator[_Found]:
    index, count = shard
    for item in found:
        digest = hashlib.sha256(item[0].encode("utf-8", "surrogateescape")).digest() if item is not None else b""
        if item is None or int.from_bytes(digest[:8], "big") % count == index:
            yield item
        else:
            skipped[OTHER_SHARDS] += 1


def _with_requests_left(
    found: Iterator[_Found], narrowed: Callable[[SourceRow], SourceRow], skipped: Counter[str]
) -> Iterator[_Found]:
    """Yield the rows that still ask something, once they are narrowed; a row that asked nothing stays as it is."""
    for item in found:
        if item is None:
            yield None
            continue
        name, row = item
        left = narrowed(row)
        skipped[HAVE_LABELS] += len(row.requests) - len(left.requests)
        if left.requests or not row.requests:
            yield name, left


def _up_to(limit: int, found: Iterator[_Found]) -> Iterator[_Found]:
    """Yield the first `limit` rows; the one behind them is not even looked for."""
    for item in found if limit else ():
        yield item
        limit -= item is not None
        if not limit:
            return
