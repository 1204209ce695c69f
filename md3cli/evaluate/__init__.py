"""Records against ground truth: how good is a run, and what changed since another one.

`evaluate` reads both sides and returns a `Section` for each kind of answer that both have: boxes, masks, points,
captions of each length, answers. Knows no torch and opens no picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import InputError
from md3cli.evaluate.compare import Comparison, compare
from md3cli.evaluate.located import final_records
from md3cli.evaluate.scores import Section, without_infinite
from md3cli.evaluate.truth import Captions, Instances, Questions, Truth, load_truth
from md3cli.finished.records_file import read_records
from md3cli.records import RecordDict, printable

__all__ = ["EVAL_SCHEMA", "Evaluation", "Section", "compare_runs", "evaluate", "load_truth"]

EVAL_SCHEMA = "md3-eval/1"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The score sheet of one run."""

    records: Path
    truths: tuple[Path, ...]
    sections: tuple[Section, ...]
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()  # what of the records files was left out

    def to_json(self) -> dict[str, Any]:
        """Return the document of `md3 eval --json`; a figure that is not finite is null, as JSON has no other word."""
        document: dict[str, Any] = {"schema": EVAL_SCHEMA, "records": printable(str(self.records))}
        document["ground_truth"] = [printable(str(path)) for path in self.truths]
        document["sections"] = [section.to_json() for section in self.sections]
        if self.comparison is not None:
            document["comparison"] = self.comparison.to_json()
        return dict(without_infinite(document))


def evaluate(records: Path, truths: Sequence[Truth]) -> Evaluation:
    """Score the records of a file.

    Raises:
        InputError: records and ground truth have nothing in common.
        MissingExtraError: objects are to be scored and faster-coco-eval is not installed.
    """
    notes = list[str]()
    sections = _sections(final_records(read_records(records, notes)), truths, records)
    return Evaluation(records, tuple(truth.path for truth in truths), tuple(sections), notes=tuple(notes))


def compare_runs(records: Path, other: Path, truths: Sequence[Truth]) -> Evaluation:
    """`evaluate`, and say what changed since the run `other`; without `truths` the changes alone."""
    notes, earlier_notes = list[str](), list[str]()
    after = final_records(read_records(records, notes))
    before = final_records(read_records(other, earlier_notes))
    notes += [f"{printable(str(other))}: {note}" for note in earlier_notes]
    sections = _sections(after, truths, records) if truths else []
    earlier = _sections(before, truths, other) if truths else []
    comparison = compare(before, after, earlier, sections)
    return Evaluation(records, tuple(truth.path for truth in truths), tuple(sections), comparison, tuple(notes))


def _sections(records: Sequence[RecordDict], truths: Sequence[Truth], path: Path) -> list[Section]:
    sections = [section for truth in truths for section in _score(records, truth)]
    if not sections:
        tasks = ", ".join(dict.fromkeys(str(record["task"]) for record in records)) or "nothing"
        raise InputError(
            f"nothing to score: {printable(str(path))} holds {tasks}; COCO instances score detect, segment and "
            "point, COCO captions score caption, questions score query"
        )
    return sections


def _score(records: Sequence[RecordDict], truth: Truth) -> list[Section]:
    by_task: dict[str, list[RecordDict]] = {}
    for record in records:
        by_task.setdefault(str(record["task"]), []).append(record)
    match truth:
        case Instances():
            from md3cli.evaluate.boxes import score_boxes, score_masks, score_points

            scorers = {"detect": score_boxes, "segment": score_masks, "point": score_points}
            return [score(by_task[task], truth) for task, score in scorers.items() if task in by_task]
        case Captions():
            from md3cli.evaluate.captions import score_captions

            return list(score_captions(by_task.get("caption", []), truth))
        case Questions():
            from md3cli.evaluate.answers import score_answers

            return [score_answers(by_task["query"], truth)] if "query" in by_task else []
