"""Files that go beside the pictures, among a user's own: all are planned before the first is written.

First every place is looked at: one that may not be written to ends the export while all is as it was. Then each file
appears whole or not at all. A kill leaves some of them done; the same command does the rest. One that was there is
synced before its former content goes, because nothing can make that again.

The plan waits in SQLite's private temporary file, so memory stays flat. Of pictures that differ in their suffix alone
the first in the records has the plain name. Knows nothing of what the files hold: `txt` and `labelme` do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sqlite3
import stat
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from md3cli.errors import ImageError, UsageError
from md3cli.exporters import ExportOptions
from md3cli.exporters.at_once import in_order
from md3cli.exporters.grouping import ImageGroup
from md3cli.exporters.names import shortened
from md3cli.exporters.pictures import FoundPicture, Pictures
from md3cli.files import temp_beside, translate_errors
from md3cli.finished.guards import check_not_input, files_of_run
from md3cli.finished.record_shape import LINE_LIMIT_BYTES
from md3cli.finished.records_file import disk_trouble_in_words
from md3cli.records import printable
from md3cli.refine.collection import Collection
from md3cli.system import open_regular

_LEFTOVER = re.compile(r"\.(.+)\.tmp-\d{1,12}")  # what a killed export leaves (`files.temp_beside`)
_ADVICE = "--existing says what becomes of files that are there, -o names another folder"

Merge = Callable[[bytes, bytes], bytes]


class BesidePictures:
    """The files of one export that go beside pictures; `add` plans, `write` writes. Close it.

    `merge` returns a file's new content from the former one and what is to be added, for `--existing append` and
    `prepend`; it returns the former one where nothing is to be done, and raises ValueError, with words that follow the
    file's name, where it cannot.

    Raises:
        UsageError: the pictures' folder is not known, or only a stranger's run.json names it.
    """

    def __init__(
        self,
        records: Collection,
        options: ExportOptions,
        format: str,
        suffix: str,
        merge: Merge = lambda former, added: former,
    ) -> None:
        self.pictures = Pictures(records, options)
        self.pictures.require_root(f"{format} beside the pictures")
        self.pictures.require_trusted(f"{format} beside the pictures")
        self._told = options.told
        self._suffix = suffix
        self._merge = merge
        # The option's default stands for --overwrite, too: the command refuses both together.
        is_replacing = options.overwrite and options.existing == "refuse"
        self._existing = "replace" if is_replacing else options.existing
        self._inputs = [file for source in records.sources for file in files_of_run(source.path)]
        self._roots = [str(root.path) for root in self.pictures.roots]
        self._check_folder = lru_cache(maxsize=1024)(self._check_folder_anew)
        self.num_kept = self.num_renamed = 0
        self._first_renamed = ""
        self._database = sqlite3.connect("")  # a temporary file that SQLite removes by itself
        self._database.execute(
            "CREATE TABLE file(seq INTEGER PRIMARY KEY, folder BLOB, name BLOB, alike BLOB, content BLOB)"
        )
        self._database.execute("CREATE INDEX alike ON file(alike)")

    def close(self) -> None:
        """Forget the plan."""
        self._database.close()

    @property
    def root(self) -> Path:
        """The pictures' folder, of the first run."""
        assert self.pictures.root is not None  # checked at the start
        return self.pictures.root

    def add(self, group: ImageGroup, content: bytes | Callable[[str], bytes]) -> None:
        """Plan the file of a picture; one that is not there is counted by `pictures`.

        Where `content` names the picture, it is a function of the picture's file name (surrogates for bytes that are no
        UTF-8).

        Raises:
            UsageError: the picture lies in a tar, or beyond a link that leads out of the pictures' folder; or what
                stands in the file's place must stay.
        """
        found = self._picture(group)
        if found is None or found.path is None:
            return
        folder, picture = os.path.split(os.fspath(found.path))
        self._check_folder(folder)
        names = _names(picture, self._suffix)
        name = next(name for name in names if not self._is_taken(folder, name, found.path))
        if name != os.path.splitext(picture)[0] + self._suffix:
            self.num_renamed += 1
            self._first_renamed = self._first_renamed or name
        made = content if isinstance(content, bytes) else content(picture)
        changed = self._content(Path(folder, name), made)
        self.num_kept += changed is None
        with disk_trouble_in_words():
            row = (os.fsencode(folder), os.fsencode(name), _alike(folder, name), None if changed is None else made)
            self._database.execute("INSERT INTO file VALUES (NULL, ?, ?, ?, ?)", row)

    def write(self) -> None:
        """Write the files that were planned.

        Raises:
            ExportError: not one of the pictures is there.
            OutputError: one cannot be written; those before it are.
            UsageError: what stands in a file's place has changed in the meantime, and must stay.
        """
        self.pictures.notes()  # raises
        self._remove_leftovers()
        (total,) = self._database.execute("SELECT count(content) FROM file").fetchone()
        rows = self._database.execute("SELECT folder, name, content FROM file WHERE content NOTNULL ORDER BY seq")
        for number, is_kept in enumerate(in_order(self._write_one, rows)):
            self._told(number, total)
            self.num_kept += is_kept

    def _write_one(self, row: tuple[bytes, bytes, bytes]) -> bool:
        """Write one file; True where what is there by now stays."""
        folder, name, added = row
        path = Path(os.fsdecode(folder), os.fsdecode(name))
        content = self._content(path, added)  # looked at again: what is there now is what is added to
        if content is not None:
            _put(path, content)
        return content is None

    def notes(self) -> Iterator[str]:
        """Yield what became of files that were there, and which names other programs will not look for."""
        if self.num_kept:
            yield f"{self.num_kept:,} files that were there already stay as they are"
        if self.num_renamed:
            yield (
                f"{self.num_renamed:,} files got a longer name, because the plain one is another picture's or too long "
                f"(first: {printable(self._first_renamed)}); programs look for the plain one, so rename such pictures"
            )
        yield from self.pictures.notes()

    def _picture(self, group: ImageGroup) -> FoundPicture | None:
        found = self.pictures.find(group.picture_record, has_twins=group.has_twins)
        if found is None:
            return None
        if found.size is not None:
            raise UsageError(f"nothing can stand beside a picture in {printable(str(found.path))}; use -o")
        if found.sha256 is not None:  # of twins one is here
            try:
                self.pictures.read_bytes(found)
            except ImageError:
                self.pictures.note_unreadable(group.name)
                return None
        return found

    def _check_folder_anew(self, folder: str) -> None:
        """Refuse a folder outside the roots, as a link inside them may lead to, and one that takes no files."""
        real = Path(os.path.realpath(folder))
        if not any(real.is_relative_to(root) for root in self._roots):
            raise UsageError(f"{printable(folder)} is behind a link that leads out of the pictures' folder; use -o")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{printable(folder)} cannot be written to, so nothing was; use -o")

    def _is_taken(self, folder: str, name: str, picture: str) -> bool:
        """Return whether another picture's file has this name, as the file system takes names."""
        rows = self._database.execute("SELECT folder, name FROM file WHERE alike = ?", (_alike(folder, name),))
        others = rows.fetchall()
        return (os.fsencode(folder), os.fsencode(name)) in others or (bool(others) and _ignores_case(picture))

    def _content(self, path: Path, added: bytes) -> bytes | None:
        """Return what is to stand at `path`; None where nothing is to be done.

        Raises:
            UsageError: what stands there must stay.
        """
        try:
            facts = os.lstat(path)
        except FileNotFoundError:
            return added
        if self._existing == "refuse":
            raise UsageError(f"{printable(str(path))} exists already, so nothing was written; {_ADVICE}")
        if self._existing == "skip":
            return None
        self._check_changeable(path, facts)
        former = _read(path)
        changed = added if self._existing == "replace" else self._merged(path, former, added)
        return None if changed == former else changed

    def _check_changeable(self, path: Path, facts: os.stat_result) -> None:
        """Refuse what is no plain file of this user's to change: a link's content may be anybody's."""
        check_not_input([path], self._inputs, "--extension")
        is_read_only = not facts.st_mode & 0o222 or not os.access(path, os.W_OK)
        what = (
            "is a link" if stat.S_ISLNK(facts.st_mode)
            else "is no file" if not stat.S_ISREG(facts.st_mode)
            else "is read-only" if is_read_only
            else f"is larger than {LINE_LIMIT_BYTES >> 20} MiB" if facts.st_size > LINE_LIMIT_BYTES
            else None
        )  # fmt: skip
        if what is not None:
            raise UsageError(f"{printable(str(path))} {what}, so nothing was written; move it away, or {_ADVICE}")

    def _merged(self, path: Path, former: bytes, added: bytes) -> bytes:
        try:
            return self._merge(former, added)
        except ValueError as error:
            raise UsageError(f"{printable(str(path))} {error}, so nothing was written; {_ADVICE}") from error

    def _remove_leftovers(self) -> None:
        """Remove half-written files of killed exports; only such as would have become one of the planned files."""
        for (row,) in self._database.execute("SELECT DISTINCT folder FROM file").fetchall():
            folder = os.fsdecode(row)
            with contextlib.suppress(OSError):
                names = [entry.name for entry in os.scandir(folder) if _LEFTOVER.fullmatch(entry.name)]
                for name in names:
                    meant = _LEFTOVER.sub(r"\1", name)
                    query = "SELECT 1 FROM file WHERE alike = ?"
                    if self._database.execute(query, (_alike(folder, meant),)).fetchone():
                        os.unlink(os.path.join(folder, name))


def _names(picture: str, suffix: str) -> Iterator[str]:
    """Yield names for a file about a picture, best first; the first is what trainers look for.

    Unlike `names.candidates` it takes a name of the disk, whatever its bytes. The last two are this picture's alone.
    """
    digest = hashlib.sha256(os.fsencode(picture)).hexdigest()
    stem, _ = os.path.splitext(picture)
    yield shortened(stem, suffix, digest)
    yield shortened(picture, suffix, digest)
    yield shortened(f"{shortened(stem, '', digest, 200)}~{digest[:16]}", suffix, digest)
    yield f"{digest}{suffix}"


def _alike(folder: str, name: str) -> bytes:
    """Return 16 bytes that are the same for paths that some file system takes for one (case, Unicode form)."""
    path = unicodedata.normalize("NFC", os.path.join(folder, name)).casefold()
    return hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _ignores_case(picture: str) -> bool:
    """Return whether the file system finds a picture under its name in the other case."""
    folder, name = os.path.split(picture)
    with contextlib.suppress(OSError):
        return os.path.samefile(picture, os.path.join(folder, name.swapcase()))
    return False


def _read(path: Path) -> bytes:
    with translate_errors(path), open(open_regular(path, follows_links=False), "rb") as file:
        return file.read(LINE_LIMIT_BYTES)


def _put(path: Path, content: bytes) -> None:
    """Have `content` stand at `path`, whole or not at all, with the permissions of what stood there."""
    aside = temp_beside(path)
    with translate_errors(path):
        try:
            with aside.open("xb") as file:
                file.write(content)
                if path.exists():
                    shutil.copymode(path, aside)
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut might leave neither; what is new can be made again
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
