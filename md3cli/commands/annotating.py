"""How an annotating command gets its shared options, and how it runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import typer

from md3cli.commands.options import AnnotateOptions
from md3cli.config import RunConfig


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let the parser see the fields of `AnnotateOptions` in place of the parameter `options`."""
    hints = get_type_hints(command, include_extras=True)
    declared = get_type_hints(AnnotateOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        parameter.replace(annotation=hints[name], kind=keyword)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    shared = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=declared[field.name])
        for field in fields(AnnotateOptions)
    ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        options = AnnotateOptions(**{field.name: values.pop(field.name) for field in fields(AnnotateOptions)})
        command(**values, options=options)

    wrapper.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in own + shared}
    del wrapper.__wrapped__
    return wrapper


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
