"""What a command must never write over: what it reads, pictures, and what somebody else made.

All is refused before a model is loaded, under whatever name a file is given: links, hard ones too, and other
spellings. --overwrite lets a single file go that the user named as OUTPUT, and nothing else: a file in the place of
one of md3's own (records, run.json) that is none stays, and so does anything foreign in a run folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from md3cli.errors import OutputMismatchError, UsageError
from md3cli.finished.own_files import check_not_foreign, has_marker
from md3cli.finished.run_json import RECORDS_NAME, read_document, run_info_paths
from md3cli.records import SCHEMA, printable
from md3cli.remote.address import is_address
from md3cli.source.kinds import Glob, has_image_suffix, is_glob

# First bytes of the picture formats that md3 reads.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")


def check_not_input(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse to write to a file that is read, or that is a picture; --overwrite does not help.

    Args:
        outputs: every file that is written; those that are not there are harmless.
        inputs: what is read: paths, globs, and `-` for stdin; folders and addresses are passed over.

    Raises:
        UsageError: one is an input or a picture, under whatever name.
    """
    there = [output for output in outputs if output.is_file()]
    check_none_is_read(there, inputs)
    for output in there:
        if has_image_suffix(os.path.realpath(output)) or _begins_like_picture(output):
            raise UsageError(f"{printable(str(output))} is a picture, so nothing is written to it; name another -o")


def check_none_is_read(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse to write to a file that is read, as `check_not_input`; pictures may be replaced."""
    read = [path for path in map(str, inputs) if not is_address(path)]
    for output in outputs:
        if output.is_file() and any(_is_same(output, path) for path in read):
            shown = printable(str(output))
            raise UsageError(f"{shown} is an input of this command, so nothing is written to it; name another -o")


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
    """Whether a glob names a file."""
    glob = Glob.parse(text)
    relative = os.path.relpath(os.path.realpath(output), os.path.realpath(glob.base or "."))
    return not relative.startswith("..") and glob.matches(relative) and glob.names_suffix


def _begins_like_picture(path: Path) -> bool:
    head = head_of(path, 12)
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP") or head[4:8] == b"ftyp"


_HEAD_BYTES = 1 << 20


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
    is_ours = begins_with_record(journal)
    if run_info.exists() and not (is_ours or has_run_schema(run_info)):
        raise OutputMismatchError(
            f"{printable(str(run_info))} is not md3's, so nothing is written beside it; choose another -o"
        )
    if journal.is_file() and journal.stat().st_size and not (is_ours or run_info.exists()):
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
    """Whether run.json says that an earlier start, perhaps from before there were lists, was asked for this format."""
    if not has_run_schema(run_info):
        return False
    starts = read_document(run_info).get("starts")
    arguments = [start.get("arguments") for start in starts if isinstance(start, dict)] if type(starts) is list else []
    words = [str(word) for found in arguments if isinstance(found, list) for word in found]
    return any(word in (format, f"--format={format}", f"-f{format}") for word in words)
