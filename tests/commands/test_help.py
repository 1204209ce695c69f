"""The two pages of help: how long they are, that they name everything, and what the short one leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.core import TyperOption
from typer.testing import CliRunner

from md3cli.cli import COMMANDS, GROUPS, app, load_command
from md3cli.commands.help import MOST_COLUMNS, HelpCommand, HelpGroup
from md3cli.commands.options import NOT_ESTIMATED, AnnotateOptions

TASKS = ("caption", "query", "detect", "point", "segment", "run", "estimate")
MOST_SHORT_LINES, MOST_LINES, MOST_LINES_OF_AN_OPTION = 40, 130, 2  # at 100 columns


def commands() -> Iterator[tuple[str, Any]]:
    """Every command and subcommand, by the words behind `md3`."""
    yield "", typer.main.get_command(app)
    for name in COMMANDS:
        command = load_command(name)
        yield name, command
        yield from ((f"{name} {part}", one) for part, one in getattr(command, "commands", {}).items())


ALL = dict(commands())
LEAVES = [name for name, command in ALL.items() if not hasattr(command, "commands")]


def page(name: str, option: str, columns: int = 100) -> list[str]:
    result = CliRunner().invoke(app, [*name.split(), option], prog_name="md3", env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def options(name: str) -> list[TyperOption]:
    """The options that a command shows."""
    return [param for param in ALL[name].params if isinstance(param, TyperOption) and not param.hidden]


def entries(lines: list[str]) -> dict[str, list[str]]:
    """The lines of each option, by its spelling as the page has it."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if re.match(r"  (-\w, |    )?--?\w", line):
            found[line] = [line]
        elif line.startswith("   ") and found:
            found[next(reversed(found))].append(line)
        else:
            found[f"not an option: {line}"] = []
    return {first: block for first, block in found.items() if block}


@pytest.mark.parametrize("name", LEAVES)
def test_a_short_page_is_short(name: str) -> None:
    lines = page(name, "-h")
    assert len(lines) <= MOST_SHORT_LINES
    told = [re.fullmatch(rf"`md3 {name} --help` shows the other (\d+) options\.", line) for line in lines]
    num_hidden = sum(int(match[1]) for match in told if match)
    num_shown = len(entries(lines[lines.index("Options:") :])) - 1  # without the options for help
    assert num_shown + num_hidden == len(options(name))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("select", "--label --sort --sample"),
        ("stats", "--task"),
        ("eval", "--gt"),
        ("report", "--gt"),
        ("detect", "--labels"),
    ],
)
def test_a_short_page_has_what_a_command_is_about(name: str, wanted: str) -> None:
    assert set(wanted.split()) <= set(" ".join(page(name, "-h")).split())


@pytest.mark.parametrize("name", TASKS)
def test_the_short_page_of_a_task_has_its_own_options(name: str) -> None:
    lines = page(name, "-h")
    assert len([line for line in lines if line.startswith("  md3 ") or "| md3 " in line]) in (3, 4)  # examples
    text = "\n".join(lines)
    assert f"`md3 {name} --help` shows the other " in text
    wanted = {spelling for option in options(name) if option.rich_help_panel is None for spelling in option.opts}
    wanted |= {"-m, --model"} | ({"-o, --output", "-f, --format"} if name != "estimate" else set())
    assert [spelling for spelling in wanted if spelling not in text] == []
    assert "--batch-size" not in text


@pytest.mark.parametrize("columns", [50, 80, 100, 200])
@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", ALL)
def test_no_line_is_wider_than_the_terminal(name: str, option: str, columns: int) -> None:
    examples = re.compile(r"  .*\bmd3 ")  # a command is not broken
    too_wide = [line for line in page(name, option, columns) if len(line) > min(columns, MOST_COLUMNS)]
    assert [line for line in too_wide if not examples.match(line)] == []


@pytest.mark.parametrize("name", ALL)
def test_the_whole_page_names_every_option_in_a_line_or_two(name: str) -> None:
    lines = page(name, "--help")
    assert len(lines) <= MOST_LINES
    words = set(re.findall(r"(?<!\S)--?[\w-]+|(?<=/)--[\w-]+", "\n".join(lines)))
    declared = {spelling for option in options(name) for spelling in (*option.opts, *option.secondary_opts)}
    assert declared - words == set()
    assert [block for block in entries(lines).values() if len(block) > MOST_LINES_OF_AN_OPTION] == []


@pytest.mark.parametrize("name", ALL)
def test_values_are_named_by_what_they_mean(name: str) -> None:
    text = "\n".join(page(name, "--help"))
    assert re.findall(r"<\w|\[x?\d*[<>]=|\b(?:TEXT|INTEGER|FLOAT|PATH|BOOLEAN)\b", text) == []
    named = [option for option in options(name) if option.is_flag or option.metavar or option.type_descriptor.is_choice]
    nameless = [option.opts for option in options(name) if option not in named]
    assert nameless == []


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_both_pages(name: str) -> None:
    assert isinstance(ALL[name], HelpCommand | HelpGroup)
    assert "-h, --help" in "\n".join(page(name, "-h"))


def test_commands_stand_in_groups() -> None:
    lines = page("", "--help")
    places = [lines.index(f"{title}:") for title in GROUPS]
    assert places == sorted(places)
    for title, names in GROUPS.items():
        section = lines[lines.index(f"{title}:") + 1 :][: len(names)]
        assert [line.split()[0] for line in section] == list(names)
    assert page("", "-h") == lines


def test_an_estimate_shows_only_what_it_uses() -> None:
    assert AnnotateOptions.__dataclass_fields__.keys() >= NOT_ESTIMATED
    assert {option.name for option in options("estimate")} & NOT_ESTIMATED == set()
    text = "\n".join(page("estimate", "--help"))
    assert [option for option in ("-f,", "--resume", "--world-size N", "--cache-size") if option in text] == [
        "--world-size N",
        "--cache-size",
    ]
    assert "such as -o" in text, "what stays without an effect is said"


def test_help_wins_over_what_is_missing_and_what_is_wrong() -> None:
    assert (
        page("detect", "-h")
        == CliRunner()
        .invoke(app, ["detect", "--max-objects", "0", "-h"], prog_name="md3", env={"COLUMNS": "100"})
        .stdout.splitlines()
    )
