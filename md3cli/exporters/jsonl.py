"""JSON Lines: the records themselves, checked, each request once, without a torn tail."""

from __future__ import annotations

from pathlib import Path

from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.files import replaced_file
from md3cli.records import compact_json
from md3cli.refine.collection import Collection, read


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write every record, failures included."""
    num_records, notes = 0, list[str]()
    with replaced_file(out, overwrite=options.overwrite) as file:
        for record in read(records, notes):
            file.write(compact_json(record) + b"\n")
            num_records += 1
    return ExportReport("jsonl", out, num_records, notes=tuple(notes))
