"""A run folder on an object store (`s3://`, `gs://`), through fsspec.

Objects appear whole by nature. Put-if-absent is the store's own conditional write; whether it has one is
tried by every start, since without it two drivers could both believe to have been first. Nothing is ever made
but objects: a bucket that is not there is an error, not a new bucket.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from md3cli.errors import ImageError, MissingExtraError, OutputError
from md3cli.records import printable
from md3cli.remote.address import is_address

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
        from md3cli.remote.files import open_remote
        from md3cli.remote.inputs import reader

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
