"""`md3 audit`: what finished records say against somebody's labels, the surest finding first."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from md3cli.commands.help import App
from md3cli.commands.reading import ReadOptions, Records
from md3cli.commands.report import PAGE_SUFFIXES
from md3cli.commands.shared import OVERWRITES_NOTHING, spread, tell_notes
from md3cli.commands.writing import check_root
from md3cli.console import print_bytes, print_table, say
from md3cli.console.progress import told_progress
from md3cli.errors import UsageError
from md3cli.finished.guards import check_not_input
from md3cli.records import compact_json, printable
from md3cli.refine.collection import Collection, read
from md3cli.signals import StopSignals, check_stdout

if TYPE_CHECKING:
    from md3cli.evaluate.audit import Finding

app = App()
MOST_ROWS = 100  # of the table


@app.command(shows=["--gt"])
@spread(ReadOptions)
def audit(
    records: Records = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Findings (.jsonl), or a page to look through (.html)."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For the page: where the pictures are; else what run.json says.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    *,
    options: ReadOptions,
) -> None:
    """What is missing, doubtful, moved or misnamed in labels that are there, the surest finding first.

    The labels are COCO, a YOLO data.yaml or a labelme folder; the records are of detect or segment.

    Examples:
        md3 audit run/ --gt instances.json
        md3 audit run/ --gt dataset/data.yaml -o findings.jsonl
        md3 audit run/ --gt instances.json --label car --min-score 0.5 -o audit.html
    """
    suffix = None if output is None else output.suffix.lower()
    if suffix not in (None, ".jsonl", *PAGE_SUFFIXES):
        raise UsageError(f"{printable(str(output))}: findings are .jsonl, or a page that ends in .html")
    if not options.gt:
        raise UsageError("no labels to look at; give --gt FILE: COCO, a YOLO data.yaml or a labelme folder")
    check_root(root)
    if output is None:
        check_stdout()
        tell_notes([OVERWRITES_NOTHING] if overwrite else [])
    if root is not None and suffix not in PAGE_SUFFIXES:
        tell_notes(["--root changes nothing: only the page shows pictures"])
    collection = options.collection(records or (), uses_gt=True)
    if output is not None:
        check_not_input([output], options.files_read(collection))
    with StopSignals() as stop, stop.interruptible():
        findings = _findings(collection, options.gt)
        if output is None:
            _print(findings)
        elif suffix in PAGE_SUFFIXES:
            _write_page(findings, collection, output, root, overwrite=overwrite)
        else:
            _write_lines(findings, output, overwrite=overwrite)


def _findings(collection: Collection, paths: Sequence[Path]) -> list[Finding]:
    """Return what the records speak against in all of the labels; tell how much was looked at, and what was not."""
    from md3cli.evaluate import load_truth
    from md3cli.evaluate.audit import KINDS, audit
    from md3cli.evaluate.located import final_records
    from md3cli.evaluate.truth import Instances

    notes, findings, num_annotations, num_images = list[str](), list["Finding"](), 0, 0
    with told_progress("audit") as told:
        taken = final_records(read(replace(collection, told=told, is_numbered=True), notes))
    for path in paths if taken else ():
        truth = load_truth(path)
        if not isinstance(truth, Instances):
            raise UsageError(
                f"--gt {printable(str(path))} has no boxes; md3 audit is about boxes, md3 eval scores texts"
            )
        found = audit(taken, truth, collection.refinement.labels)
        findings += found.findings
        notes += found.notes
        num_annotations, num_images = num_annotations + found.num_annotations, num_images + found.num_images
    if not taken:
        notes.append("nothing is selected, so nothing is found")
    kinds = Counter(finding.kind for finding in findings)
    counts = ", ".join(f"{kinds[kind]:,} {kind}" for kind in KINDS if kinds[kind]) or "none"
    what = "1 image" if num_images == 1 else f"{num_images:,} images"
    say(f"labels in {what}: {num_annotations:,}; findings: {counts}", err=True)
    tell_notes(notes)
    return sorted(findings, key=lambda finding: -finding.score)


def _print(findings: Sequence[Finding]) -> None:
    if not sys.stdout.isatty():
        for finding in findings:
            print_bytes(compact_json(finding.to_json()) + b"\n")
        return
    rows = [
        (one.kind, printable(one.image), printable(_label(one)), f"{one.score:.3f}") for one in findings[:MOST_ROWS]
    ]
    if rows:
        print_table(("kind", "image", "label", "score"), rows, right=("score",), is_ruled=False)
    if len(findings) > MOST_ROWS:
        say(f"and {len(findings) - MOST_ROWS:,} more; -o FILE.jsonl or -o FILE.html has all")


def _label(finding: Finding) -> str:
    if finding.kind == "misnamed" and finding.found is not None:
        return f"{finding.shown.label}, found as {finding.found.label}"
    return finding.shown.label


def _write_lines(findings: Sequence[Finding], output: Path, *, overwrite: bool) -> None:
    from md3cli.exporters.files import replaced_file

    with replaced_file(output, overwrite=overwrite) as file:
        file.writelines(compact_json(finding.to_json()) + b"\n" for finding in findings)
    say(f"{printable(str(output))}: {len(findings):,} findings", err=True)


def _write_page(
    findings: Sequence[Finding], collection: Collection, output: Path, root: Path | None, *, overwrite: bool
) -> None:
    from md3cli.commands.report import tell_page
    from md3cli.report.build import ReportOptions
    from md3cli.report.findings import write_findings

    with told_progress("page") as told:
        made = write_findings(
            findings, replace(collection, told=told), output, ReportOptions(root=root, overwrite=overwrite)
        )
    tell_page(made, f"{len(findings):,} findings")
