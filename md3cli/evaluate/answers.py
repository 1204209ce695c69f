"""Answers against what was expected.

Without `--metric`: `exact` (the text as it is, without space around), `normalised` (case, punctuation, articles and
spelled numbers do not count, and a sentence is right where it begins with the expected yes or no) and `numeric`, for
questions that expect a number: the first number of the answer counts. Of several true answers the best counts.

With `--metric` those of answer_metrics.py come first. A request that failed is wrong by each. `accuracy` reads answers
to questions of yes and no as POPE does, and is `normalised` for all others. `f1` is of questions of yes and no alone.

`md3cli.evaluate` alone imports this file, when a run has answers to score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from md3cli.errors import InputError
from md3cli.evaluate import answer_metrics
from md3cli.evaluate.located import coverage_notes, has_failed
from md3cli.evaluate.metrics import Metric
from md3cli.evaluate.scores import Scores, Section, Verdict, ratio
from md3cli.evaluate.truth import Questions
from md3cli.finished.names import Matches, folded, match_images, some_of
from md3cli.records import RecordDict, printable

ANSWER_METRICS = frozenset(Metric) - {Metric.ACC50, Metric.MIOU, Metric.CIOU}
NEITHER_CHARS = 40  # shown of an answer that says neither yes nor no
RIGHT_FROM = 0.5  # of a metric's value for one answer
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBER_WORDS = {word: float(value) for value, word in enumerate(_NUMBERS)} | {"none": 0.0}
_TOKEN = re.compile(r"((?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+))|\w+(?:['’]\w+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


class YesNo(NamedTuple):
    """What a question of yes and no is answered, and what the answer is read as."""

    is_yes: bool
    says_yes: bool
    says_neither: bool = False


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer beside what was expected; `error` is the distance of two numbers.

    `values` are 0 to 1, None where the metric is not about this question.
    """

    question: str
    answer: str
    num_expected: int
    is_exact: bool
    is_right: bool
    is_number_expected: bool
    is_number_right: bool
    error: float | None
    yes_no: YesNo | None = None
    values: Mapping[Metric, float | None] = field(default_factory=dict)


def score_answers(records: Sequence[RecordDict], truth: Questions, metrics: Sequence[Metric] = ()) -> Section:
    """Score `query` records.

    Raises:
        InputError: no question of the records is in the ground truth.
    """
    metrics = [metric for metric in metrics if metric in ANSWER_METRICS]
    expected = {(image, folded(question)): answers for (image, question), answers in truth.answers.items()}
    names = [record["image"] for record in records if record["image"] is not None]
    known = list(dict.fromkeys(image for image, _ in truth.answers if image is not None))
    matches = match_images(names, known) if names and known else Matches()
    judged, asked = list[JudgedAnswer](), set[tuple[str | None, str]]()
    num_failed, verdicts = 0, dict[str, Verdict]()
    for record in records:
        image, question = matches.found.get(record["image"], record["image"]), str(record.get("prompt") or "")
        key = (image, folded(question))
        if (answers := expected.get(key)) is None:
            continue
        asked.add(key)
        judged.append(judge_record(record, question, answers, metrics))
        if has_failed(record):
            num_failed += 1
        else:
            verdicts[record["id"]] = Verdict(_is_right(judged[-1], metrics))
    if records and not judged:
        raise InputError(
            f"no question of the records is in {printable(str(truth.path))}; are the questions worded alike?"
        )
    counts = {"requests": len(judged), "failed": num_failed, "not_in_truth": len(records) - len(judged)}
    counts["not_asked"] = len(expected) - len(asked)
    notes = (*coverage_notes("image", names, known, matches), *truth.notes, *_metric_notes(judged, metrics))
    scores, by_question = _answer_scores(judged, metrics), _by_question(judged, metrics)
    return Section("answers", "normalised", scores, counts, by_question, notes, verdicts=verdicts)


def _by_question(judged: Sequence[JudgedAnswer], metrics: Sequence[Metric]) -> dict[str, Scores]:
    by_question: dict[str, list[JudgedAnswer]] = {}
    for one in judged:
        by_question.setdefault(one.question, []).append(one)
    return {question: _answer_scores(answers, metrics) for question, answers in by_question.items()}


def judge_record(
    record: RecordDict, question: str, expected: Sequence[str], metrics: Sequence[Metric] = ()
) -> JudgedAnswer:
    """Compare the answer of a record with the accepted ones; a request that failed is wrong by every metric."""
    answer = str(record.get("answer") or "")
    one = judge(question, answer, expected)
    if (is_yes := answer_metrics.true_yes(expected)) is not None:
        yes_no = YesNo(is_yes, answer_metrics.says_yes(answer), answer_metrics.says_neither(answer))
        one = replace(one, yes_no=YesNo(is_yes, not is_yes) if has_failed(record) else yes_no)
    values = {metric: _value(metric, one, expected) for metric in metrics}
    if has_failed(record):  # nothing said is what some texts are made: VQA drops articles and signs
        one = replace(one, is_exact=False, is_right=False)
        values = {metric: None if value is None else 0.0 for metric, value in values.items()}
    return replace(one, values=values)


def judge(question: str, answer: str, expected: Sequence[str]) -> JudgedAnswer:
    """Compare one answer with the accepted ones."""
    wanted = [number for text in expected if (number := whole_number(text)) is not None]
    found = first_number(answer)
    error = min((abs(found - number) for number in wanted), default=None) if found is not None else None
    return JudgedAnswer(
        question,
        answer,
        len(expected),
        answer.strip() in {text.strip() for text in expected},
        any(_says(answer, text) for text in expected),
        bool(wanted),
        error is not None and math.isclose(error, 0.0, abs_tol=1e-9),
        error,
    )


def _value(metric: Metric, one: JudgedAnswer, expected: Sequence[str]) -> float | None:
    """Return what an answer is worth by a metric; None where the metric is not about its question."""
    is_read_right = None if one.yes_no is None else one.yes_no.is_yes == one.yes_no.says_yes
    match metric:
        case Metric.ANLS:
            return answer_metrics.anls(one.answer, expected)
        case Metric.RELAXED:
            return float(answer_metrics.is_relaxed_right(one.answer, expected))
        case Metric.VQA:
            return answer_metrics.vqa_accuracy(one.answer, expected) if len(expected) > 1 else None
        case Metric.F1:
            return None if is_read_right is None else float(is_read_right)
        case Metric.ACCURACY:
            return float(one.is_right if is_read_right is None else is_read_right)
        case Metric.NUMERIC:
            return float(one.is_number_right) if one.is_number_expected else None
        case _:
            return float(one.is_exact)


def _is_right(one: JudgedAnswer, metrics: Sequence[Metric]) -> bool:
    value = one.values.get(metrics[0]) if metrics else None
    return one.is_right if value is None else value >= RIGHT_FROM


def _metric_notes(judged: Sequence[JudgedAnswer], metrics: Sequence[Metric]) -> Iterator[str]:
    """Yield what a metric leaves out, and how it reads what may be read in two ways."""
    for metric in metrics:
        if num_left_out := sum(one.values[metric] is None for one in judged):
            yield f"{metric}: {num_left_out:,} of {len(judged):,} answers are left out: {_LEFT_OUT[metric]}"
    few = [one for one in judged if 1 < one.num_expected <= answer_metrics.FULL_AGREEMENT]
    if Metric.VQA in metrics and few:
        yield f"vqa: fewer than 4 true answers to {len(few):,} of {len(judged):,}, where not even the best answer has 1"
    unclear = [one.answer for one in judged if one.yes_no is not None and one.yes_no.says_neither]
    if unclear and not {Metric.F1, Metric.ACCURACY}.isdisjoint(metrics):
        shown = some_of(list(dict.fromkeys(text[:NEITHER_CHARS] for text in unclear)))
        yield f"neither yes nor no in {len(unclear):,} of {len(judged):,} answers, which count as yes (POPE): {shown}"


_LEFT_OUT = {
    Metric.VQA: "one true answer alone is not several people's",
    Metric.F1: "what is true is neither yes nor no",
    Metric.NUMERIC: "what is true is no number",
}


def _says(answer: str, expected: str) -> bool:
    said, wanted = normalised(answer), normalised(expected)
    return said == wanted or (wanted in ("yes", "no") and said.split(" ", 1)[0] == wanted)


def normalised(text: str) -> str:
    """Return `text` without case, punctuation and articles, numbers as digits (after the VQA evaluation's rules)."""
    return " ".join(map(str, _tokens(text)))


def first_number(text: str) -> float | None:
    """Return the first number in `text`, in digits or as a word up to twelve."""
    return next((token for token in _tokens(text) if isinstance(token, float)), None)


def whole_number(text: str) -> float | None:
    """Return the number that all of `text` is; None where it is something else."""
    tokens = list(_tokens(text))
    return tokens[0] if len(tokens) == 1 and isinstance(tokens[0], float) else None


def _tokens(text: str) -> Iterator[str | float]:
    for match in _TOKEN.finditer(_THOUSANDS.sub("", text.casefold())):
        word = match[0]
        if match[1] or word in _NUMBER_WORDS:
            yield float(_NUMBER_WORDS.get(word, word))
        elif word not in _ARTICLES:
            yield word


def _answer_scores(judged: Sequence[JudgedAnswer], metrics: Sequence[Metric]) -> Scores:
    numeric = [one for one in judged if one.is_number_expected]
    errors = [one.error for one in numeric if one.error is not None]
    usual: Scores = {
        "exact": ratio(sum(one.is_exact for one in judged), len(judged)),
        "normalised": ratio(sum(one.is_right for one in judged), len(judged)),
        "numeric": ratio(sum(one.is_number_right for one in numeric), len(numeric)),
        "numeric_error": ratio(sum(errors), len(errors)),
    }
    return {str(metric): _mean_value(metric, judged) for metric in metrics} | usual


def _mean_value(metric: Metric, judged: Sequence[JudgedAnswer]) -> float | None:
    if metric is Metric.F1:
        read = [one.yes_no for one in judged if one.yes_no is not None]
        return answer_metrics.f1_of_yes((one.is_yes, one.says_yes) for one in read)
    values = [value for one in judged if (value := one.values[metric]) is not None]
    return ratio(sum(values), len(values))
