"""`md3 config show`: values and where they come from, in the order of precedence; nothing that opens an address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from program import Program, isolate

from md3cli.cli import COMMANDS, options_of
from md3cli.settings import CONFIG_FILE, user_config_dir


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    isolate(monkeypatch, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Program(monkeypatch)


def shown(md3: Program, *line: str) -> dict[tuple[str | None, str], dict[str, Any]]:
    """The rows of `--json`, by command and name."""
    result = md3("config", "show", *line, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["settings"]
    found = {(row["command"], row["name"]): row for row in rows}
    assert len(found) == len(rows), "no setting twice"
    return found


def of_run(md3: Program, *flags: str) -> dict[str, tuple[Any, str]]:
    return {name: (row["value"], row["source"]) for (_, name), row in shown(md3, "run", *flags).items()}


def write_users_file(text: str) -> Path:
    path = user_config_dir() / CONFIG_FILE
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_each_source_in_its_turn(md3: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_run(md3)["seed"] == (0, "default")
    users = write_users_file("seed = 1\nquiet = true\n")
    assert of_run(md3)["seed"] == ("1", "user file")
    Path(CONFIG_FILE).write_text("seed = 2\n[detect]\nseed = 3\n")
    assert of_run(md3)["seed"] == ("2", "md3.toml")
    monkeypatch.setenv("MD3_SEED", "4")
    assert of_run(md3)["seed"] == ("4", "MD3_*")
    assert of_run(md3, "--seed", "5")["seed"] == ("5", "flag")
    assert of_run(md3)["quiet"] == (True, "user file")
    text = md3("config", "show").stdout
    assert str(users) in text.splitlines()[0]
    assert "*" in next(line for line in text.splitlines() if " seed " in line)
    assert "MD3_SEED" in text


def test_a_table_is_shown_under_its_command(md3: Program) -> None:
    Path(CONFIG_FILE).write_text("seed = 2\n[detect]\nseed = 3\n")
    rows = shown(md3)
    assert rows[None, "seed"]["value"] == "2"
    assert (rows["detect", "seed"]["value"], rows["detect", "seed"]["place"][-13:]) == ("3", "[detect] seed")
    assert ("point", "seed") not in rows, "it has what all have"


def test_every_setting_is_shown(md3: Program) -> None:
    rows = shown(md3)
    for name in COMMANDS:
        positive = [key for key, option in options_of(name).items() if not option.is_negated]
        assert [key for key in positive if (name, key) not in rows and (None, key) not in rows] == [], name


def test_both_sides_of_a_pair_are_one_setting(md3: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD3_NO_CACHE", "1")
    assert of_run(md3, "--overwrite")["resume"] == (False, "flag")
    row = shown(md3)[None, "cache"]
    assert (row["value"], row["place"]) == (False, "MD3_NO_CACHE")


def test_nothing_that_opens_an_address_is_shown(md3: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD3_ROOT", "https://me:hunter2@host.org/x?token=secret1")
    monkeypatch.setenv("MD3_RAY_ADDRESS", "ray://me:hunter2@host:10001")
    line = ("run", "--include", "see https://host.org/?access_token=secret1 there")
    for text in (md3("config", "show").stdout, md3("config", "show", *line).stdout, str(shown(md3, *line))):
        assert "host.org" in text
        assert [secret for secret in ("hunter2", "secret1") if secret in text] == []


def test_a_line_is_read_as_its_command_would(md3: Program) -> None:
    rows = shown(md3, "detect", "photos/", "car", "-m", "tiny", "-f", "coco", "-f", "csv", "--max-objects", "3")
    assert {name: row["value"] for (_, name), row in rows.items() if row["source"] == "flag"} == {
        "model": "tiny",
        "format": ["coco", "csv"],
        "max-objects": "3",
    }
    assert shown(md3, "models", "pull", "--revision", "x").keys() == {("models", "revision")}
    assert shown(md3, "--model", "tiny")["run", "model"]["source"] == "flag"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["detct"], "'detct' is no command; write it like md3 config show detect --model tiny"),
        (["detect", "--bogus", "1"], "No such option: --bogus"),
    ],
)
def test_a_line_that_is_none(md3: Program, line: list[str], message: str) -> None:
    result = md3("config", "show", *line)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_wrong_file_is_told_where(md3: Program) -> None:
    Path(CONFIG_FILE).write_text("modle = 'tiny'\n")
    result = md3("config", "show")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "md3.toml: modle: unknown key" in result.stderr


def test_each_group_is_shown_once(md3: Program) -> None:
    lines = md3("config", "show").stdout.splitlines()
    groups = [line for line in lines if line.endswith(":") and not line.startswith((" ", "*"))]
    assert len(groups) == len(set(groups))
    assert groups.index("Answers:") < groups.index("md3 detect:")
