"""Records as rows for people: what all rows share stands above them once, and the numbers are explained once.

Rows come one by one while a run goes on, so widths follow from the terminal and not from what is in them. Apart from
the console, its only user: what is said is tested without a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from md3cli.exporters.objects import signed_area
from md3cli.exporters.svg_path import segment_polygons
from md3cli.records import RecordDict, Request, Task
from md3cli.refine.labels import shown_text
from md3cli.refine.parts import part_name

MOST_OBJECTS_SHOWN = 6
CORNERS = ("x_min", "y_min", "x_max", "y_max")
BOX_NUMBERS = "score [x_min y_min x_max y_max]"
NUMBERS: Mapping[str, str] = {
    Task.DETECT: BOX_NUMBERS,
    Task.POINT: "score (x y)",
    Task.SEGMENT: f"{BOX_NUMBERS} share of the picture",
}
WHERE = "0-1 from top left"


@dataclass(slots=True)
class TableHead:
    """What is written above the rows, and which columns they have."""

    title: str = ""
    has_asked: bool = True
    tasks: tuple[str, ...] = ()  # whose numbers are explained above the first row
    explained: set[str] = field(default_factory=set)  # tasks

    @classmethod
    def of(cls, requests: Sequence[Request]) -> TableHead:
        """Return the head for rows of these requests: the title is what they share, none where it is not known."""
        asked = {asked_words(str(request.task), request.prompt, request.length) for request in requests}
        tasks = tuple(dict.fromkeys(str(request.task) for request in requests))
        if len(asked) == 1:
            return cls(asked.pop(), has_asked=False, tasks=tasks)
        return cls(tasks[0] if len(tasks) == 1 else "", tasks=tasks)

    def columns(self) -> tuple[tuple[str, float], ...]:
        """Return each column's name with its share of the width."""
        if self.has_asked:
            return ("image", 0.28), ("asked", 0.22), ("answer", 0.5)
        return ("image", 0.27), ("answer", 0.73)

    def cells(self, record: RecordDict, width: int) -> tuple[list[str], list[str]]:
        """Return what was asked of a record's picture, a cell each, and the lines of the answer.

        Args:
            width: of the whole table, in characters.
        """
        image = str(record["image"] or "-")
        task, prompt = str(record["task"]), record["prompt"]
        part = part_words(record)
        is_question = bool(part) and task == Task.QUERY
        asked = part + asked_words("" if is_question else task, prompt, record.get("length")).lstrip()
        answer = folded(parts(record), int(width * self.columns()[-1][1]) - 1)
        if self.has_asked:
            return [image, f"{part}{prompt}" if prompt is not None and task == self._task else asked], answer
        is_other = asked != self.title and not (record["error"] and task == self._task and not part)
        return [image], [f"{asked}: {answer[0]}", *answer[1:]] if is_other else answer

    def explain(self, task: str) -> str:
        """Return a line that says what the numbers of a task are; empty where that was said, or it has none."""
        if task not in NUMBERS or task in self.explained:
            return ""
        self.explained.add(task)
        return f"{'' if task == self._task else f'{task}: '}{NUMBERS[task]}, {WHERE}"

    @property
    def _task(self) -> str:
        return self.title.partition(" ")[0]


def asked_words(task: str, prompt: str | None, length: str | None = None) -> str:
    """Return what was asked: `detect red circle`, `caption short`."""
    words = prompt if prompt is not None else length if task == Task.CAPTION else None
    return task if words is None else f"{task} {words}"


def part_words(record: RecordDict) -> str:
    """Return which object a record is about, to stand before what was asked: `car 1: `; empty for whole pictures."""
    if (region := record.get("region")) is None:
        return ""
    return f"{part_name(region | {key: shown_text(str(region[key])) for key in ('label', 'of')})}: "


def describe(record: RecordDict) -> str:
    """Return what a record says, in a few words."""
    return " ".join(parts(record))


def parts(record: RecordDict) -> list[str]:
    """Return what a record says in parts that should not be broken: a text, or a count and each thing found."""
    if record["error"]:
        return [f"{record['error']['type']}: {record['error']['message']}"]
    if record["task"] == Task.CAPTION:
        return [str(record["caption"])]
    if record["task"] == Task.QUERY:
        return [str(record["answer"])]
    found, show = {
        Task.DETECT: ("objects", _box),
        Task.POINT: ("points", lambda point: f"({point['x']:.2f} {point['y']:.2f})"),
        Task.SEGMENT: ("segments", _segment),
    }[Task(record["task"])]
    return _listing([f"{_label(thing, record)}{_score(thing)}{show(thing)}" for thing in record[found]])


def _label(thing: Mapping[str, Any], record: RecordDict) -> str:
    """Return the name of a thing where it says more than the prompt."""
    label = thing.get("label")
    return "" if label is None or label == record["prompt"] else f"{shown_text(str(label))} "


def _segment(segment: Mapping[str, Any]) -> str:
    area = abs(sum(signed_area(list(polygon)) for polygon in segment_polygons(segment)))
    outline = f"{area:.1%}" if segment["svg_path"] else f"no outline ({segment.get('parse_error') or 'empty'})"
    return f"{_box(segment['bbox'])} {outline}"


def _box(corners: Mapping[str, Any]) -> str:
    return f"[{' '.join(f'{corners[name]:.2f}' for name in CORNERS)}]"


def _score(thing: Mapping[str, Any]) -> str:
    return f"{thing['score']:.2f} " if thing.get("score") is not None else ""


def _listing(things: Sequence[str]) -> list[str]:
    if not things:
        return ["none"]
    num_more = len(things) - MOST_OBJECTS_SHOWN
    shown = [f"{len(things)}: {things[0]}", *things[1:MOST_OBJECTS_SHOWN]]
    shown = [f"{thing}," for thing in shown[:-1]] + shown[-1:]
    return [*shown, f"and {num_more} more"] if num_more > 0 else shown


def folded(words: Sequence[str], width: int) -> list[str]:
    """Join `words` to lines of at most `width` characters; a word that is longer has a line of its own."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
