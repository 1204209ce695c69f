"""Whether a text of the model is of use: one pure function tells loops, refusals and texts that were cut off.

Nothing is stored: who selects, counts or shows asks again. Source: product contract, section 9.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from md3cli.records import RecordDict

QUALITIES = ("loop", "refusal", "cut")
_LONGEST_PERIOD = 24  # words
_REPEATS = 4  # so often the same words one after another are a loop
_FEWEST_WORDS = 8  # "no no no no" is an answer
_SENTENCE_REPEATS, _LONG_SENTENCE = 3, 4  # words
_BEGINNING_CHARS = 160
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:really |very |so )?sorry"
    r"|i (?:cannot|can't|can not|won't|must decline|am (?:unable|not able)|(?:do not|don't) have the ability)"
    r"|i'm (?:unable|not able)|as an ai\b|as a (?:language|vision|visual)"
    r"|(?:unable|not able) to (?:assist|help|comply|provide|answer))"
)
_WORDS = re.compile(r"\w+|[^\w\s]")
_SENTENCE_ENDS = re.compile(r"[.!?\n]+")


def qualities_of(record: RecordDict) -> tuple[str, ...]:
    """Return which of `loop`, `refusal` and `cut` a record's text is; none for a record of objects or a failure.

    `cut`: the text, or the reasoning before it, was ended by the limit of tokens. `loop`: the same words come four
    times or more, one after another, or a sentence three times. `refusal`: it begins by saying that it will not answer.
    """
    text = record.get("caption") if record.get("task") == "caption" else record.get("answer")
    if record.get("error") is not None or not isinstance(text, str):
        return ()
    reasoning = record.get("reasoning") or {}
    is_cut = "length" in (record.get("finish_reason"), reasoning.get("finish_reason"))
    is_loop = is_looping(text) or is_looping(str(reasoning.get("text") or ""))
    found = {"loop": is_loop, "refusal": is_refusal(text), "cut": is_cut}
    return tuple(name for name in QUALITIES if found[name])


def is_refusal(text: str) -> bool:
    """Return whether a text begins by declining to answer."""
    return _REFUSAL.search(text[:_BEGINNING_CHARS].replace("\u2019", "'").casefold()) is not None


def is_looping(text: str) -> bool:
    """Return whether a text repeats itself instead of going on."""
    words = _WORDS.findall(text.casefold())
    if any(_longest_repeat(words, period) >= max(_FEWEST_WORDS, _REPEATS * period) for period in _periods(words)):
        return True
    sentences = (" ".join(sentence.split()).casefold() for sentence in _SENTENCE_ENDS.split(text))
    counts = Counter(sentence for sentence in sentences if sentence.count(" ") >= _LONG_SENTENCE - 1)
    return any(count >= _SENTENCE_REPEATS for count in counts.values())


def _periods(words: Sequence[str]) -> range:
    return range(1, min(_LONGEST_PERIOD, len(words) // _REPEATS) + 1)


def _longest_repeat(words: Sequence[str], period: int) -> int:
    """Return how many words the longest stretch has in which each word is the one `period` words before."""
    longest = run = 0
    for word, before in zip(words[period:], words, strict=False):
        run = run + 1 if word == before else 0
        longest = max(longest, run)
    return longest + period if longest else 0
