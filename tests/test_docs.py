"""The documentation cannot drift: every command has help, an example that parses, and a README mention."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import test_imports
import typer.main

from md3cli.cli import COMMANDS, app, load_command, options_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def commands() -> Iterator[tuple[str, Any]]:
    for name in COMMANDS:
        command = load_command(name)
        yield name, command
        for subname, subcommand in getattr(command, "commands", {}).items():
            yield f"{name} {subname}", subcommand


ALL = dict(commands())
LEAVES = {name: command for name, command in ALL.items() if not hasattr(command, "commands")}


def help_text(name: str) -> str:
    command = LEAVES[name]
    return f"{command.help or ''}\n{command.epilog or ''}"


def examples(text: str) -> list[str]:
    """What follows `md3` on a line, up to a pipe or a redirection."""
    return [match[1].strip() for match in re.finditer(r"(?:^|[\s|:`])md3 ([^|>\n`]+)", text)]


@pytest.mark.parametrize("name", ALL)
def test_every_command_says_what_it_does(name: str) -> None:
    text = ALL[name].help or ""
    assert re.match(r"[A-Z].*[.;:]", text.strip().split("\n\n")[0].replace("\n", " ")), text


@pytest.mark.parametrize("name", ALL)
def test_every_option_says_what_it_does(name: str) -> None:
    silent = [param.name for param in ALL[name].params if not getattr(param, "help", "x")]
    assert not silent


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    found = [line for line in examples(help_text(name)) if line.startswith(name)]
    assert found, f"no example in md3 {name} --help"
    for line in found:
        arguments = shlex.split(line)[len(name.split()) :]
        LEAVES[name].make_context(name, arguments)  # raises where an option is unknown


def test_the_list_of_commands_says_what_their_help_says() -> None:
    program = typer.main.get_command(app)
    for name, summary in COMMANDS.items():
        assert program.commands[name].help == summary  # type: ignore[attr-defined]
        words = set(re.findall(r"\w{4,}", summary.lower()))
        assert words & set(re.findall(r"\w{4,}", (ALL[name].help or "").lower())), name


def test_the_readme_mentions_every_command() -> None:
    text = README.read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if f"md3 {name}" not in text]
    assert not missing


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: Path) -> list[list[str]]:
    """The words behind `md3` of every command that a page shows."""
    text = re.sub(r'"\$\w+"', "1", page.read_text(encoding="utf-8"))  # what the shell would put there
    blocks = re.findall(r"```(?:sh|bash|console|shell)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    typed = [shlex.split(example) for line in lines for example in examples(line.partition("#")[0])]
    return [words for words in typed if words[0] in COMMANDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_parse(page: Path) -> None:
    for words in commands_of(page):
        name = " ".join(words[:2]) if words[:2] and " ".join(words[:2]) in LEAVES else words[0]
        LEAVES[name].make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_two_runs_of_a_page_write_one_output(page: Path) -> None:
    """Who types them one after the other would be refused, OUTPUT was begun by another run; not with --add."""
    runs: dict[str, set[str]] = {}
    for words in commands_of(page):
        if "-o" in words and "--add" not in words:
            asked = " ".join(takewhile(lambda word: not word.startswith("-"), words))
            runs.setdefault(words[words.index("-o") + 1], set()).add(asked)
    assert {output: asked for output, asked in runs.items() if len(asked) > 1} == {}


def test_options_keep_their_names() -> None:
    """The names that scripts and md3.toml rely on."""
    shared = {"model", "revision", "tokenizer", "adapter", "device", "dtype", "quant", "batch-size", "max-context"}
    shared |= {"quant-vision"}
    shared |= {"compile", "no-compile", "cache", "no-cache", "cache-dir", "cache-size", "offline", "background"}
    shared |= {"temperature", "top-p", "max-tokens", "seed", "output", "format", "resume", "overwrite"}
    shared |= {"retry-failed", "fail-on", "workers", "quiet", "verbose", "no-progress", "no-color", "debug"}
    shared |= {"recursive", "no-recursive", "include", "exclude", "limit", "shard", "dry-run", "root", "remote"}
    shared |= {"allow-empty", "follow-links", "max-pixels", "max-file-size", "decode-timeout", "fetch-timeout"}
    shared |= {"devices", "workers-per-device", "worker-rank", "world-size", "engine", "ray-address", "shard-size"}
    shared |= {"labels", "min-score", "nms", "add", "prompts", "template", "map", "const", "regions", "pad"}
    shared |= {"estimate", "estimate-sample", "estimate-open", "price-per-gpu-hour", "price-per-1000"}
    own = {
        "caption": {"length"},
        "query": {"question", "reasoning", "no-reasoning", "choices", "spatial-ref"},
        "detect": {
            "max-objects",
            "tile",
            "overlap",
            "missing-only",
            "gt",
            "everything",
            "list",
            "vocabulary",
            "max-names",
        },
        "point": {"max-objects", "spatial-ref", "tile", "overlap", "missing-only", "gt"},
        "segment": {"spatial-ref", "missing-only", "gt"},
        "run": {"task", "then", "reasoning", "no-reasoning", "tile", "overlap"},
    }
    for name, extra in own.items():
        assert options_of(name).keys() == shared | extra, name


ARCHITECTURE = ROOT / "docs" / "architecture.md"
EVERY_PAGE = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
OF_NO_FILE = {"md3cli/ROOM/FILE.py", "tests/ROOM/test_FILE.py"}  # stand for any


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])(?:md3cli|tests|examples|docs)/[\w./-]*\w/?", text))
    assert sorted(path for path in named - OF_NO_FILE if not (ROOT / path).exists()) == []


def test_the_reading_path_and_the_nine_steps_are_there() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    life = text.partition("## The life of a picture")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d)\. .*?`(md3cli/[\w/]+\.py)`", life, re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, 10))
    reading = text.partition("## Reading path")[2].partition("\n## ")[0]
    assert len(re.findall(r"`(md3cli/[\w/]+\.py)`", reading)) >= 8


def rooms_of_the_page() -> list[tuple[int, str]]:
    """The rows of the table of rooms: number and path."""
    table = ARCHITECTURE.read_text(encoding="utf-8").partition("<!-- rooms -->")[2].partition("\n\n")[0]
    return [(int(number), path) for number, path in re.findall(r"^\| (\d+) \| `([\w/.]+)` \| \S", table, re.MULTILINE)]


def test_the_arrows_of_the_page_are_those_of_the_code() -> None:
    def path_of(room: str) -> str:
        path = room.replace(".", "/")
        return f"{path}/" if (ROOT / path).is_dir() and room != "md3cli" else f"{path}.py"

    expected = [
        (rank, "md3cli/__init__.py" if room == "md3cli" else path_of(room))
        for rank, rooms in enumerate(test_imports.ROOMS, start=1)
        for room in rooms
    ]
    assert rooms_of_the_page() == expected


def test_every_room_stands_on_the_page() -> None:
    package = ROOT / "md3cli"
    found = [path for path in (*package.iterdir(), *(package / "model").iterdir()) if path.name != "__pycache__"]
    rooms = {f"{path.relative_to(ROOT)}/" for path in found if path.is_dir() and list(path.glob("*.py"))}
    rooms |= {str(path.relative_to(ROOT)) for path in found if path.suffix == ".py"} - {"md3cli/model/__init__.py"}
    assert sorted(rooms - {path for _, path in rooms_of_the_page()}) == []


def test_pages_that_a_newcomer_needs_are_linked_from_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [page for page in ("docs/architecture.md", "CONTRIBUTING.md") if f"]({page})" not in text] == []


def test_every_helper_of_the_tests_has_its_line() -> None:
    support = ROOT / "tests" / "support"
    rows = re.findall(
        r"^\| `([\w.]+)` \| (\S.*) \|$", (support / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    helpers = sorted(path.name for path in support.glob("*.py") if not path.name.startswith("test_"))
    assert [name for name, _ in rows] == helpers
