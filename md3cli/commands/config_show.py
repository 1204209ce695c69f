"""`md3 config show`: every setting, its value and where it comes from, for all commands or for one line of one.

Values are shown as they were written, not as a command would read them, and addresses without what opens them. Knows no
setting by name: options and panels are the parser's, which is found through the context. No model, no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperOption

from md3cli.commands.help import OWN_PANEL, SHORT, App
from md3cli.console import say
from md3cli.errors import UsageError
from md3cli.records import printable
from md3cli.remote.address import is_address, shown
from md3cli.settings import CONFIG_FILE, ENV_PREFIX, Layer, Options, Setting, read_layers, resolve_settings

app = App(no_args_is_help=True, help="Settings: every one, its value and where it comes from.")

FLAG, DEFAULT = "flag", "default"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_USERINFO = re.compile(r"(?<=://)[^/@\s]*@")
_KEY_COLUMNS, _VALUE_COLUMNS = 22, 22


@dataclass(frozen=True, slots=True)
class Row:
    """A setting as it is shown.

    Attributes:
        command: whose it is; None for all commands that have it.
        source: one of flag, MD3_*, md3.toml, user file, default.
        place: where exactly; empty for a flag and a default.
    """

    group: str
    command: str | None
    name: str
    value: Any
    source: str
    place: str = ""


@app.callback()
def config() -> None:
    """Settings: every one, its value and where it comes from."""


@app.command("show", context_settings={"ignore_unknown_options": True, "help_option_names": [SHORT]})
def show(
    ctx: typer.Context,
    line: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COMMAND [ARGUMENT...]]", help="Only what this command, or this line of it, would use."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Every setting, its value and where it comes from: flag, MD3_*, md3.toml, your own file, default.

    Examples:
        md3 config show
        md3 config show detect photos/ car --model tiny
        md3 config show --json
    """
    layers = read_layers(os.environ, Path.cwd())
    settings = _Settings(ctx.find_root(), layers)
    rows = list(settings.of_line(line) if line else settings.of_all())
    files = [layer.origin for layer in layers if layer.origin != ENV_PREFIX]
    if as_json:
        typer.echo(json.dumps({"files": files, "settings": [asdict(row) for row in rows]}))
    else:
        say("\n".join(_lines(rows, files)))


class _Settings:
    """The layers, and what they mean to each command."""

    def __init__(self, root: Any, layers: Sequence[Layer]) -> None:
        """`root` is the context of `md3`, whose command knows all others."""
        self._root, self._layers = root, layers
        program = root.command
        self._parsers: Mapping[str, Any] = {name: program.load(name) for name in program.commands}
        self._options: Mapping[str, Options] = {name: program.options_of(name) for name in program.commands}

    def of_all(self) -> Iterator[Row]:
        """Yield the settings that commands share, by panel, then what is one command's own or differs for it."""
        from md3cli.commands.options import AnnotateOptions

        shared = {field.name for field in fields(AnnotateOptions)} - {"typed"}
        common = self._found("run", table="")
        options = [option for option in _shown_options(self._parsers["run"]) if option.name in shared]
        panels = dict.fromkeys(option.rich_help_panel or OWN_PANEL for option in options)
        for panel in panels:
            for option in options:
                if (option.rich_help_panel or OWN_PANEL) == panel:
                    yield self._row(panel, None, option, common)
        for name, parser in self._parsers.items():
            found = self._found(name)
            is_annotating = shared <= {option.name for option in _options(parser)}
            for option in _shown_options(parser):
                is_shared = is_annotating and option.name in shared
                if not is_shared or found.get(option.name or "") != common.get(option.name or ""):
                    yield self._row(f"md3 {name}", name, option, found)

    def of_line(self, line: Sequence[str]) -> Iterator[Row]:
        """Yield the settings of a command's line, panel by panel; one that begins with an option is `run`'s.

        Raises:
            UsageError: it begins with no command.
        """
        name, *arguments = ["run", *line] if line[0].startswith("-") else line
        if name not in self._parsers:
            raise UsageError(f"{printable(name)!r} is no command; write it like md3 config show detect --model tiny")
        parser = self._parsers[name]
        subcommands = getattr(parser, "commands", {})
        if arguments and arguments[0] in subcommands:
            parser = subcommands[arguments.pop(0)]
        context = typer.Context(parser, parent=self._root, info_name=name)
        typed, _, _ = parser.make_parser(context).parse_args(arguments)  # not checked: a line without INPUT will do
        found = self._found(name)
        panels: dict[str, list[Row]] = {}
        for option in _shown_options(parser):
            panel = option.rich_help_panel or f"md3 {name}"
            if option.name in typed:
                row = Row(panel, name, _name_of(option), _without_secrets(typed[option.name]), FLAG)
            else:
                row = self._row(panel, name, option, found)
            panels.setdefault(panel, []).append(row)
        yield from (row for rows in panels.values() for row in rows)

    def _found(self, command: str, *, table: str | None = None) -> dict[str, Setting]:
        """Return what the layers say; with `table` that table counts instead of the command's own."""
        calls = {name: partial(self._options.__getitem__, name) for name in self._options}
        return resolve_settings(self._layers, command if table is None else table, self._options[command], calls)

    def _row(self, group: str, command: str | None, option: TyperOption, found: Mapping[str, Setting]) -> Row:
        setting = found.get(option.name or "")
        if setting is None:
            return Row(group, command, _name_of(option), _without_secrets(_default_of(option)), DEFAULT)
        value = _without_secrets(setting.value)
        return Row(group, command, _name_of(option), value, _source_of(setting), setting.place)


def _source_of(setting: Setting) -> str:
    if setting.is_of_folder:
        return CONFIG_FILE
    return f"{ENV_PREFIX}*" if setting.place.startswith(ENV_PREFIX) else "user file"


def _options(parser: Any) -> Iterator[TyperOption]:
    for part in (parser, *getattr(parser, "commands", {}).values()):
        yield from (param for param in part.params if isinstance(param, TyperOption))


def _shown_options(parser: Any) -> Iterable[TyperOption]:
    """Return the options of a command and its subcommands, each name once."""
    return {option.name: option for option in _options(parser) if not option.hidden}.values()


def _name_of(option: TyperOption) -> str:
    return max(option.opts, key=len).removeprefix("--")


def _default_of(option: TyperOption) -> Any:
    return option.show_default if isinstance(option.show_default, str) else option.default


def _without_secrets(value: Any) -> Any:
    """Return a value as it may be shown: users, tokens and signatures in addresses are left out or are digests."""
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = _ADDRESS.sub(lambda match: shown(match[0]) if is_address(match[0]) else match[0], str(value))
    return _USERINFO.sub("", text)


def _lines(rows: Iterable[Row], files: Sequence[str]) -> Iterator[str]:
    """Yield the table: by group a name, its value and where it comes from."""
    yield f"settings files: {', '.join(map(printable, files)) or 'none'}; * is no default"
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            yield from ("", f"{group}:")
        mark = " " if row.source == DEFAULT else "*"
        yield printable(f"{mark} {row.name:{_KEY_COLUMNS}}  {_words(row.value):{_VALUE_COLUMNS}}  {_where(row)}")


def _where(row: Row) -> str:
    if row.source.startswith(ENV_PREFIX) or not row.place:
        return row.place or row.source
    return f"{row.source} ({row.place})"


def _words(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)
