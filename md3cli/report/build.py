"""Records on disk -> the report on disk: one page, or an overview with pages beside it.

Two passes over the records: the first counts, the second makes thumbnails and pages, so memory holds
one page at most. Each page is one file that asks nothing of the network: its own Content Security
Policy allows data: pictures and, by hash, exactly the style and script inside it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from md3cli import __version__
from md3cli.errors import InputError, MissingExtraError
from md3cli.evaluate.section import Section
from md3cli.exporters.options import ExportOptions
from md3cli.exporters.pictures import Pictures
from md3cli.exporters.publishing import replaced_file, staged_folder
from md3cli.exporters.reading import read_records
from md3cli.finished_run import load_run_info
from md3cli.records import printable
from md3cli.report.items import Item, items
from md3cli.report.judged import score_plots, score_table, verdicts_of, with_verdicts
from md3cli.report.page import Link, Page, legible, overview_tiles, palette_of, run_facts, today
from md3cli.report.plots import run_plots
from md3cli.report.stats import RunStats
from md3cli.report.thumbnails import with_thumbnails

if TYPE_CHECKING:
    from jinja2 import Template

IMAGES_PER_PAGE = 2000  # about 40 MB of thumbnails: what a browser still opens at once


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """How to make a report. `root` and `is_confined` are as for every export (exporters/options.py)."""

    root: Path | None = None
    is_confined: bool = True
    overwrite: bool = False
    title: str | None = None
    thumbnail_px: int = 320
    images_per_page: int = IMAGES_PER_PAGE
    max_pixels: int = 2**28
    max_file_size: int = 2**30


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What was written: `page` is the file to open."""

    page: Path
    num_images: int
    num_records: int
    num_pages: int
    num_missing: int  # pictures that could not be opened
    notes: tuple[str, ...] = ()  # what of the records file was left out


def write_report(
    records: Path, output: Path, options: ReportOptions, sections: Sequence[Section] = ()
) -> ReportSummary:
    """Write the report of `records` to `output` (an .html file, or a folder for its index.html).

    More than `options.images_per_page` pictures go to pages in a folder beside the overview.
    `sections` are scores by ground truth, to be shown and drawn.

    Raises:
        InputError: no records, or a damaged one.
        UsageError: `output` exists and may not be overwritten.
        OutputError: it cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    _template()  # what is missing is said before the work
    page = output if output.suffix.lower() in (".html", ".htm") else output / "index.html"
    notes = list[str]()
    stats, num_items = _count(items(read_records(records, notes)))
    if num_items == 0:
        raise InputError(f"{printable(str(records))} holds no records; nothing to show")
    pictures = Pictures(records, _picture_options(options))
    judged = with_verdicts(items(read_records(records)), verdicts_of(sections))
    shown = with_thumbnails(judged, pictures, options.thumbnail_px)
    overview = _overview(records, stats, options, sections)
    with replaced_file(page, overwrite=options.overwrite) as file:
        if num_items <= options.images_per_page:
            parts, num_pages = replace(overview, items=list(shown)), 1
            num_missing = sum(item.missing is not None for item in parts.items)
        else:
            parts, num_missing = _write_pages(page, overview, shown, num_items, options)
            num_pages = len(parts.links)
        file.writelines(render(parts))
    return ReportSummary(page, stats.num_images, stats.num_records, num_pages, num_missing, tuple(notes))


def _picture_options(options: ReportOptions) -> ExportOptions:
    return ExportOptions(
        root=options.root,
        is_confined=options.is_confined,
        max_pixels=options.max_pixels,
        max_file_size=options.max_file_size,
    )


def _count(shown: Iterable[Item]) -> tuple[RunStats, int]:
    stats, num_items = RunStats(), 0
    for item in shown:
        stats.add(item)
        num_items += 1
    return stats, num_items


def _overview(records: Path, stats: RunStats, options: ReportOptions, sections: Sequence[Section]) -> Page:
    run = load_run_info(records)
    name = printable(records.parent.resolve().name if records.stem == "records" else records.stem)
    return Page(
        title=options.title or name,
        facts=run_facts(stats),
        palette=palette_of(stats.labels),
        run_key=_run_key(records),
        name=name,
        tiles=overview_tiles(stats, run),
        tables=[score_table(section) for section in sections],
        plots=[*(plot for section in sections for plot in score_plots(section)), *run_plots(stats, run)],
        made=today(),
    )


def _run_key(records: Path) -> str:
    """The same for the same first record: marks survive a report made again, and runs do not share them."""
    first = next(read_records(records))
    return hashlib.sha256(f"{records.name}\n{first.get('id')}".encode("utf-8", "replace")).hexdigest()[:16]


def _write_pages(
    page: Path, overview: Page, shown: Iterator[Item], num_items: int, options: ReportOptions
) -> tuple[Page, int]:
    """Pages into `STEM_pages/`; the overview that links to them, and the number of missing pictures."""
    folder, size = page.with_name(f"{page.stem}_pages"), options.images_per_page
    names = [f"page-{number:04d}.html" for number in range(1, -(-num_items // size) + 1)]
    bare, num_missing = replace(overview, tiles=(), plots=(), tables=()), 0
    with staged_folder(folder, overwrite=options.overwrite, format="html") as stage:
        for number, name in enumerate(names):
            part = list(islice(shown, size))
            num_missing += sum(item.missing is not None for item in part)
            links = [Link("overview", f"../{quote(page.name)}"), *_page_links(names, number, "")]
            title = f"{overview.title}, {number * size + 1:,} to {number * size + len(part):,} of {num_items:,}"
            with (stage.path / name).open("wb") as file:
                file.writelines(render(replace(bare, title=title, items=part, links=links)))
    return replace(overview, links=_page_links(names, None, f"{quote(folder.name)}/")), num_missing


def _page_links(names: list[str], current: int | None, prefix: str) -> list[Link]:
    return [Link(str(n + 1), None if n == current else prefix + name) for n, name in enumerate(names)]


def render(page: Page) -> Iterator[bytes]:
    """The page's HTML in pieces, UTF-8."""
    from markupsafe import Markup

    style, script = _part("report.css"), _part("report.js")
    pieces = _template().generate(
        page=page,
        policy=content_policy(style, script),
        style=Markup(style),  # our own files, not text from records
        script=Markup(script),
        data=Markup(page.data()),  # JSON with <, > and & as \u escapes
        version=__version__,
    )
    return (piece.encode("utf-8", "replace") for piece in pieces)


def content_policy(style: str, script: str) -> str:
    """The Content Security Policy that allows this style, this script and data: pictures, and nothing else."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


@cache
def _part(name: str) -> str:
    return resources.files("md3cli.report").joinpath(name).read_text(encoding="utf-8")


def _legible_text(value: object) -> object:
    """What the template prints: text from records made legible; what is markup already (ours) as it is."""
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
