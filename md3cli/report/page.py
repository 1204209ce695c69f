"""What the template gets: the words, numbers and filters of the page.

Nothing here opens a picture or writes a page: build.py does; the pictures themselves go to the script (index.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from md3cli.exporters.palette import LABELS_PER_DASH, style_at
from md3cli.records import is_printable, printable

if TYPE_CHECKING:
    from md3cli.report.plots import Plot, RunStats

MAX_LABEL_CHIPS, MAX_QUESTION_CHIPS = 60, 20
QUALITY_TEXTS = {"loop": "repeats itself", "refusal": "refuses", "cut": "cut off"}


@dataclass(frozen=True, slots=True)
class Tile:
    """One number of the overview."""

    name: str
    value: str
    about: str = ""
    is_bad: bool = False
    pick: str | None = None  # what the page filters by on a click: a facet's name, a colon, the value


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words; the first cell of each is its name."""

    title: str
    about: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One check box of a filter."""

    value: str
    text: str
    count: int | None = None
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Facet:
    """The check boxes of one filter; `num_more` values did not fit, and the search finds them."""

    legend: str
    name: str
    options: Sequence[Option]
    num_more: int = 0


@dataclass(frozen=True, slots=True)
class Sign:
    """A line of the legend: `kind` names the drawing in the template, `text` says what it stands for."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Palette:
    """Labels with their colours, in the order of the run: the same on every page of a report, and in overlays."""

    numbers: Mapping[str, int]

    def colour_of(self, label: str) -> str:
        """Return the style sheet's classes for a label: colour and dash."""
        style = style_at(self.numbers.get(label, 0))
        return f"c{style.colour_place} d{style.dash_place}"

    def document(self) -> list[tuple[str, str]]:
        """Return each label as it is shown with its class, for the script."""
        return [(legible(label), self.colour_of(label)) for label in self.numbers]


@dataclass(frozen=True, slots=True)
class Page:
    """The HTML file. Lists that are empty are left out of it."""

    title: str
    facts: Sequence[str]
    tiles: Sequence[Tile] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    facets: Sequence[Facet] = ()
    signs: Sequence[Sign] = ()
    has_scores: bool = False
    is_judged: bool = False
    made: str = ""


def facets_of(stats: RunStats, palette: Palette) -> list[Facet]:
    """Return the filters that can tell records of this run apart."""
    statuses = {"ok": "answered", "empty": "nothing found", "failed": "failed"}
    marks = [Option("none", "unmarked"), Option("right", "right"), Option("wrong", "wrong")]
    labels = [label for label in palette.numbers if label in stats.palette_labels]  # no object is called by the others
    counts = sorted(((stats.labels[label], label) for label in labels), key=lambda pair: -pair[0])
    chips = [Option(legible(label), label, n, palette.colour_of(label)) for n, label in counts[:MAX_LABEL_CHIPS]]
    asked = sorted(stats.answers.items(), key=lambda pair: -pair[1].total())
    questions = [Option(text, text, n.total()) for text, n in asked[:MAX_QUESTION_CHIPS] if legible(text) == text]
    facets = [
        Facet("Task", "task", [Option(task, task, count) for task, count in stats.tasks.items()]),
        Facet("Status", "status", [Option(s, name, n) for s, name in statuses.items() if (n := stats.statuses[s])]),
        Facet("By ground truth", "verdict", [Option(v, v, n) for v in ("right", "wrong") if (n := stats.verdicts[v])]),
        Facet(
            "Text", "quality", [Option(q, name, n) for q, name in QUALITY_TEXTS.items() if (n := stats.qualities[q])]
        ),
        Facet("Question", "prompt", questions, len(asked) - len(questions)),
        Facet("Label", "label", chips, len(counts) - len(chips)),
    ]
    telling = [facet for facet in facets if len(facet.options) > 1 or (facet.options and facet.name == "quality")]
    return [Facet("Mark", "mark", marks), *telling]


def signs_of(kinds: Collection[str], num_labels: int) -> list[Sign]:
    """Return the legend of what is drawn somewhere in this report; `kinds` as in `RunStats`."""
    judged = is_judged(kinds)
    solid = "solid: right" if "plain" not in kinds else "solid: right, or not in the ground truth"
    words = {
        "box": solid if judged else "box: found here",
        "wrong": "dashed: wrong by ground truth",
        "missed": "white, dashed: missed, in the ground truth only",
        "mask": "filled: the mask of what was found",
        "point": "dot: a point",
        "ground": "white ring: what a passage of the reasoning is about",
        "part": "white dotted box: what an answer is about, while its name is pointed at",
    }
    signs = [Sign(kind, text) for kind, text in words.items() if kind in kinds]
    if num_labels < 2 or not signs:
        return signs
    is_dashed = num_labels > LABELS_PER_DASH and not judged  # with ground truth, dashes are the verdict's
    return [*signs, Sign("dash", "colour and dash: the label") if is_dashed else Sign("label", "colour: the label")]


def is_judged(kinds: Collection[str]) -> bool:
    """Return whether a ground truth says of something that is drawn what it is worth."""
    return not {"right", "wrong", "missed"}.isdisjoint(kinds)


def legible(text: str) -> str:
    """Return `text` with all that could turn or hide what a reader sees shown as `\\xNN` or `\\uNNNN`.

    Line ends, tabs and the joiners that scripts and emoji need stay.
    """
    if all(map(_is_legible, text)):
        return text
    return "".join(char if _is_legible(char) else printable(char) for char in text)


def _is_legible(char: str) -> bool:
    return is_printable(char) or char in "\n\t\u200c\u200d"


def today() -> str:
    """Return the date the page says it was made on (UTC)."""
    return datetime.now(UTC).date().isoformat()


def palette_of(labels: Iterable[str]) -> Palette:
    """Return colours for `labels` in their order."""
    return Palette({label: number for number, label in enumerate(labels)})
