"""answers: what `--metric` makes of a run's answers, what it leaves out and what it says of that."""

from __future__ import annotations

import statistics

import pytest
from truths import box, instances, record, sections_of

from md3cli.errors import InputError, UsageError
from md3cli.evaluate import Metric
from md3cli.evaluate.answer_metrics import anls, is_relaxed_right, vqa_accuracy

ANSWERS = {"a": "Hello wrld", "b": "105", "c": "Yes", "d": "two", "e": "No, it is not."}
TRUE = {"a": ["hello world"], "b": [100, "99"], "c": ["yes"] * 3 + ["no"], "d": ["2"] * 9, "e": "yes"}


@pytest.fixture
def answers(tmp_path):
    """Score answers by picture against what is true; the section."""

    def score(said, true, *metrics, question="Q?"):
        records = [record(image, "query", question, **_result(answer)) for image, answer in said.items()]
        truth = [{"image": image, "question": question, "answer": answer} for image, answer in true.items()]
        return sections_of(tmp_path, records, truth, metrics=metrics)["answers"]

    return score


def _result(answer):
    return {"error": "model"} if answer is None else {"answer": answer}


def test_a_metric_is_the_mean_over_the_answers(answers):
    section = answers(ANSWERS, TRUE, Metric.RELAXED, Metric.ANLS, Metric.VQA)
    true = {key: [str(text) for text in (one if isinstance(one, list) else [one])] for key, one in TRUE.items()}
    assert section.scores["anls"] == pytest.approx(statistics.mean(anls(ANSWERS[k], true[k]) for k in true))
    assert section.scores["relaxed"] == statistics.mean(is_relaxed_right(ANSWERS[k], true[k]) for k in true)
    asked = [key for key in true if len(true[key]) > 1]
    assert section.scores["vqa"] == pytest.approx(statistics.mean(vqa_accuracy(ANSWERS[k], true[k]) for k in asked))
    assert list(section.scores)[:4] == ["relaxed", "anls", "vqa", "exact"]
    assert section.main == "relaxed"
    assert "vqa: 2 of 5 answers are left out: one true answer alone is not several people's" in section.notes
    assert "vqa: fewer than 4 true answers to 1 of 5, where not even the best answer has 1" in section.notes


def test_without_a_metric_all_stays_as_it_was(answers):
    section = answers(ANSWERS, TRUE)
    assert list(section.scores) == ["exact", "normalised", "numeric", "numeric_error"]
    assert section.main == "normalised"
    assert section.notes == ()


@pytest.mark.parametrize("metric", [Metric.EXACT, Metric.NUMERIC])
def test_a_usual_score_that_is_asked_for_comes_first(answers, metric):
    usual, asked = answers(ANSWERS, TRUE), answers(ANSWERS, TRUE, metric)
    assert next(iter(asked.scores)) == asked.main == metric
    assert asked.scores == usual.scores
    assert asked.by_name == usual.by_name


YES_NO = {"a": "yes", "b": "yes", "c": "no", "d": "no", "e": "no"}


def test_yes_and_no_are_scored_as_pope_does(answers):
    said = {"a": "Yes, there is.", "b": "No", "c": "there is not", "d": "Perhaps", "e": "No."}
    section = answers(said, YES_NO, Metric.F1, Metric.ACCURACY)
    assert section.scores["f1"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))  # 1 of 2 said, 1 of 2 true
    assert section.scores["accuracy"] == 0.6
    assert "neither yes nor no in 1 of 5 answers, which count as yes (POPE): Perhaps" in section.notes


@pytest.mark.parametrize(("true", "f1"), [("yes", 2 / 3), ("no", 2 / 3)])
def test_a_request_that_failed_is_wrong_whatever_is_true(answers, true, f1):
    section = answers({"a": "yes", "b": None}, {"a": "yes", "b": true}, Metric.F1, Metric.ACCURACY, Metric.ANLS)
    assert section.scores["f1"] == pytest.approx(f1)
    assert (section.scores["accuracy"], section.scores["anls"]) == (0.5, 0.5)
    assert not any("neither" in note for note in section.notes)


def test_a_failure_is_no_empty_answer(answers):
    metrics = (Metric.VQA, Metric.ANLS, Metric.RELAXED, Metric.ACCURACY, Metric.EXACT)
    scores = answers({"a": None}, {"a": ["a", "the", "?", "."]}, *metrics).scores
    assert {name: scores[name] for name in (*metrics, "normalised")} == dict.fromkeys((*metrics, "normalised"), 0.0)
    assert answers({"a": ""}, {"a": ["a", "the", "?", "."]}, Metric.VQA).scores["vqa"] == 1.0


def test_f1_is_of_yes_and_no_alone_and_accuracy_of_all(answers):
    section = answers({"a": "Yes", "b": "The red one."}, {"a": "yes", "b": "red one"}, Metric.F1, Metric.ACCURACY)
    assert (section.scores["f1"], section.scores["accuracy"]) == (1.0, 1.0)
    assert "f1: 1 of 2 answers are left out: what is true is neither yes nor no" in section.notes


def test_right_is_what_the_main_metric_calls_so(answers):
    said, true = {"a": "104", "b": "Hello wrld"}, {"a": "100", "b": "hello world"}
    for metrics, expected in (((), [False, False]), ([Metric.RELAXED], [True, False]), ([Metric.ANLS], [True, True])):
        verdicts = answers(said, true, *metrics).verdicts.values()
        assert [verdict.is_right for verdict in verdicts] == expected


def test_many_questions_are_scored_in_one_pass(answers, tmp_path):
    records = [record("a.jpg", "query", f"Question {n}?", answer=str(n)) for n in range(3000)]
    truth = [{"image": "a.jpg", "question": f"question {n}?", "answer": n} for n in range(3000)]
    section = sections_of(tmp_path, records, truth, metrics=[Metric.ANLS])["answers"]
    assert section.scores["anls"] == 1.0
    assert len(section.by_name) == 3000
    assert section.counts["not_asked"] == 0


@pytest.mark.parametrize(
    ("metrics", "true", "why"),
    [
        ([Metric.ACC50], "yes", "acc50 needs detect records and one true box .* here are records of query"),
        ([Metric.MIOU], "yes", "miou needs segment records and COCO instances with masks"),
        ([Metric.ANLS, Metric.CIOU], "yes", "ciou needs segment"),
        ([Metric.VQA], "yes", "vqa needs query records and several true answers"),
        ([Metric.F1], "red", "f1 needs query records and true answers of yes or no"),
        ([Metric.NUMERIC], "red", "numeric needs query records and true answers that are numbers"),
    ],
)
def test_a_metric_without_what_it_needs_is_refused(answers, metrics, true, why):
    with pytest.raises(UsageError, match=f"--metric {why}"):
        answers({"a": "yes"}, {"a": true}, *metrics)


def test_masks_are_no_metric_of_boxes(tmp_path):
    truth = instances([("a.jpg", "car", [0, 0, 50, 50])])
    found = record("a.jpg", "detect", "car", objects=[box(0, 0, 50, 50)])
    with pytest.raises(UsageError, match=r"--metric miou needs segment records .* here are records of detect"):
        sections_of(tmp_path, [found], truth, metrics=[Metric.MIOU])


def test_each_section_is_led_by_its_own_metrics(tmp_path):
    records = [record("a.jpg", "query", "Q?", answer="yes"), record("a.jpg", "caption", caption="A dog")]
    captions = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}],
    }
    questions = [{"image": "a.jpg", "question": "Q?", "answer": "yes"}]
    sections = sections_of(tmp_path, records, captions, questions, metrics=[Metric.ANLS, Metric.EXACT])
    assert sections["answers"].main == "anls"
    assert sections["captions (normal)"].main == "exact"
    assert next(iter(sections["captions (normal)"].scores)) == "exact"


def test_what_is_true_may_be_written_in_several_ways(answers):
    true = {"a": True, "b": 2.0, "c": [None, " ", "red"], "d": [{"answer": "cat", "answer_confidence": "yes"}]}
    said = {"a": "yes", "b": "2", "c": "red", "d": "cat"}
    assert answers(said, true, Metric.EXACT).scores["exact"] == 1.0


def test_a_question_without_an_answer_is_told(answers):
    section = answers({"a": "yes", "b": "no", "c": "no"}, {"a": "yes", "b": None, "c": ["", None]})
    assert (section.counts["requests"], section.counts["not_in_truth"]) == (1, 2)
    assert any(note.startswith("2 of 3 rows: no 'answer' in ") for note in section.notes)


def test_what_is_no_answer_is_refused(answers):
    with pytest.raises(InputError, match="a list is no true answer"):
        answers({"a": "yes"}, {"a": [["yes"]]})
