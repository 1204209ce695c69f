"""Answers against expected answers: exact, normalised, numeric.

`exact` compares the text as it is, without space around. `normalised` compares what the text says:
case, punctuation, articles and spelled numbers do not count, and a sentence is right where it begins
with the expected yes or no. `numeric` looks at questions that expect a number, and at the first
number of the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from md3cli.errors import InputError
from md3cli.evaluate.located import coverage_notes, has_failed
from md3cli.evaluate.scores import Scores, Section, Verdict, ratio
from md3cli.evaluate.truth import Questions
from md3cli.finished.names import Matches, folded, match_images
from md3cli.records import RecordDict, printable

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBER_WORDS = {word: float(value) for value, word in enumerate(_NUMBERS)} | {"none": 0.0}
_TOKEN = re.compile(r"((?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+))|\w+(?:['’]\w+)*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer beside what was expected; `error` is the distance of two numbers."""

    question: str
    is_exact: bool
    is_right: bool
    is_number_expected: bool
    is_number_right: bool
    error: float | None


def score_answers(records: Sequence[RecordDict], truth: Questions) -> Section:
    """Score `query` records.

    Raises:
        InputError: no question of the records is in the ground truth.
    """
    expected = {(image, folded(question)): answers for (image, question), answers in truth.answers.items()}
    matches = _match_images(records, truth)
    images = matches.found
    judged: dict[str, JudgedAnswer] = {}
    verdicts: dict[str, Verdict] = {}
    for record in records:
        image, question = images.get(record["image"], record["image"]), str(record.get("prompt") or "")
        answers = expected.get((image, folded(question)))
        if answers is None:
            continue
        judged[record["id"]] = one = judge(question, str(record.get("answer") or ""), answers)
        if not has_failed(record):
            verdicts[record["id"]] = Verdict(one.is_right)
    if records and not judged:
        raise InputError(
            f"no question of the records is in {printable(str(truth.path))}; are the questions worded alike?"
        )
    questions = dict.fromkeys(one.question for one in judged.values())
    by_name = {q: _scores([one for one in judged.values() if one.question == q]) for q in questions}
    counts = {
        "requests": len(judged),
        "failed": sum(has_failed(record) for record in records if record["id"] in judged),
        "not_in_truth": len(records) - len(judged),
        "not_asked": len(expected) - len(judged),
    }
    names = [record["image"] for record in records if record["image"] is not None]
    notes = tuple(coverage_notes("image", names, _truth_images(truth), matches))
    return Section("answers", "normalised", _scores(list(judged.values())), counts, by_name, notes, verdicts=verdicts)


def _truth_images(truth: Questions) -> list[str]:
    return list(dict.fromkeys(image for image, _ in truth.answers if image is not None))


def _match_images(records: Sequence[RecordDict], truth: Questions) -> Matches:
    names, known = [r["image"] for r in records if r["image"] is not None], _truth_images(truth)
    return match_images(names, known) if names and known else Matches()


def judge(question: str, answer: str, expected: Sequence[str]) -> JudgedAnswer:
    """Compare one answer with the accepted ones."""
    wanted = [number for text in expected if (number := whole_number(text)) is not None]
    found = first_number(answer)
    error = min((abs(found - number) for number in wanted), default=None) if found is not None else None
    return JudgedAnswer(
        question,
        answer.strip() in {text.strip() for text in expected},
        any(_says(answer, text) for text in expected),
        bool(wanted),
        error is not None and math.isclose(error, 0.0, abs_tol=1e-9),
        error,
    )


def _says(answer: str, expected: str) -> bool:
    said, wanted = normalised(answer), normalised(expected)
    if said == wanted:
        return True
    return wanted in ("yes", "no") and said.split(" ", 1)[0] == wanted


def normalised(text: str) -> str:
    """Return `text` without case, punctuation and articles, numbers as digits (after the VQA evaluation's rules)."""
    return " ".join(str(token) for token in _tokens(text))


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


def _scores(judged: Sequence[JudgedAnswer]) -> Scores:
    numeric = [one for one in judged if one.is_number_expected]
    errors = [one.error for one in numeric if one.error is not None]
    return {
        "exact": ratio(sum(one.is_exact for one in judged), len(judged)),
        "normalised": ratio(sum(one.is_right for one in judged), len(judged)),
        "numeric": ratio(sum(one.is_number_right for one in numeric), len(numeric)),
        "numeric_error": ratio(sum(errors), len(errors)),
    }
