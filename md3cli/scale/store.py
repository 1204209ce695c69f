"""Where a run folder lies: a few operations that a local folder and an object store both have.

Names are relative, with `/`. What is put appears whole or not at all. The one operation that exactly-once
rests on is `put_if_absent`: of all who put the same name, one is told that it was the first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from md3cli.publish import atomic_publish, output_error, temp_beside

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
    from md3cli.scale.object_store import ObjectStore

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
            _sync_folder(path.parent)
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
        _sync_folder(path.parent)
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
            fd = os.open(self.path(name), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
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
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
