"""What one answer is worth beside its true ones, as papers with published numbers define it; pure functions, 0 to 1.

Each follows the paper and the script that its numbers are made with; where the two differ, the docstring says which
counts. Knows nothing of records and files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from md3cli.errors import InputError

ANLS_THRESHOLD = 0.5
LONGEST_COMPARED_CHARS = 100_000  # of a text in `anls`: two of them take four seconds
RELATIVE_TOLERANCE = 0.05  # of `relaxed`
FULL_AGREEMENT = 3  # so many people who say the same make a VQA answer wholly right

# ---- ANLS -----------------------------------------------------------------------------------------


def anls(answer: str, expected: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity to the nearest true answer; 0 where half or more is different.

    Case does not count, nor how many blanks there are. Scene Text Visual Question Answering (Biten et al., ICCV 2019),
    the metric of DocVQA. An answer of which exactly half is different scores 0, as in the paper and in the package
    `anls`; the script of the Robust Reading Competition gives it 0.5.

    Raises:
        InputError: texts of more than `LONGEST_COMPARED_CHARS` are to be compared.
    """
    said = _with_single_blanks(answer)
    return max((_similarity(said, _with_single_blanks(text)) for text in expected), default=0.0)


def _with_single_blanks(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(said: str, wanted: str) -> float:
    longest = max(len(said), len(wanted))
    if said == wanted:
        return 1.0
    if abs(len(said) - len(wanted)) >= ANLS_THRESHOLD * longest:  # at least so many letters are missing
        return 0.0
    if longest > LONGEST_COMPARED_CHARS:
        raise InputError(f"anls compares texts of at most {LONGEST_COMPARED_CHARS:,} characters; here are {longest:,}")
    difference = edit_distance(said, wanted) / longest
    return 1 - difference if difference < ANLS_THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Return the fewest letters to insert, delete or replace that make `first` of `second` (Levenshtein, 1966).

    A column of the table of distances stands in two whole numbers, a bit a letter of `first`: where it rises by one,
    and where it falls (Myers, J. ACM 1999, as Hyyrö wrote it in 2003). So a letter of `second` costs a few operations.
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for index, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << index
    distance, last, all_bits = len(first), 1 << (len(first) - 1), (1 << len(first)) - 1
    rises, falls = all_bits, 0
    for letter in second:
        same = places.get(letter, 0)
        diagonal = (((same & rises) + rises) ^ rises) | same | falls
        rises_across = falls | (all_bits & ~(diagonal | rises))
        falls_across = diagonal & rises
        distance += bool(rises_across & last) - bool(falls_across & last)
        rises_across = rises_across << 1 | 1
        rises = (falls_across << 1 | ~(diagonal | rises_across)) & all_bits
        falls = rises_across & diagonal & all_bits
    return distance


# ---- relaxed accuracy ------------------------------------------------------------------------------


def is_relaxed_right(answer: str, expected: Iterable[str]) -> bool:
    """Return whether an answer is a true one, or a number at most 5 % of it away.

    A text must be the same, whatever its case. `14%` is 0.14. ChartQA (Masry et al., ACL Findings 2022), as the script
    of Pix2Struct (Lee et al., ICML 2023) reads it: `1,000` is a text, and beside a true 0 texts count, not numbers.
    Only blanks around a text do not count here, and what is no finite number is a text.
    """
    return any(_is_near(answer.strip(), text.strip()) for text in expected)


def _is_near(said: str, wanted: str) -> bool:
    number, true_number = _as_number(said), _as_number(wanted)
    if number is None or not true_number:
        return said.lower() == wanted.lower()
    return abs(number - true_number) / abs(true_number) <= RELATIVE_TOLERANCE


def _as_number(text: str) -> float | None:
    """Return the number that all of a text is; None where it is something else, or not finite."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ---- soft VQA accuracy -----------------------------------------------------------------------------

_PUNCTUATION = frozenset(';/[]"{}()=+\\_-><@`,?!')
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the script means to pass re.UNICODE, which lands in the place of `count`
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
# The contractions of the script: each of its entries is one of these with one apostrophe left out. (`somebody'd` it
# turns the other way round, which compares the same.)
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WITH_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """Return how much of an answer is right by what several people said: min(others who said so / 3, 1).

    The mean over all ways to leave one of the people out. Making the V in VQA Matter (Goyal et al., CVPR 2017) and its
    official script, with the texts as `vqa_text` makes them. The script compares them as they are where all people gave
    the very same text, so that "Yes." is wrong beside ten times "yes"; the published description does not, nor do we.
    With fewer than 4 people even the best answer scores less than 1, with one it scores 0.
    """
    said, there = vqa_text(answer), [vqa_text(text) for text in expected]
    num_same, num_all = there.count(said), len(there)
    without_one_of_them = num_same * min(1.0, (num_same - 1) / FULL_AGREEMENT)
    without_another = (num_all - num_same) * min(1.0, num_same / FULL_AGREEMENT)
    return (without_one_of_them + without_another) / num_all


def vqa_text(text: str) -> str:
    """Return a text as VQA compares it: lower case, number words as digits, no articles, apostrophes put back.

    A sign of punctuation goes, and leaves a blank only where the text has it nowhere beside a blank and has no comma
    between digits. A period stays before a digit.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    closes_up = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for sign in _PUNCTUATION.intersection(text):
        is_beside_blank = f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if closes_up or is_beside_blank else " ")
    plain = _PERIOD.sub("", plain, count=_MOST_PERIODS)
    words = (_DIGITS.get(word, word) for word in plain.lower().split())
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


# ---- yes or no -------------------------------------------------------------------------------------

_NO_WORDS = frozenset({"No", "no", "not"})
_WORD = re.compile(r"\w+")
_SIGNS = re.compile(r"[\W_]+")


def says_yes(answer: str) -> bool:
    """Return whether POPE reads an answer as yes: its first sentence has none of the words `No`, `no` and `not`.

    So an answer that says neither is a yes. Evaluating Object Hallucination in Large Vision-Language Models (Li et al.,
    EMNLP 2023), read word by word as its script does.
    """
    return _NO_WORDS.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))


def says_neither(answer: str) -> bool:
    """Return whether an answer that POPE reads as yes has no such word anywhere."""
    return says_yes(answer) and "yes" not in (word.casefold() for word in _WORD.findall(answer))


def true_yes(expected: Iterable[str]) -> bool | None:
    """Return whether the true answers are all yes; None where they are not all yes and not all no."""
    said = {_SIGNS.sub("", text).casefold() for text in expected}
    return {"yes": True, "no": False}.get(said.pop()) if len(said) == 1 else None


def f1_of_yes(pairs: Iterable[tuple[bool, bool]]) -> float | None:
    """Return the F1 of yes in (true, said) pairs; None where yes is neither true nor said anywhere."""
    pairs = list(pairs)
    num_wrong = sum(true != said for true, said in pairs)
    num_right = sum(true and said for true, said in pairs)
    return 2 * num_right / (2 * num_right + num_wrong) if num_right + num_wrong else None
