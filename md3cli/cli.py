"""The `md3` program: its commands, loaded when they are called, and the one place that ends it.

Every `Md3Error` becomes one line and an exit status here and nowhere else. Settings of `md3.toml` and the environment
become defaults of the commands' options. What a command does is not known here. Apart from
__main__.py, whose first lines must come before anything slow is imported.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.main
from typer.core import TyperOption

from md3cli import __version__
from md3cli.commands.help import SHORT, WHOLE, App, HelpCommand, HelpGroup
from md3cli.errors import ConfigError, Md3Error, UsageError
from md3cli.records import printable
from md3cli.settings import OptionName, Options, Setting, read_layers, resolve_settings
from md3cli.signals import STDOUT_CLOSED, Interrupted, is_closed

# title -> name -> help in the list
GROUPS: Mapping[str, Mapping[str, str]] = {
    "Annotate": {
        "caption": "Describe every image.",
        "query": "Ask questions of every image, or of the model alone.",
        "detect": "Find objects and draw boxes around them.",
        "point": "Point at objects.",
        "segment": "Outline an object.",
        "run": "Several tasks in one pass, or a manifest of them.",
        "estimate": "What a run would take: time, tokens, disk, money.",
    },
    "Look at and export": {
        "export": "Other formats from finished records.",
        "select": "Some of the records, or several runs as one.",
        "stats": "Counts, scores, failures, tokens and rates of runs.",
        "report": "A page to look through, from finished records.",
        "eval": "Scores against ground truth; two runs compared.",
        "audit": "What is missing, doubtful, moved or misnamed in labels.",
    },
    "Runs": {
        "status": "How far a run is; also while it runs elsewhere.",
        "verify": "Check that a run has each request exactly once.",
        "runs": "Remove what a run of many processes needs no more.",
    },
    "Machine": {
        "models": "Weights: what is there, fetch, look into, convert.",
        "bench": "This machine's throughput, beside its limits.",
        "config": "Every setting, its value and where it comes from.",
        "cache": "The encoding cache: look at it, shrink it, empty it.",
        "doctor": "What works here, and what to do about the rest.",
    },
}
COMMANDS: Mapping[str, str] = {name: text for group in GROUPS.values() for name, text in group.items()}

# The others are in the modules of their own names.
MODULES: Mapping[str, str] = {
    **dict.fromkeys(("caption", "query", "detect", "point", "segment", "run", "estimate"), "annotate"),
    **dict.fromkeys(("verify", "runs"), "status"),
    "stats": "select",
    "config": "config_show",
}
DOCTOR = "doctor"
MOST_OWNERS_TOLD = 3  # commands that have an option which this one has not
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class LazyGroup(HelpGroup):
    """Commands as named stubs until one is called; then its module is imported in the stub's place."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = {
            name: HelpCommand(name=name, help=text, rich_help_panel=title)
            for title, group in GROUPS.items()
            for name, text in group.items()
        }
        self._settings: dict[str, Setting] = {}
        self._is_debug = False

    def load(self, name: str) -> Any:
        """Return the parser of command `name`, as `load_command`."""
        return load_command(name)

    def options_of(self, name: str) -> Options:
        """Return the options of command `name`, as the function of this name."""
        return options_of(name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put the command in its stub's place, with settings as its defaults, before its arguments are parsed."""
        if args and args[0] in COMMANDS:
            self._is_debug = "--debug" in args or bool(ctx.params.get("debug"))
            self.commands[args[0]] = load_command(args[0])
            if not ctx.resilient_parsing and not {SHORT, WHOLE} & set(args):
                self._use_settings(ctx, args[0], args[1:])
        elif args and os.path.lexists(args[0]) and not ctx.resilient_parsing:
            name = printable(args[0])
            raise UsageError(
                f"{name} is no command; say what to do with it, like md3 caption {name} (md3 -h lists all)"
            )
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the program's own options; a command's, before its name, are told where they belong."""
        for param in self.params:
            if getattr(param, "is_flag", False) and param.default is None:
                param.default = False  # as for the options for help
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            _ask_what_was_meant(error, " A command's options stand behind its name.")
            raise

    def _use_settings(self, ctx: Any, name: str, typed: Sequence[str]) -> None:
        try:
            ctx.default_map = {name: self._read_settings(name, typed)}
        except ConfigError as error:
            if name != DOCTOR:
                raise
            ctx.obj = error  # a finding among others

    def _read_settings(self, name: str, typed: Sequence[str]) -> dict[str, Any]:
        """Return what environment and files say, as defaults of the command and of its subcommands."""
        commands = {other: partial(options_of, other) for other in COMMANDS}
        layers = read_layers(os.environ, _working_folder())
        self._settings = resolve_settings(layers, name, options_of(name), commands)
        values = {parameter: setting.value for parameter, setting in self._settings.items()}
        if any(layer.is_of_folder for layer in layers):
            from md3cli.commands.folder_settings import check_folder_settings

            obeyed = check_folder_settings(layers, self._settings, typed)
            if obeyed is not None and "--quiet" not in typed and not values.get("quiet"):
                typer.echo(obeyed, err=True)
        self._is_debug = self._is_debug or bool(values.get("debug"))
        return values | dict.fromkeys(getattr(self.commands[name], "commands", {}), values)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and end the program as its outcome says."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Interrupted as stop:
            raise typer.Exit(stop.exit_status) from stop
        except BrokenPipeError:
            _end_quietly()
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # pydantic's own beginning
            setting = self._settings.get(getattr(error.param, "name", None) or "")
            if setting is None or not _is_from_settings(error):
                raise
            self._end(ConfigError(f"{setting.place}: {error.message}"))
        except Exception as error:
            if hasattr(error, "format_message"):  # the parser's own: usage, told by the parser
                _ask_what_was_meant(error, _whose_option(error))
                raise
            self._end(error)

    def _end(self, error: Exception) -> NoReturn:
        """Say what went wrong in one line, and end with the error's status; with --debug show where."""
        if self._is_debug:
            traceback.print_exception(error, file=sys.stderr)
        message, status = _message_of(error)
        typer.echo(f"error: {printable(message.strip())}", err=True)
        raise typer.Exit(status) from error

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; a reader of stdout who has left is no failure, and a full disk is told in one line."""
        try:
            try:
                with _warnings_in_a_line():
                    return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            _end_quietly()
        except OSError as error:
            message, status = _message_of(error)
            typer.echo(f"error: {printable(message)}", err=True)
            _forget_stdout()
            sys.exit(status)
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):
                _end_quietly()
            raise


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        from md3cli.console import show_warning

        show_warning(message)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working folder cannot be entered ({error.strerror}); start in one that is there"
        ) from error


def _is_from_settings(error: typer.BadParameter) -> bool:
    if error.ctx is None or error.param is None or error.param.name is None:
        return False
    source = error.ctx.get_parameter_source(error.param.name)
    return source is not None and source.name == "DEFAULT_MAP"


def _ask_what_was_meant(error: Any, advice: str = "") -> None:
    """Suggest options in the words in which the parser suggests commands, and none that is far from what was typed."""
    if hasattr(error, "possibilities"):
        typed, possible = error.option_name.strip("-"), [name.strip("-") for name in error.possibilities or ()]
        near = difflib.get_close_matches(typed, possible, n=2, cutoff=0.7)
        error.possibilities = None
        error.message += f". Did you mean {' or '.join(repr(f'--{name}') for name in near)}?" if near else "."
        error.message += advice


def _whose_option(error: Any) -> str:
    """Return a sentence with a blank before it that says which commands have an unknown option; "" where none has."""
    option = getattr(error, "option_name", None) or ""
    if not (hasattr(error, "possibilities") and option.startswith("--")):
        return ""
    owners = [f"md3 {name}" for name in COMMANDS if option.removeprefix("--") in options_of(name)]
    first, rest = owners[:MOST_OWNERS_TOLD], owners[MOST_OWNERS_TOLD:]
    return f" It is an option of {', '.join(first)}{' and others' if rest else ''}." if owners else ""


def _message_of(error: Exception) -> tuple[str, int]:
    if isinstance(error, Md3Error):
        return str(error), error.exit_status
    if isinstance(error, OSError) and error.errno in _NO_SPACE and error.filename is None:
        from md3cli.files import output_error

        return str(output_error(Path("stdout"), error)), 1  # all other files are named by whoever writes them
    if isinstance(error, OSError) and is_closed(error):
        return STDOUT_CLOSED, 1
    return f"unexpected {type(error).__name__}: {error} (`md3 --debug ...` shows where)", 1


def _end_quietly() -> NoReturn:
    _forget_stdout()
    sys.exit(0)


def _forget_stdout() -> None:
    """Keep the interpreter from writing again, at its end, what could not be written."""
    with contextlib.suppress(OSError, ValueError):  # stdout is no file here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_command(name: str) -> Any:
    """Return the parser of command `name`, from the `app` of its module, which may hold several commands."""
    module = import_module(f"md3cli.commands.{MODULES.get(name, name)}")
    app: typer.Typer = module.app
    command: Any
    # This one alone: to prepare all seven of annotate.py, with sixty options each, took 11 ms more.
    one = [info for info in app.registered_commands if name in (info.name, getattr(info.callback, "__name__", None))]
    if one:
        is_short, markup = app.pretty_exceptions_short, app.rich_markup_mode
        command = typer.main.get_command_from_info(one[0], pretty_exceptions_short=is_short, rich_markup_mode=markup)
    else:
        command = typer.main.get_command(app)
        command = getattr(command, "commands", {}).get(name, command)
    command.name = name
    return command


def options_of(name: str) -> Options:
    """Return the options of command `name` and of its subcommands, by long name without dashes."""
    command = load_command(name)
    options: dict[str, OptionName] = {}
    for part in (command, *getattr(command, "commands", {}).values()):
        for option in part.params:
            if isinstance(option, TyperOption) and option.name is not None:
                options |= _option_names(option)
    return {key: option for key, option in options.items() if key != "help"}


def _option_names(option: TyperOption) -> dict[str, OptionName]:
    assert option.name is not None
    names: dict[str, OptionName] = {}
    for spellings, is_negated in ((option.opts, False), (option.secondary_opts, True)):
        for spelling in spellings:
            if spelling.startswith("--"):
                names[spelling[2:]] = OptionName(option.name, bool(option.is_flag), is_negated, option.multiple)
    return names


app = App(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,  # errors in plain text, without rich
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="`md3 COMMAND -h` is the short help of a command, `--help` the whole one. "
    "Every option can also be set as MD3_NAME in the environment or in your own md3.toml; "
    "one in the working folder may set what is harmless.",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"md3 {__version__}")
        raise typer.Exit


@app.callback()
def md3(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Annotate image collections with Moondream 3: captions, answers, boxes, points and outlines.

    Examples:
        md3 detect examples/scenes "red circle" --model tiny
    """
