"""answer_metrics: each metric beside a second implementation from its paper, and beside values of its own script."""

from __future__ import annotations

import random
import statistics
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import InputError
from md3cli.evaluate.answer_metrics import (
    LONGEST_COMPARED_CHARS,
    anls,
    edit_distance,
    f1_of_yes,
    is_relaxed_right,
    says_neither,
    says_yes,
    true_yes,
    vqa_accuracy,
    vqa_text,
)

TOLERANCE = 1e-6
LETTERS = st.text("ab cAB \n", max_size=12)
TEXTS = st.text(max_size=30)


# ---- ANLS -----------------------------------------------------------------------------------------


def table_distance(first, second):
    """Levenshtein's distance by the whole table of it (Wagner and Fischer, 1974)."""
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    table[:, 0], table[0] = range(len(first) + 1), range(len(second) + 1)
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return int(table[-1, -1])


def paper_anls(answer, expected, threshold=0.5):
    """Equation 1 of Biten et al. for one question, on texts as the competition makes them."""
    scores = []
    for text in expected:
        said, wanted = (" ".join(one.strip().lower().split()) for one in (answer, text))
        distance = table_distance(said, wanted) / max(len(said), len(wanted)) if said or wanted else 0.0
        scores.append(1 - distance if distance < threshold else 0.0)
    return max(scores)


@given(LETTERS, LETTERS)
def test_the_edit_distance_is_the_tables(first, second):
    assert edit_distance(first, second) == table_distance(first, second)


@given(TEXTS, TEXTS, TEXTS)
def test_the_edit_distance_is_a_distance(first, second, third):
    assert (edit_distance(first, second) == 0) == (first == second)
    assert edit_distance(first, second) == edit_distance(second, first)
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(second, third)


def test_the_edit_distance_of_long_texts():
    rng = random.Random(3)
    first = "".join(rng.choices("abc é漢", k=700))  # many more letters than a machine word has bits
    second = "".join(letter for letter in first if rng.random() > 0.1)
    assert edit_distance(first, second) == table_distance(first, second)


@given(LETTERS, st.lists(LETTERS, min_size=1, max_size=4))
def test_anls_is_the_papers(answer, expected):
    assert anls(answer, expected) == pytest.approx(paper_anls(answer, expected), abs=TOLERANCE)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_anls_of_any_text(answer, expected):
    score = anls(answer, expected)
    assert 0 <= score <= 1
    assert anls(answer, [*expected, answer.upper().lower()]) >= score
    assert anls(expected[0], expected) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("Hello Wrld", ["hello world"], 0.9090909090909091),
        ("  HELLO \n world ", ["Hello  World"], 1.0),
        ("ab", ["abcd"], 0.0),  # exactly half is different
        ("abc", ["abcde"], 0.6),
        ("Nov 3, 2009", ["november 3, 2009", "Nov 3 2009"], 0.9090909090909091),
        ("", ["x"], 0.0),
    ],
)
def test_anls_is_that_of_the_package(answer, expected, score):
    """Expected values: `anls_score` of the package anls 0.0.2."""
    assert anls(answer, expected) == pytest.approx(score, abs=TOLERANCE)


def test_anls_compares_no_books():
    book = "a" * LONGEST_COMPARED_CHARS
    assert anls(book + "b", ["short"]) == 0.0
    assert anls(book + "b", [book + "b"]) == 1.0
    with pytest.raises(InputError, match="100,000 characters"):
        anls(book + "b", [book + "c"])


# ---- relaxed accuracy ------------------------------------------------------------------------------


def script_relaxed(said, wanted):
    """What Pix2Struct's script makes of two texts."""

    def number(text):
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    one, other = number(said), number(wanted)
    if one is not None and other:
        return abs(one - other) / abs(other) <= 0.05
    return said.lower() == wanted.lower()


def test_relaxed_is_the_scripts():
    rng = random.Random(7)
    words = ["Yes", "no", "blue", "Blue", "2019", "14%", "0.14", "14", "-3.5", "3.5", "1e3", "1000", ".5", "0.52", "%"]
    words += ["1,000", "1,05", "0", "0.0", "-0", "0%", "+14", "14 %", "14%%", "1_000", "$5", "5.", "١٤"]
    verdicts = []
    for _ in range(3000):
        base = rng.uniform(-50, 50)
        near = f"{base * rng.uniform(0.9, 1.1):.{rng.randint(1, 4)}f}"
        said, wanted = rng.choice([(near, f"{base:.3f}"), (rng.choice(words), rng.choice(words))])
        verdicts.append(is_relaxed_right(said, [wanted]))
        assert verdicts[-1] == script_relaxed(said, wanted), (said, wanted)
    assert 500 < sum(verdicts) < 2500


@pytest.mark.parametrize(
    ("answer", "expected", "is_right"),
    [
        ("105", ["100"], True),
        ("105.1", ["100"], False),
        ("1,050", ["1000"], False),  # the script reads no commas
        ("1,050", ["1,050"], True),
        ("1,05", ["105"], False),
        ("14 %", ["0.14"], True),
        ("14", ["14%"], False),
        (" Blue\n", ["blue"], True),
        ("0.0", ["0"], False),  # beside a true 0 the script compares texts
        ("0", ["0"], True),
        ("0.01", ["0"], False),
        ("-5", ["5"], False),
        ("nan", ["nan"], True),
        ("inf", ["1e400"], False),
        ("9" * 400, ["9" * 400], True),
        ("10 cars", ["10"], False),
        ("b", ["a", "B"], True),
    ],
)
def test_what_is_near_enough(answer, expected, is_right):
    assert is_relaxed_right(answer, expected) is is_right


@given(st.floats(-1e12, 1e12).filter(lambda value: abs(value) > 1e-3), st.floats(-0.2, 0.2))
def test_five_percent_is_the_border(wanted, change):
    assert is_relaxed_right(repr(wanted * (1 + change)), [repr(wanted)]) is (abs(change) < 0.05) or (
        abs(abs(change) - 0.05) < 1e-9
    )


# ---- soft VQA accuracy -----------------------------------------------------------------------------


def left_out_one_by_one(answer, expected):
    """The definition of the paper's page: the mean over all sets of all people but one."""
    texts = [vqa_text(text) for text in expected]
    subsets = combinations(range(len(texts)), len(texts) - 1)
    return statistics.mean(min(sum(texts[k] == vqa_text(answer) for k in some) / 3, 1) for some in subsets)


VOCABULARY = ["yes", "Yes.", "no", "a dog", "dog", "2", "two", "dont know", "don't know"]


@given(st.sampled_from(VOCABULARY), st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=12))
def test_vqa_is_the_mean_over_all_people_but_one(answer, expected):
    score = vqa_accuracy(answer, expected)
    assert score == pytest.approx(left_out_one_by_one(answer, expected), abs=TOLERANCE)
    assert 0 <= score <= 1
    assert vqa_accuracy(answer, expected[::-1]) == score


@pytest.mark.parametrize(("num_same", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_of_ten_people(num_same, score):
    """Expected values: the table of the paper's page, as the official script gives it."""
    others = [f"other {n}" for n in range(10 - num_same)]
    assert vqa_accuracy("Cat.", ["cat"] * num_same + others) == pytest.approx(score, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("The two dogs.", "2 dogs"),
        ("an  Apple", "apple"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("wheres the ball", "where's ball"),
        ("it's", "it's"),
        ("its", "its"),
        ("10:30 am", "10:30 am"),
        ("3.5", "3.5"),
        ("1.", "1"),
        ("U.S.", "us"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("e-mail", "e mail"),
        ("half -full", "half full"),
        ('"quoted" (left)', "quoted left"),
        ("what?!", "what"),
        ("None", "0"),
        ("Ten", "10"),
        ("$5.00", "$5.00"),
        ("50%", "50%"),
        ("new\nline\ttab ", "new line tab"),
        ("C++", "c"),
        ("me@home", "me home"),
        ("THE", ""),
        ("b" + ". " * 40, "b" + " ." * 8),
    ],
)
def test_texts_are_made_as_the_official_script_makes_them(text, made):
    """Expected: processPunctuation and processDigitArticle of GT-Vision-Lab/VQA at a013f00."""
    assert vqa_text(text) == made


# ---- yes or no -------------------------------------------------------------------------------------


def script_reads_yes(text):
    """What POPE's evaluate.py makes of an answer."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    found = text.replace(",", "").split(" ")
    return not ("No" in found or "not" in found or "no" in found)


@given(st.lists(st.sampled_from(["Yes", "yes,", "No", "no", "not", "Not", "NO", "a", "dog.", "there,", "."])))
def test_yes_is_read_as_pope_reads_it(words):
    answer = " ".join(words)
    assert says_yes(answer) == script_reads_yes(answer)


@pytest.mark.parametrize(
    ("answer", "is_yes", "is_neither"),
    [
        ("Yes.", True, False),
        ("No, there is none.", False, False),
        ("There is not a dog", False, False),
        ("Yes. But not here.", True, False),
        ("Maybe", True, True),
        ("", True, True),
        ("YES!", True, False),
    ],
)
def test_what_says_neither_counts_as_yes(answer, is_yes, is_neither):
    assert (says_yes(answer), says_neither(answer)) == (is_yes, is_neither)


@pytest.mark.parametrize(
    ("expected", "is_yes"),
    [
        (["Yes"], True),
        (["no.", "No"], False),
        (["yes", "no"], None),
        (["two"], None),
        (["yes it is"], None),
        ([], None),
    ],
)
def test_a_question_of_yes_and_no_has_one_truth(expected, is_yes):
    assert true_yes(expected) is is_yes


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_f1_is_the_mean_of_precision_and_recall(pairs):
    """POPE's own sums, where it does not divide by 0."""
    right = sum(true and said for true, said in pairs)
    num_said, num_true = sum(said for _, said in pairs), sum(true for true, _ in pairs)
    score = f1_of_yes(pairs)
    if right:
        precision, recall = right / num_said, right / num_true
        assert score == pytest.approx(2 * precision * recall / (precision + recall), abs=TOLERANCE)
    else:
        assert score == (0.0 if num_said or num_true else None)
