"""What several commands share: how a dataclass of options becomes parameters, options about labels, notes on stderr.

What a command does with their values is not known here.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from md3cli.records import printable

OVERWRITES_NOTHING = "--overwrite changes nothing: what is printed replaces no file"
_labels = functools.partial(typer.Option, rich_help_panel="Labels")

LabelsFile = Annotated[
    Path | None,
    _labels(
        "--labels",
        metavar="FILE",
        help="Names, prompts and thresholds of classes, in order: .toml, .txt or YOLO's .yaml.",
    ),
]
MinScore = Annotated[
    float | None, _labels(metavar="X", min=0, max=1, help="Show no object with a score below X; records keep all.")
]
Nms = Annotated[
    float | None,
    _labels(
        metavar="IOU",
        min=0,
        max=1,
        help="Hide the less sure of two boxes that overlap more; 0.7 for shared names, 1 is off.",
    ),
]


def spread(*kinds: Any, hidden: frozenset[str] = frozenset()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have typer see the fields of the dataclasses `kinds` in place of the parameters that hold them.

    Those that are `hidden` can be typed, and are not in the command's help.
    """

    def make(command: Callable[..., None]) -> Callable[..., None]:
        """Return `command` with the options as parameters of their own; it is called with `kinds` made of them."""
        hints = get_type_hints(command, include_extras=True)
        held = {name: hints[name] for name in inspect.signature(command).parameters if hints[name] in kinds}
        keyword, spread_out = inspect.Parameter.KEYWORD_ONLY, {n: _shared_parameters(kind) for n, kind in held.items()}
        parameters = list[inspect.Parameter]()
        for name, parameter in inspect.signature(command).parameters.items():
            own = parameter if name in held else parameter.replace(annotation=_for_typer(hints[name]), kind=keyword)
            parameters += [_hidden(p) if p.name in hidden else p for p in spread_out.get(name, (own,))]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            ctx: typer.Context = values.pop("ctx")
            typed = frozenset(name for name in values if is_typed(ctx, name))
            made = {
                name: kind(**{one.name: values.pop(one.name) for one in spread_out[name]}, typed=typed)
                for name, kind in held.items()
            }
            command(**made, **values)

        parameters.append(inspect.Parameter("ctx", keyword, annotation=typer.Context))
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapper.__wrapped__
        return wrapper

    return make


@functools.cache  # many commands share them, and typer's hints take a millisecond to read
def _shared_parameters(kind: Any) -> tuple[inspect.Parameter, ...]:
    keyword, declared = inspect.Parameter.KEYWORD_ONLY, get_type_hints(kind, include_extras=True)
    return tuple(
        inspect.Parameter(field.name, keyword, default=field.default, annotation=_for_typer(declared[field.name]))
        for field in fields(kind)
        if field.name != "typed"
    )


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Return whether a parameter was typed, rather than set in a file or the environment."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _hidden(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, info = get_args(parameter.annotation)
    info = copy.copy(info)
    info.hidden = True
    annotated: Any = Annotated
    return parameter.replace(annotation=annotated[kind, info])


def _for_typer(annotation: Any) -> Any:
    """Return the annotation of an option with a parser as that of a text: typer would take apart a tuple, for one."""
    kind, info = get_args(annotation)
    if info.parser is None:
        return annotation
    is_list = any(get_origin(part) is list for part in (kind, *get_args(kind)))
    annotated: Any = Annotated
    return annotated[list[str] if is_list else str, info]


def tell_notes(notes: Iterable[Any]) -> None:
    """Print what the user should know besides, a line each."""
    for note in notes:
        typer.echo(f"note: {printable(note)}", err=True)
