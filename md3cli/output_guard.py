"""What a run must never write over because somebody else made it (input_guard.py: what is read, and pictures).

All is refused before the model is loaded. A single file that the user named as OUTPUT may be replaced with
--overwrite; a file that stands in the place of one of md3's own
(records, run.json) and is none, and anything foreign in a run folder, is not replaced even so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from md3cli.errors import OutputMismatchError
from md3cli.exporters.own_outputs import check_not_foreign
from md3cli.finished_run import RECORDS_NAME
from md3cli.input_guard import head_of
from md3cli.marker import has_marker
from md3cli.records import SCHEMA, printable
from md3cli.run_facts import read_document

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
