"""Whether a text of the model is of use: one pure function tells loops, refusals and texts that were cut off.

Nothing is stored: who selects, counts or shows asks again. Source: product contract, section 9.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from md3cli.records import RecordDict
from md3cli.refine.refusals import QUOTATION, is_refusal

QUALITIES = ("loop", "refusal", "cut")
_LONGEST_PERIOD = 64  # words
_REPEATS = 4  # so often the same words one after another are a loop
_FEWEST_WORDS = 8  # "no no no no" is an answer
_COUNTED_REPEATS, _COUNTED_WORDS = 8, 3  # where a number in them changes; "Room 1, Room 2, ..." has fewer words
_GRAM, _CHARACTERS_GRAM = 4, 6  # words, or characters where these are words
_WINDOW, _ALIKE = 60, 36  # of sixty such runs so many came shortly before
_SENTENCE_REPEATS, _LONG_SENTENCE = 3, 4  # words

_SYLLABIC = "\u0e00-\u0eff\u3040-\u309f\u3400-\u9fff\uf900-\ufaff"  # written without blanks: each character is a word
# A short quotation is one word: what a sign repeats is not the model's.
_WORDS = re.compile(rf"{QUOTATION}|[{_SYLLABIC}]|[^\W{_SYLLABIC}]+|([^\w\s])\1*")
_CHARACTER = re.compile(f"[{_SYLLABIC}]")
_STUTTER = re.compile(r"([^\W\d_]{1,8}?)\1{15,}|(\S{1,8}?)\2{99,}")
_LIST_MARKER = re.compile(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+", re.MULTILINE)
_SENTENCE_ENDS = re.compile(r"[.!?。！？\n]+")
_TABLE = re.compile(r"[{|<]")  # of JSON, Markdown and HTML, where much repeats that says nothing


def qualities_of(record: RecordDict) -> tuple[str, ...]:
    """Return which of `loop`, `refusal` and `cut` a record's text is; none for a record of objects or a failure.

    `cut`: the text, or the reasoning before it, was ended by the limit of tokens. `loop`: the text, or the reasoning,
    repeats itself (`is_looping`). `refusal`: it begins by saying that it will not answer (`is_refusal`).
    """
    text = record.get("caption") if record.get("task") == "caption" else record.get("answer")
    if record.get("error") is not None or not isinstance(text, str):
        return ()
    reasoning = record.get("reasoning") or {}
    is_cut = "length" in (record.get("finish_reason"), reasoning.get("finish_reason"))
    is_loop = is_looping(text) or is_looping(str(reasoning.get("text") or ""))
    found = {"loop": is_loop, "refusal": is_refusal(text), "cut": is_cut}
    return tuple(name for name in QUALITIES if found[name])


def is_looping(text: str) -> bool:
    """Return whether a text repeats itself instead of going on.

    It does if the same words come again and again, if words do in which only a number changes, if nearly all of a long
    stretch has just been there, or if most of its sentences are repeats.
    """
    text = _LIST_MARKER.sub("", text).casefold()
    words = [match[0] for match in _WORDS.finditer(text)]
    is_table = _TABLE.search(text) is not None
    if _STUTTER.search(text) or _goes_round(words, is_table):
        return True
    return not is_table and (_counts_on(words) or _is_much_alike(words) or _repeats_sentences(text))


def _goes_round(words: Sequence[str], is_table: bool) -> bool:
    """Return whether words are repeated one after another.

    Signs alone must be half of all. In a table words must be, too, or go on to the end.
    """
    for period in range(1, min(_LONGEST_PERIOD, len(words) // _REPEATS) + 1):
        end, length = _longest_repeat(words, period)
        if length >= max(_FEWEST_WORDS, _REPEATS * period):
            is_said = any(map(_is_word, words[end - period : end]))
            if (is_said and (not is_table or end > len(words) - period)) or 2 * length >= len(words):
                return True
    return False


def _counts_on(words: Sequence[str]) -> bool:
    """Return whether the same words are repeated with other numbers: "Image 1 shows a cat. Image 2 shows a cat."."""
    words = ["0" if word.isdecimal() else word for word in words]
    for period in range(_COUNTED_WORDS, min(_LONGEST_PERIOD, len(words) // _COUNTED_REPEATS) + 1):
        end, length = _longest_repeat(words, period)
        repeated = words[end - period : end]
        if length >= _COUNTED_REPEATS * period and sum(map(_is_word, repeated)) >= _COUNTED_WORDS:
            return True
    return False


def _is_word(word: str) -> bool:
    return any(map(str.isalpha, word))


def _longest_repeat(words: Sequence[str], period: int) -> tuple[int, int]:
    """Return (end, number of words) of the longest stretch in which each word is the one `period` words before."""
    end = longest = run = 0
    for at, (word, before) in enumerate(zip(words[period:], words, strict=False), period + 1):
        run = run + 1 if word == before else 0
        if run > longest:
            end, longest = at, run
    return end, longest + period if longest else 0


def _is_much_alike(words: Sequence[str]) -> bool:
    """Return whether most runs of a few words in a stretch of sixty came shortly before."""
    length = _CHARACTERS_GRAM if 2 * sum(1 for word in words if _CHARACTER.match(word)) > len(words) else _GRAM
    last: dict[tuple[str, ...], int] = {}
    known: list[bool] = []
    for at in range(len(words) - length + 1):
        gram = tuple(words[at : at + length])
        known.append(at - last.get(gram, at - _LONGEST_PERIOD - 1) <= _LONGEST_PERIOD)
        last[gram] = at
        if sum(known[-_WINDOW:]) >= _ALIKE:
            return True
    return False


def _repeats_sentences(text: str) -> bool:
    """Return whether sentences that come three times or more are most of a text; the chorus of a song is not."""
    sentences = [tuple(match[0] for match in _WORDS.finditer(part)) for part in _SENTENCE_ENDS.split(text)]
    counts = Counter(filter(None, sentences))
    repeated = sum(n for said, n in counts.items() if n >= _SENTENCE_REPEATS and len(said) >= _LONG_SENTENCE)
    return 2 * repeated > counts.total()
