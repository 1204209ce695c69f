"""`md3 export`: other formats from finished records; no model, no GPU, no torch import."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from md3cli.commands.help import App
from md3cli.commands.parse import FORMATS, Format
from md3cli.commands.reading import ReadOptions, Records
from md3cli.commands.report import PAGE_SUFFIXES, write_page
from md3cli.commands.shared import spread, tell_notes
from md3cli.commands.writing import WriteOptions
from md3cli.console import print_document
from md3cli.console.progress import told_progress
from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions, ExportReport, export_records, format_of
from md3cli.finished.guards import check_none_is_read, check_not_of_run
from md3cli.records import printable
from md3cli.refine.collection import Collection
from md3cli.signals import StopSignals, check_stdout

app = App()

PRINTABLE = frozenset({"jsonl", "coco", "csv"})

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        rich_help_panel="Output",
        metavar="OUT",
        help="File or folder; else coco, csv, jsonl are printed.",
    ),
]
FormatName = Annotated[
    Format | None,
    typer.Option(
        "--format",
        "-f",
        rich_help_panel="Output",
        metavar="FORMAT",
        help=f"{' '.join(FORMATS)}; else what OUT's suffix says.",
    ),
]


@app.command()
@spread(WriteOptions, ReadOptions)
def export(
    records: Records = None,
    format: FormatName = None,
    output: Output = None,
    *,
    write: WriteOptions,
    options: ReadOptions,
) -> None:
    """Other formats from finished records; no model is needed.

    Examples:
        md3 export run/ -o boxes.json
        md3 export run/ --format yolo --split train=0.8,val=0.2 -o dataset/
        md3 export run/ --format csv --min-score 0.4 > boxes.csv
    """
    collection = options.collection(records or ())
    is_page = output is not None and output.suffix.lower() in PAGE_SUFFIXES
    chosen = format or ("html" if is_page else None if output is None else format_of(output))
    if chosen is None:
        raise UsageError("say what to write: --format coco, or -o with a suffix: .json .jsonl .parquet .csv .html")
    choices = write.for_format(chosen, typed_reading=options.typed)
    is_printed = output is None and not write.beside and chosen in PRINTABLE
    tell_notes(write.unused(chosen, typed_reading=options.typed, is_printed=is_printed))
    if output is not None:
        check_none_is_read([output], options.files_read(collection))
        check_not_of_run(output)
    with StopSignals() as stop, stop.interruptible():  # nothing is lost: OUT appears at the end
        if chosen == "html":
            from md3cli.report.build import ReportOptions

            report_options = ReportOptions(
                root=write.root,
                overwrite=write.overwrite,
                max_pixels=write.max_pixels,
                max_file_size=write.max_file_size,
            )
            write_page(collection, output or Path("report.html"), report_options, options)
        elif output is None and not write.beside:
            _print(collection, chosen, choices)
        else:
            with told_progress(chosen) as told:
                done = export_records(collection, chosen, output or Path(), replace(choices, told=told))
            _tell(done)
            if write.beside and output is not None and output.resolve() != done.out.resolve():
                tell_notes([f"the files are beside the pictures, as --beside says; nothing is in {output}"])


def _print(records: Collection, format: str, options: ExportOptions) -> None:
    """Print the document, once it is complete."""
    is_folder = options.splits is not None or options.is_roboflow
    if format not in PRINTABLE or is_folder:
        what = f"{format} with --split or --roboflow" if is_folder else format
        raise UsageError(f"{what} cannot be printed; name a {'folder' if is_folder else 'file or folder'} with -o")
    check_stdout()
    with tempfile.TemporaryDirectory(prefix="md3-export-") as folder:
        document = Path(folder, "document")
        with told_progress(format) as told:
            done = export_records(records, format, document, replace(options, told=told))
        print_document(document)
    tell_notes(done.notes)


def _tell(done: ExportReport) -> None:
    images = f", {done.num_images:,} images" if done.num_images else ""
    failures = f", {done.num_failures:,} failed ones left out" if done.num_failures else ""
    typer.echo(f"{printable(str(done.out))}: {done.format}, {done.num_records:,} records{images}{failures}", err=True)
    tell_notes(done.notes)
