"""What `-h` and `--help` print: the short page and the whole one of a command, in two columns of plain text.

`-h` shows usage, examples, the command's own options and `-o -f -m`; `--help` shows every option, panel by panel. An
option without a `rich_help_panel` is the command's own; its metavar names its value. Every app of the commands is an
`App`, so that each command has both pages. Knows no command by name. Not typer's own pages: those have no short
one, and import rich, which takes longer than all the rest. Apart from options.py, which declares and lays nothing
out. The two pages are ripgrep's custom.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

SHORT, WHOLE = "-h", "--help"
OWN_PANEL = "Options"
ALWAYS_SHORT = frozenset({OWN_PANEL, "--output", "--format", "--model"})  # what is on every short page
MOST_COLUMNS, LEAST_COLUMNS = 100, 40  # of a page
MOST_NAME_COLUMNS = 30  # a longer name has a line of its own
_NO_BREAK = "\N{NO-BREAK SPACE}"


class Entry(NamedTuple):
    """A line of a page: a name, such as `-o, --output OUT`, and what it means."""

    name: str
    text: str


class _TwoPages:
    """What commands and groups have in common: `-h` is the parser's own help option, `--help` stands beside it."""

    _whole_option: TyperOption | None = None  # one object: the parser compares it

    def get_usage(self, ctx: Any) -> str:
        """Return the usage line, which errors of usage show as well."""
        return usage_line(ctx)

    def get_help(self, ctx: Any) -> str:
        """Return what `-h` prints."""
        return short_page(ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the declared parameters and the two options for help."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the class that this is mixed into
        if self._whole_option is None:
            params[-1].default = False  # to make a bool of None typer imports pydantic: half the time of a page
            self._whole_option = option = copy.copy(params[-1])
            option.name, option.opts, option.callback = WHOLE.strip("-"), [WHOLE], _print_whole_page
        return [*params, self._whole_option]


class HelpCommand(_TwoPages, TyperCommand):
    """A command with two pages of help; `shown` are panels and options that its short page has besides its own."""

    shown: frozenset[str] = frozenset()


class HelpGroup(_TwoPages, TyperGroup):
    """A group of commands, whose one page lists them, panel by panel."""

    def get_help(self, ctx: Any) -> str:
        """Return what `-h` prints."""
        return whole_page(ctx)


class App(typer.Typer):
    """A typer app whose commands and groups have two pages of help."""

    def __init__(self, **settings: Any) -> None:
        usual: dict[str, Any] = {"cls": HelpGroup, "add_completion": False}
        super().__init__(**(usual | {"context_settings": {"help_option_names": [SHORT]}} | settings))

    def command(self, name: str | None = None, *, shows: Sequence[str] = (), **settings: Any) -> Callable[[Any], Any]:
        """Return what makes a command of a function, as typer's method does; `shows` are its `HelpCommand.shown`."""
        kind = type("HelpCommand", (HelpCommand,), {"shown": frozenset(shows)})
        return super().command(name, cls=kind, **settings)


def _print_whole_page(ctx: Any, option: TyperOption, is_asked: bool) -> None:
    if is_asked and not ctx.resilient_parsing:
        typer.echo(whole_page(ctx))
        ctx.exit()


def short_page(ctx: Any) -> str:
    """Return usage, examples, the command's own options, those of `ALWAYS_SHORT` and the command's `shown`."""
    options = [option for panel in _panels(ctx).values() for option in panel]
    short = ALWAYS_SHORT | getattr(ctx.command, "shown", frozenset())
    shown = [option for option in options if not short.isdisjoint((option.rich_help_panel or OWN_PANEL, *option.opts))]
    shown.sort(key=_is_for_help)
    lines = [*_beginning(ctx, is_short=True), *_sections({"Arguments": _arguments(ctx), OWN_PANEL: _entries(shown)})]
    if num_hidden := len(options) - len(shown):
        lines += ["", f"`{ctx.command_path} {WHOLE}` shows the other {num_hidden} options."]
    return "\n".join(lines)


def whole_page(ctx: Any) -> str:
    """Return usage, the whole description, every command of a group and every option."""
    panels = {title: _entries(options) for title, options in _panels(ctx).items()}
    lines = [*_beginning(ctx, is_short=False), *_sections({"Arguments": _arguments(ctx)} | _commands(ctx) | panels)]
    if ctx.command.epilog:
        lines += ["", *textwrap.wrap(ctx.command.epilog, _width())]
    return "\n".join(lines)


def usage_line(ctx: Any) -> str:
    """Return `Usage: md3 detect INPUT OBJECT... [OPTIONS]`."""
    words = [_argument_name(param) for param in ctx.command.params if not isinstance(param, TyperOption)]
    if isinstance(ctx.command, TyperGroup):
        words.append("COMMAND")
    return f"Usage: {' '.join((ctx.command_path, *words))} [OPTIONS]"


def _argument_name(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    if name.startswith("["):  # says itself what may be left out
        return str(name)
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _beginning(ctx: Any, *, is_short: bool) -> list[str]:
    """Return usage, description and examples; a short one has the first paragraph of the description."""
    paragraphs, examples = _description(inspect.cleandoc(ctx.command.help or ""))
    lines = textwrap.wrap(usage_line(ctx), _width(), subsequent_indent=" " * 7)
    for paragraph in paragraphs[: 1 if is_short else None]:
        lines += ["", *textwrap.wrap(paragraph, _width())]
    if examples:
        lines += ["", _title("Examples"), *(f"  {example}" for example in examples)]
    return lines


def _arguments(ctx: Any) -> list[Entry]:
    arguments = (param for param in ctx.command.params if not isinstance(param, TyperOption))
    return [Entry(_argument_name(argument), argument.help or "") for argument in arguments]


def _description(text: str) -> tuple[list[str], list[str]]:
    """Split a docstring in paragraphs, each a line, and the lines below `Examples:`."""
    before, _, examples = text.partition("\nExamples:\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in before.split("\n\n") if paragraph.strip()]
    return paragraphs, [line.strip() for line in examples.splitlines() if line.strip()]


def _panels(ctx: Any) -> dict[str, list[TyperOption]]:
    """Return the options by panel, the command's own first, those for help last among them."""
    panels: dict[str, list[TyperOption]] = {OWN_PANEL: []}
    for param in ctx.command.get_params(ctx):
        if isinstance(param, TyperOption) and not param.hidden and param.opts != [SHORT]:
            panels.setdefault(param.rich_help_panel or OWN_PANEL, []).append(param)
    return panels


def _commands(ctx: Any) -> dict[str, list[Entry]]:
    panels: dict[str, list[Entry]] = {}
    commands: Mapping[str, Any] = getattr(ctx.command, "commands", {})
    for name, command in commands.items():
        (text, *_), _ = _description(inspect.cleandoc(command.help or ""))
        panels.setdefault(command.rich_help_panel or "Commands", []).append(Entry(name, text))
    return panels


def _is_for_help(option: TyperOption) -> bool:
    return option.opts == [WHOLE]


def _entries(options: Iterable[TyperOption]) -> list[Entry]:
    return [_entry(option) for option in options]


def _entry(option: TyperOption) -> Entry:
    """Return how a page names an option and its value, and what it says of it."""
    if _is_for_help(option):
        return Entry(f"{SHORT}, {WHOLE}", f"Show the short help, or with {WHOLE} every option.")
    spellings = sorted(option.opts, key=len)
    short = [spelling for spelling in spellings if not spelling.startswith("--")]
    long = [spelling for spelling in spellings if spelling.startswith("--")]
    names = ", ".join([*short, "/".join([*long, *option.secondary_opts])][: 2 if long else 1])
    value = "" if option.is_flag else f" {value_name(option)}"
    default = _default_words(option)
    text = (option.help or "") + (f" [default: {default}]".replace(": ", f":{_NO_BREAK}") if default else "")
    return Entry(("" if short else "    ") + names + value, text)


def value_name(option: TyperOption) -> str:
    """Return the metavar of an option, or its choices."""
    if option.metavar:
        return option.metavar
    return "|".join(map(str, option.type_descriptor.choices or ())) or (option.name or "").upper()


def _default_words(option: TyperOption) -> str:
    """Return what holds where the option is not typed; nothing where that is nothing, or the text says it."""
    value = option.default
    if isinstance(option.show_default, str):
        return option.show_default
    if not option.show_default or value is None or (value is False and not option.secondary_opts):
        return ""
    if option.is_flag:
        return (option.opts if value else option.secondary_opts)[0].strip("-")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sections(sections: Mapping[str, Sequence[Entry]]) -> Iterator[str]:
    """Yield the lines of a page's sections; the texts of all of them begin in the same column."""
    longest = max(len(entry.name) for entries in sections.values() for entry in entries)
    columns = min(longest, MOST_NAME_COLUMNS, _width() // 2 - 6)
    for title, entries in sections.items():
        if entries:
            yield from ("", _title(title))
            for entry in entries:
                yield from _lines_of(entry, columns)


def _lines_of(entry: Entry, columns: int) -> Iterator[str]:
    """Yield a name and its text side by side, or below each other where the name has more than `columns`."""
    indent = " " * (columns + 4)
    first, *rest = (line.replace(_NO_BREAK, " ") for line in textwrap.wrap(entry.text, _width() - len(indent)) or [""])
    if len(entry.name) > columns:
        yield f"  {entry.name}"
        yield indent + first
    else:
        yield f"  {entry.name:{columns}}  {first}".rstrip()
    yield from (indent + line for line in rest)


def _title(text: str) -> str:
    return typer.style(f"{text}:", bold=True)


def _width() -> int:
    return max(LEAST_COLUMNS, min(MOST_COLUMNS, shutil.get_terminal_size().columns))
