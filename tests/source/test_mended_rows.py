"""A manifest's row that could not be read and has been mended: its failure goes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import Program, isolate, make_pictures, records_of


@pytest.fixture
def md3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", 4)
    return Program(monkeypatch)


def rows(*broken: int) -> str:
    names = [f'{{"image":"pictures/p{i}.png"' for i in range(4)]
    return "".join(name + ("\n" if number in broken else "}\n") for number, name in enumerate(names, start=1))


COMMAND = ("run", "m.jsonl", "--task", "caption:short", "-o", "r.jsonl", "--no-progress")


def test_only_the_failure_of_a_mended_row_goes(md3: Program) -> None:
    Path("m.jsonl").write_text(rows(2, 4))
    assert md3(*COMMAND).exit_code == 3
    Path("m.jsonl").write_text(rows(4))
    assert md3(*COMMAND).exit_code == 3, "one is still broken"
    records = records_of(Path("r.jsonl"))
    assert [record["image"] for record in records] == [f"pictures/p{i}.png" for i in range(3)] + [None]
    assert records[3]["error"]["message"].startswith("line 4: ")
    Path("m.jsonl").write_text(rows())
    assert md3(*COMMAND).exit_code == 0
    assert [record["error"] for record in records_of(Path("r.jsonl"))] == [None] * 4


def test_a_broken_row_that_is_gone_keeps_its_failure(md3: Program) -> None:
    Path("m.jsonl").write_text(rows(4))
    assert md3(*COMMAND).exit_code == 3
    Path("m.jsonl").write_text("".join(rows().splitlines(keepends=True)[:2]))
    assert md3(*COMMAND).exit_code == 3
    assert len(records_of(Path("r.jsonl"))) == 4
