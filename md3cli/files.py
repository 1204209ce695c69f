"""Files that appear whole or not at all, the lock that keeps two runs off one output, copies and scratch folders.

A published file is written under a temporary name in the same folder, synced and renamed, so that a reader never sees
half of it, whatever kills the writer. Knows nothing of records.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from md3cli.errors import OutputError, OutputHeldError
from md3cli.records import printable
from md3cli.settings import user_cache_dir
from md3cli.system import (
    NotRegularError,
    lock,
    open_at_once,
    open_regular,
    share_blocks,
    sync_folder,
    write_all,
)

STAGED = "staged"  # the folder inside an output where new files wait until all of them are there
_SECOND_LOOK_S = 0.02
_REMOVALS, _REMOVAL_PAUSE_S = 5, 0.05
_HOLDER = "holder"  # the lock inside a folder of `held_folder`
_NEW_S = 60.0
_LOOKS = 25  # at a lock that somebody may only be asking about
TEMP_NAME_LIMIT_BYTES = 200  # of the name, so that the temporary name stays under the 255 of file systems


def output_error(path: Path, error: OSError) -> OutputError:
    """Return the line a user reads when `path` cannot be written."""
    hint = {
        errno.ENOSPC: "make space and run the same command again",
        errno.EDQUOT: "make space in your quota and run the same command again",
        errno.EFBIG: "raise the file size limit (ulimit -f) and run the same command again",
        errno.EACCES: "choose another -o or change the permissions",
        errno.EROFS: "choose another -o",
    }.get(error.errno or 0, "then run the same command again")
    return OutputError(f"cannot write {printable(str(path))}: {error.strerror or error}; {hint}")


@contextlib.contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Raise what the file system refuses about `path` as OutputError."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


# -- publishing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write: the file becomes `path` at the end, and is removed on an exception.

    A link is followed: the file that it points to is replaced, and the link stays.

    Raises:
        OutputError: the file cannot be written, synced or renamed.
    """
    target = Path(os.path.realpath(path))
    temp = temp_beside(target)
    try:
        os.close(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temp
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, target)
        sync_folder(target.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temp)


def temp_beside(target: Path) -> Path:
    """Return a new temporary name beside `target`, of the kind that `remove_stale_temps` removes."""
    return target.with_name(f"{_temp_stem(target)}{secrets.randbelow(10**12)}")


def _temp_stem(target: Path) -> str:
    name = os.fsdecode(os.fsencode(target.name)[:TEMP_NAME_LIMIT_BYTES])
    return f".{name}.tmp-"


def remove_stale_temps(target: Path, *, older_than_s: float = 0.0) -> None:
    """Remove the files and folders that killed writers of `target` left behind.

    The caller holds the output's lock, so that nobody else writes; where others may, what was last written less than
    `older_than_s` ago is taken for theirs and stays.
    """
    target = Path(os.path.realpath(target))
    stem = _temp_stem(target)
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if entry.name.startswith(stem) and entry.name.removeprefix(stem).isdigit():
                with contextlib.suppress(OSError):  # its writer may end just now
                    _remove_stale(entry, older_than_s)


def _remove_stale(entry: os.DirEntry[str], older_than_s: float) -> None:
    if older_than_s and time.time() - entry.stat(follow_symlinks=False).st_mtime < older_than_s:
        return
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        os.unlink(entry.path)


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours and all that is in it; a warning says what stays."""
    for _ in range(_REMOVALS):  # something may still come into it, and on Windows scanners hold files open
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(_REMOVAL_PAUSE_S)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:  # gone by now
        return
    except OSError as error:
        place = printable(str(error.filename or folder))
        warnings.warn(f"{place} cannot be removed ({error.strerror or error}); remove it", stacklevel=2)


# -- locks -----------------------------------------------------------------------------------------


class OutputLock:
    """A lock on a file with the holder's pid and host as text: exclusive, or shared by the ranks of a run.

    The file stays, because two processes could each lock a file that was removed. The system frees the lock when the
    process dies, so no lock is stale. `is_held` is False where the file system has no locks (some network mounts):
    there the run goes on unguarded.
    """

    def __init__(self, fd: int, is_held: bool) -> None:
        self._fd = fd
        self.is_held = is_held

    @classmethod
    def acquire(cls, path: Path, output: Path | str, *, is_shared: bool = False) -> OutputLock:
        """Lock `path` on behalf of `output`, within half a second or not at all.

        Raises:
            OutputHeldError: another process holds the lock; the message names its pid and host.
            OutputError: the lock's file cannot be made.
        """
        try:
            fd = open_at_once(path, os.O_RDWR | os.O_CREAT, follows_links=False)
        except OSError as error:
            if path.is_symlink():  # the lock's text would be written into whatever it leads to
                raise OutputError(f"{printable(str(path))} is a link, and a lock must be a file; remove it") from error
            raise output_error(path, error) from error
        try:
            is_held = _lock_patiently(fd, is_shared=is_shared)
            if is_held:
                os.ftruncate(fd, 0)
                write_all(fd, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except BlockingIOError as error:
            raise _held_error(fd, output) from error
        except OSError as error:
            os.close(fd)
            raise output_error(path, error) from error
        return cls(fd, is_held)

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock_patiently(fd: int, *, is_shared: bool) -> bool:
    """Lock an open file as `lock` does, and wait for who only asks for its holder, which takes some microseconds."""
    for _ in range(_LOOKS - 1):
        with contextlib.suppress(BlockingIOError):
            return lock(fd, is_shared=is_shared)
        time.sleep(_SECOND_LOOK_S)
    return lock(fd, is_shared=is_shared)


def _held_error(fd: int, output: Path | str) -> OutputHeldError:
    with open(fd, "rb") as file:  # which closes it
        holder = _holder(file)
    return OutputHeldError(
        f"{printable(str(output))} is being written by another run: {holder}; "
        "wait for it, stop it, or choose another -o"
    )


def _holder(file: IO[bytes]) -> str:
    pid, _, host = file.read(300).decode("utf-8", "replace").strip().partition(" ")
    return f"process {printable(pid or 'unknown')} on {printable(host or 'this machine')}"


def lock_holder(path: Path) -> str | None:
    """Return who holds the lock at `path`, as `process 12 on host`; None where nobody does, or nobody can tell.

    The lock is taken for some microseconds to find that out, twice, so that two who ask do not take each other for a
    holder. A start that comes just then waits for it (`OutputLock.acquire`).
    """
    for is_last in (False, True):
        try:
            fd = open_regular(path, follows_links=False)
        except (OSError, NotRegularError):
            return None
        with open(fd, "rb") as file:
            try:
                lock(fd)
            except BlockingIOError:
                if is_last:
                    return _holder(file)
                time.sleep(_SECOND_LOOK_S)
                continue
            except OSError:  # a network mount that locks what is opened to be written
                pass
            return None
    return None


# -- copies and scratch ----------------------------------------------------------------------------


def copy_file(source: Path | str, target: Path, *, is_linked: bool = False) -> bool:
    """Make `target`, which must be absent or empty, a copy of the file that `source` leads to.

    The copy costs nothing where the file system can share blocks. With `is_linked`, `target` becomes the same file (a
    hard link), so that who writes to one writes to both; where the file system has no such links, it is a copy. Return
    whether it is a link.

    Raises:
        OSError: `source` cannot be read, or `target` cannot be written.
    """
    source = os.path.realpath(source)
    if is_linked and _linked(source, target):
        return True
    with open(source, "rb") as old, open(target, "wb") as new:
        if not share_blocks(old.fileno(), new.fileno()):
            shutil.copyfileobj(old, new, 1 << 20)
    return False


def _linked(source: str, target: Path) -> bool:
    temp = target.with_name(f".{os.getpid()}-{threading.get_ident()}.link")
    try:
        os.link(source, temp)
        os.replace(temp, target)
    except OSError:  # another file system, or one without hard links
        temp.unlink(missing_ok=True)
        return False
    return True


def scratch_folder() -> Path:
    """Return a folder for files that are gone when the program ends.

    Raises:
        OutputError: no such folder can be written to.
    """
    folder = user_cache_dir()  # before the system's, which may lie in memory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:  # no home folder, or a file in its place
        pass
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise OutputError(
            f"no folder for temporary files can be written, {printable(str(folder))} neither; "
            "set TMPDIR to one that can"
        ) from error


@contextlib.contextmanager
def held_folder(prefix: str) -> Iterator[Path]:
    """Make a scratch folder, `PREFIX` and something, that is gone at the end; remove those that the dead left behind.

    Raises:
        OutputError: no such folder can be written to.
    """
    place = scratch_folder()
    _remove_unheld(place, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as name:
        held = OutputLock.acquire(Path(name) / _HOLDER, name)
        try:
            yield Path(name)
        finally:
            held.release()


def _remove_unheld(place: Path, prefix: str) -> None:
    """Remove folders of `held_folder` that nobody holds; one that is new may just be about to be held."""
    for holder in place.glob(f"{prefix}*/{_HOLDER}"):  # a folder without one may be another program's
        folder = holder.parent
        with contextlib.suppress(OSError):
            is_new = time.time() - folder.stat().st_mtime < _NEW_S
            if not is_new and not folder.is_symlink() and lock_holder(holder) is None:
                shutil.rmtree(folder, ignore_errors=True)
