"""Records in, files that other tools read out; never torch.

Each format is one module with one function, `export(records, out, options) -> ExportReport`,
imported when it is asked for. Every format can be made again from the records at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from md3cli.errors import UsageError
from md3cli.exporters.options import ExportOptions, ExportReport
from md3cli.finished.guards import check_not_input, files_of_run
from md3cli.finished.run_json import find_records

__all__ = ["FORMATS", "RUN_FOLDER_NAMES", "ExportOptions", "ExportReport", "export_records", "format_of"]

_MODULES: Mapping[str, str] = {
    "jsonl": "jsonl",
    "coco": "coco",
    "parquet": "parquet",
    "csv": "csv_flat",
    "yolo": "yolo",
    "voc": "voc",
    "labelstudio": "labelstudio",
    "hf": "hf",
    "overlay": "overlay",
    "txt": "txt",
}
FORMATS: tuple[str, ...] = tuple(_MODULES)

# What each format is called inside a run folder.
RUN_FOLDER_NAMES: Mapping[str, str] = {
    "coco": "coco.json",
    "parquet": "records.parquet",
    "csv": "records.csv",
    "yolo": "yolo",
    "voc": "voc",
    "labelstudio": "labelstudio",
    "hf": "hf",
    "overlay": "overlay",
    "txt": "txt",
}
_SUFFIXES = {".jsonl": "jsonl", ".json": "coco", ".parquet": "parquet", ".csv": "csv"}


class _Export(Protocol):
    def __call__(self, records: Path, out: Path, options: ExportOptions) -> ExportReport: ...


def format_of(out: Path) -> str | None:
    """The format that the suffix of `out` stands for, if any."""
    return _SUFFIXES.get(out.suffix.lower())


def export_records(records_path: Path, format: str, out: Path, options: ExportOptions) -> ExportReport:
    """Write the finished records of a file (or run folder) as `format` to `out`.

    Raises:
        UsageError: an unknown format, `out` exists (without `options.overwrite`), or a missing option.
        InputError: the records cannot be read.
        ExportError: the records cannot be turned into this format.
        OutputError: `out` cannot be written; what stood there is as it was.
    """
    if format not in _MODULES:
        raise UsageError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    records = find_records(records_path)
    read = [*files_of_run(records), *([options.coco_ids_from] if options.coco_ids_from is not None else [])]
    check_not_input([out, out.with_suffix(".xml")] if format == "labelstudio" else [out], read)
    export = cast(_Export, import_module(f"md3cli.exporters.{_MODULES[format]}").export)
    return export(records, out, options)
