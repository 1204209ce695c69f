"""`md3 eval`: scores of finished records against ground truth, and what changed since another run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from md3cli.commands.help import App
from md3cli.commands.reading import ReadOptions, Records
from md3cli.commands.shared import spread
from md3cli.console import say
from md3cli.errors import UsageError
from md3cli.evaluate.metrics import Metric
from md3cli.finished.guards import check_none_is_read, check_not_input
from md3cli.finished.run_json import read_document
from md3cli.records import printable
from md3cli.refine.collection import Collection
from md3cli.refine.labels import read_labels, toml_of
from md3cli.signals import check_stdout

if TYPE_CHECKING:
    from md3cli.evaluate import Evaluation, Section, Truth
    from md3cli.evaluate.scores import BestThresholds

app = App()
_WRITTEN = ("eval.json", "-pr.png", "-reliability.png")  # how the names of the files that are written end


@app.command("eval", shows=["--gt"])
@spread(ReadOptions)
def eval_(
    records: Records = None,
    answer: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Compare answers (or captions) with this column of the records' meta."),
    ] = None,
    metric: Annotated[
        list[Metric] | None,
        typer.Option(metavar="NAME", help="Put first: anls relaxed vqa f1 accuracy exact numeric acc50 miou ciou."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="RECORDS", help="Another run: say what changed since.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="A folder for eval.json and the curves as PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]X", help="Exit with 1 below this: a number for each section's main score, or NAME=NUMBER."
        ),
    ] = None,
    best_thresholds: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A labels file (.toml) to write: for each label the min_score of the best F1 (IoU 0.5).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the FILE of --best-thresholds.")] = False,
    *,
    options: ReadOptions,
) -> None:
    """Scores against ground truth: boxes, masks, points, captions, answers.

    Examples:
        md3 eval run/ --gt instances.json
        md3 eval run/records.jsonl --gt instances.json --fail-under AP50=0.6
        md3 eval run/ --answer answers --metric anls --fail-under anls=0.8
        md3 eval run/ --compare older/ -o scores/
        md3 eval run/ --gt instances.json --best-thresholds labels.toml
    """
    from md3cli.evaluate import compare_runs, evaluate, load_truth
    from md3cli.evaluate.scores import table

    metrics = list(dict.fromkeys(metric or ()))
    if not options.gt and answer is None:
        _check_needs_no_truth(metrics, compare)
    check_stdout()
    limits = [_limit(text) for text in fail_under or ()]
    if best_thresholds is not None and overwrite:
        options = _with_names_of(best_thresholds, options)
    found = options.collection(records or (), uses_gt=True, answer=answer)
    other = None if compare is None else _read_alike(compare, found)
    read = [*options.files_read(found), *(options.files_read(other) if other else ())]
    if overwrite:  # a labels file may be brought up to date: it is read before it is written
        read = [path for path in read if path != best_thresholds or path != options.labels]
    _check_written(output, read)
    _check_labels_file(best_thresholds, read, overwrites=overwrite, has_truth=bool(options.gt))
    truths = [load_truth(path) for path in options.gt or ()]
    if other:
        evaluation = compare_runs(found, other, truths, metrics, answer=answer)
    else:
        evaluation = evaluate(found, truths, metrics, answer=answer)
    below = [line for limit in limits for line in _below(evaluation.sections, *limit)]
    if best_thresholds is not None:
        evaluation = replace(evaluation, best=_write_best(best_thresholds, found, truths))
    say(_document(evaluation) if as_json else table(evaluation))
    written = [] if best_thresholds is None else [f"written: {printable(str(best_thresholds))}"]
    for line in (*(f"note: {note}" for note in evaluation.notes), *written):
        say(line, err=True)
    if output is not None:
        _write(evaluation, output)
    for line in below:
        say(line, err=True)
    if below:
        raise typer.Exit(1)


def _check_needs_no_truth(metrics: Sequence[Metric], compare: Path | None) -> None:
    if metrics:
        raise UsageError(f"--metric {metrics[0]} needs a ground truth; give --gt FILE, or --answer COLUMN")
    if compare is None:
        raise UsageError("nothing to compare with; give --gt FILE, --answer COLUMN, or --compare OTHER.jsonl")


def _with_names_of(file: Path, options: ReadOptions) -> ReadOptions:
    """Return `options` with the names of a labels file that is to be replaced, where no other is typed."""
    if options.labels is not None or not file.is_file():
        return options
    try:
        read_labels(file)
    except UsageError:  # --overwrite takes the place of whatever stands there
        return options
    return replace(options, labels=file)


def _read_alike(records: Path, found: Collection) -> Collection:
    """Return another run under the names and thresholds in force for `found`, so that what differs is what was said."""
    other, shown = Collection.of([records], chosen=found.refinement), found.refinement
    return replace(other, refinement=replace(other.refinement, min_score=shown.min_score, nms=shown.nms))


def _limit(text: str) -> tuple[str | None, float]:
    """Return `0.5` or `AP50=0.5` as (score, or None for each main score; number)."""
    name, has_name, value = text.rpartition("=")
    try:
        return (name if has_name else None), float(value)
    except ValueError as error:
        raise UsageError(
            f"--fail-under {text}: give a number such as 0.5, or a score's name such as AP50=0.5"
        ) from error


def _below(sections: Sequence[Section], name: str | None, least: float) -> list[str]:
    """Return in sentences what is below the limit; a score without a value is below it as well."""
    lines, is_known = [], False
    for section in sections:
        score = name or section.main
        if score in section.scores:
            is_known, value = True, section.scores[score]
            if value is None or not value >= least:
                shown = "nothing to score" if value is None else f"{value:.3f}"
                lines.append(f"{section.name}: {score} {shown} is below {least:g}")
    if not is_known:
        known = ", ".join(dict.fromkeys(score for section in sections for score in section.scores)) or "none"
        advice = f"; --metric {name} adds it" if name in list(Metric) else ""
        raise UsageError(f"--fail-under: no score {name or ''} here; there are: {known}{advice}")
    return lines


def _document(evaluation: Evaluation) -> str:
    return json.dumps(evaluation.to_json(), ensure_ascii=False, indent=1, allow_nan=False)


def _check_written(folder: Path | None, read: Sequence[Path]) -> None:
    """Refuse a folder whose eval.json or figures are read, links to pictures, or somebody else's."""
    from md3cli.evaluate import EVAL_SCHEMA

    if folder is None:
        return
    document, figures = folder / "eval.json", list(folder.glob("*.png"))
    check_none_is_read(figures, read)
    check_not_input([document, *(path for path in figures if path.is_symlink())], read)
    if read_document(document).get("schema") == EVAL_SCHEMA:
        return
    foreign = next((path for path in (document, *figures) if path.exists() and path.name.endswith(_WRITTEN)), None)
    if foreign is not None:
        raise UsageError(f"{printable(str(foreign))} was not written by md3 eval, so it stays; name another -o")


def _write(evaluation: Evaluation, folder: Path) -> None:
    from md3cli.evaluate.scores import draw_figures
    from md3cli.files import atomic_publish, translate_errors

    with translate_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_publish(folder / "eval.json") as partial:
        partial.write_text(_document(evaluation) + "\n", encoding="utf-8", errors="replace")
    written = [
        folder / "eval.json",
        *(path for section in evaluation.sections for path in draw_figures(section, folder)),
    ]
    say("written: " + ", ".join(map(str, written)), err=True)


def _check_labels_file(file: Path | None, read: Sequence[Path], *, overwrites: bool, has_truth: bool) -> None:
    """Refuse a FILE of --best-thresholds that is read, is no name for a labels file, or is there already."""
    if file is None:
        if overwrites:
            raise UsageError("--overwrite is for the FILE of --best-thresholds; give it, or leave --overwrite out")
        return
    shown = printable(str(file))
    if not has_truth:
        raise UsageError("--best-thresholds needs a ground truth; give --gt with COCO instances")
    if file.suffix.lower() != ".toml":
        raise UsageError(f"--best-thresholds {shown}: a labels file with thresholds ends in .toml")
    check_not_input([file], read, "--best-thresholds")
    if os.path.lexists(file) and not (overwrites and file.is_file()):
        advice = "--overwrite replaces it" if file.is_file() else "name another"
        raise UsageError(f"--best-thresholds {shown} is there already; {advice}")


def _write_best(file: Path, records: Collection, truths: Sequence[Truth]) -> BestThresholds:
    """Write the labels file with the best thresholds of `records`, and return how good they are."""
    from md3cli.evaluate.thresholds import best_thresholds
    from md3cli.files import atomic_publish

    labels, best = best_thresholds(records, truths)
    about = "min_score: the score of the best F1 at IoU 0.5, by md3 eval --best-thresholds"
    with atomic_publish(file) as partial:
        partial.write_text(f"# {about}\n\n{toml_of(labels)}", encoding="utf-8", newline="\n")
    return best
