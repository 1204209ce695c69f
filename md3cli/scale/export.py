"""The records of all shards as one file in input order: a copy of the parts, one behind the other.

A part holds the very lines of a single process's journal, so that the export is the same bytes however the
run went, and costs no more than reading and writing them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from md3cli.errors import DamagedPartError
from md3cli.files import atomic_publish, output_error
from md3cli.records import OK_TAIL, printable
from md3cli.scale.folder import ERRORS, EXPORTED, KEPT, RunFolder
from md3cli.scale.markers import Commit
from md3cli.scale.plan import Plan


@dataclass(frozen=True, slots=True)
class Exported:
    """What the last export wrote."""

    records: int
    bytes: int
    sha256: str


def read_exported(folder: RunFolder) -> Exported | None:
    """What the last export wrote; None while there was none."""
    try:
        return Exported(**json.loads(folder.store.read(EXPORTED) or b""))
    except (ValueError, TypeError):
        return None


def export_parts(folder: RunFolder, plan: Plan, commits: Mapping[int, Commit], out: Path) -> Exported:
    """Write all records to `out`, whole or not at all; the failed ones to errors.jsonl of the folder too.

    `note_exported` comes once they stand where they belong.

    Raises:
        OutputError: it cannot be written.
        DamagedPartError: a part is not what its marker says.
    """
    with folder.store.put_file(ERRORS) as errors_path, atomic_publish(out) as temp:
        try:
            with open(temp, "wb") as file, open(errors_path, "wb") as errors:
                exported = _copy(folder, plan, commits, file, errors)
        except OSError as error:
            raise output_error(out, error) from error
    return exported


def note_exported(folder: RunFolder, exported: Exported) -> None:
    """Note that OUTPUT has the records of all shards."""
    folder.store.put(EXPORTED, json.dumps(asdict(exported)).encode())


def _copy(folder: RunFolder, plan: Plan, commits: Mapping[int, Commit], file: IO[bytes], errors: IO[bytes]) -> Exported:
    digest, num_bytes, num_records = hashlib.sha256(), 0, 0
    for shard in range(-1, plan.shards):
        data = read_part(folder, commits[shard]) if shard >= 0 else folder.store.read(KEPT) or b""
        digest.update(data)
        file.write(data)
        num_bytes += len(data)
        num_records += data.count(b"\n")
        if shard < 0 or commits[shard].errors:
            errors.writelines(line for line in data.splitlines(keepends=True) if not line.endswith(OK_TAIL))
    return Exported(num_records, num_bytes, digest.hexdigest())


def read_part(folder: RunFolder, commit: Commit) -> bytes:
    """The records of a committed shard.

    Raises:
        DamagedPartError: they are not what the marker says.
    """
    data = folder.store.read(commit.part)
    if data is None or hashlib.sha256(data).hexdigest() != commit.sha256:
        what = "is missing" if data is None else "is damaged"
        raise DamagedPartError(
            f"{printable(folder.uri)}/{commit.part} {what}, again after its shard was done anew; check the disk, then "
            "start the same command again"
        )
    return data
