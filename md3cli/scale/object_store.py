"""A run folder on an object store (`s3://`, `gs://`, ...), through fsspec.

Objects appear whole by nature. Put-if-absent is the store's own conditional write; whether it has one is
tried once per store and process, since without it two drivers could both believe to have been first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from md3cli.errors import MissingExtraError, OutputError
from md3cli.records import printable

SELF_TEST_FOLDER = "selftest"


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
        except (FileNotFoundError, FileExistsError, OutputError):
            raise
        except Exception as error:
            what = printable(str(error)) or type(error).__name__
            raise OutputError(f"{printable(self._uri)}/{name}: {what}; then run the same command again") from error

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

    def open(self, name: str) -> IO[bytes]:
        with self._told(name):
            file: IO[bytes] = self._fs.open(self._path(name), "rb")
            return file

    def put(self, name: str, data: bytes) -> None:
        with self._told(name):
            self._make_folder(name)
            self._fs.pipe_file(self._path(name), data)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._told(name):
            self._make_folder(name)
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
            with self._told(name):
                self._make_folder(name)
                self._fs.put_file(temp, self._path(name))
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

    def _make_folder(self, name: str) -> None:
        """Some stores behind fsspec are folders after all; where there are none this does nothing."""
        parent = self._path(name).rpartition("/")[0]
        if parent.count("/") > 1 or self._fs.protocol in ("file", "local"):
            self._fs.makedirs(parent, exist_ok=True)

    def has_put_if_absent(self) -> bool:
        """Whether putting the same name twice fails the second time, by trying it."""
        name = f"{SELF_TEST_FOLDER}/{secrets.token_hex(8)}"
        try:
            return self.put_if_absent(name, b"1") and not self.put_if_absent(name, b"2")
        finally:
            self.remove(name)
