"""`md3 select` and `md3 stats`: some of the records, or several runs as one; and what records hold, in numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from md3cli.commands.help import App
from md3cli.commands.reading import ReadOptions, Records
from md3cli.commands.shared import OVERWRITES_NOTHING, spread, tell_notes
from md3cli.console import print_bytes, say
from md3cli.console.progress import clock
from md3cli.errors import UsageError
from md3cli.finished.run_json import RunInfo, counts_of
from md3cli.records import compact_json, printable
from md3cli.refine.collection import Collection, read
from md3cli.refine.labels import shown_text
from md3cli.refine.stats import RecordStats
from md3cli.remote.address import shown_argument
from md3cli.signals import StopSignals, check_stdout

app = App()
_MOST_SHOWN = 100  # of labels in a line of text


@app.command(shows=["Selection"])
@spread(ReadOptions)
def select(
    records: Records = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.jsonl", help="File to write; else they are printed.")
    ] = None,
    refined: Annotated[
        bool, typer.Option("--refined", help="Write what is shown: names and thresholds applied.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    *,
    options: ReadOptions,
) -> None:
    """Some of the records, or the records of several runs as one.

    Examples:
        md3 select run/ --sort least-sure --limit 50 -o doubtful.jsonl
        md3 select day/ night/ --label car --score-to 0.5 -o cars.jsonl
        md3 select --as day=run1/ --as night=run2/ -o both.jsonl
    """
    from md3cli.exporters.selected import write_selected

    if output is not None and output.suffix.lower() != ".jsonl":
        raise UsageError(f"{printable(str(output))}: records are JSON Lines; end it in .jsonl, or use md3 export")
    if output is None and "overwrite" in options.typed:
        tell_notes([OVERWRITES_NOTHING])
    collection = options.collection(records or ())
    with StopSignals() as stop, stop.interruptible():
        if output is None:
            _print(collection, is_refined=refined)
            return
        arguments = ("md3", *map(shown_argument, sys.argv[1:]))
        written = write_selected(
            collection,
            output,
            is_refined=refined,
            overwrite=overwrite,
            arguments=arguments,
            read=options.files_read(collection),
        )
        say(f"{printable(str(output))}: {written.num_records:,} records", err=True)
        for note in written.notes:
            say(f"note: {printable(note)}", err=True)


def _print(records: Collection, *, is_refined: bool) -> None:
    check_stdout()
    with closing(records.open()) as shown:
        for _, record in shown.placed(is_raw=not is_refined):
            print_bytes(compact_json(record) + b"\n")
        for note in shown.notes:
            say(f"note: {printable(note)}", err=True)


@app.command(shows=["Selection"])
@spread(ReadOptions)
def stats(
    records: Records = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines of text.")] = False,
    *,
    options: ReadOptions,
) -> None:
    """Counts, scores, failures, tokens and rates of any run.

    Examples:
        md3 stats run/
        md3 stats run/ --task detect --min-score 0.5
        md3 stats day/ night/ --json
    """
    check_stdout()
    collection, notes = options.collection(records or ()), list[str]()
    counted = RecordStats(collection.refinement.labels)
    for record in read(collection, notes):
        counted.add(record)
    say(json.dumps(counted.to_json(), ensure_ascii=False) if as_json else "\n".join(_lines(counted, collection)))
    for note in notes:
        say(f"note: {printable(note)}", err=True)


def _lines(counted: RecordStats, records: Collection) -> Iterator[str]:
    found = counted.to_json()
    failed = f", {found['failed']:,} failed ({_listed(found['errors'])})" if found["failed"] else ""
    yield f"records   {found['records']:,}: {found['ok']:,} ok{failed}"
    yield f"tasks     {_listed(found['tasks']) or 'none'}"
    if "regions" in found:
        yield f"regions   {found['regions']:,} of the records are about parts of pictures"
    if found["labels"]:
        most_first = dict(sorted(found["labels"].items(), key=lambda item: -item[1]))
        yield f"objects   {sum(found['labels'].values()):,}: {_listed(most_first)}"
    if found["scores"]["median"] is not None:
        scores = found["scores"]
        yield f"scores    {scores['min']:.3f} to {scores['max']:.3f}, median {scores['median']:.3f}"
    if any(found["quality"].values()):
        yield f"texts     {_listed({name: n for name, n in found['quality'].items() if n})}"
    yield f"tokens    {found['tokens']['prompt']:,} prompt, {found['tokens']['output']:,} output"
    if records.selection.takes_all:
        for source, info in zip(records.sources, records.infos(), strict=True):
            rate = _rate(info)
            where = f" ({printable(str(source.path))})" if len(records.sources) > 1 else ""
            yield from [f"rate      {rate}{where}"] if rate else []


def _rate(info: RunInfo) -> str:
    """Return how fast a run was, all starts together; empty where its run.json does not say."""
    counts = counts_of(info.document)
    if counts is None or not info.elapsed_s:
        return ""
    done = counts["ok"] + counts["failed"]
    return f"{done / info.elapsed_s:.1f} records/s over {clock(info.elapsed_s)} of all starts"


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{shown_text(name)} {count:,}" for name, count in islice(counts.items(), _MOST_SHOWN)]
    more = len(counts) - len(shown)
    return ", ".join([*shown, *([f"and {more:,} more (--json has all)"] if more else [])])
