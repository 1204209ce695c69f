"""A checkpoint folder in the making: hidden beside its place, locked, continued after a kill, published by rename.

Weight files that are finished stand in `.finished.json` with their digests and a line on what they were
made from. A writer that was killed leaves the folder; the next one with the same line goes on from there,
any other starts anew. A writer that fails removes it. No torch; knows nothing of tensors.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from md3cli.errors import OutputError
from md3cli.model.formats import JsonObject
from md3cli.model.weight_files import CHECKSUMS_NAME, CONFIG_LIMIT_BYTES

_FINISHED = ".finished.json"


class PartialFolder:
    """The hidden folder; use `open_partial`."""

    def __init__(self, path: Path, made_from: str | None) -> None:
        self.path = path
        self._made_from = made_from
        self._digests: dict[str, str] = {}
        state = self._read_state()
        if made_from is not None and state.get("made_from") == made_from:
            self._digests = dict(state["digests"])
        else:
            _empty(path)

    def _read_state(self) -> JsonObject:
        try:
            state = json.loads((self.path / _FINISHED).read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) and isinstance(state.get("digests"), dict) else {}

    def has(self, name: str) -> bool:
        """True for a file that an earlier writer finished."""
        return name in self._digests and (self.path / name).is_file()

    def finish(self, name: str, sha256: str) -> None:
        """Note a file that is whole and on disk."""
        self._digests[name] = sha256
        temporary = self.path / f"{_FINISHED}.new"
        write_synced(temporary, json.dumps({"made_from": self._made_from, "digests": self._digests}))
        temporary.replace(self.path / _FINISHED)

    def publish(self, target: Path) -> None:
        """Give the folder its name, with the weight files' digests in the form `sha256sum -c` reads.

        Small files are not among them: they are judged when they are read, and may be edited. `target`
        may be an empty folder.
        """
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._digests.items()))
        write_synced(self.path / CHECKSUMS_NAME, lines)
        if target.is_dir():
            target.rmdir()
        self.path.rename(target)
        (target / _FINISHED).unlink(missing_ok=True)  # after: a kill in between must not cost the work
        sync_folder(target.parent)


@contextlib.contextmanager
def open_partial(target: Path, made_from: str | None) -> Iterator[PartialFolder]:
    """The folder in which `target` is made, for one writer at a time; removed where the writer raises.

    `made_from` names source and settings; None never continues what an earlier writer left.

    Raises:
        OutputError: another process is writing the same target, or the folder cannot be made.
    """
    path = target.with_name(f".{target.name}.partial")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{target} is being written by another process") from error
        except OSError:
            pass  # a file system without locks
        try:
            yield PartialFolder(path, made_from)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def write_synced(file: Path, text: str) -> None:
    """Write a small text file and have it on disk."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Have a folder's names on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checksums(folder: Path) -> Mapping[str, str]:
    """File name to SHA-256 as `publish` wrote them; empty where there are none or they are not in that form."""
    file = folder / CHECKSUMS_NAME
    try:
        if not file.is_file() or file.stat().st_size > CONFIG_LIMIT_BYTES:  # opening a FIFO would wait for ever
            return {}
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    pairs = (line.split("  ", 1) for line in lines if line.strip())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
