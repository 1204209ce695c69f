"""`md3 export` and `md3 report`: other formats and a page from finished records; no model, no GPU, no torch import."""

from __future__ import annotations

import tempfile
import webbrowser
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from md3cli.commands.help import App
from md3cli.commands.parse import FORMATS, MAX_FILE_SIZE, MAX_PIXELS, Format, checked, parse_bytes, parse_count
from md3cli.commands.reading import ReadOptions, Records
from md3cli.commands.shared import spread
from md3cli.console import print_document
from md3cli.console.progress import told_progress
from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions, ExportReport, export_records, format_of
from md3cli.finished.guards import check_none_is_read, check_not_input, check_not_of_run
from md3cli.records import printable
from md3cli.refine.collection import Collection
from md3cli.signals import StopSignals, check_stdout

if TYPE_CHECKING:
    from md3cli.evaluate import Section
    from md3cli.report.build import ReportOptions

app = App()

PAGE_SUFFIXES = (".html", ".htm")
PRINTABLE = frozenset({"jsonl", "coco", "csv"})

OUTPUT, COCO, PICTURES = "Output", "COCO", "Pictures"


def _option(*names: str, panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


Output = Annotated[
    Path | None,
    _option("--output", "-o", panel=OUTPUT, metavar="OUT", help="File or folder; else coco, csv, jsonl are printed."),
]
FormatName = Annotated[
    Format | None,
    _option(
        "--format",
        "-f",
        panel=OUTPUT,
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}; by default what OUT's suffix says.",
    ),
]
Overwrite = Annotated[bool, _option("--overwrite", panel=OUTPUT, help="Replace what stands in OUT.")]
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
    _option(
        "--max-pixels",
        panel=PICTURES,
        metavar="N",
        parser=checked(parse_count),
        help="Refuse larger pictures.",
        show_default="268M",
    ),
]
MaxFileSize = Annotated[
    int,
    _option(
        "--max-file-size", panel=PICTURES, metavar="SIZE", parser=checked(parse_bytes), help="Refuse larger files."
    ),
]


@app.command()
@spread(ReadOptions)
def export(
    records: Records = None,
    format: FormatName = None,
    output: Output = None,
    overwrite: Overwrite = False,
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
    *,
    options: ReadOptions,
) -> None:
    """Other formats from finished records; no model is needed.

    Examples:
        md3 export run/ -o boxes.json
        md3 export run/records.jsonl --format yolo -o dataset/
        md3 export run/ --format csv --min-score 0.4 > boxes.csv
    """
    collection = options.collection(records or ())
    is_page = output is not None and output.suffix.lower() in PAGE_SUFFIXES
    chosen = format or ("html" if is_page else None if output is None else format_of(output))
    if chosen is None:
        raise UsageError("say what to write: --format coco, or -o with a suffix: .json .jsonl .parquet .csv .html")
    _check_root(root)
    choices = ExportOptions(
        root=root,
        overwrite=overwrite,
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
    if output is not None:
        check_none_is_read([output], options.files_read(collection))
        check_not_of_run(output)
    with StopSignals() as stop, stop.interruptible():  # nothing is lost: OUT appears at the end
        if chosen == "html":
            from md3cli.report.build import ReportOptions

            report_options = ReportOptions(root=root, overwrite=overwrite)
            _write_report(collection, output or Path("report.html"), report_options, options)
        elif output is None and not (beside and chosen == "txt"):
            _print(collection, chosen, choices)
        else:
            with told_progress(chosen) as told:
                done = export_records(collection, chosen, output or Path(), replace(choices, told=told))
            _tell(done)


def _print(records: Collection, format: str, options: ExportOptions) -> None:
    """Print the document, once it is complete."""
    if format not in PRINTABLE:
        raise UsageError(f"{format} cannot be printed; name a file or folder with -o")
    check_stdout()
    with tempfile.TemporaryDirectory(prefix="md3-export-") as folder:
        document = Path(folder, "document")
        with told_progress(format) as told:
            done = export_records(records, format, document, replace(options, told=told))
        print_document(document)
    _note(done.notes)


def _tell(done: ExportReport) -> None:
    images = f", {done.num_images:,} images" if done.num_images else ""
    failures = f", {done.num_failures:,} failed ones left out" if done.num_failures else ""
    typer.echo(f"{printable(str(done.out))}: {done.format}, {done.num_records:,} records{images}{failures}", err=True)
    _note(done.notes)


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        typer.echo(f"note: {printable(note)}", err=True)


def _check_root(root: Path | None) -> None:
    if root is not None and not root.exists():
        raise UsageError(f"--root {printable(str(root))} is not there; name the folder the pictures are in")


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
    _check_root(root)
    choices = ReportOptions(
        root=root, overwrite=overwrite, title=title, thumbnail_px=thumbnail_size, images_per_page=images_per_page
    )
    page = _write_report(options.collection(records or (), uses_gt=True), output, choices, options)
    if open_page and not webbrowser.open(page.resolve().as_uri()):
        _note([f"no browser could be started; open {page} yourself"])


def _write_report(records: Collection, output: Path, choices: ReportOptions, options: ReadOptions) -> Path:
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
    beside = f" (keep {printable(made.folder.name)} beside it)" if made.folder else ""
    where = printable(str(made.page))
    typer.echo(f"{where}{beside}: {made.num_images:,} images, {made.num_records:,} records", err=True)
    unopened = f"{made.num_missing:,} {'picture' if made.num_missing == 1 else 'pictures'} cannot be opened"
    _note([*made.notes, *([f"{unopened}; is --root right?"] if made.num_missing else [])])
    return made.page
