"""Where a run folder lies: a few operations that a local folder and an object store both have.

Names are relative, with `/`. What is put appears whole or not at all. The one operation that exactly-once
rests on is `put_if_absent`: of all who put the same name, one is told that it was the first.

A run folder on an object store (`s3://`, `gs://`), through fsspec.

Objects appear whole by nature. Put-if-absent is the store's own conditional write; whether it has one is
tried by every start, since without it two drivers could both believe to have been first. Nothing is ever made
but objects: a bucket that is not there is an error, not a new bucket.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol

from md3cli.errors import ImageError, MissingExtraError, OutputError
from md3cli.files import atomic_publish, output_error, temp_beside
from md3cli.records import printable
from md3cli.remote.address import is_address
from md3cli.system import open_at_once, sync_folder, write_all

SELF_TEST_FOLDER = "selftest"
READ_AT_A_TIME = 1000  # files, of which fsspec has a hundred or so under way


class ObjectStore:
    """Files below a URL; see `store.Store`."""

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
        self._uri, self._root = uri.rstrip("/"), str(root).rstrip("/")

    @property
    def uri(self) -> str:
        return self._uri

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """What goes wrong with `name` as OutputError; stores raise whatever they like."""
        try:
            yield
        except Exception as error:
            raise OutputError(f"{printable(self._uri)}/{name}: {_what(error)}") from error

    def names(self, folder: str) -> list[str]:
        with self._told(folder):
            try:
                found: list[str] = self._fs.ls(self._path(folder), detail=False, refresh=True)
            except FileNotFoundError:
                return []
        return sorted(name for name in (path.rstrip("/").rpartition("/")[2] for path in found) if name)

    def read(self, name: str) -> bytes | None:
        with self._told(name):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for first in range(0, len(names), READ_AT_A_TIME):
            some = names[first : first + READ_AT_A_TIME]
            with self._told(some[0]):
                found = self._contents(some)
            yield from ((name, found[self._path(name)]) for name in some if self._path(name) in found)

    def _contents(self, names: Sequence[str]) -> Mapping[str, bytes]:
        """By path, of many at a time; without those that are not there."""
        found: Mapping[str, Any] = self._fs.cat([self._path(name) for name in names], on_error="return")
        for content in found.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        return {path: content for path, content in found.items() if isinstance(content, bytes)}

    def open(self, name: str) -> IO[bytes]:
        """The file to read from, as of `Store.open`; an address is read as an INPUT at that address would be."""
        if not is_address(self._uri):  # one of fsspec's that no user can name
            file: IO[bytes] = self._fs.open(self._path(name), "rb")
            return file
        from md3cli.remote.reader import open_remote
        from md3cli.source.remote_inputs import reader

        address = f"{self._uri}/{name}"
        try:
            return open_remote(address, reader(address))
        except ImageError as error:
            if error.type == "not_found":
                raise FileNotFoundError(address) from error
            raise OutputError(f"{printable(address)}: {error}; then run the same command again") from error

    def put(self, name: str, data: bytes) -> None:
        with self._told(name):
            self._fs.pipe_file(self._path(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._told(name):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

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
        with self._told(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_all(self) -> None:
        with self._told(""), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    def modified_at(self, name: str) -> float | None:
        with self._told(name):
            try:
                modified: Any = self._fs.modified(self._path(name))
            except (FileNotFoundError, NotImplementedError):
                return None
        return modified.timestamp() if isinstance(modified, datetime) else None

    def has_put_if_absent(self) -> bool:
        name = f"{SELF_TEST_FOLDER}/{secrets.token_hex(8)}"
        try:
            return self.put_if_absent(name, b"1") and not self.put_if_absent(name, b"2")
        finally:
            self.remove(name)

    # -- whole files between here and there ------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        with self._told(name):
            return bool(self._fs.isfile(self._path(name)))

    def upload(self, path: Path, name: str) -> None:
        """Make or replace a file by a local one."""
        with self._told(name):
            self._fs.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> bool:
        """Copy a file to a local path; False where it is not there."""
        with self._told(name):
            if not self._fs.isfile(self._path(name)):
                return False
            self._fs.get_file(self._path(name), str(path))
            return True

    def names_below(self, folder: str) -> list[str]:
        """The files in a folder and in folders inside it, as names of this store."""
        with self._told(folder):
            found: list[str] = self._fs.find(self._path(folder))
        prefix = f"{self._root}/"
        return sorted(path.removeprefix(prefix) for path in found)


def _what(error: Exception) -> str:
    """An error of a store in words, and what to do about it."""
    text = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"{text}; make the bucket first, or choose another -o"
    if isinstance(error, PermissionError) or "credentials" in text.lower():
        return f"{text}; check the credentials in the environment, and what they may do"
    return f"{text}; then run the same command again"


_NO_LINKS_HERE = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
TEMP_MARK = ".tmp-"  # in the names of files that are still being written
_TEMP_NAME = re.compile(rf"\..+{re.escape(TEMP_MARK)}\d+", re.DOTALL)


class Store(Protocol):
    """See the module's text. Every method raises OutputError where the store refuses."""

    @property
    def uri(self) -> str:
        """What names this store to another process."""
        ...

    def names(self, folder: str) -> list[str]:
        """The files directly in `folder`, sorted, without those still being written; empty where there is none."""
        ...

    def read(self, name: str) -> bytes | None:
        """The content; None where there is no such file."""
        ...

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Names and contents of those files that are there, in the order of `names`."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """The file to read from, seekable.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def put(self, name: str, data: bytes) -> None:
        """Make or replace a file."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make a file; False, and nothing done, where it is there already."""
        ...

    def put_file(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write; on leaving it becomes the file `name`."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def remove_all(self) -> None:
        """Remove the store with all that is in it, if it is there."""
        ...

    def modified_at(self, name: str) -> float | None:
        """When it was last written, in seconds since 1970; None where it is not there or not known."""
        ...

    def has_put_if_absent(self) -> bool:
        """Whether putting the same name twice fails the second time; tried where it is not sure."""
        ...


def open_store(uri: str) -> Store:
    """The store that `uri` names: a path, or a URL of an object store.

    Raises:
        MissingExtraError: a URL without the `remote` extra.
    """
    if "://" not in uri:
        return LocalStore(Path(uri))
    return ObjectStore(uri)


class LocalStore:
    """A folder on a local or network file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))

    @property
    def uri(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.root / name

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.path(folder)) as entries:
                return sorted(entry.name for entry in entries if TEMP_MARK not in entry.name and entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise output_error(self.path(folder), error) from error

    def read(self, name: str) -> bytes | None:
        try:
            return self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise output_error(self.path(name), error) from error

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            if (data := self.read(name)) is not None:
                yield name, data

    def open(self, name: str) -> IO[bytes]:
        return open(self.path(name), "rb")

    def put(self, name: str, data: bytes) -> None:
        with self.put_file(name) as temp:
            temp.write_bytes(data)

    @contextlib.contextmanager
    def put_file(self, name: str) -> Iterator[Path]:
        path = self._with_folder(name)
        with atomic_publish(path) as temp:
            yield temp

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Make the file by a hard link to a whole temporary one: of many processes exactly one succeeds."""
        path = self._with_folder(name)
        temp = temp_beside(path)
        try:
            _write_synced(temp, data)
            try:
                os.link(temp, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS_HERE:
                    raise
                return self._create(path, data)
            sync_folder(path.parent)
            return True
        except OSError as error:
            raise output_error(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temp)

    def _create(self, path: Path, data: bytes) -> bool:
        """Without hard links a reader may meet half a file; whoever reads markers takes such a one for none."""
        try:
            _write_synced(path, data)
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True

    def remove(self, name: str) -> None:
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as error:
            raise output_error(self.path(name), error) from error

    def remove_all(self) -> None:
        try:
            shutil.rmtree(self.root)
        except FileNotFoundError:
            return
        except OSError as error:
            raise output_error(self.root, error) from error

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
        """Return what changes whenever the file is touched or grows; None where it is not there.

        The file is opened for it, for only then a network file system asks its server.
        """
        try:
            fd = open_at_once(self.path(name))
        except OSError:
            return None
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return status.st_mtime_ns, status.st_size

    def has_put_if_absent(self) -> bool:
        return True

    def _with_folder(self, name: str) -> Path:
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(path.parent, error) from error
        return path


def _write_synced(path: Path, data: bytes) -> None:
    fd = open_at_once(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
