"""Damage in a run folder, found and told: lines of attempts' journals, and parts that are not what their markers say.

A damaged line costs itself only. Of a part whose digest is wrong the good records stay where damaged lines explain
it; where every line is whole, nothing tells which was changed, and all of the shard is done again. What is left out
is copied to the run folder's `damaged/` first.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence

from md3cli.records import printable
from md3cli.scale.adoption import keep_lines
from md3cli.scale.asking import asked, history_of, is_line_of
from md3cli.scale.attempts import Place, attempt_files, damage_of, keep_damaged_lines
from md3cli.scale.commits import Commit, read_commit
from md3cli.scale.layout import DAMAGED, PARTS, RunFolder, commit_name
from md3cli.scale.plan import Plan, PlannedRow, PlanReader
from md3cli.whole_records import read_record

_MOST_TOLD = 5


def damaged_journals(folder: RunFolder, plan: Plan, commits: Mapping[int, Commit]) -> Iterator[str]:
    """Yield in words which lines of attempts at open shards are damaged, once they are copied; of many only the first.

    Raises:
        OutputError: the copies cannot be written.
    """
    reader, words = PlanReader(folder, plan), []
    for shard in range(plan.shards):
        if shard not in commits and attempt_files(folder.wip, shard):
            words += damage_of(folder, shard, history_of(folder, shard, reader.shard(shard)).damaged)
    yield from _bounded(words, "journals")


def reopen_damaged(folder: RunFolder, plan: Plan, commits: dict[int, Commit]) -> Iterator[str]:
    """Have the shards of damaged or missing parts done again, taken out of `commits`; yield what became of each.

    Raises:
        OutputError: the folder cannot be changed.
    """
    reader, words = PlanReader(folder, plan), []
    for shard, commit in sorted(commits.items()):
        data = folder.store.read(commit.part)
        if data is None or hashlib.sha256(data).hexdigest() != commit.sha256:
            words += _reopen(folder, shard, commit, data, reader.shard(shard))
            del commits[shard]
    yield from _bounded(words, "parts")


def _reopen(folder: RunFolder, shard: int, commit: Commit, data: bytes | None, rows: Sequence[PlannedRow]) -> list[str]:
    good, damaged = sort_part(data or b"", rows)
    if damaged:
        keep_damaged_lines(folder, shard, list(damaged.values()))
        keep_lines(folder, shard, good)
        places = [(Place(commit.part, number), line) for number, line in damaged.items()]
        words = damage_of(folder, shard, places)
    elif data is not None and len(good) < commit.num_records:
        keep_lines(folder, shard, good)
        words = [f"{_shown(folder, commit)} lacks {commit.num_records - len(good):,} records; they are done again"]
    elif data is not None:
        copy = f"{DAMAGED}/{commit.part.removeprefix(f'{PARTS}/')}"
        folder.wip.put(copy, data)
        words = [
            f"{_shown(folder, commit)} was changed inside its values, where nothing tells which: its {len(good):,} "
            f"records are done again; a copy is {printable(folder.wip.uri)}/{copy}"
        ]
    else:
        words = [f"{_shown(folder, commit)} is missing; its {commit.num_records:,} records are done again"]
    if read_commit(folder, shard) == commit:  # else somebody was faster
        folder.store.remove(commit_name(shard))
        folder.store.remove(commit.part)
    return words


def sort_part(data: bytes, rows: Sequence[PlannedRow]) -> tuple[list[bytes], dict[int, bytes]]:
    """Sort the lines of a part.

    Returns:
        The records of the requests of `rows`, one of each, and by number, from 1, all other lines.
    """
    planned = {record_id: (record_id, row, request) for record_id, row, request in asked(rows)}
    good: dict[str, bytes] = {}
    damaged: dict[int, bytes] = {}
    for number, line in enumerate(io.BytesIO(data), start=1):
        record = read_record(line)
        one = planned.get(record["id"]) if record is not None and line.endswith(b"\n") else None
        if one is not None and one[0] not in good and is_line_of(line, *one):
            good[one[0]] = line
        else:
            damaged[number] = line.removesuffix(b"\n") + b"\n"
    return list(good.values()), damaged


def _shown(folder: RunFolder, commit: Commit) -> str:
    return f"{printable(folder.uri)}/{commit.part}"


def _bounded(words: Sequence[str], what: str) -> Iterator[str]:
    yield from words[:_MOST_TOLD]
    if len(words) > _MOST_TOLD:
        yield f"{len(words) - _MOST_TOLD:,} more {what} were damaged, and are repaired in the same way"
