"""The records file of `md3 select`: records as they stand in their runs, in the order chosen, with a run.json beside.

run.json (`md3-selection/1`) keeps where the pictures of each run are, sealed where this user's md3 knew it, and the
names, thresholds and backgrounds of the runs, so that export, report and eval show of the file what they show of those.
`asked` has what the runs were to ask, as far as the words for tasks, labels and prompts take it: what failed or found
nothing may be left out, and `redacted` must know that it is not there; `rows_may_ask`, that a run stopped before the
rows of its manifest said all. `is_thinned` says that thresholds may have taken objects away (`--refined`). Apart from
jsonl.py, which writes records as they are shown and knows of no run.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from md3cli import __version__
from md3cli.errors import UsageError
from md3cli.exporters import ExportReport
from md3cli.exporters.coverage import ROWS_MAY_ASK, asked_by_runs, rows_may_ask
from md3cli.exporters.files import replaced_file
from md3cli.exporters.pictures import backgrounds_of, roots_of
from md3cli.files import atomic_publish
from md3cli.finished.guards import check_not_input
from md3cli.finished.run_json import SELECTION_SCHEMA, digest_of_file, read_document, run_info_paths, seal_of
from md3cli.records import RecordDict, compact_json, printable
from md3cli.refine.collection import Collection
from md3cli.refine.selection import Selection


def write_selected(
    records: Collection,
    out: Path,
    *,
    is_refined: bool = False,
    overwrite: bool = False,
    arguments: Sequence[str] = (),
    read: Sequence[Path] = (),
) -> ExportReport:
    """Write the records of a collection to `out`, and its run.json.

    Args:
        is_refined: with names and thresholds applied; else as the model gave them.
        arguments: the command line, for run.json.
        read: files that must not be written to.

    Raises:
        UsageError: `out` exists (without `overwrite`), is read by this command, or has a run's run.json beside it.
        InputError: the records cannot be read.
        OutputError: `out` cannot be written; what stood there is as it was.
    """
    run_info, *others = run_info_paths(out)
    check_not_input([out, run_info], read)
    for known in (run_info, *others):  # others: `out` is called like the journal of a document
        if known.exists() and read_document(known).get("schema") != SELECTION_SCHEMA:
            raise UsageError(f"{printable(str(known))} is that of a run, so it stays; name another -o")
    errors: Counter[str] = Counter()
    num_records = 0
    with replaced_file(out, overwrite=overwrite) as file, closing(records.open()) as shown:
        notes = tuple(shown.notes)
        for _, record in shown.placed(is_raw=not is_refined):
            file.write(compact_json(record) + b"\n")
            num_records += 1
            errors[record["error"]["type"] if record["error"] else ""] += 1
    num_ok = errors.pop("", 0)
    counts = {"ok": num_ok, "failed": errors.total(), "errors": dict(sorted(errors.items()))}
    document = _document(records, arguments) | {"counts": counts, "records": asdict(digest_of_file(out))}
    may_hide = records.refinement.has_thresholds or records.refinement.may_compare
    was_thinned = any(info.document.get("is_thinned") for info in records.infos())
    document |= {"is_thinned": was_thinned or (is_refined and may_hide)}
    with atomic_publish(run_info) as temp:
        temp.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")
    return ExportReport("jsonl", out, num_records, num_failures=errors.total(), notes=notes)


def _document(records: Collection, arguments: Sequence[str]) -> dict[str, Any]:
    roots = [
        {"root": str(root.path), "prefix": root.prefix, "seal": seal_of(str(root.path)) if root.is_trusted else None}
        for root in roots_of(records, None)
    ]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "schema": SELECTION_SCHEMA,
        "starts": [{"started": now, "ended": now, "exit_status": 0}],  # nothing is left to do: `md3 verify` asks
        "versions": {"md3cli": __version__},
        "arguments": [printable(argument) for argument in arguments],
        "sources": [printable(str(source.path)) for source in records.sources],
        "roots": roots,
        "refinement": records.refinement.to_json(),
        "backgrounds": list(backgrounds_of(records)),
        "asked": _asked(records),
        ROWS_MAY_ASK: rows_may_ask(records),
    }


def _asked(records: Collection) -> list[RecordDict]:
    """Return the requests of the runs that are of what is selected, each once."""
    words = Selection(records.selection.tasks, records.selection.labels, records.selection.prompts)
    taken = (request for request in asked_by_runs(records) if words.takes(request, records.refinement.labels))
    return list({(request["task"], request["prompt"]): request for request in taken}.values())
