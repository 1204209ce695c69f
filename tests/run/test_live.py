"""A single answer on a terminal: the record's own text, piece by piece; failures and stops as in any other run."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from program import Program, isolate
from stub_engine import StubEngine, StubModel, answer
from terminal import Terminal, terminal
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.console import LiveText
from md3cli.model.engine.generation import Decisions
from md3cli.records import Answer, Job
from md3cli.signals import Interrupted

SCENE = Path(__file__).parents[2] / "examples" / "scenes" / "scene_00000.png"
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def on_terminal(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """Exit status, and what stdout and stderr were sent, both of which are terminals."""
    with terminal(**environment) as stdout, pytest.MonkeyPatch.context() as patch:
        stderr = Terminal()
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments], prog_name="md3")
        return int(end.value.code or 0), stdout.getvalue(), stderr.getvalue()


def record_of(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="md3")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    isolate(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("md3cli.run.feed.num_auto_workers", lambda: 0)
    return tmp_path


# -- the model that ships --------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize(
    "question",
    [
        ["How many shapes are there?"],
        ["What is the leftmost shape?", "--no-reasoning"],
        ["How many shapes are there?", "--temperature", "0.8", "--seed", "3"],
        ["How many shapes are there?", "--max-tokens", "2"],
    ],
)
def test_what_is_printed_is_the_records_answer(home: Path, question: list[str]) -> None:
    line = ["query", SCENE, *question, "--model", "tiny", "--device", "cpu"]
    record = record_of(*line)
    status, stdout, stderr = on_terminal(*line)
    assert (status, stdout) == (0, record["answer"] + "\n")
    shown = ESCAPES.sub("", stderr)
    if "reasoning" in record:
        assert record["reasoning"]["text"] in shown
        assert "\x1b[2m" in stderr, "thoughts are dim"
    else:
        assert "\x1b[2m" not in stderr
    assert "request" not in shown, "no summary"
    assert ("note: the answer was cut" in shown) == (record["finish_reason"] == "length")


@pytest.mark.process
def test_a_question_without_a_picture(home: Path) -> None:
    line = ["query", "-q", "How many sides does a triangle have?", "--model", "tiny", "--device", "cpu"]
    assert on_terminal(*line)[:2] == (0, record_of(*line)["answer"] + "\n")


@pytest.mark.process
def test_an_empty_answer_is_told(home: Path) -> None:
    line = ["query", "-q", "How many crosses?", "--no-reasoning", "--model", "tiny", "--device", "cpu"]
    assert record_of(*line)["answer"] == ""
    status, stdout, stderr = on_terminal(*line, "--no-progress")
    assert (status, stdout, stderr) == (0, "", "note: the model's answer is empty\n")
    assert on_terminal(*line, "--quiet") == (0, "", "")


@pytest.mark.process
def test_nothing_but_the_answer_where_that_is_wanted(home: Path) -> None:
    line = ["query", SCENE, "How many shapes are there?", "--model", "tiny", "--device", "cpu"]
    answer_line = record_of(*line)["answer"] + "\n"
    assert on_terminal(*line, "--quiet") == (0, answer_line, "")
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        status, stdout, stderr = on_terminal(*line, "--no-progress", **plain)
        assert (status, stdout, ESCAPES.findall(stderr)) == (0, answer_line, [])
    assert "1 of 1 ok, 1 image in " in on_terminal(*line, "-v")[2]


# -- everything around it, with a stub that shows its words -----------------------------------------


class Words:
    """A tokenizer whose ids are places in a list of words."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)


class TalkingEngine(StubEngine):
    """Says a word a step, as a generation that grows."""

    words = ("A ", "dog", ".\n", "It ", "\x1b[2J", "runs")
    stop_at: int | None = None  # a step in which a signal comes
    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Words(self.words)
        self.growing: Any = None

    def add(self, job: Job) -> Any:
        super().add(job)
        self.growing = type("Generation", (), {"reasoning": None, "answer": Decisions(), "choices": (), "job": job})()
        return self.growing

    def step(self) -> Sequence[Answer]:
        said = self.growing.answer.token_ids
        if len(said) == self.stop_at:
            raise Interrupted(2)
        said.append(len(said))
        if len(said) < len(self.words):
            return []
        (done,) = super().step()
        if self.fails:
            return [Answer(done.key, failure=answer(Job(0, None, ask("fail me"))).failure)]
        return [Answer(done.key, {"answer": "".join(self.words)}, "stop", 1, 6)]


def ask(prompt: str) -> Any:
    from md3cli.records import Request, Task

    return Request(Task.QUERY, prompt)


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch, home: Path) -> type[TalkingEngine]:
    Program(monkeypatch)
    made = type("Engine", (TalkingEngine,), {})
    monkeypatch.setattr(StubModel, "load", lambda self: made())
    return made


def test_the_answer_comes_word_by_word_and_steers_no_terminal(
    talking: type[TalkingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(LiveText, "answer", lambda self, text: pieces.append(text))
    status, _, stderr = on_terminal("query", SCENE, "what?")
    assert status == 0, stderr
    assert [piece for piece in pieces if piece] == ["A ", "dog.\n", "It ", "\x1b[2Jruns"]
    monkeypatch.undo()


def test_control_characters_are_shown_as_text(talking: type[TalkingEngine]) -> None:
    status, stdout, _ = on_terminal("query", SCENE, "what?")
    assert (status, stdout) == (0, "A dog.\nIt \\u001b[2Jruns\n")


def test_a_failure_on_the_way_is_told_as_always(talking: type[TalkingEngine]) -> None:
    talking.fails = True
    status, stdout, stderr = on_terminal("query", SCENE, "what?")
    assert status == 3
    line, *table = stdout.splitlines()
    assert line == "A dog."
    assert "model: asked to fail" in ESCAPES.sub("", stdout)
    assert "1 failed (model 1)" in stderr
    assert table


def test_a_stop_ends_the_line_and_the_run(talking: type[TalkingEngine]) -> None:
    talking.stop_at = 2
    status, stdout, stderr = on_terminal("query", SCENE, "what?")
    assert (status, stdout) == (130, "A \n")
    assert ESCAPES.sub("", stderr).splitlines()[-1] == "stopped by SIGINT"
    assert "-o" not in stderr


def test_a_picture_that_cannot_be_read_is_told_as_always(talking: type[TalkingEngine], home: Path) -> None:
    (home / "a.jpg").write_bytes(b"no picture")
    status, stdout, stderr = on_terminal("query", "a.jpg", "what?")
    assert status == 3
    assert "not_an_image" in ESCAPES.sub("", stdout)
    assert "1 failed (not_an_image 1)" in stderr


@pytest.mark.parametrize(
    "line",
    [
        ["query", SCENE, "one?", "two?"],
        ["query", SCENE.parent, "one?", "--limit", "1"],
        ["query", SCENE, "one?", "--choices", "yes,no"],
        ["caption", SCENE],
    ],
)
def test_all_else_is_a_table(monkeypatch: pytest.MonkeyPatch, home: Path, line: list[object]) -> None:
    Program(monkeypatch)
    status, stdout, stderr = on_terminal(*line)
    assert status == 0
    assert "answer" in stdout.splitlines()[1]  # below what was asked
    assert " ok" in stderr


def test_an_engine_that_shows_nothing_on_its_way_says_it_at_the_end(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    Program(monkeypatch)
    record = record_of("query", SCENE, "one?")
    assert on_terminal("query", SCENE, "one?")[:2] == (0, record["answer"] + "\n")


def test_only_stdout_need_be_a_terminal(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    Program(monkeypatch)
    with terminal() as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        with pytest.raises(SystemExit):
            app(["query", str(SCENE), "one?"], prog_name="md3")
        assert "\x1b" not in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert len(stdout.getvalue().splitlines()) == 1
