"""`md3 export`: other formats from finished records; no model, no GPU, no torch import."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from md3cli.commands.parse import MAX_FILE_SIZE, MAX_PIXELS, Format, checked, parse_bytes, parse_count
from md3cli.console import print_document
from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions, ExportReport, export_records, format_of
from md3cli.records import printable
from md3cli.signals import StopSignals, check_stdout

app = typer.Typer(add_completion=False)

PRINTABLE = frozenset({"jsonl", "coco", "csv"})

OUTPUT, COCO, PICTURES = "Output", "COCO", "Pictures"


def _option(*names: str, panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


Records = Annotated[
    Path, typer.Argument(metavar="RECORDS", help="Finished records (.jsonl), or a run folder.", show_default=False)
]
Output = Annotated[
    Path | None,
    _option("--output", "-o", panel=OUTPUT, metavar="OUT", help="File or folder; else coco, csv, jsonl are printed."),
]
FormatName = Annotated[
    Format | None, _option("--format", "-f", panel=OUTPUT, help="What to write; by default what OUT's suffix says.")
]
Overwrite = Annotated[bool, _option("--overwrite", panel=OUTPUT, help="Replace what stands in OUT.")]
Labels = Annotated[
    list[str] | None,
    _option("--label", panel=OUTPUT, help="Order of the categories, one option each; the rest follows as first seen."),
]
Beside = Annotated[bool, _option("--beside", panel=OUTPUT, help="txt: each text beside its picture, not under OUT.")]
EmbedImages = Annotated[bool, _option("--embed-images", panel=OUTPUT, help="parquet: the pictures' bytes too.")]
UrlPrefix = Annotated[
    str | None,
    _option("--url-prefix", panel=OUTPUT, metavar="URL", help="labelstudio: what goes before a picture's name."),
]
CocoResults = Annotated[bool, _option("--coco-results", panel=COCO, help="The bare list of results, for scoring.")]
CocoIdsFrom = Annotated[
    Path | None,
    _option("--coco-ids-from", panel=COCO, metavar="GT.json", help="Use this file's image and category ids."),
]
Keypoints = Annotated[bool, _option("--keypoints", panel=COCO, help="Points as categories of one keypoint.")]
Link = Annotated[
    bool,
    _option(
        "--link",
        panel=PICTURES,
        help="yolo, hf: hard links instead of copies. A program that rewrites one changes your own picture, too.",
    ),
]
Root = Annotated[
    Path | None,
    _option("--root", panel=PICTURES, metavar="DIR", help="Where the pictures are; by default what run.json says."),
]
Background = Annotated[
    str, _option("--background", panel=PICTURES, metavar="COLOUR", help="overlay: what transparent pictures lie on.")
]
MaxPixels = Annotated[
    int,
    _option("--max-pixels", panel=PICTURES, metavar="N", parser=checked(parse_count), help="Refuse larger pictures."),
]
MaxFileSize = Annotated[
    int,
    _option(
        "--max-file-size", panel=PICTURES, metavar="SIZE", parser=checked(parse_bytes), help="Refuse larger files."
    ),
]


@app.command(epilog="Example: md3 export run/records.jsonl --format yolo -o dataset/")
def export(
    records: Records,
    format: FormatName = None,
    output: Output = None,
    overwrite: Overwrite = False,
    label: Labels = None,
    beside: Beside = False,
    embed_images: EmbedImages = False,
    url_prefix: UrlPrefix = None,
    coco_results: CocoResults = False,
    coco_ids_from: CocoIdsFrom = None,
    keypoints: Keypoints = False,
    root: Root = None,
    link: Link = False,
    background: Background = "none",
    max_pixels: MaxPixels = MAX_PIXELS,
    max_file_size: MaxFileSize = MAX_FILE_SIZE,
) -> None:
    """Other formats from finished records; no model is needed."""
    chosen = format or (None if output is None else _format_of(output))
    if chosen is None:
        raise UsageError("say what to write: --format coco, or -o with a suffix: .json .jsonl .parquet .csv .html")
    if root is not None and not root.exists():
        raise UsageError(f"--root {printable(str(root))} is not there; name the folder the pictures are in")
    options = ExportOptions(
        root=root,
        overwrite=overwrite,
        labels=tuple(label or ()),
        coco_results=coco_results,
        coco_ids_from=coco_ids_from,
        keypoints=keypoints,
        embed_images=embed_images,
        url_prefix=url_prefix,
        beside=beside,
        is_linked=link,
        background=background,
        max_pixels=max_pixels,
        max_file_size=max_file_size,
    )
    with StopSignals() as stop, stop.interruptible():  # nothing is lost: OUT appears at the end
        if chosen == "html":
            _write_page(records, output, options)
        elif output is None and not (beside and chosen == "txt"):
            _print(records, chosen, options)
        else:
            _tell(export_records(records, chosen, output or Path(), options))


def _format_of(output: Path) -> str | None:
    return "html" if output.suffix.lower() in (".html", ".htm") else format_of(output)


def _write_page(records: Path, output: Path | None, options: ExportOptions) -> None:
    from md3cli.commands.report import report

    report(records, output or Path("report.html"), root=options.root, overwrite=options.overwrite)


def _print(records: Path, format: str, options: ExportOptions) -> None:
    """Print the document, once it is complete."""
    if format not in PRINTABLE:
        raise UsageError(f"{format} cannot be printed; name a file or folder with -o")
    check_stdout()
    with tempfile.TemporaryDirectory(prefix="md3-export-") as folder:
        document = Path(folder, "document")
        report = export_records(records, format, document, options)
        print_document(document)
    for note in report.notes:
        typer.echo(f"note: {printable(note)}", err=True)


def _tell(report: ExportReport) -> None:
    images = f", {report.num_images:,} images" if report.num_images else ""
    failures = f", {report.num_failures:,} failed ones left out" if report.num_failures else ""
    where = printable(str(report.out))
    typer.echo(f"{where}: {report.format}, {report.num_records:,} records{images}{failures}", err=True)
    for note in report.notes:
        typer.echo(f"note: {printable(note)}", err=True)
