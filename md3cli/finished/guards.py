"""What md3 made itself, and what a command must never write over: what it reads, pictures, somebody else's files.

All is refused before a model is loaded, under whatever name a file is given: links, hard ones too, and other
spellings. --overwrite lets a single file go that the user named as OUTPUT, and nothing else: a file in the place of
one of md3's own (records, run.json) that is none stays, and so does anything foreign in a run folder.

A folder that md3 makes has the list `.md3`, and only what stands on it is ever removed. Its first line is JSON
(`schema`, `format`, `version`); each further line is a path, relative to the folder, with `/`. A path that a line
cannot hold as it is (line breaks, bytes that are no UTF-8) is a JSON string. The list may come from a stranger:
absolute paths, `..` and paths through links are not believed. Lines are read and written one at a time, so a list of
any length takes no memory; only `listed_in` keeps 21 bytes a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from md3cli import __version__
from md3cli.errors import OutputMismatchError, UsageError
from md3cli.finished.digest import DIGEST_BYTES, DigestSet
from md3cli.finished.run_json import RECORDS_NAME, RUN_INFO_NAME, read_document, run_info_paths
from md3cli.records import SCHEMA, are_printable, printable
from md3cli.remote.address import is_address
from md3cli.source.walk import Glob, has_image_suffix, is_glob
from md3cli.system import open_at_once

_HEAD_BYTES = 1 << 20
MARKER = ".md3"
LIST_SCHEMA = "md3-files/1"
RUN = "run"  # the format of a run folder
_ASIDE = f"{MARKER}.tmp-"  # what becomes the list
_LINE_LIMIT = 1 << 16  # characters; no file system has longer paths
TRAINERS_SUFFIX = ".cache"  # `labels.cache`, `labels/train.cache`: trainers leave these in data sets
# First bytes of the picture formats that md3 reads.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")


def check_not_input(outputs: Iterable[Path], inputs: Iterable[str | Path], option: str = "-o") -> None:
    """Refuse to write to a file that is read, or that is a picture; --overwrite does not help.

    Args:
        outputs: every file that is written; those that are not there are harmless.
        inputs: what is read: paths, globs, and `-` for stdin; folders and addresses are passed over.
        option: what named the outputs.

    Raises:
        UsageError: one is an input or a picture, under whatever name.
    """
    there = [output for output in outputs if output.is_file()]
    check_none_is_read(there, inputs, option)
    for output in there:
        if has_image_suffix(os.path.realpath(output)) or _begins_like_picture(output):
            raise UsageError(
                f"{printable(str(output))} is a picture, so nothing is written to it; name another {option}"
            )


def check_none_is_read(outputs: Iterable[Path], inputs: Iterable[str | Path], option: str = "-o") -> None:
    """Refuse to write to a file that is read, as `check_not_input`; pictures may be replaced."""
    read = [path for path in map(str, inputs) if not is_address(path)]
    for output in outputs:
        if output.is_file() and any(_is_same(output, path) for path in read):
            shown = printable(str(output))
            advice = f"name another {option}"
            raise UsageError(f"{shown} is an input of this command, so nothing is written to it; {advice}")


def files_of_run(records: Path) -> list[Path]:
    """Return a records file and where its run.json may stand: what is read of a finished run."""
    return [records, *run_info_paths(records)]


def files_in(paths: Iterable[str | None]) -> Iterator[str]:
    """Yield the paths that are files, and the files right inside those that are folders (of a model, an adapter)."""
    for path in paths:
        if path is None or is_address(path):
            continue
        if os.path.isdir(path):
            yield from (entry.path for entry in os.scandir(path) if entry.is_file())
        elif os.path.isfile(path):
            yield path


def head_of(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError:
        return b""


def _is_same(output: Path, path: str) -> bool:
    try:
        if path == "-":  # `md3 run - <list.csv -o list.csv`
            return os.path.samestat(os.fstat(0), output.stat())
        if is_glob(path) and not os.path.exists(path):
            return _is_matched(output, path)
        return os.path.isfile(path) and os.path.samefile(output, path)
    except (OSError, ValueError):
        return False


def _is_matched(output: Path, text: str) -> bool:
    glob = Glob.parse(text)
    relative = os.path.relpath(os.path.realpath(output), os.path.realpath(glob.base or "."))
    return not relative.startswith("..") and glob.matches(relative) and glob.names_suffix


def _begins_like_picture(path: Path) -> bool:
    head = head_of(path, 12)
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP") or head[4:8] == b"ftyp"


def check_not_foreign_run(journal: Path, run_info: Path) -> None:
    """Refuse a run.json or a records file that md3 did not write, where its own would stand.

    Raises:
        OutputMismatchError: one is something else, or a link that the user did not name. A damaged run.json beside
            records of md3 is not refused.
    """
    for path in (run_info, *([journal] if journal.name.endswith(f".{RECORDS_NAME}") else [])):
        if path.is_symlink():  # not what the user named, so perhaps put there by another
            raise OutputMismatchError(
                f"{printable(str(path))} is a link, and md3 would write to what it leads to; remove it, or choose "
                "another -o"
            )
    if run_info.exists() and not (begins_with_record(journal) or has_run_schema(run_info)):
        raise OutputMismatchError(
            f"{printable(str(run_info))} is not md3's, so nothing is written beside it; choose another -o"
        )
    # Is it there first, and then what is it: a rank may be putting it there just now.
    if journal.is_file() and journal.stat().st_size and not (begins_with_record(journal) or run_info.exists()):
        raise OutputMismatchError(
            f"{printable(str(journal))} holds something else than records of md3, so it is not replaced; "
            "choose another -o"
        )


def has_run_schema(run_info: Path) -> bool:
    """Return whether a run.json says that md3 wrote it.

    Raises:
        OutputMismatchError: it is larger than any that md3 writes.
    """
    return str(read_document(run_info).get("schema")).startswith("md3-run/")


def begins_with_record(journal: Path) -> bool:
    """Return whether one of the first lines of a file is a record of md3, of any version."""
    for line in head_of(journal, _HEAD_BYTES).split(b"\n")[:20]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and str(record.get("schema")).startswith(SCHEMA.partition("/")[0] + "/"):
            return True
    return False


def check_not_of_run(output: Path) -> None:
    """Refuse to write over the records or the run.json of a run, which nothing can make again; --overwrite is no help.

    Raises:
        UsageError: it is one.
        OutputMismatchError: as `has_run_schema`.
    """
    if not output.is_file():
        return
    is_records = any(map(has_run_schema, run_info_paths(output))) and begins_with_record(output)
    # By its name first: a document may be larger than what is read as a run.json.
    is_run_info = output.name.endswith(RUN_INFO_NAME) and has_run_schema(output)
    if is_records or is_run_info:
        what = "the records" if is_records else "the run.json"
        raise UsageError(f"{printable(str(output))} is {what} of a run, so nothing is written to it; name another -o")


def check_documents(documents: Iterable[tuple[str, Path]], run_info: Path, *, is_run_folder: bool) -> None:
    """Refuse documents in a run folder, and folders anywhere, that md3 did not make.

    Args:
        documents: each format with its file or folder.

    Raises:
        UsageError: a folder holds something foreign.
        OutputMismatchError: a file of md3's name stands in a folder that has no run.json of md3.
    """
    for format, path in documents:
        if path.is_dir():
            if next(path.iterdir(), None) is None or (format == "txt" and is_run_folder and has_run_schema(run_info)):
                continue
            if has_marker(path) or not is_of_older_run(run_info, format):
                check_not_foreign(path)
        elif path.exists() and is_run_folder and not has_run_schema(run_info):
            raise OutputMismatchError(f"{printable(str(path))} is not md3's, so it is not replaced; choose another -o")


def is_of_older_run(run_info: Path, format: str) -> bool:
    """Return whether an earlier start, perhaps older than `.md3` lists, was asked for this format, by run.json."""
    if not has_run_schema(run_info):
        return False
    starts = read_document(run_info).get("starts")
    arguments = [start.get("arguments") for start in starts if isinstance(start, dict)] if type(starts) is list else []
    words = [str(word) for found in arguments if isinstance(found, list) for word in found]
    return any(word in (format, f"--format={format}", f"-f{format}") for word in words)


# -- the list of what md3 made ----------------------------------------------------------------------


def write_marker(folder: Path, format: str, paths: Iterator[str]) -> None:
    """Write the list of `paths` into `folder`.

    Raises:
        OSError: it cannot be written.
    """
    aside = folder / f"{_ASIDE}{secrets.randbelow(10**12)}"
    with aside.open("x", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"schema": LIST_SCHEMA, "format": format, "version": __version__}) + "\n")
        file.writelines(f"{_as_line(path)}\n" for path in paths)
    os.replace(aside, folder / MARKER)


def has_marker(folder: Path | str) -> bool:
    """Return whether `folder` has a file `.md3` that md3 wrote, as far as its first line says."""
    return marker_format(folder) is not None


def marker_format(folder: Path | str) -> str | None:
    """Return what md3 made `folder` as: a format, or `run`; None where it has no list of ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError), _opened(folder) as file:
        head = json.loads(file.readline(_LINE_LIMIT))
        if isinstance(head, dict) and head.get("schema") == LIST_SCHEMA:
            return str(head.get("format"))
    return None


def written_paths(folder: Path | str) -> Iterator[str]:
    """Yield the paths on the list of `folder` that stay inside it; nothing where there is no list of ours."""
    if not has_marker(folder):
        return
    with contextlib.suppress(OSError, ValueError), _opened(folder) as file:
        file.readline(_LINE_LIMIT)
        while line := file.readline(_LINE_LIMIT):
            path = _as_path(line.rstrip("\n"))
            if path is not None:
                yield path


def files_below(folder: Path | str, relative: str = "") -> Iterator[str]:
    """Yield the paths of all files below `folder`, relative to it, one after the other; links are not entered."""
    with os.scandir(os.path.join(folder, relative)) as entries:
        for entry in entries:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(folder, path)
            elif path != MARKER and not path.startswith(_ASIDE):
                yield path


def foreign_file(folder: Path) -> str | None:
    """Return a file below `folder` that its list does not name, if any; a trainer's cache is nobody's work."""
    is_listed = listed_in(folder)
    found = (path for path in files_below(folder) if not path.endswith(TRAINERS_SUFFIX))
    return next((path for path in found if not is_listed(path)), None)


def listed_in(folder: Path) -> Callable[[str], bool]:
    """Return what says whether a path, relative to `folder` and with `/`, is on its list; 21 bytes a listed path."""
    listed = DigestSet()
    for path in written_paths(folder):
        listed.add(_path_digest(path))
    return lambda path: _path_digest(path) in listed


def remove_written(folder: Path) -> None:
    """Remove the files on the list of `folder`, the list, and the folders that are empty then; all else stays."""
    for path in written_paths(folder):
        if not _leads_through_link(folder, path):
            with contextlib.suppress(OSError):
                os.unlink(folder / path)
    if has_marker(folder):
        with contextlib.suppress(OSError):
            os.unlink(folder / MARKER)
    for top, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty: something else is in it
            os.rmdir(top)


def _opened(folder: Path | str) -> IO[str]:
    fd = open_at_once(os.path.join(folder, MARKER), follows_links=False)
    return open(fd, encoding="utf-8", newline="\n")


def _path_digest(path: str) -> bytes:
    return hashlib.sha256(os.fsencode(path)).digest()[:DIGEST_BYTES]


def _as_line(path: str) -> str:
    is_plain = not path.startswith('"') and are_printable(path)
    return path if is_plain else json.dumps(path)


def _as_path(line: str) -> str | None:
    """Return the path that a line means; None where it is none, or leads out of the folder."""
    try:
        path = json.loads(line) if line.startswith('"') else line
        os.fsencode(path)
    except (ValueError, TypeError, RecursionError):
        return None
    parts = path.replace("\\", "/").split("/") if os.name == "nt" else path.split("/")
    is_inside = all(part not in ("", ".", "..") for part in parts) and "\0" not in path
    return path if is_inside and not os.path.isabs(path) and not os.path.splitdrive(path)[0] else None


def _leads_through_link(folder: Path, path: str) -> bool:
    above = folder
    for part in path.split("/")[:-1]:
        above = above / part
        if above.is_symlink():
            return True
    return False


def check_not_foreign(folder: Path) -> None:
    """Refuse a folder that is there and holds what md3 did not write.

    Raises:
        UsageError: it has no list of md3's files, or something that is not on it.
    """
    if not has_marker(folder):
        raise UsageError(
            f"{printable(str(folder))} was not made by md3 (or before it kept lists of its files, .md3), so it is not "
            "replaced; name another -o, or delete the folder yourself"
        )
    if marker_format(folder) == RUN:
        raise UsageError(f"{printable(str(folder))} is a run folder with its records; name another -o")
    foreign = _foreign_at_second_look(folder)
    if foreign is not None:
        raise UsageError(
            f"{printable(str(folder / foreign))} was not written by md3; move it away yourself, or name another -o"
        )


def _foreign_at_second_look(folder: Path) -> str | None:
    """Return what `foreign_file` does; a rank may have put another folder in the place of this one while it looked."""
    with contextlib.suppress(FileNotFoundError):
        if foreign_file(folder) is None:
            return None
    return foreign_file(folder)
