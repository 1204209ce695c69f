"""Records on disk -> the report on disk: one page, or an overview with pages beside it.

Two passes over the records: the first counts, the second makes thumbnails and pages, so memory holds
one page at most. Each page is one file that asks nothing of the network: its own Content Security
Policy allows data: pictures and, by hash, exactly the style and script inside it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from md3cli import __version__
from md3cli.errors import InputError, MissingExtraError, OutputError
from md3cli.finished_run import load_run_info, read_records
from md3cli.publish import atomic_publish, output_error
from md3cli.records import printable
from md3cli.report.items import Item, items
from md3cli.report.page import Link, Page, overview_tiles, palette_of, run_facts, today
from md3cli.report.plots import run_plots
from md3cli.report.stats import RunStats
from md3cli.report.thumbnails import PictureSource, with_thumbnails

if TYPE_CHECKING:
    from jinja2 import Template

IMAGES_PER_PAGE = 2000  # about 40 MB of thumbnails: what a browser still opens at once


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """How to make a report; `pictures.root` is where the records' images are."""

    pictures: PictureSource
    title: str | None = None
    images_per_page: int = IMAGES_PER_PAGE
    may_overwrite: bool = False


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What was written: `page` is the file to open."""

    page: Path
    num_images: int
    num_records: int
    num_pages: int
    num_missing: int  # pictures that could not be opened


def write_report(records: Path, output: Path, options: ReportOptions) -> ReportSummary:
    """Write the report of `records` to `output` (an .html file, or a folder for its index.html).

    More than `options.images_per_page` pictures go to pages in a folder beside the overview.

    Raises:
        InputError: no records, or a damaged one.
        OutputError: `output` exists and may not be overwritten, or cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    page = output if output.suffix.lower() in (".html", ".htm") else output / "index.html"
    if page.exists() and not options.may_overwrite:
        raise OutputError(f"{printable(str(page))} exists; add --overwrite to replace it")
    stats, num_items = _count(items(read_records(records)))
    if num_items == 0:
        raise InputError(f"{printable(str(records))} holds no records; nothing to show")
    overview = _overview(records, stats, options)
    pictured = with_thumbnails(items(read_records(records)), options.pictures)
    try:
        if num_items <= options.images_per_page:
            shown = list(pictured)
            _write(page, replace(overview, items=shown))
            num_pages, num_missing = 1, sum(item.missing is not None for item in shown)
        else:
            num_pages, num_missing = _write_pages(page, overview, pictured, num_items, options.images_per_page)
    except OSError as error:
        raise output_error(page, error) from error
    return ReportSummary(page, stats.num_images, stats.num_records, num_pages, num_missing)


def _count(shown: Iterable[Item]) -> tuple[RunStats, int]:
    stats, num_items = RunStats(), 0
    for item in shown:
        stats.add(item)
        num_items += 1
    return stats, num_items


def _overview(records: Path, stats: RunStats, options: ReportOptions) -> Page:
    run = load_run_info(records)
    name = records.parent.resolve().name if records.stem == "records" else records.stem
    return Page(
        title=options.title or printable(name),
        facts=run_facts(stats),
        palette=palette_of(stats.labels),
        run_key=_run_key(records),
        name=printable(name),
        tiles=overview_tiles(stats, run),
        plots=run_plots(stats, run),
        made=today(),
    )


def _run_key(records: Path) -> str:
    """The same for the same first record: marks survive a report made again, and runs do not share them."""
    first = next(read_records(records))
    return hashlib.sha256(f"{records.name}\n{first.get('id')}".encode("utf-8", "replace")).hexdigest()[:16]


def _write_pages(page: Path, overview: Page, shown: Iterator[Item], num_items: int, size: int) -> tuple[int, int]:
    """Pages into `STEM_pages/`, the overview last: what it links to is there. (pages, missing pictures)"""
    folder = page.with_name(f"{page.stem}_pages")
    num_pages, num_missing = -(-num_items // size), 0
    names = [f"page-{number:04d}.html" for number in range(1, num_pages + 1)]
    for number, name in enumerate(names):
        part = list(islice(shown, size))
        num_missing += sum(item.missing is not None for item in part)
        links = [Link("overview", f"../{page.name}"), *_page_links(names, number, "")]
        bare = replace(overview, tiles=(), plots=(), tables=())
        title = f"{overview.title}, {number * size + 1:,} to {number * size + len(part):,} of {num_items:,}"
        _write(folder / name, replace(bare, title=title, items=part, links=links))
    _write(page, replace(overview, links=_page_links(names, None, f"{folder.name}/")))
    return num_pages, num_missing


def _page_links(names: list[str], current: int | None, prefix: str) -> list[Link]:
    return [Link(str(n + 1), None if n == current else prefix + name) for n, name in enumerate(names)]


def _write(path: Path, page: Page) -> None:
    """The page appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_publish(path) as partial,
        open(partial, "w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):
        file.writelines(render(page))


def render(page: Page) -> Iterator[str]:
    """The page's HTML in pieces."""
    from markupsafe import Markup

    style, script = _part("report.css"), _part("report.js")
    return _template().generate(
        page=page,
        policy=content_policy(style, script),
        style=Markup(style),  # our own files, not text from records
        script=Markup(script),
        data=Markup(page.data()),  # JSON with <, > and & as \u escapes
        version=__version__,
    )


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


@cache
def _template() -> Template:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("the HTML report", "report") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("template.html.j2")
