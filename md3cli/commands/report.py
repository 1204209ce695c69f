"""`md3 report`: a page from finished records; no model, no GPU, no torch import."""

from __future__ import annotations

import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from md3cli.commands.help import App
from md3cli.commands.reading import ReadOptions, Records
from md3cli.commands.shared import spread, tell_notes
from md3cli.commands.writing import check_root
from md3cli.console.progress import told_progress
from md3cli.errors import UsageError
from md3cli.finished.guards import check_not_input
from md3cli.records import printable
from md3cli.refine.collection import Collection

if TYPE_CHECKING:
    from md3cli.evaluate import Section
    from md3cli.report.build import ReportOptions, ReportSummary

app = App()

PAGE_SUFFIXES = (".html", ".htm")


@app.command(shows=["--gt"])
@spread(ReadOptions)
def report(
    records: Records = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The page (.html), or a folder for it.")
    ] = Path("report.html"),
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the pictures are; by default what run.json says.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TITLE", help="The page's title; by default the run's name.")
    ] = None,
    thumbnail_size: Annotated[
        int, typer.Option(metavar="N", min=32, max=2048, help="Long side of a thumbnail in pixels.")
    ] = 320,
    images_per_page: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Pictures shown at a time; those of over 2,000 lie in a folder beside the page."
        ),
    ] = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    *,
    options: ReadOptions,
) -> None:
    """A page to look through: thumbnails with boxes, points and masks, filters, counts, marks right and wrong.

    Examples:
        md3 report run/ -o report.html
        md3 report run/ --gt instances.json -o report.html
        md3 report run/ other/ --sort least-sure --limit 50 -o doubtful.html
    """
    from md3cli.report.build import ReportOptions

    if output.suffix and output.suffix.lower() not in PAGE_SUFFIXES:
        raise UsageError(f"{printable(str(output))} is no name for a page; end it in .html, or name a folder")
    check_root(root)
    choices = ReportOptions(
        root=root, overwrite=overwrite, title=title, thumbnail_px=thumbnail_size, images_per_page=images_per_page
    )
    page = write_page(options.collection(records or (), uses_gt=True), output, choices, options)
    if open_page and not webbrowser.open(page.resolve().as_uri()):
        tell_notes([f"no browser could be started; open {page} yourself"])


def write_page(records: Collection, output: Path, choices: ReportOptions, options: ReadOptions) -> Path:
    """Write the page of `records`, with scores where a ground truth is given; tell where it is, and return it."""
    from md3cli.report.build import write_report

    page = output if output.suffix else output / "index.html"
    check_not_input([page], options.files_read(records))
    sections: tuple[Section, ...] = ()
    if options.gt:
        from md3cli.evaluate import evaluate, load_truth

        sections = evaluate(records, [load_truth(path) for path in options.gt]).sections
    with told_progress("report") as told:
        made = write_report(replace(records, told=told), output, choices, sections)
    tell_page(made, f"{made.num_records:,} records")
    return made.page


def tell_page(made: ReportSummary, what: str) -> None:
    """Tell where a page is, what it shows, and which pictures it lacks."""
    beside = f" (keep {printable(made.folder.name)} beside it)" if made.folder else ""
    typer.echo(f"{printable(str(made.page))}{beside}: {made.num_images:,} images, {what}", err=True)
    unopened = f"{made.num_missing:,} {'picture' if made.num_missing == 1 else 'pictures'} cannot be opened"
    tell_notes([*made.notes, *([f"{unopened}; is --root right?"] if made.num_missing else [])])
