"""Counts over all records of a run, and the tiles and plots of them: geometry for the template's SVG, nothing drawn.

Memory does not grow with the records. `Columns` are histograms, `Bars` are counts of named things, `Lines` are curves;
all geometry is in drawing units of the plot's viewBox (`WIDTH` x `HEIGHT`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from md3cli.exporters.grouping import asked_and_found, image_key
from md3cli.finished.digest import DigestSet, digest_of
from md3cli.finished.run_json import RunInfo
from md3cli.records import printable
from md3cli.refine.labels import Labels
from md3cli.report.items import Entry, Item
from md3cli.report.page import Tile

NUM_SCORE_BINS = 20
MAX_DISTINCT = 5000  # labels, questions and answers remembered; what comes later is in none of these counts
ANSWER_CHARS = 60
WIDTH, HEIGHT = 360.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 38.0, 8.0, 10.0, 26.0  # margins for the axes' words
DOT_RADIUS = 3.0
MAX_BARS = 12
MAX_COLUMNS = 24
MAX_QUESTIONS = 4


@dataclass(slots=True)
class RunStats:
    """The counts, filled item by item and then read by the plots."""

    named: Labels = field(default=Labels())  # how prompts are called
    first_id: str | None = None
    pictures: PictureCount = field(default_factory=lambda: PictureCount())
    num_records: int = 0
    num_objects: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)  # objects by label, in order of first appearance
    palette_labels: dict[str, None] = field(default_factory=dict)  # asked or found, in the order of the overlays
    part_labels: dict[str, None] = field(default_factory=dict)  # of what answers are about; behind the others
    images_of_label: Counter[str] = field(default_factory=Counter)
    objects_per_image: Counter[int] = field(default_factory=Counter)  # images that were asked for objects
    score_bins: list[int] = field(default_factory=lambda: [0] * NUM_SCORE_BINS)
    caption_words: Counter[int] = field(default_factory=Counter)
    answers: dict[str, Counter[str]] = field(default_factory=dict)  # by question
    models: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)  # by ground truth, of records
    qualities: Counter[str] = field(default_factory=Counter)  # of texts
    kinds: set[str] = field(default_factory=set)  # of what is drawn, see kinds_of
    output_tokens: int = 0

    @property
    def num_images(self) -> int:
        return self.pictures.total

    @property
    def coloured(self) -> list[str]:
        """The labels in the order of their colours."""
        return list(dict.fromkeys((*self.palette_labels, *self.part_labels)))

    def add(self, item: Item) -> None:
        """Count one picture with its records."""
        self.first_id = self.first_id or str(item.first.get("id"))
        if item.first["image"] is not None:
            self.pictures.add(image_key(item.first), item.picture_record.get("sha256"))
        labels = Counter(shape.label for entry in item.entries for shape in entry.shapes)
        for label, count in labels.items():
            if label in self.labels or len(self.labels) < MAX_DISTINCT:
                self.labels[label] += count
                self.images_of_label[label] += 1
        if any(entry.status != "failed" and entry.text is None for entry in item.entries):
            self.objects_per_image[labels.total()] += 1
        self.num_objects += labels.total()
        for entry in item.entries:
            if len(self.palette_labels) < MAX_DISTINCT:
                drawn = (shape.label for shape in entry.shapes)
                self.palette_labels.update(dict.fromkeys((*asked_and_found(entry.record, self.named), *drawn)))
            if entry.part is not None and len(self.part_labels) < MAX_DISTINCT:
                self.part_labels[entry.part.label] = None
            self.num_records += 1
            self.tasks[entry.task] += 1
            self.statuses[entry.status] += 1
            self.models[str(entry.record.get("model") or "unknown")] += 1
            self._add_scores(entry.scores)
            self.verdicts[entry.verdict or "none"] += 1
            self.qualities.update(entry.qualities)
            self.kinds.update(kinds_of(entry))
            if entry.status == "failed":
                self.errors[str(entry.record["error"]["type"])] += 1
            elif entry.text is not None:
                self._add_text(entry.task, entry.prompt, entry.text)
            self.output_tokens += (entry.record.get("tokens") or {}).get("output") or 0

    def _add_scores(self, scores: list[float]) -> None:
        for score in scores:
            self.score_bins[min(max(int(score * NUM_SCORE_BINS), 0), NUM_SCORE_BINS - 1)] += 1

    def _add_text(self, task: str, question: str, text: str) -> None:
        if task == "caption":
            self.caption_words[len(text.split())] += 1
            return
        if question in self.answers or len(self.answers) < MAX_DISTINCT:
            answers = self.answers.setdefault(question, Counter())
            answer = printable(" ".join(text.split()))[:ANSWER_CHARS]
            if answer in answers or len(answers) < MAX_DISTINCT:
                answers[answer] += 1


class PictureCount:
    """Counts pictures, each once; of a sorted selection one may come several times. Takes 42 bytes a picture.

    Of one name those with different digests are several. A record without a digest is about any of its name.
    """

    def __init__(self) -> None:
        self.total = 0
        self._seen = DigestSet()

    def add(self, name: bytes, sha256: object) -> None:
        """Count a picture of `name` (16 bytes, as of `image_key`); `sha256` None: nobody knows it."""
        has_digest = digest_of(b"known:" + name)
        if not sha256:
            self.total += has_digest not in self._seen and self._seen.add(name)
        elif self._seen.add(digest_of(b"%b:%b" % (name, str(sha256).encode("utf-8", "surrogatepass")))):
            is_first = self._seen.add(has_digest)  # of its name: it may have been counted without a digest
            self.total += not (is_first and name in self._seen)


def kinds_of(entry: Entry) -> Iterator[str]:
    """Yield what is drawn for a record: box, mask, point, ground, part; of shapes right, wrong, missed, else plain."""
    for shape in (*entry.shapes, *entry.missed):
        yield "mask" if shape.path else "box" if shape.rect else "point"
        yield shape.verdict or "plain"
    if any(passage.points for passage in entry.reasoning):
        yield "ground"
    if entry.part is not None:
        yield "part"


@dataclass(frozen=True, slots=True)
class Tick:
    """A word on an axis, `at` drawing units along it."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """One bar of a histogram; `title` is shown when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    title: str
    pick: str | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """A histogram."""

    title: str
    about: str
    columns: tuple[Column, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    kind: str = "columns"


@dataclass(frozen=True, slots=True)
class Bar:
    """One named number as it is shown; `share` of the longest, `pick` what the page filters by on a click."""

    name: str
    number: str
    share: float
    title: str
    pick: str | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Named counts, the largest first; `num_more` names did not fit."""

    title: str
    about: str
    bars: tuple[Bar, ...]
    num_more: int
    kind: str = "bars"


@dataclass(frozen=True, slots=True)
class Line:
    """One curve as an SVG path; `style` names its class in the style sheet."""

    name: str
    path: str
    style: str


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over common axes."""

    title: str
    about: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    dots: tuple[Column, ...] = ()
    kind: str = "lines"


Plot = Columns | Bars | Lines


def overview_tiles(stats: RunStats, run: RunInfo) -> list[Tile]:
    """Return the run in numbers."""
    failed, empty = stats.statuses["failed"], stats.statuses["empty"]
    tiles = [Tile("Images", f"{stats.num_images:,}"), Tile("Records", f"{stats.num_records:,}")]
    if stats.objects_per_image:
        per_image = stats.num_objects / stats.objects_per_image.total()
        tiles.append(Tile("Objects", f"{stats.num_objects:,}", f"{per_image:.1f} an image"))
        tiles.append(Tile("Nothing found", f"{empty:,}", "records", pick="status:empty" if empty else None))
    about, pick = _percent(failed, stats.num_records), "status:failed" if failed else None
    tiles.append(Tile("Failed", f"{failed:,}", about, is_bad=failed > 0, pick=pick))
    if stats.output_tokens:
        tiles.append(Tile("Tokens", short_number(stats.output_tokens), "generated"))
    if run.elapsed_s:
        tiles.append(Tile("Time", duration(run.elapsed_s), f"{stats.num_images / run.elapsed_s:.3g} images/s"))
    return tiles


def run_facts(stats: RunStats) -> list[str]:
    """Return tasks and models, for the line under the title."""
    tasks = [f"{task} {count:,}" for task, count in stats.tasks.most_common()]
    return tasks + [model for model, _ in stats.models.most_common(3)]


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} % of the records" if total and count else ""


def run_plots(stats: RunStats, run: RunInfo) -> list[Plot]:
    """Return the plots that the run has numbers for, in reading order."""
    plots: list[Plot | None] = [
        _histogram("Objects per image", "images by number of objects", stats.objects_per_image, "object", "image"),
        _scores(stats.score_bins),
        _bars("Objects by label", "objects", stats.labels, pick="label", images=stats.images_of_label),
        _histogram("Caption length", "captions by number of words", stats.caption_words, "word", "caption"),
        *_answers(stats.answers),
        _bars("Errors by type", "failed records", stats.errors, pick="error"),
        _throughput(run.timeline),
        _stages(run.stages_s),
    ]
    return [plot for plot in plots if plot is not None]


def _histogram(title: str, about: str, counts: Mapping[int, int], over: str, what: str) -> Columns | None:
    """Plot counts over whole numbers; neighbours share a column where there are too many."""
    if not counts:
        return None
    low, high = min(counts), max(counts)
    step = math.ceil((high - low + 1) / MAX_COLUMNS)
    edges = list(range(low, high + 1, step))
    heights = [sum(counts.get(n, 0) for n in range(edge, edge + step)) for edge in edges]
    names = [f"{edge}" if step == 1 else f"{edge} to {edge + step - 1}" for edge in edges]
    titles = [f"{_many(height, what)} with {name} {over}s" for name, height in zip(names, heights, strict=True)]
    every = math.ceil(len(edges) / 10)
    labels = [str(edge) if index % every == 0 else "" for index, edge in enumerate(edges)]
    return _columns(title, about, heights, titles, labels)


def _scores(bins: list[int]) -> Columns | None:
    if not any(bins):
        return None
    edges = [index / NUM_SCORE_BINS for index in range(NUM_SCORE_BINS)]
    titles = [
        f"{_many(count, 'object')} with a score of {edge:.2f} to {edge + 1 / NUM_SCORE_BINS:.2f}"
        for edge, count in zip(edges, bins, strict=True)
    ]
    labels = [f"{edge:.1f}" if index % 4 == 0 else "" for index, edge in enumerate(edges)]
    picks = [f"score:{edge:.2f}:{edge + 1 / NUM_SCORE_BINS:.2f}" for edge in edges]
    return _columns("Scores", "objects by score", bins, titles, labels, picks)


def _columns(
    title: str, about: str, heights: list[int], titles: list[str], labels: list[str], picks: Sequence[str] = ()
) -> Columns:
    top = nice_ceiling(max(heights))
    step = (WIDTH - LEFT - RIGHT) / len(heights)
    plot_height = HEIGHT - TOP - BOTTOM
    columns, ticks = [], []
    for index, (height, name, label) in enumerate(zip(heights, titles, labels, strict=True)):
        tall = max(height / top * plot_height, 1.0 if height else 0.0)
        x = LEFT + index * step
        pick = picks[index] if picks and height else None
        columns.append(Column(round(x + step * 0.06, 2), _y(tall), round(step * 0.88, 2), round(tall, 2), name, pick))
        if label:
            ticks.append(Tick(round(x + step / 2, 2), label))
    return Columns(title, about, tuple(columns), tuple(ticks), _y_ticks(top, num=2 if top % 2 == 0 else 1))


def _y(tall: float) -> float:
    return round(HEIGHT - BOTTOM - tall, 2)


def _y_ticks(top: float, num: int = 2) -> tuple[Tick, ...]:
    plot_height = HEIGHT - TOP - BOTTOM
    return tuple(Tick(_y(plot_height * n / num), short_number(top * n / num)) for n in range(num + 1))


def _bars(
    title: str, about: str, counts: Counter[str], *, pick: str | None = None, images: Mapping[str, int] | None = None
) -> Bars | None:
    if not counts:
        return None
    largest = counts.most_common(MAX_BARS)
    bars = []
    for name, count in largest:
        detail = f" in {_many(images[name], 'image')}" if images else ""
        said = f"{name}: {count:,} of {counts.total():,}{detail}"
        bars.append(Bar(name, f"{count:,}", round(count / largest[0][1], 4), said, f"{pick}:{name}" if pick else None))
    return Bars(title, about, tuple(bars), len(counts) - len(bars))


def _answers(answers: Mapping[str, Counter[str]]) -> Iterable[Bars | None]:
    """Yield answers of the questions asked most, where answers repeat (one each tells nothing)."""
    asked = sorted(answers.items(), key=lambda pair: -pair[1].total())
    repeating = [(question, counts) for question, counts in asked if counts.most_common(1)[0][1] > 1]
    for question, counts in repeating[:MAX_QUESTIONS]:
        yield _bars(question, "answers", counts, pick="text")


def _throughput(timeline: Sequence[tuple[float, float]]) -> Lines | None:
    """Plot records a second over the run, from (seconds since the start, records done) pairs."""
    rates = []
    for (start, done_before), (end, done) in pairwise(timeline):
        if end > start:
            rates.append(((start + end) / 2, (done - done_before) / (end - start)))
    if len(rates) < 2:
        return None
    whole_s, top = timeline[-1][0], nice_ceiling(max(rate for _, rate in rates))
    points = [(seconds / whole_s, rate / top) for seconds, rate in rates]
    x_ticks = tuple(Tick(_along(n / 4), duration(whole_s * n / 4)) for n in range(5))
    mean = timeline[-1][1] / whole_s
    line = Line("records per second", unit_path(points), "c0")
    return Lines("Throughput", f"records per second; {mean:.3g} on average", (line,), x_ticks, _y_ticks(top))


def _stages(stages_s: Mapping[str, float]) -> Bars | None:
    spent = {stage: seconds for stage, seconds in stages_s.items() if seconds > 0}
    longest = max(spent.values(), default=0.0)
    bars = [
        Bar(stage, short_number(round(seconds, 1)), round(seconds / longest, 4), f"{stage}: {duration(seconds)}")
        for stage, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
    ]
    return Bars("Time by stage", "seconds; stages overlap", tuple(bars), 0) if bars else None


def unit_path(points: Iterable[tuple[float, float]]) -> str:
    """Return an SVG path through `points`, both coordinates 0-1 of the plot's area, y upwards."""
    return "M" + "L".join(f"{_along(x):g},{_y(y * (HEIGHT - TOP - BOTTOM)):g}" for x, y in points)


def unit_dot(x: float, y: float, title: str) -> Column:
    """Return a dot on a curve, at coordinates as of `unit_path`."""
    return Column(_along(x), _y(y * (HEIGHT - TOP - BOTTOM)), DOT_RADIUS, 0.0, title)


def share_ticks() -> tuple[tuple[Tick, ...], tuple[Tick, ...]]:
    """Return both axes from 0 to 1."""
    return tuple(Tick(_along(n / 5), f"{n / 5:.1f}") for n in range(6)), _y_ticks(1.0)


def _along(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)


def nice_ceiling(value: float) -> float:
    """Return a round top for an axis: the next of a few steps times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def short_number(value: float) -> str:
    """Return a number as an axis has room for: 1200 is `1.2k`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return 0.51 seconds as `0.5 s`, 12.3 as `12 s`, 90 as `1:30`, 4000 as `1:06:40`."""
    if seconds < 9.95:
        return f"{float(f'{seconds:.1f}'):g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
