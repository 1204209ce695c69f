"""A first look at the columns of INPUT, before anything slow: what is not there, what may be misspelled.

A manifest's columns mean something by their names alone, so that a misspelled one is carried to `meta` in silence, and
a template over a column that is not there fails every row. The first rows tell. Bounded by MOST_ROWS rows and BUDGET_S
seconds; opens no picture. Apart from source.py, which would read the same with or without it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from md3cli.config import ColumnOptions
from md3cli.errors import InputError, NoImageColumnError, UsageError
from md3cli.records import Request, Task, printable
from md3cli.refine.template import quoted
from md3cli.source.columns import OF_THE_PICTURE, ColumnRules, clash_of, likely_images, near_miss
from md3cli.source.manifest import ManifestRow
from md3cli.source.requests import ROW_COLUMNS, is_given

MOST_ROWS, BUDGET_S = 1000, 0.5
MOST_NAMED = 8  # columns in one message
MOST_COMPARED = 1000  # columns that may be misspelled: lines of JSON may have any number


@dataclass(slots=True)
class FirstRows:
    """What the first rows of all INPUTs hold.

    `columns` are their names in order, `num_rows` could be read; `is_unknown`: of some manifest none could. `own`
    counts the tasks of rows that ask something else than the command, `unknown` holds tasks that are none, with the
    place of the first row. `of_sidecars` are columns that pictures of tars bring, which mean nothing by their names.
    """

    columns: dict[str, None] = field(default_factory=dict)
    num_rows: int = 0
    own: Counter[str] = field(default_factory=Counter)
    unknown: dict[str, str] = field(default_factory=dict)
    is_unknown: bool = False
    of_sidecars: dict[str, None] = field(default_factory=dict)

    def take_sidecars(self, pictures: Iterator[Mapping[str, object]], rules: ColumnRules) -> None:
        """Take in the columns of the first pictures of a tar.

        Raises:
            UsageError: `rules` name another picture than a member, or give a column the name of another.
        """
        if name := next((name for name, column in rules.renamed.items() if column == "image"), None):
            raise UsageError(f"--map image={printable(name)}: INPUT says itself what its pictures are, no column does")
        deadline = time.monotonic() + BUDGET_S
        for columns in islice(pictures, MOST_ROWS):
            if clash := clash_of(columns, rules.renamed):
                raise UsageError(clash)
            self.of_sidecars |= {rules.renamed.get(column, column): None for column in columns}
            if time.monotonic() > deadline:
                break

    def take(
        self, rows: Iterator[ManifestRow], rules: ColumnRules, asked: Sequence[Request], *, may_fail: bool = False
    ) -> None:
        """Take in the first of a manifest's `rows`, of a run that asks `asked`.

        Raises:
            InputError: it cannot be read, unless it `may_fail`, as a record; or it has no column of pictures.
        """
        deadline, num_before = time.monotonic() + BUDGET_S, self.num_rows
        try:
            for number, row in enumerate(rows):
                if number >= MOST_ROWS or (number and time.monotonic() > deadline):
                    break
                if row.columns is None:
                    continue
                self.num_rows += 1
                self.columns |= dict.fromkeys(row.columns)
                self._take_task(row, rules, asked)
        except InputError as error:
            if not may_fail or isinstance(error, NoImageColumnError):
                raise
        self.is_unknown = self.is_unknown or self.num_rows == num_before

    def _take_task(self, row: ManifestRow, rules: ColumnRules, asked: Sequence[Request]) -> None:
        columns = rules.with_constants(row.columns or {})
        task = columns.get("task")
        task = task.strip().lower() if isinstance(task, str) else ""
        if task and task not in tuple(Task):
            self.unknown.setdefault(task, row.where)
        elif is_given(columns, "prompt") or (task and all(request.task != task for request in asked)):
            self.own[task or "prompt"] += 1


def check_columns(rows: FirstRows, options: ColumnOptions, rules: ColumnRules, where: str) -> None:
    """Refuse a --map of a column that no row has, a placeholder that no row can fill, and images under another name.

    Raises:
        UsageError: names what is not there, and what is.
        NoImageColumnError: lines of JSON call their images otherwise.
    """
    if rows.is_unknown:
        return
    if rows.columns and "image" not in rows.columns and (likely := likely_images(list(rows.columns))):
        raise NoImageColumnError(
            f"{where} has no column 'image'{_but('image', list(rows.columns))}; "
            f"--map image=NAME says which one has the images{likely}",
            list(rows.columns),
        )
    found = rows.columns | rows.of_sidecars
    for column, name in options.renamed:
        if column not in found:
            raise UsageError(
                f"--map {printable(column)}={printable(name)}: {where} has no column {quoted(name)}"
                f"{_but(name, list(found))}"
            )
    there = list(found | rules.constants)
    for name in rules.placeholders:
        if name not in there:
            raise UsageError(
                f"{{{printable(name)}}} in a prompt: {where} has no column {quoted(name)}"
                f"{_but(name, [*there, *OF_THE_PICTURE], rules.renamed)}"
            )


def check_asked(rows: FirstRows, asked: Sequence[Request], rules: ColumnRules, where: str) -> None:
    """Refuse a run that leaves it to rows what to ask, where they do not say it either.

    Raises:
        UsageError: says what to type.
    """
    there = rows.columns.keys() | rules.constants
    if not rows.num_rows or "task" in there:
        return
    if not asked:
        raise UsageError(
            f"nothing to do: {where} has no column 'task'{_but('task', list(rows.columns))}; say what with --task, "
            "like --task caption:long, or which column says it: --map task=NAME"
        )
    if all(request.task is not Task.CAPTION and request.prompt is None for request in asked) and "prompt" not in there:
        what, how = ("question", "with -q") if asked[0].task is Task.QUERY else ("OBJECT", "behind INPUT")
        raise UsageError(
            f"no {what}: {where} has no column 'prompt'{_but('prompt', list(rows.columns))}; type one {how}, "
            "or say which column has it: --map prompt=NAME"
        )


def notes_on(rows: FirstRows, asked: Sequence[Request], rules: ColumnRules, where: str) -> Iterator[str]:
    """Yield what a user should know about the columns before the run begins, a line each."""
    there = rows.columns.keys() | rules.constants
    yield from islice(_misspelt([*rules.constants, *islice(rows.columns, MOST_COMPARED)], there, rules), MOST_NAMED)
    if rules.is_template and not rules.named:
        yield "--template: no prompt that you typed has a {column}; prompts that rows bring are asked as they stand"
    for name in OF_THE_PICTURE:
        if name in there and name in rules.named:
            yield f"{{{name}}} is the picture's own; --map x={name} lets {{x}} be the column '{name}'"
    for task, place in list(rows.unknown.items())[:MOST_NAMED]:
        meant = near_miss(task, tuple(Task))
        hint = f"did you mean {meant}?" if meant else f"tasks are: {', '.join(Task)}."
        yield f"{where}, {place}: unknown task {quoted(task)}, so such rows fail; {hint}"
    is_typed = any(request.task is Task.CAPTION or request.prompt is not None for request in asked)
    if is_typed and rows.own:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in rows.own.items())
        yield (
            f"{rows.own.total():,} of the first {rows.num_rows:,} rows of {where} bring a task or prompt of their own "
            f"({kinds}), asked instead of what you typed"
        )


def _misspelt(columns: Sequence[str], there: Collection[str], rules: ColumnRules) -> Iterator[str]:
    missing = sorted(ROW_COLUMNS.difference(there))
    for column in columns:
        if column not in ROW_COLUMNS and column not in rules.placeholders and (meant := near_miss(column, missing)):
            yield f"column {quoted(column)} is carried to meta; did you mean {meant}?"


def _but(name: str, there: Sequence[str], renamed: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean x?`, or which columns there are."""
    if renamed and name in renamed:
        return f"; --map calls it {quoted(renamed[name])}"
    if meant := near_miss(name, there[:MOST_COMPARED]):
        return f"; did you mean {quoted(meant)}?"
    shown = [printable(column)[:40] for column in there][:MOST_NAMED]
    return f" (it has: {', '.join(shown)}{', ...' if len(there) > MOST_NAMED else ''})" if shown else ""
