"""The place where a run folder lies: a few operations that a local folder and an object store both have.

Names are relative, with `/`. What is put appears whole or not at all. Exactly-once rests on `put_if_absent`: of all who
put the same name, one is told that it was the first. A folder does it with a hard link, an object store with its own
conditional write. Whether a store has one is tried at every start, for without it two runs could both believe to be
the first. Nothing is ever made but files and objects: a missing bucket is an error, not a new bucket.

Object stores go through fsspec, not through obstore: reading from `hf://` needs fsspec anyway, and one library is
simpler than two. This file knows nothing of what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from md3cli.errors import ImageError, MissingExtraError, OutputError
from md3cli.files import atomic_publish, temp_beside, translate_errors
from md3cli.records import printable
from md3cli.remote.address import is_address
from md3cli.system import open_at_once, sync_folder, write_all

SELF_TEST_FOLDER = "selftest"
READ_AT_A_TIME = 1000  # files, of which fsspec has a hundred or so under way
TEMP_MARK = ".tmp-"  # in the names of files that are still being written
_TEMP_NAME = re.compile(rf"\..+{re.escape(TEMP_MARK)}\d+", re.DOTALL)
_NO_LINKS_HERE = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class Store(ABC):
    """Files by name; every method raises OutputError where the store refuses. `uri` names it to another process."""

    uri: str

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the files directly in `folder`, sorted, without those still being written; none without a folder."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the content; None where there is no such file."""

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield names and contents of those files that are there, in the order of `names`."""
        for name in names:
            if (data := self.read(name)) is not None:
                yield name, data

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file to read from, seekable; raises FileNotFoundError where it is not there."""

    def put(self, name: str, data: bytes) -> None:
        """Make or replace a file."""
        with self.put_file(name) as path:
            path.write_bytes(data)

    @abstractmethod
    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make a file; return False, and do nothing, where it is there already."""

    @abstractmethod
    def put_file(self, name: str) -> AbstractContextManager[Path]:
        """Give a local path to write; on leaving the context the file `name` is made of it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def remove_all(self) -> None:
        """Remove the store with all that is in it, if it is there."""

    @abstractmethod
    def modified_at(self, name: str) -> float | None:
        """Return when a file was last written, in seconds since 1970; None where it is not there or not known."""

    def has_put_if_absent(self) -> bool:
        """Return whether putting the same name twice fails the second time; tried where it is not sure."""
        return True


def open_store(uri: str) -> Store:
    """Open the store that `uri` names: a path, or a URL of an object store.

    Raises:
        MissingExtraError: a URL without the `remote` extra.
    """
    return ObjectStore(uri) if "://" in uri else LocalStore(Path(uri))


class LocalStore(Store):
    """A folder on a local or network file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.uri = str(self.root)

    def path(self, name: str) -> Path:
        """Return where a file lies."""
        return self.root / name

    def names(self, folder: str) -> list[str]:
        path = self.path(folder)
        missing = (FileNotFoundError, NotADirectoryError)
        with translate_errors(path), contextlib.suppress(*missing), os.scandir(path) as found:
            return sorted(entry.name for entry in found if TEMP_MARK not in entry.name and entry.is_file())
        return []

    def read(self, name: str) -> bytes | None:
        path = self.path(name)
        with translate_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return path.read_bytes()
        return None

    def open(self, name: str) -> IO[bytes]:
        return open(self.path(name), "rb")

    @contextlib.contextmanager
    def put_file(self, name: str) -> Iterator[Path]:
        with atomic_publish(self._in_folder(name)) as temp:
            yield temp

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make the file by a hard link to a whole temporary one: of many processes exactly one succeeds."""
        path = self._in_folder(name)
        temp = temp_beside(path)
        try:
            with translate_errors(path):
                _write_synced(temp, data)
                return self._link(temp, path, data)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temp)

    def _link(self, temp: Path, path: Path, data: bytes) -> bool:
        try:
            os.link(temp, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS_HERE:
                raise
            try:  # a reader may meet half a file; whoever reads markers takes such a one for none
                _write_synced(path, data)
            except FileExistsError:
                return False
        sync_folder(path.parent)
        return True

    def remove(self, name: str) -> None:
        path = self.path(name)
        with translate_errors(path):
            path.unlink(missing_ok=True)

    def remove_all(self) -> None:
        with translate_errors(self.root), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root)

    def remove_temps(self) -> None:
        """Remove what killed writers have left; for a process that knows that nobody else writes here."""
        for path in self.root.rglob(f".*{TEMP_MARK}*"):
            if _TEMP_NAME.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def modified_at(self, name: str) -> float | None:
        try:
            return self.path(name).stat().st_mtime
        except OSError:
            return None

    def sign_of(self, name: str) -> tuple[int, int] | None:
        """Return what changes whenever the file is touched or grows; None where it is not there."""
        try:  # opened, for only then a network file system asks its server
            fd = open_at_once(self.path(name))
        except OSError:
            return None
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return status.st_mtime_ns, status.st_size

    def _in_folder(self, name: str) -> Path:
        """Return where a file lies, in a folder that is there."""
        path = self.path(name)
        with translate_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _write_synced(path: Path, data: bytes) -> None:
    fd = open_at_once(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


class ObjectStore(Store):
    """Objects below a URL (`s3://`, `gs://`); objects appear whole by nature."""

    def __init__(self, uri: str) -> None:
        """Raises MissingExtraError: fsspec, or what it needs for this kind of URL, is not installed."""
        try:
            import fsspec.core

            self._fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        except ImportError as error:
            raise MissingExtraError(f"a run folder at {printable(uri)}", "remote") from error
        except ValueError as error:  # a protocol that nobody knows
            raise OutputError(
                f"{printable(uri)}: {printable(str(error))}; name a folder or a URL that is known"
            ) from error
        self.uri, self._root = uri.rstrip("/"), str(root).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _translate_errors(self, name: str) -> Iterator[None]:
        """Raise what goes wrong with `name` as OutputError; stores raise whatever they like."""
        try:
            yield
        except Exception as error:
            raise OutputError(f"{printable(self.uri)}/{name}: {_in_words(error)}") from error

    def names(self, folder: str) -> list[str]:
        found: list[str] = []
        with self._translate_errors(folder), contextlib.suppress(FileNotFoundError):
            found = self._fs.ls(self._path(folder), detail=False, refresh=True)
        return sorted(name for name in (path.rstrip("/").rpartition("/")[2] for path in found) if name)

    def read(self, name: str) -> bytes | None:
        with self._translate_errors(name), contextlib.suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(self._path(name)))
        return None

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for first in range(0, len(names), READ_AT_A_TIME):
            some = names[first : first + READ_AT_A_TIME]
            with self._translate_errors(some[0]):
                found = self._contents(some)
            yield from ((name, found[self._path(name)]) for name in some if self._path(name) in found)

    def _contents(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return by path what many files hold; without those that are not there."""
        found: Mapping[str, Any] = self._fs.cat([self._path(name) for name in names], on_error="return")
        for content in found.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        return {path: content for path, content in found.items() if isinstance(content, bytes)}

    def open(self, name: str) -> IO[bytes]:
        """Open a file as `Store.open` does; an address is read as an INPUT at that address would be."""
        if not is_address(self.uri):  # one of fsspec's that no user can name
            file: IO[bytes] = self._fs.open(self._path(name), "rb")
            return file
        from md3cli.remote.reader import open_remote
        from md3cli.source.remote_inputs import reader

        address = f"{self.uri}/{name}"
        try:
            return open_remote(address, reader(address))
        except ImageError as error:
            if error.type == "not_found":
                raise FileNotFoundError(address) from error
            raise OutputError(f"{printable(address)}: {error}; then run the same command again") from error

    def put(self, name: str, data: bytes) -> None:
        with self._translate_errors(name):
            self._fs.pipe_file(self._path(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._translate_errors(name), contextlib.suppress(FileExistsError):
            self._fs.pipe_file(self._path(name), data, mode="create")
            return True
        return False

    @contextlib.contextmanager
    def put_file(self, name: str) -> Iterator[Path]:
        handle, temp = tempfile.mkstemp(prefix="md3-")
        os.close(handle)
        try:
            yield Path(temp)
            self.upload(Path(temp), name)
        finally:
            os.unlink(temp)

    def remove(self, name: str) -> None:
        with self._translate_errors(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_all(self) -> None:
        with self._translate_errors(""), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    def modified_at(self, name: str) -> float | None:
        modified: Any = None
        with self._translate_errors(name), contextlib.suppress(FileNotFoundError, NotImplementedError):
            modified = self._fs.modified(self._path(name))
        return modified.timestamp() if isinstance(modified, datetime) else None

    def has_put_if_absent(self) -> bool:
        name = f"{SELF_TEST_FOLDER}/{secrets.token_hex(8)}"
        try:
            return self.put_if_absent(name, b"1") and not self.put_if_absent(name, b"2")
        finally:
            self.remove(name)

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""
        with self._translate_errors(name):
            return bool(self._fs.isfile(self._path(name)))

    def upload(self, path: Path, name: str) -> None:
        """Make or replace a file by a local one."""
        with self._translate_errors(name):
            self._fs.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        """Copy a file, if it is there, to a local path."""
        if self.has(name):
            with self._translate_errors(name):
                self._fs.get_file(self._path(name), str(path))

    def names_below(self, folder: str) -> list[str]:
        """Return the files in a folder and in folders inside it, as names of this store."""
        with self._translate_errors(folder):
            found: list[str] = self._fs.find(self._path(folder))
        return sorted(path.removeprefix(f"{self._root}/") for path in found)


def _in_words(error: Exception) -> str:
    """Return an error of a store in words, and what to do about it."""
    text = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"{text}; make the bucket first, or choose another -o"
    if isinstance(error, PermissionError) or "credentials" in text.lower():
        return f"{text}; check the credentials in the environment, and what they may do"
    return f"{text}; then run the same command again"
