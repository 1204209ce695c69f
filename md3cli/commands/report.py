"""`md3 report`: a page to look through, from finished records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from md3cli.errors import UsageError

app = typer.Typer()


@app.command(epilog="Example: md3 report run/records.jsonl -o report.html")
def report(
    records: Annotated[Path, typer.Argument(help="The records (.jsonl) or the folder of a run.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page (.html), or a folder for it.")] = Path(
        "report.html"
    ),
    root: Annotated[
        Path | None, typer.Option(help="Where the pictures are; nothing outside is opened.  [default: run.json's]")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.  [default: the run's name]")] = None,
    thumbnail_size: Annotated[int, typer.Option(min=32, max=2048, help="Long side of a thumbnail in pixels.")] = 320,
    images_per_page: Annotated[
        int, typer.Option(min=1, help="More pictures than this go to pages in a folder beside the overview.")
    ] = 2000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
) -> None:
    """A page to look through: thumbnails with boxes, points and masks, filters, counts, marks right and wrong."""
    from md3cli.finished_run import find_records, load_run_info
    from md3cli.report.build import ReportOptions, write_report
    from md3cli.report.thumbnails import PictureSource

    if output.suffix and output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{output} is no name for a page; end it in .html, or name a folder")
    found = find_records(records)
    folder = root or load_run_info(found).root or Path()
    pictures = PictureSource(folder, is_confined=root is not None, long_side_px=thumbnail_size)
    options = ReportOptions(pictures, title, images_per_page, may_overwrite=overwrite)
    summary = write_report(found, output, options)
    pages = f" and {summary.num_pages} pages beside it" if summary.num_pages > 1 else ""
    typer.echo(f"{summary.page}{pages}: {summary.num_images:,} images, {summary.num_records:,} records", err=True)
    if summary.num_missing:
        typer.echo(f"{summary.num_missing:,} pictures could not be opened under {folder}; is --root right?", err=True)
