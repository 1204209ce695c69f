"""SPECs, the words of `--task` and `--then` and of the column `then`: what is asked, read from one text. Pure.

What is asked about objects is a template: `{label}` is what the object is called. Knows nothing of options and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from md3cli.errors import RequestError, RowError, UsageError
from md3cli.records import CAPTION_LENGTHS, Request, Task, printable
from md3cli.refine.template import SHOWN_CHARS, Template, quoted

LABEL = "label"  # the one placeholder of what is asked about objects
FOLLOWED_TASKS = frozenset({Task.DETECT, Task.SEGMENT})  # whose objects have boxes, which can be asked about
MOST_THEN = 100  # that a row asks about each object


class TaskSpec(NamedTuple):
    """A part of a SPEC: a caption's length, a question or an OBJECT; None is the usual length, or all listed."""

    task: Task
    argument: str | None


def parse_task(spec: str) -> list[TaskSpec]:
    """Read `caption:long`, `detect:car,person` (two requests), `query:Is it raining?`, `point:nose`, `segment:dog`.

    `detect`, `point` and `segment` alone have no argument: what `--labels` lists.

    Raises:
        ValueError: it is no SPEC; says why.
    """
    name, colon, rest = spec.partition(":")
    if name not in tuple(Task):
        raise ValueError(f"{printable(spec)!r}: no task {printable(name)!r}; one of {', '.join(Task)}")
    task = Task(name)
    if task is Task.CAPTION:
        if colon and rest not in CAPTION_LENGTHS:
            raise ValueError(f"{printable(spec)!r}: a caption is one of {', '.join(CAPTION_LENGTHS)}")
        return [TaskSpec(task, rest if colon else None)]
    if task is Task.QUERY:
        if not rest.strip():
            raise ValueError("a question is missing; write it like query:Is it raining?")
        return [TaskSpec(task, rest)]
    if not colon:  # all that --labels lists
        return [TaskSpec(task, None)]
    objects = [part.strip() for part in rest.split(",")]
    if not all(objects):
        raise ValueError(f"{printable(spec)!r}: an object is missing; write it like {name}:car,person")
    return [TaskSpec(task, part) for part in objects]


def parse_listing(spec: str) -> TaskSpec:
    """Read `query:PROMPT` or `caption:LENGTH`: what tells what is in a picture.

    Raises:
        ValueError: it is neither; says why.
    """
    first = parse_task(spec)[0]
    if first.task not in (Task.QUERY, Task.CAPTION):
        raise ValueError(f"{printable(spec)!r} lists nothing; write query:PROMPT or caption:short")
    return first


def parse_then(spec: str) -> list[TaskSpec]:
    """Read a SPEC of what is asked about each object, `{label}` in its prompt.

    Raises:
        ValueError: it is no such SPEC; says why.
    """
    found = parse_task(spec)
    for task, argument in found:
        if argument is not None:
            label_template(argument)
        elif task is not Task.CAPTION:
            raise ValueError(f"{printable(spec)!r}: an object is missing; write it like {task}:wheel")
    return found


def label_template(prompt: str) -> Template:
    """Take apart a prompt whose only placeholder is `{label}`.

    Raises:
        ValueError: it has another one, or a brace without its other half.
    """
    try:
        template = Template.parse(prompt)
    except UsageError as error:
        raise ValueError(str(error)) from error
    if others := [name for name in template.names if name != LABEL]:
        shown = printable(others[0])[:SHOWN_CHARS]
        raise ValueError(
            f"{quoted(prompt)}: {{{shown}}} is filled by nothing; {{{LABEL}}} is, and {{{{ }}}} are braces"
        )
    return template


def then_requests(value: Any, base: Request) -> tuple[Request, ...]:
    """Return the templates that a row's `then` (a SPEC, or a list of SPECs) asks about objects, with base's settings.

    Raises:
        RowError: `bad_row` where it is neither.
        RequestError: a SPEC makes no sense, or they are too many.
    """
    specs = [value] if isinstance(value, str) else value
    if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
        raise RowError("bad_row", f"then is {printable(repr(value))[:SHOWN_CHARS]}, not a SPEC or a list of SPECs")
    found = list[Request]()
    for spec in specs[: MOST_THEN + 1]:
        try:
            found += [template_of(part, base) for part in parse_then(spec)]
        except ValueError as error:
            raise RequestError(f"then: {error}") from error
    if len(found) > MOST_THEN:
        raise RequestError(f"then asks more than {MOST_THEN} things about each object")
    return tuple(found)


def template_of(spec: TaskSpec, base: Request) -> Request:
    """Return what a SPEC of `parse_then` asks about each object, with the settings of `base` that suit any task."""
    settings = replace(base, spatial_refs=(), choices=(), tiles=None, region=None)
    if spec.task is Task.CAPTION:
        return replace(settings, task=spec.task, prompt=None, length=spec.argument or base.length)
    return replace(settings, task=spec.task, prompt=spec.argument)


def are_followed(requests: Sequence[Request]) -> bool:
    """Return whether any of the requests finds objects that can be asked about."""
    return any(request.task in FOLLOWED_TASKS for request in requests)
