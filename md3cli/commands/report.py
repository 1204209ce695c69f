"""`md3 report`: a page to look through, from finished records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from md3cli.errors import UsageError
from md3cli.finished.guards import check_not_input, files_of_run
from md3cli.records import printable

if TYPE_CHECKING:
    from md3cli.evaluate import Section
    from md3cli.report.build import ReportSummary

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: md3 report run/records.jsonl -o report.html")
def report(
    records: Annotated[Path, typer.Argument(help="Finished records (.jsonl), or a run folder.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page (.html), or a folder for it.")] = Path(
        "report.html"
    ),
    gt: Annotated[
        list[Path] | None, typer.Option(help="Ground truth as for md3 eval: show scores, what is wrong and missed.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the pictures are.  [default: what run.json says]")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.  [default: the run's name]")] = None,
    thumbnail_size: Annotated[int, typer.Option(min=32, max=2048, help="Long side of a thumbnail in pixels.")] = 320,
    images_per_page: Annotated[
        int, typer.Option(min=1, help="More pictures than this go to pages in a folder beside the overview.")
    ] = 2000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
) -> None:
    """A page to look through: thumbnails with boxes, points and masks, filters, counts, marks right and wrong."""
    from md3cli.finished.run_json import find_records
    from md3cli.report.build import ReportOptions, write_report

    if output.suffix and output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{printable(str(output))} is no name for a page; end it in .html, or name a folder")
    if root is not None and not root.exists():
        raise UsageError(f"--root {printable(str(root))} is not there; name the folder the pictures are in")
    found = find_records(records)
    page = output if output.suffix else output / "index.html"
    check_not_input([page], [*files_of_run(found), *(gt or ())])
    sections: tuple[Section, ...] = ()
    if gt:
        from md3cli.evaluate import evaluate, load_truth

        sections = evaluate(found, [load_truth(path) for path in gt]).sections
    options = ReportOptions(
        root=root, overwrite=overwrite, title=title, thumbnail_px=thumbnail_size, images_per_page=images_per_page
    )
    _tell(write_report(found, output, options, sections))


def _tell(summary: ReportSummary) -> None:
    pages = f" and {summary.num_pages} pages beside it" if summary.num_pages > 1 else ""
    where = printable(str(summary.page))
    typer.echo(f"{where}{pages}: {summary.num_images:,} images, {summary.num_records:,} records", err=True)
    for note in summary.notes:
        typer.echo(f"note: {printable(note)}", err=True)
    if summary.num_missing:
        pictures = "picture" if summary.num_missing == 1 else "pictures"
        typer.echo(f"note: {summary.num_missing:,} {pictures} cannot be opened; is --root right?", err=True)
