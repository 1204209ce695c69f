"""What the operating system does for a run beyond Python's own calls: locks, limits, the heap, signals, processes.

This file alone asks whether a system has a call. Where it has none (Windows knows no `fcntl`, no `resource`, no
`O_NONBLOCK`), each function does the next best thing, which its docstring names. Standard library only; knows nothing
of runs, pictures or md3's errors.

Locks are our own and not filelock's, which has no lock that several ranks share, and on Windows locks the first byte
of the file, where the holder's name stands: nobody could read who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

# In this order wherever all are named; SIGHUP does not exist on Windows.
STOP_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
KILL_SIGNAL: int = getattr(signal, "SIGKILL", signal.SIGTERM)

_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_HAS_OPEN_FOLDERS = hasattr(os, "O_DIRECTORY")
_NO_LOCKS_HERE = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
_BEHIND_TEXT = 1 << 30  # where Windows locks a byte, which others then cannot read
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_CONTAINER = "/sys/fs/cgroup"  # of this process, as a container shows it
_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 30  # of freed memory at the end of the heap
_LARGEST_HEAP_BLOCK = 32 << 20  # glibc allows no more; larger blocks are mapped, and faulted in, each time

# -- files -----------------------------------------------------------------------------------------


class NotRegularError(OSError):
    """What was opened is a folder, a FIFO, a socket or a device."""

    def __init__(self) -> None:
        super().__init__(0, "not a regular file")


def open_at_once(path: Path | str, flags: int = os.O_RDONLY, *, follows_links: bool = True) -> int:
    """Return a file descriptor; a FIFO without a writer does not hang the call. For files it is `os.open`.

    Without `follows_links` a link in the last part of `path` is an OSError, where the system can tell.
    """
    return os.open(path, flags | _NO_WAITING | (0 if follows_links else _NO_LINK), 0o666)


def open_regular(path: Path | str, flags: int = os.O_RDONLY, *, follows_links: bool = True) -> int:
    """Return a file descriptor as `open_at_once` does.

    Raises:
        NotRegularError: it is no regular file.
        OSError: it cannot be opened.
    """
    fd = open_at_once(path, flags, follows_links=follows_links)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotRegularError
    return fd


def read_at(fd: int, num_bytes: int, offset: int) -> bytes:
    """Return up to `num_bytes` from `offset` of an open file; without `pread` the file's position moves."""
    if hasattr(os, "pread"):
        return os.pread(fd, num_bytes, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, num_bytes)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to an open file, in as many writes as it takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_data(fd: int) -> None:
    """Bring an open file's bytes to the disk, and its times, too, where the system makes no difference."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk; do nothing where the system opens no folders."""
    if _HAS_OPEN_FOLDERS:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def exchange(first: Path, second: Path) -> bool:
    """Let two folders change places at once, so that neither is ever absent; return False where that is impossible."""
    rename = getattr(_library(), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    is_done: bool = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
    return is_done


def drop_cache(fd: int) -> None:
    """Ask the system to read a file from the disk next time; do nothing where it takes no advice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


# -- locks -----------------------------------------------------------------------------------------

try:
    import fcntl
except ImportError:  # Windows

    def _lock(fd: int, is_shared: bool) -> None:
        try:
            windows = importlib.import_module("msvcrt")
        except ImportError:
            raise OSError(errno.ENOSYS, "no locks") from None
        if is_shared:
            raise OSError(errno.ENOSYS, "no shared locks")
        os.lseek(fd, _BEHIND_TEXT, os.SEEK_SET)
        try:
            windows.locking(fd, windows.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(errno.EAGAIN, "locked") from error
        finally:
            os.lseek(fd, 0, os.SEEK_SET)

    def share_blocks(source: int, target: int) -> bool:
        return False

    def shared_memory(num_bytes: int) -> int | None:
        return None

else:

    def _lock(fd: int, is_shared: bool) -> None:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def share_blocks(source: int, target: int) -> bool:
        """Make an open file a copy of another at no cost (Btrfs, XFS, bcachefs, ZFS); return False elsewhere."""
        if sys.platform != "linux":
            return False
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError:
            return False
        return True

    def shared_memory(num_bytes: int) -> int | None:
        """Return a descriptor of new memory that processes can map and none can resize; None where there is none.

        It has no name, and is gone when nobody has it open or mapped. Linux alone has it, and a limit on the size of
        files (RLIMIT_FSIZE) may forbid it.
        """
        if not hasattr(os, "memfd_create"):
            return None
        try:
            fd = os.memfd_create("md3", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            return None
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError:
            os.close(fd)
            return None
        return fd


def lock(fd: int, *, is_shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False where there are no locks (network mounts).

    A shared lock leaves room for other shared ones; Windows has none.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        _lock(fd, is_shared)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return False
        raise
    return True


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; hold nothing where there are no locks, or where the system opens no folders.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if not _HAS_OPEN_FOLDERS:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(fd)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system that locks no folders
        yield
    finally:
        os.close(fd)


# -- limits ----------------------------------------------------------------------------------------

try:
    import resource
except ImportError:  # Windows: a decoder that eats memory is stopped by the system alone

    def limit_memory(num_bytes: int) -> None:
        pass

    def _leave_no_core_dump() -> None:
        pass

    def most_memory_used() -> int:
        return 0

else:

    def limit_memory(num_bytes: int) -> None:
        """Let this process have at most `num_bytes` of address space, where the system can (macOS cannot)."""
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def _leave_no_core_dump() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def most_memory_used() -> int:
        """Return the most bytes that this process ever held; 0 where the system does not say."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes


def available_memory() -> int | None:
    """Return the bytes that this process can still take without harm, a container's limit included; None if unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS, Windows
        return None
    with contextlib.suppress(OSError, ValueError):  # no version 2 of control groups; "max": no limit
        most, used = (int(Path(_CONTAINER, f"memory.{name}").read_text()) for name in ("max", "current"))
        with open(f"{_CONTAINER}/memory.stat", encoding="ascii") as lines:  # files that were read once cost nothing
            used -= sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        available = min(available, max(0, most - used))
    return available


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def be_expendable() -> None:
    """Leave no core dump; on Linux also be the first process that the kernel ends when memory runs out."""
    _leave_no_core_dump()
    if sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")


# -- the C library's heap --------------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next tensors; return False where the C library is not glibc.

    glibc returns freed blocks to the kernel when they are large or lie at the end of the heap, and takes them again,
    zeroed page by page, for the next tensor of the same size. A forward pass on the CPU frees and takes the same few
    sizes hundreds of times: without these page faults a crop of the real vision encoder takes a fifth less time and a
    prefix a seventh (two Zen 4 cores under a hypervisor, 2026-11). Peak memory does not grow: what is kept was in use.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES) and libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK))


def return_freed_memory() -> None:
    """Give what is free back to the kernel, once: after weights were exchanged, whose sizes do not come again."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = _library()
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _library() -> ctypes.CDLL:
    import ctypes  # 3 ms, which `md3 --version` need not wait for

    return ctypes.CDLL(None, use_errno=True)


# -- processes -------------------------------------------------------------------------------------


def leave_stopping_to(parent_pid: int) -> None:
    """Ignore the signals that stop a run, and end when the parent has ended; on Linux, whenever it ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # sent to a whole service, they would make bad records of good pictures
    if sys.platform == "linux":
        _library().prctl(_PARENT_DEATH_SIGNAL, KILL_SIGNAL)  # of the *thread* that started this process
    if os.getppid() != parent_pid:  # it died before the lines above
        os._exit(0)


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine is there; return True where asking would end it (Windows)."""
    if not hasattr(os, "getpgid"):
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # or a number that no process has
        return False
    except OSError:  # somebody else's
        return True
    return True
