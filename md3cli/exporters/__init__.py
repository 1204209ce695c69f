"""Finished records in, files that other tools read out; never torch.

Each format is one module with one function, `export(records, out, options) -> ExportReport`, which is imported when
the format is asked for. Every format can be made again from the records at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

from md3cli.errors import UsageError
from md3cli.exporters.splits import Splits
from md3cli.finished.guards import check_not_input, files_of_run
from md3cli.refine.collection import Collection, as_collection

FORMATS = (
    "jsonl", "coco", "parquet", "csv", "yolo", "voc", "labelstudio", "labelme", "cvat", "hf", "overlay", "crops",
    "redacted", "txt",
)  # fmt: skip
_MODULES = {"csv": "csv_flat"}  # the others are in the modules of their own names

# What each format is called inside a run folder.
RUN_FOLDER_NAMES: Mapping[str, str] = {
    "coco": "coco.json",
    "parquet": "records.parquet",
    "csv": "records.csv",
    "yolo": "yolo",
    "voc": "voc",
    "labelstudio": "labelstudio",
    "labelme": "labelme",
    "cvat": "cvat",
    "hf": "hf",
    "overlay": "overlay",
    "crops": "crops",
    "redacted": "redacted",
    "txt": "txt",
}
Existing = Literal["refuse", "skip", "append", "prepend", "replace"]
Redaction = Literal["box", "blur", "pixelate"]
_SUFFIXES = {".jsonl": "jsonl", ".json": "coco", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Choices of one export; a format takes what concerns it and ignores the rest.

    Attributes:
        root: the folder (or tar) that the pictures' names are relative to; None: run.json beside the records says it.
        is_confined: no picture outside `root` is opened, whatever the records say; to be switched off only for
            records that this very process made.
        url_prefix: what goes before a picture's name in Label Studio tasks.
        beside: files about a picture stand next to it; `existing`: what becomes of one that is there.
        is_linked: pictures in data sets are hard links, not copies.
        background: a colour that transparent pictures are laid on where they are drawn anew, `none` drops alpha;
            None: as the run did.
        splits: the sets that pictures are parted into; None: one set.
        is_flat: names of `[A-Za-z0-9._-]` in one folder, unique without suffix and case.
        is_roboflow: `coco` is a folder of pictures with `_annotations.coco.json` beside them.
        has_bom: `csv` begins with a byte order mark.
        keeps_lines, prefix, suffix, join, extension: the texts of `txt`, and how their files are called.
        redaction: how `redacted` covers a box.
        pad: room around a box in `crops` and `redacted`, as a share of its width and height; None: the format's own.
        hides_unsure: the user typed a least score in this very command, so that `redacted` may leave objects bare.
        has_typed_labels: the user named a labels file in this very command, so that `redacted` covers all its labels.
        is_run_done: the run of the records is over, though run.json does not say so yet.
        max_pixels, max_file_size: what is refused unread, as everywhere.
        told: called with how many pictures are done, of how many; with how many records are read, of None.
        early: the folder of overlays that were drawn while the run went on (`early.EarlyDrawings`).
    """

    root: Path | None = None
    overwrite: bool = False
    coco_results: bool = False
    coco_ids_from: Path | None = None
    keypoints: bool = False
    embed_images: bool = False
    url_prefix: str | None = None
    beside: bool = False
    is_linked: bool = False
    background: str | None = None
    is_confined: bool = True
    max_pixels: int = 2**28
    max_file_size: int = 2**30
    told: Callable[[int, int | None], object] = lambda done, total: None
    early: Path | None = None
    existing: Existing = "refuse"
    splits: Splits | None = None
    is_flat: bool = False
    is_roboflow: bool = False
    has_bom: bool = False
    keeps_lines: bool = False
    prefix: str = ""
    suffix: str = ""
    join: str = ", "
    extension: str = ".txt"
    redaction: Redaction = "box"
    pad: float | None = None
    hides_unsure: bool = False
    is_run_done: bool = False
    has_typed_labels: bool = False


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote. `num_images` is 0 for formats that know records only.

    `num_failures` counts the failed records that were left out; `notes` tell the user what else is not in the output.
    """

    format: str
    out: Path
    num_records: int
    num_images: int = 0
    num_failures: int = 0
    notes: tuple[str, ...] = ()


def format_of(out: Path) -> str | None:
    """Return the format that the suffix of `out` stands for, if any."""
    return _SUFFIXES.get(out.suffix.lower())


def export_records(records: Path | Collection, format: str, out: Path, options: ExportOptions) -> ExportReport:
    """Write finished records, of a file or run folder or as a collection says, as `format` to `out`.

    Raises:
        UsageError: an unknown format, `out` exists (without `options.overwrite`), or a missing option.
        InputError: the records cannot be read.
        ExportError: the records cannot be turned into this format.
        OutputError: `out` cannot be written; what stood there is as it was.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    records = replace(as_collection(records), told=options.told)
    files = [file for source in records.sources for file in files_of_run(source.path)]
    read = [*files, *([options.coco_ids_from] if options.coco_ids_from is not None else [])]
    check_not_input([out, out.with_suffix(".xml")] if format == "labelstudio" else [out], read)
    module = import_module(f"md3cli.exporters.{_MODULES.get(format, format)}")
    report: ExportReport = module.export(records, out, options)
    return report
