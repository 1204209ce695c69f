"""Records on disk become the report on disk: one page, and where there are many pictures a folder of data beside it.

One pass over the records counts, makes thumbnails and writes index and cards piece by piece, so memory holds the
pictures of one file at most; the page, which has the counts, comes last. It asks nothing of the network: its own
Content Security Policy allows data: pictures and, by hash, exactly the style and script inside it; script files beside
it are loaded under a nonce. Thumbnails are JPEG data URIs of pictures that came through `read_image`, as everywhere.
Ground truth adds verdicts on shapes, missed objects, scores and curves.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image

from md3cli import __version__
from md3cli.errors import ImageError, MissingExtraError
from md3cli.evaluate.scores import Curves, Section, Verdict, number
from md3cli.exporters import ExportOptions
from md3cli.exporters.at_once import holding, in_order
from md3cli.exporters.files import replaced_file, staged_folder
from md3cli.exporters.pictures import FoundPicture, Pictures
from md3cli.finished.guards import marker_format, remove_written
from md3cli.finished.run_json import RunInfo
from md3cli.records import printable
from md3cli.refine.collection import Collection, as_collection, read
from md3cli.report.index import CARDS_SIZE, WORDS_LIMIT, in_pieces, joined_json, script_of
from md3cli.report.items import Entry, Item, Shape, items, missed_shape
from md3cli.report.page import Page, Palette, Table, facets_of, is_judged, legible, palette_of, signs_of, today
from md3cli.report.plots import (
    Column,
    Line,
    Lines,
    RunStats,
    overview_tiles,
    run_facts,
    run_plots,
    share_ticks,
    unit_dot,
    unit_path,
)

if TYPE_CHECKING:
    from jinja2 import Template

IMAGES_IN_FILE = 2000  # about 40 MB of thumbnails: what a browser still opens at once, and a mail still carries
IMAGES_PER_PAGE = 100  # cards that a browser lays out in 50 ms
SCRIPTS = ("index.js", "cards.js", "report.js")  # in the order of their first lines
JPEG_QUALITY = 78
LABELS_DRAWN = 9
ROWS_SHOWN = 30


def with_thumbnails(items: Iterable[Item], pictures: Pictures, long_side_px: int) -> Iterator[Item]:
    """Yield the same items, each with its `thumbnail` or the reason why it is `missing`; a few are in flight."""
    found = ((item, _find(item, pictures)) for item in items)
    return in_order(lambda pair: _fill(*pair, pictures, long_side_px), found)


def _find(item: Item, pictures: Pictures) -> FoundPicture | None:
    return None if item.first["image"] is None else pictures.find(item.picture_record)


def _fill(item: Item, picture: FoundPicture | None, pictures: Pictures, long_side_px: int) -> Item:
    if item.first["image"] is None:
        return item
    if picture is None:
        item.missing = "the picture is not there"
        return item
    try:
        with holding(item.width, item.height):
            item.thumbnail = data_uri(pictures.read(picture), long_side_px)
    except ImageError as error:
        item.missing = str(error)
    return item


def data_uri(image: Image.Image, long_side_px: int) -> str:
    """Return `image` (RGB; changed in place) as a JPEG no larger than `long_side_px`; never enlarged."""
    image.thumbnail((long_side_px, long_side_px), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def verdicts_of(sections: Sequence[Section]) -> dict[str, Verdict]:
    """Return all verdicts by record id."""
    return {record: verdict for section in sections for record, verdict in section.verdicts.items()}


def with_verdicts(items: Iterable[Item], verdicts: Mapping[str, Verdict]) -> Iterator[Item]:
    """Yield the same items; records that the ground truth knows carry its verdict."""
    for item in items:
        for place, entry in enumerate(item.entries):
            verdict = verdicts.get(entry.record.get("id", ""))
            if verdict is not None:
                item.entries[place] = _judged(entry, verdict, item.frame)
        yield item


def _judged(entry: Entry, verdict: Verdict, frame: tuple[float, float]) -> Entry:
    words = {True: "right", False: "wrong", None: None}
    shapes: Iterable[Shape] = entry.shapes
    if len(verdict.objects) == len(entry.shapes):
        shapes = (replace(shape, verdict=words[v]) for shape, v in zip(entry.shapes, verdict.objects, strict=True))
    missed = tuple(missed_shape(entry.prompt, box, frame) for box in verdict.missed)
    return replace(entry, verdict=words[verdict.is_right], shapes=tuple(shapes), missed=missed)


def score_table(section: Section) -> Table:
    """Return a section's scores, with a row for each label or question."""
    names = [name for name, value in section.scores.items() if value is not None]
    rows = [("all", *(number(section.scores[name]) for name in names))]
    if len(section.by_name) > 1:
        shown = list(section.by_name.items())[:ROWS_SHOWN]
        rows += [(label, *(number(scores.get(name)) for name in names)) for label, scores in shown]
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in section.counts.items())
    title = f"{section.name[:1].upper()}{section.name[1:]} by ground truth"
    return Table(title, counts, ("", *(name.replace("_", " ") for name in names)), tuple(rows))


def score_plots(section: Section, palette: Palette) -> list[Lines]:
    """Return precision over recall and reliability, where the section has them; labels in their colours."""
    curves = section.curves
    if curves is None:
        return []
    plots = [_precision_recall(section.name, curves, palette)] if curves.precision else []
    return plots + ([_reliability(section.name, curves)] if curves.reliability else [])


def _precision_recall(name: str, curves: Curves, palette: Palette) -> Lines:
    labels = [label for label in curves.precision if label != "all"][:LABELS_DRAWN]
    shown = ["all", *labels] if len(labels) > 1 else ["all"]
    lines = [
        Line(label, unit_path(zip(curves.recall, curves.precision[label], strict=True)), style)
        for label, style in zip(shown, ["whole", *map(palette.colour_of, labels)], strict=False)
    ]
    return Lines(f"Precision over recall: {name}", "at IoU 0.5", tuple(lines), *share_ticks())


def _reliability(name: str, curves: Curves) -> Lines:
    points = [(b.mean_score, b.share_right) for b in curves.reliability]
    ideal = Line("ideal", unit_path([(0, 0), (1, 1)]), "ideal")
    lines = (Line("this run", unit_path(points), "c0"), ideal)
    dots: list[Column] = [
        unit_dot(
            b.mean_score, b.share_right, f"{b.share_right:.2f} of {b.count:,} objects right at score {b.mean_score:.2f}"
        )
        for b in curves.reliability
    ]
    return Lines(f"Is the score right? {name}", "share right over score", lines, *share_ticks(), dots=tuple(dots))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """How to make a report. `root` and `is_confined` are as for every export (`ExportOptions`).

    `images_per_page` are shown at a time; a report of more than these and than `images_in_file` has a folder beside it.
    """

    root: Path | None = None
    is_confined: bool = True
    overwrite: bool = False
    title: str | None = None
    thumbnail_px: int = 320
    images_per_page: int = IMAGES_PER_PAGE
    images_in_file: int = IMAGES_IN_FILE
    max_pixels: int = 2**28
    max_file_size: int = 2**30


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What was written; `page` is the file to open, `folder` what must stay beside it, if anything."""

    page: Path
    folder: Path | None
    num_images: int
    num_records: int
    num_missing: int  # pictures that could not be opened
    notes: tuple[str, ...] = ()  # what of the records file was left out


def write_report(
    records: Path | Collection,
    output: Path,
    options: ReportOptions,
    sections: Sequence[Section] = (),
) -> ReportSummary:
    """Write the report of `records` to `output` (an .html file, or a folder for its index.html).

    `sections` are scores by ground truth, to be shown and drawn.

    Raises:
        InputError: no records file, or a damaged record.
        UsageError: `output` exists and may not be overwritten.
        OutputError: it cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    records, notes = as_collection(records), list[str]()
    shown = with_verdicts(items(read(records, notes)), verdicts_of(sections))

    def page_of(stats: RunStats) -> Page:
        return _page_of(records, stats, options, sections)

    made = write_items(shown, records, output, options, page_of)
    return replace(made, notes=(*notes, *made.notes))


def write_items(
    shown: Iterable[Item],
    records: Collection,
    output: Path,
    options: ReportOptions,
    page_of: Callable[[RunStats], Page],
) -> ReportSummary:
    """Write a page with a card for each of `shown`, whose pictures are those of `records`; raises as `write_report`.

    `page_of` makes the words around the cards, once all of them are counted.
    """
    _template()  # what is missing is said before the work
    page, num_missing = output if output.suffix.lower() in (".html", ".htm") else output / "index.html", 0
    pictures, stats = Pictures(records, _picture_options(options)), _new_stats(records)
    with replaced_file(page, overwrite=options.overwrite) as file, ExitStack() as stack:
        pieces = Pieces(page.with_name(f"{page.stem}_pages"), options, stack)
        for item in in_pieces(with_thumbnails(shown, pictures, options.thumbnail_px), pieces.write):
            stats.add(item)
            num_missing += item.missing is not None
        stack.close()  # the folder first: a page without its folder shows nothing
        head = _head_of(records, stats, options)
        nonce = None if pieces.folder is None else pieces.stamp
        file.writelines(render(page_of(stats), pieces.data(head), nonce))
    pieces.remove_former()
    notes = tuple(pictures.file_notes())
    return ReportSummary(page, pieces.folder, stats.num_images, stats.num_records, num_missing, notes)


def _new_stats(records: Collection) -> RunStats:
    stats = RunStats(records.refinement.labels)
    stats.palette_labels.update(dict.fromkeys(records.classes))
    return stats


class Pieces:
    """Index and cards of a report: kept while its pictures fit in one file, then in script files in `beside`.

    The thumbnails are in script files, too: picture files would need `img-src file:`, which is every file of the disk.
    `stamp` tells the files from another report's, and is the nonce, which nobody who wrote the records can know.
    """

    def __init__(self, beside: Path, options: ReportOptions, stack: ExitStack) -> None:
        self._beside, self._overwrite, self._stack = beside, options.overwrite, stack
        self._most_kept = max(options.images_in_file, options.images_per_page)
        self._kept: dict[str, list[str]] = {"index": [], "cards": []}
        self._num_kept = 0  # pictures with a card
        self._counts = {"index": 0, "cards": 0}
        self._stage: Path | None = None
        self.stamp = secrets.token_urlsafe(16)

    def write(self, kind: str, number: int, text: str, num_pictures: int) -> None:
        """Take over a piece, `number` of its kind, as JSON."""
        self._counts[kind] += 1
        if self._stage is not None:
            self._write_file(kind, number, text)
            return
        self._kept[kind].append(text)
        self._num_kept += num_pictures if kind == "cards" else 0
        if self._num_kept > self._most_kept:
            stage = self._stack.enter_context(staged_folder(self._beside, overwrite=self._overwrite, format="html"))
            self._stage = stage.path
            for kept, texts in self._kept.items():
                for place, one in enumerate(texts):
                    self._write_file(kept, place, one)
            self._kept.clear()

    def _write_file(self, kind: str, number: int, text: str) -> None:
        assert self._stage is not None
        name = f"{kind}-{number + 1:05d}"
        (self._stage / f"{name}.js").write_text(script_of(self.stamp, name, text), encoding="ascii")

    @property
    def folder(self) -> Path | None:
        """The folder that the page needs beside it."""
        return None if self._stage is None else self._beside

    def data(self, head: Mapping[str, Any]) -> Iterator[str]:
        """Yield JSON for the page's script: `head`, and the pieces themselves or where they are."""
        if self._stage is None:
            return joined_json(head, self._kept)
        files = {"folder": quote(os.fsencode(self._beside.name)), "stamp": self.stamp, **self._counts}
        return joined_json({**head, "files": files}, {})

    def remove_former(self) -> None:
        """Remove the folder of a larger report that stood here, where this one needs none."""
        if self._stage is None and self._overwrite and marker_format(self._beside) == "html":
            remove_written(self._beside)


def _picture_options(options: ReportOptions) -> ExportOptions:
    return ExportOptions(
        root=options.root,
        is_confined=options.is_confined,
        max_pixels=options.max_pixels,
        max_file_size=options.max_file_size,
    )


def name_of_run(records: Collection) -> str:
    """Return what a page about the records is called, and the file of its marks."""
    path = records.path
    return printable(path.parent.resolve().name if path.stem == "records" else path.stem)


def _page_of(records: Collection, stats: RunStats, options: ReportOptions, sections: Sequence[Section]) -> Page:
    """Return what the template gets."""
    infos, palette = records.infos(), palette_of(stats.coloured)
    run = infos[0] if len(infos) == 1 else RunInfo({})  # the times of several runs say nothing together
    return Page(
        title=options.title or name_of_run(records),
        facts=run_facts(stats),
        tiles=overview_tiles(stats, run),
        tables=[score_table(section) for section in sections],
        plots=[*(plot for section in sections for plot in score_plots(section, palette)), *run_plots(stats, run)],
        facets=facets_of(stats, palette),
        signs=signs_of(stats.kinds, len(stats.palette_labels)),
        has_scores=any(stats.score_bins),
        is_judged=is_judged(stats.kinds),
        made=today(),
    )


def _head_of(records: Collection, stats: RunStats, options: ReportOptions) -> dict[str, Any]:
    """Return what the script gets besides index and cards."""
    labels = palette_of(stats.coloured).document()
    data: dict[str, Any] = {"run": run_key(records.infos(), stats), "name": name_of_run(records), "labels": labels}
    return data | {"perPage": options.images_per_page, "cardsSize": CARDS_SIZE}


def run_key(infos: Sequence[RunInfo], stats: RunStats) -> str:
    """Return what the browser keeps marks under: one key for all reports of the same pictures, a selection's too.

    Marks count by record id, and another question, model or picture has another id.
    """
    roots = sorted({str(info.root) for info in infos if info.root is not None}) or [str(stats.first_id)]
    return hashlib.sha256("\n".join(roots).encode("utf-8", "replace")).hexdigest()[:16]


def render(page: Page, data: Iterable[str], nonce: str | None = None) -> Iterator[bytes]:
    """Yield the page's HTML in pieces, UTF-8; `data` is JSON for the script (see index.py), `nonce` of its files."""
    from markupsafe import Markup

    style, script = _part("report.css"), "\n".join(map(_part, SCRIPTS))
    pieces = _template().generate(
        page=page,
        policy=content_policy(style, script, nonce),
        style=Markup(style),  # our own files, not text from records
        script=Markup(script),
        data=map(Markup, data),  # of safe_json, which cannot end the element it stands in
        words_limit=WORDS_LIMIT,
        version=__version__,
    )
    return (piece.encode("utf-8", "replace") for piece in pieces)


def content_policy(style: str, script: str, nonce: str | None = None) -> str:
    """Return the Content Security Policy that allows this style, this script and data: pictures, and nothing else.

    With `nonce`, also the script files that this script asks for.
    """
    beside = f" 'nonce-{nonce}'" if nonce else ""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'{beside}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


@cache
def _part(name: str) -> str:
    return resources.files("md3cli.report").joinpath(name).read_text(encoding="utf-8")


def _legible_text(value: object) -> object:
    """Make text from records legible; leave what is markup already, which is ours."""
    return legible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


@cache
def _template() -> Template:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("the HTML report", "report") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        finalize=_legible_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("template.html.j2")
