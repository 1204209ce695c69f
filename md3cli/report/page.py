"""What the template gets: one page's words, numbers, filters and items.

Nothing here opens a picture or writes a page: build.py does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from md3cli.exporters.palette import style_at
from md3cli.records import is_printable, printable
from md3cli.report.items import Entry, Item

if TYPE_CHECKING:
    from md3cli.report.plots import Plot

MAX_LABEL_CHIPS = 60


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of the overview."""

    name: str
    value: str
    about: str = ""
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words; the first cell of each is its name."""

    title: str
    about: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Link:
    """To another page of the report; without `href` it is this one."""

    text: str
    href: str | None
    about: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """One check box of a filter."""

    value: str
    text: str
    count: int | None = None
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Palette:
    """Labels with their colours, in the order of the run: the same on every page of a report, and in overlays."""

    numbers: Mapping[str, int]

    def colour_of(self, label: str) -> str:
        """Return the style sheet's classes for a label: colour and dash."""
        style = style_at(self.numbers.get(label, 0))
        return f"c{style.colour_place} d{style.dash_place}"


@dataclass(frozen=True, slots=True)
class Page:
    """One HTML file. Lists that are empty are left out of it."""

    title: str
    facts: Sequence[str]
    palette: Palette
    run_key: str  # what marks are kept under in the browser
    name: str  # what the marks' file is called after
    links: Sequence[Link] = ()
    tiles: Sequence[Tile] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    items: Sequence[Item] = ()
    made: str = ""
    _firsts: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._firsts.extend(accumulate((len(item.entries) for item in self.items), initial=0))

    def colour_of(self, label: str) -> str:
        """Return the style sheet's class for a label."""
        return self.palette.colour_of(label)

    def first_entry(self, n: int) -> int:
        """Return the number on the page of the first record of item `n`."""
        return self._firsts[n]

    @property
    def entries(self) -> list[Entry]:
        """Return all records of the page in order."""
        return [entry for item in self.items for entry in item.entries]

    @property
    def tasks(self) -> list[Option]:
        """Return check boxes for the tasks, where there is more than one."""
        counts = Counter(entry.task for entry in self.entries)
        return [Option(task, task, count) for task, count in counts.items()] if len(counts) > 1 else []

    @property
    def statuses(self) -> list[Option]:
        """Return check boxes for how records ended."""
        names = {"ok": "answered", "empty": "nothing found", "failed": "failed"}
        counts = Counter(entry.status for entry in self.entries)
        return [Option(s, name, counts[s]) for s, name in names.items() if s in counts] if len(counts) > 1 else []

    @property
    def marks(self) -> list[Option]:
        """Return check boxes for the reader's marks."""
        return [Option("none", "unmarked"), Option("right", "right"), Option("wrong", "wrong")]

    @property
    def verdicts(self) -> list[Option]:
        """Return check boxes for what the ground truth says."""
        counts = Counter(entry.verdict for entry in self.entries if entry.verdict)
        return [Option(verdict, verdict, counts[verdict]) for verdict in ("right", "wrong") if verdict in counts]

    @property
    def labels(self) -> list[Option]:
        """Return check boxes for the labels used most, where there is more than one."""
        counts = Counter(shape.label for entry in self.entries for shape in entry.shapes)
        chosen = counts.most_common(MAX_LABEL_CHIPS)
        if len(counts) < 2:
            return []
        return [Option(str(self.palette.numbers.get(x, 0)), x, n, self.colour_of(x)) for x, n in chosen]

    @property
    def has_scores(self) -> bool:
        """Return whether a score filter makes sense."""
        return any(entry.scores for entry in self.entries)

    def data(self) -> str:
        """Return what the script needs, as JSON that is safe inside a script element."""
        document = {
            "run": self.run_key,
            "name": self.name,
            "labels": list(map(legible, self.palette.numbers)),  # as the bars of a plot have them
            "records": [_facts(entry, self.palette) for entry in self.entries],
        }
        text = json.dumps(document, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def legible(text: str) -> str:
    """Return `text` with all that could turn or hide what a reader sees shown as `\\xNN` or `\\uNNNN`.

    Line ends, tabs and the joiners that scripts and emoji need stay.
    """
    if all(map(_is_legible, text)):
        return text
    return "".join(char if _is_legible(char) else printable(char) for char in text)


def _is_legible(char: str) -> bool:
    return is_printable(char) or char in "\n\t\u200c\u200d"


def _facts(entry: Entry, palette: Palette) -> dict[str, Any]:
    record = entry.record
    facts: dict[str, Any] = {
        key: record.get(key) for key in ("id", "image", "image_b64", "task", "prompt") if key in record
    }
    facts |= {"status": entry.status, "labels": [palette.numbers.get(shape.label, 0) for shape in entry.shapes]}
    facts["scores"] = [shape.score for shape in entry.shapes] if entry.shapes else entry.scores
    return facts | ({"verdict": entry.verdict} if entry.verdict else {})


def today() -> str:
    """Return the date the page says it was made on (UTC)."""
    return datetime.now(UTC).date().isoformat()


def palette_of(labels: Iterable[str]) -> Palette:
    """Return colours for `labels` in their order."""
    return Palette({label: number for number, label in enumerate(labels)})
