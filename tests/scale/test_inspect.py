"""Damage in the files of a run of many processes: it costs its own line, is copied and told, and is done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from program import Program, make_pictures

MANY = ("--engine", "local", "--shard-size", 10)
LINE = 4  # of a file of records, from 1, that is damaged


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", 30)


def flipped(line: bytes) -> bytes:
    return line.replace(b'"task"', b'"tasj"')


def nul(line: bytes) -> bytes:
    return line[:40] + bytes(60) + line[100:]


def blank(line: bytes) -> bytes:
    return b"\n"


def other_prompt(line: bytes) -> bytes:
    return line.replace(b'"prompt":null', b'"prompt":"x"')


def other_image(line: bytes) -> bytes:
    return line.replace(b'"image":"p', b'"image":"q')


def other_id(line: bytes) -> bytes:
    start = line.index(b'"id":"') + len(b'"id":"')
    return line[:start] + (b"1" if line[start : start + 1] == b"0" else b"0") + line[start + 1 :]


def damage_line(path: Path, change: Callable[[bytes], bytes], number: int = LINE) -> bytes:
    """Change a line of a file; returns what stands there now."""
    lines = path.read_bytes().splitlines(keepends=True)
    before, lines[number - 1] = lines[number - 1], change(lines[number - 1])
    assert lines[number - 1] != before
    path.write_bytes(b"".join(lines))
    return lines[number - 1]


def reopen(run: Path) -> None:
    """As if the run had been stopped before its export."""
    (run / "exported.json").unlink()


def leave_journal(run: Path, shard: int) -> Path:
    """As if a shard had been stopped before its commit, all of its records in the journal of one attempt."""
    marker = run / f"commits/{shard:05d}.json"
    part = run / json.loads(marker.read_bytes())["part"]
    journal = run / f"wip/{shard:05d}.host-1-abcd.jsonl"
    journal.parent.mkdir(exist_ok=True)
    part.rename(journal)
    marker.unlink()
    reopen(run)
    return journal


@pytest.mark.parametrize("change", [flipped, nul, blank, other_prompt, other_image, other_id])
def test_a_damaged_line_of_an_attempt_costs_itself(
    md3: Program, pictures: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    out = tmp_path / "o.jsonl"
    run = Path(f"{out}.md3run")
    md3("caption", pictures, "-o", out, *MANY)
    expected = out.read_bytes()
    journal = leave_journal(run, 1)
    damaged = damage_line(journal, change)
    result = md3("caption", pictures, "-o", out)
    assert f"repaired {journal}: line {LINE} was damaged, copied to {run}/damaged/00001.jsonl" in result.stderr
    assert (run / "damaged/00001.jsonl").read_bytes() == damaged
    assert (result.exit_code, md3.num_answered, out.read_bytes()) == (0, 1, expected)


@pytest.mark.process
@pytest.mark.parametrize("change", [flipped, nul, blank, other_prompt, other_image, other_id])
def test_a_damaged_line_of_a_committed_part_costs_itself(
    md3: Program, pictures: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    out = tmp_path / "o.jsonl"
    run = Path(f"{out}.md3run")
    md3("caption", pictures, "-o", out, *MANY)
    expected = out.read_bytes()
    reopen(run)
    part = sorted((run / "parts").iterdir())[1]
    damaged = damage_line(part, change)
    found = md3("verify", out)
    assert f"shard 1: parts/{part.name} is not what its marker says: no whole record in line {LINE}\n" in found.output
    result = md3("caption", pictures, "-o", out)
    assert f"repaired {part}: line {LINE} was damaged, copied to {run}/damaged/00001.jsonl" in result.stderr
    assert (run / "damaged/00001.jsonl").read_bytes() == damaged
    assert (result.exit_code, md3.num_answered, out.read_bytes()) == (0, 1, expected)
    assert md3("verify", out).exit_code == 0


@pytest.mark.parametrize("change", ["value", "missing", "lacking"])
def test_a_part_that_no_damaged_line_explains(md3: Program, pictures: Path, tmp_path: Path, change: str) -> None:
    """A value that changed may be any: all of the shard is done again, and a copy stays."""
    out = tmp_path / "o.jsonl"
    run = Path(f"{out}.md3run")
    md3("caption", pictures, "-o", out, *MANY)
    expected = out.read_bytes()
    reopen(run)
    part = sorted((run / "parts").iterdir())[1]
    whole = part.read_bytes()
    if change == "value":
        part.write_bytes(whole.replace(b'"caption":"a', b'"caption":"b', 1))
    elif change == "missing":
        part.unlink()
    else:
        part.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    damaged = part.read_bytes() if part.exists() else None
    assert damaged != whole
    result = md3("caption", pictures, "-o", out)
    words = {"value": "changed inside its values", "missing": "is missing", "lacking": "lacks 3 records"}
    assert words[change] in result.stderr
    assert md3.num_answered == (3 if change == "lacking" else 10)
    assert (result.exit_code, out.read_bytes()) == (0, expected)
    if change == "value":
        assert (run / f"damaged/{part.name}").read_bytes() == damaged


def test_many_damaged_parts_are_told_in_few_lines(md3: Program, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    run = Path(f"{out}.md3run")
    md3("caption", pictures, "-o", out, "--engine", "local", "--shard-size", 2)
    expected = out.read_bytes()
    reopen(run)
    parts = sorted((run / "parts").iterdir())
    for part in parts:
        damage_line(part, flipped, 1)
    result = md3("caption", pictures, "-o", out)
    assert result.stderr.count("warning: repaired ") == 5
    assert f"{len(parts) - 5} more parts were damaged" in result.stderr
    assert (result.exit_code, md3.num_answered, out.read_bytes()) == (0, len(parts), expected)


@pytest.mark.parametrize("change", [flipped, nul, blank, other_prompt, other_image])
def test_damage_in_records_that_are_taken_over(
    md3: Program, pictures: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    """A run of one process that many go on with."""
    out = tmp_path / "o.jsonl"
    md3("caption", pictures, "-o", out)
    expected = out.read_bytes()
    damaged = damage_line(out, change)
    result = md3("caption", pictures, "-o", out, *MANY)
    assert f"repaired {out}: line {LINE} was damaged, copied to {out}.damaged" in result.stderr
    assert Path(f"{out}.damaged").read_bytes() == damaged
    assert (result.exit_code, md3.num_answered, out.read_bytes()) == (0, 1, expected)


@pytest.mark.parametrize("change", [flipped, nul, blank, other_prompt, None])
def test_damage_in_the_exported_records_is_reported(
    md3: Program, pictures: Path, tmp_path: Path, change: Callable[[bytes], bytes] | None
) -> None:
    out = tmp_path / "o.jsonl"
    md3("caption", pictures, "-o", out, *MANY)
    expected = out.read_bytes()
    damage_line(out, change or (lambda line: line.replace(b'"caption":"a', b'"caption":"b')))
    found = md3("verify", out)
    assert found.exit_code == 1
    assert f"{out} is not what was exported: " in found.output.replace("\n", "")
    is_whole = change in (None, other_prompt)
    assert ("its lines are whole" if is_whole else f"no whole record in line {LINE}") in found.output
    assert md3("status", out, "--json").exit_code == 0
    result = md3("caption", pictures, "-o", out)
    assert ("was changed by something else" if change is None else f"line {LINE} was damaged") in result.stderr
    assert (out.read_bytes() == expected) == (change is not None)
