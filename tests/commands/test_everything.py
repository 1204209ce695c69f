"""`md3 detect --everything`: what may be typed, and what the run is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import Program, make_pictures, records_of

from md3cli.commands.annotate import DEFAULT_LISTING


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "photos", 2)


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(monkeypatch)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["car", "--everything"], "leave out OBJECTs"),
        (["--everything", "--labels", "names.txt"], "leave out --labels"),
        (["--everything", "--prompts", "names.txt"], "leave out --prompts"),
        (["car", "--list", "caption:short"], "--list is about --everything"),
        (["car", "--vocabulary", "names.txt"], "--vocabulary is about --everything"),
        (["car", "--max-names", "3"], "--max-names is about --everything"),
        (["--everything", "--list", "detect:car"], "lists nothing"),
        (["--everything", "--list", "caption:huge"], "a caption is one of short, normal, long"),
        (["--everything", "--list", "query:"], "a question is missing"),
        (["--everything", "--list", "all"], "no task 'all'"),
        (["--everything", "--max-names", "0"], "greater than or equal to 1"),
        (["--everything", "--regions"], "leave out --regions"),
        (["--everything", "--missing-only", "--gt", "names.txt"], "--missing-only is about OBJECTs"),
        (["--everything", "--vocabulary", "none.txt"], "no such file"),
        (["--everything", "--vocabulary", "twice.txt"], "line 2: 'CAR' stands in line 1 already"),
    ],
)
def test_what_makes_no_sense_is_refused(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], message: str
) -> None:
    monkeypatch.chdir(pictures.parent)
    Path("names.txt").write_text("car\n")
    Path("twice.txt").write_text("car\nCAR\n")
    result = md3("detect", pictures, *typed)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not md3.models


def test_settings_about_lists_and_labels_wait_until_they_are_asked_for(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MAX_NAMES": "3", "LIST": "caption:short", "VOCABULARY": "v.txt", "GT": "labels.json"}.items():
        monkeypatch.setenv(f"MD3_{name}", value)
    monkeypatch.chdir(pictures.parent)
    assert '"requests": 2' in md3("detect", pictures, "car", "--dry-run").stdout
    assert "v.txt: no such file" in md3("detect", pictures, "--everything", "--dry-run").stderr
    assert "labels.json" in md3("detect", pictures, "car", "--missing-only", "--dry-run").stderr


def test_what_is_typed_goes_before_settings_that_say_the_other(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures.parent)
    monkeypatch.setenv("MD3_EVERYTHING", "true")
    assert md3("detect", pictures, "car", "-o", "car.jsonl").exit_code == 0
    assert [record["prompt"] for record in records_of(Path("car.jsonl"))] == ["car", "car"]
    Path("l.txt").write_text("car\n")
    assert md3("detect", pictures, "--labels", "l.txt", "-o", "listed.jsonl").exit_code == 0
    assert [record["prompt"] for record in records_of(Path("listed.jsonl"))] == ["car", "car"]
    monkeypatch.delenv("MD3_EVERYTHING")
    monkeypatch.setenv("MD3_LABELS", "l.txt")
    result = md3("detect", pictures, "--everything", "--dry-run")
    assert result.exit_code == 0, result.stderr


def test_a_dry_run_counts_lists(md3: Program, pictures: Path) -> None:
    result = md3("detect", pictures, "--everything", "--dry-run")
    assert '"requests": 2' in result.stdout
    assert "not_counted" in result.stdout


def test_the_usual_list_is_a_question_without_reasoning(md3: Program, pictures: Path) -> None:
    assert md3("detect", pictures, "--everything").exit_code == 0
    engine = md3.models[-1].engine
    assert engine is not None
    asked = {(str(request.task), request.prompt, request.reasoning) for _, request in engine.seen}
    assert ("query", DEFAULT_LISTING.argument, False) in asked
