"""The metrics of `md3 eval --metric`: their names, what each needs, and how a section is led by those that were asked.

Stands alone because the command names them before anything of a score is loaded. How each is computed is written where
it is: answers in answer_metrics.py, boxes and masks in referring.py. Source: product contract, section 9, Metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from md3cli.errors import UsageError
from md3cli.evaluate.scores import Scores, Section


class Metric(StrEnum):
    """A score that can be asked for by name, 0 to 1."""

    ANLS = "anls"
    RELAXED = "relaxed"
    VQA = "vqa"
    F1 = "f1"
    ACCURACY = "accuracy"
    EXACT = "exact"
    NUMERIC = "numeric"
    ACC50 = "acc50"
    MIOU = "miou"
    CIOU = "ciou"


_ANSWERS = "query records and true answers"
_MASKS = "segment records and COCO instances with masks"
_NEEDS: Mapping[Metric, str] = {
    Metric.ANLS: _ANSWERS,
    Metric.RELAXED: _ANSWERS,
    Metric.VQA: "query records and several true answers to a question, as several people gave them",
    Metric.F1: "query records and true answers of yes or no",
    Metric.ACCURACY: _ANSWERS,
    Metric.EXACT: "query or caption records and true answers or captions",
    Metric.NUMERIC: "query records and true answers that are numbers",
    Metric.ACC50: "detect records and one true box for a name in a picture",
    Metric.MIOU: _MASKS,
    Metric.CIOU: _MASKS,
}


def led_by(section: Section, metrics: Sequence[Metric]) -> Section:
    """Return a section whose first scores are those of `metrics` that it has; the first of them is its main one."""
    asked = [str(metric) for metric in metrics if metric in section.scores]
    if not asked:
        return section
    by_name = {name: _in_order(asked, scores) for name, scores in section.by_name.items()}
    return replace(section, main=asked[0], scores=_in_order(asked, section.scores), by_name=by_name)


def _in_order(first: Sequence[str], scores: Scores) -> Scores:
    return {name: scores.get(name) for name in dict.fromkeys([*first, *scores])}


def check_met(metrics: Iterable[Metric], sections: Sequence[Section], tasks: Iterable[str]) -> None:
    """Raise UsageError where no section has a value of a metric that was asked; `tasks` are those of the records."""
    for metric in metrics:
        if all(section.scores.get(metric) is None for section in sections):
            there = ", ".join(dict.fromkeys(tasks))
            scored = ", ".join(section.name for section in sections)
            raise UsageError(
                f"--metric {metric} needs {_NEEDS[metric]}; here are records of {there}, and truth for: {scored}"
            )
