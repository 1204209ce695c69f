"""How an annotating command gets its shared options, and how it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import typer

from md3cli.commands.options import AnnotateOptions
from md3cli.config import RunConfig

T = TypeVar("T")


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let the parser see the fields of `AnnotateOptions` in place of the parameter `options`.

    A field that is itself a group of options (a dataclass) stands for its own fields.
    """
    hints = get_type_hints(command, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        parameter.replace(annotation=hints[name], kind=keyword)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    shared = list(_parameters(AnnotateOptions))

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        command(options=_collect(AnnotateOptions, values), **values)

    wrapper.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in own + shared}
    del wrapper.__wrapped__
    return wrapper


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    """The options of `group` as keyword parameters, those of groups inside it in their place."""
    declared = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if is_dataclass(field.default):
            yield from _parameters(type(field.default))
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(field.name, keyword, default=field.default, annotation=declared[field.name])


def _collect(group: type[T], values: dict[str, Any]) -> T:
    """A `group` of what was typed, taken out of `values`."""
    taken = {}
    for field in fields(group):  # type: ignore[arg-type]
        inner = type(field.default) if is_dataclass(field.default) else None
        taken[field.name] = values.pop(field.name) if inner is None else _collect(inner, values)
    return group(**taken)


def annotate(run: RunConfig, options: AnnotateOptions) -> None:
    """Run it; ends the command with status 3 where too many records failed.

    Raises:
        Md3Error: the run could not be done.
        signals.Interrupted: it was stopped; what was reported is on disk.
    """
    from md3cli.console import RunConsole
    from md3cli.pipeline import run as run_pipeline

    display = RunConsole(
        is_quiet=options.quiet,
        is_verbose=options.verbose,
        has_progress=not options.no_progress,
        has_color=not options.no_color,
    )
    status = run_pipeline(run, display)
    if status:
        raise typer.Exit(status)
