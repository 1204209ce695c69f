"""What a run must never write over: its own INPUT, pictures, and what somebody else made.

All is refused before the model is loaded, and links are followed. A single file that the user named as OUTPUT may be
replaced with --overwrite where it is neither input nor picture; a file that stands in the place of one of md3's own
(records, run.json) and is none, and anything foreign in a run folder, is not replaced even so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from md3cli.errors import OutputMismatchError, UsageError
from md3cli.exporters.own_outputs import check_not_foreign
from md3cli.marker import has_marker
from md3cli.records import SCHEMA, printable
from md3cli.remote.address import is_address
from md3cli.walk import Glob, has_image_suffix, is_glob

_HEAD_BYTES = 1 << 20
# First bytes of the picture formats that md3 reads.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"BM")


def check_not_input(outputs: Iterable[Path], inputs: Sequence[str], arguments: Sequence[str] = ()) -> None:
    """Refuse to write to a file that is read, or that is a picture; --overwrite does not help.

    Args:
        outputs: every file that is written; those that are not there are harmless.
        inputs: what is read: paths and globs; folders, addresses and `-` are passed over.
        arguments: the command line; each file named there is taken for one that is read (`--prompts FILE`), except
            for what stands after -o.

    Raises:
        UsageError: one is an input or a picture, under whatever name.
    """
    read = [path for path in (*inputs, *_named_files(arguments)) if not is_address(path)]
    for output in outputs:
        if not output.is_file():
            continue
        shown = printable(str(output))
        if any(_is_same(output, path) for path in read):
            raise UsageError(f"{shown} is an input of this command, so nothing is written to it; name another -o")
        if has_image_suffix(os.path.realpath(output)) or _begins_like_picture(output):
            raise UsageError(f"{shown} is a picture, so nothing is written to it; name another -o")


def _named_files(arguments: Sequence[str]) -> Iterator[str]:
    """What the arguments name, but for OUTPUT; `--option=VALUE` names VALUE."""
    is_output = False
    for argument in arguments:
        if is_output or argument.startswith(("--output=", "-o=")):
            is_output = False
        elif argument in ("-o", "--output"):
            is_output = True
        elif not argument.startswith("-o"):
            yield argument.partition("=")[2] if argument.startswith("--") and "=" in argument else argument


def _is_same(output: Path, path: str) -> bool:
    try:
        if is_glob(path) and not os.path.exists(path):
            return _is_matched(output, path)
        return os.path.isfile(path) and os.path.samefile(output, path)
    except (OSError, ValueError):
        return False


def _is_matched(output: Path, text: str) -> bool:
    """Whether a glob names a file that md3 did not make: its own files are left out of a walk."""
    if output.with_name(f"{output.name}.run.json").exists():
        return False
    glob = Glob.parse(text)
    relative = os.path.relpath(os.path.realpath(output), os.path.realpath(glob.base or "."))
    return not relative.startswith("..") and glob.matches(relative) and glob.names_suffix


def _begins_like_picture(path: Path) -> bool:
    head = _head(path, 12)
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:] == b"WEBP") or head[4:8] == b"ftyp"


def _head(path: Path, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError:
        return b""


def check_not_foreign_run(journal: Path, run_info: Path) -> None:
    """Refuse a run.json or a records file that md3 did not write, where its own would stand.

    Raises:
        OutputMismatchError: one is something else; a damaged run.json beside records of md3 is none.
    """
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
    """Whether a run.json says that md3 wrote it."""
    try:
        document = json.loads(run_info.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("schema")).startswith("md3-run/")


def begins_with_record(journal: Path) -> bool:
    """Whether one of the first lines of a file is a record of md3, of any version."""
    for line in _head(journal, _HEAD_BYTES).split(b"\n")[:20]:
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
    starts = json.loads(run_info.read_bytes()).get("starts")
    arguments = [start.get("arguments") for start in starts if isinstance(start, dict)] if type(starts) is list else []
    words = [str(word) for found in arguments if isinstance(found, list) for word in found]
    return any(word in (format, f"--format={format}", f"-f{format}") for word in words)
