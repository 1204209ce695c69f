"""Captions against references: CIDEr-D (Vedantam et al., CVPR 2015), BLEU-4 (Papineni et al., ACL 2002) and `exact`.

These are our own on purpose: the usual package, pycocoevalcap, needs Java for its tokenizer.

`md3cli.evaluate` alone imports this file, when a run has captions to score: boxes need none of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from md3cli.evaluate.located import coverage_notes, has_failed
from md3cli.evaluate.scores import Scores, Section, Verdict, ratio
from md3cli.evaluate.truth import Captions
from md3cli.finished.names import match_images
from md3cli.records import RecordDict

MAX_N = 4  # longest n-gram
CIDER_SIGMA = 6.0  # words of difference in length after which a caption loses 40 %
CIDER_SCALE = 10.0

NGram = tuple[str, ...]
Counts = Counter[NGram]


# ---- captions -------------------------------------------------------------------------------------


def score_captions(records: Sequence[RecordDict], truth: Captions) -> Iterator[Section]:
    """Score captions, and yield a section for each length that the records have.

    Raises:
        InputError: the records are about other images.
    """
    pictured = [record for record in records if record["image"] is not None]
    for length in dict.fromkeys(str(record.get("length") or "normal") for record in pictured):
        yield _score_length(length, [r for r in pictured if (r.get("length") or "normal") == length], truth)


def _score_length(length: str, records: Sequence[RecordDict], truth: Captions) -> Section:
    names = [record["image"] for record in records]
    matches = match_images(names, truth.captions)
    images = matches.found
    scored = {images[record["image"]]: record for record in records if record["image"] in images}
    candidates = [words(str(record.get("caption") or "")) for record in scored.values()]
    references = [[words(text) for text in truth.captions[name]] for name in scored]
    is_exact = [one in known for one, known in zip(candidates, references, strict=True)]
    ciders = cider_d(candidates, references)
    scores: Scores = {
        "CIDEr-D": ratio(sum(ciders), len(ciders)),
        "BLEU-4": bleu(candidates, references) if candidates else None,
        "exact": ratio(sum(is_exact), len(is_exact)),
    }
    counts = {
        "images": len(scored),
        "failed": sum(map(has_failed, scored.values())),
        "references": sum(map(len, references)),
        "words": sum(map(len, candidates)),
    }
    answered = [(r, right) for r, right in zip(scored.values(), is_exact, strict=True) if not has_failed(r)]
    verdicts = {record["id"]: Verdict(right) for record, right in answered if right}
    notes = (*coverage_notes("image", names, truth.captions, matches), *truth.notes)
    if len(scored) < 2:
        notes += ("CIDEr-D weighs words by how rare they are among the images; it means nothing for one image",)
    return Section(f"captions ({length})", "CIDEr-D", scores, counts, notes=notes, verdicts=verdicts)


def _ngrams(tokens: Sequence[str], n: int) -> Counts:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Return the CIDEr-D of each candidate, 0 to 10; document frequencies are those of `references`."""
    totals = [0.0] * len(candidates)
    for n in range(1, MAX_N + 1):
        rarity = _Rarity(references, n)
        for index, (candidate, known) in enumerate(zip(candidates, references, strict=True)):
            vector = rarity.weigh(_ngrams(candidate, n))
            for reference in known:
                likeness = _clipped_cosine(vector, rarity.weigh(_ngrams(reference, n)))
                apart = len(candidate) - len(reference)
                totals[index] += likeness * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2)) / len(known)
    return [CIDER_SCALE * total / MAX_N for total in totals]


class _Rarity:
    """Inverse document frequencies of n-grams; a document is all references of an image."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], n: int) -> None:
        self._documents = Counter(
            ngram for known in references for ngram in {ngram for tokens in known for ngram in _ngrams(tokens, n)}
        )
        self._log_num = math.log(max(len(references), 1))

    def weigh(self, counts: Counts) -> dict[NGram, float]:
        """Return the tf-idf of each n-gram."""
        return {  # an n-gram that no reference has weighs as one that a single document has
            ngram: count * (self._log_num - math.log(max(self._documents[ngram], 1))) for ngram, count in counts.items()
        }


def _clipped_cosine(candidate: Mapping[NGram, float], reference: Mapping[NGram, float]) -> float:
    product = sum(  # clipped: to say a word more often than the reference does brings nothing
        min(weight, reference[ngram]) * reference[ngram] for ngram, weight in candidate.items() if ngram in reference
    )
    norms = math.sqrt(sum(w * w for w in candidate.values()) * sum(w * w for w in reference.values()))
    return product / norms if norms else 0.0


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Return the BLEU-4 of the whole corpus, 0 to 1, against the closest reference's length, without smoothing."""
    right, said = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for candidate, known in zip(candidates, references, strict=True):
        length += len(candidate)
        reference_length += min((abs(len(tokens) - len(candidate)), len(tokens)) for tokens in known)[1]
        for n in range(1, MAX_N + 1):
            counts, most = _ngrams(candidate, n), Counts()
            for tokens in known:
                most |= _ngrams(tokens, n)
            right[n - 1] += (counts & most).total()
            said[n - 1] += counts.total()
    if not all(right):
        return 0.0
    brevity = min(0.0, 1 - reference_length / length)
    return math.exp(brevity + sum(math.log(r / s) for r, s in zip(right, said, strict=True)) / MAX_N)


# ---- words of a caption --------------------------------------------------------------------------

_SPELLINGS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "£": "#", "€": "$", "½": "1/2", "¼": "1/4", "¾": "3/4"}
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"'}
# coco-caption means to drop brackets and does not.
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_ENTITY = re.compile("|".join(_ENTITIES))
# The rules for what captions hold, found by comparison with pycocoevalcap 1.2 on 599 texts of words, signs, numbers
# and quotes: 97 in 100 come out the same.
_WORD = re.compile(
    r"""
    </?[a-z][^<>\s]*>                                        # a tag
    | (?:https?://|www\.)[^\s"<>|]*[^\s"<>|.!?,:;()-]       # an address
    | [\w.]{1,64}@\w+(?:\.\w+)+
    | \w+\.(?:jpe?g|png|gif|txt|html?|pdf|com|org|net)(?!\w)
    | (?:[^\W\d_]\.){2,}                                     # u.s., a.m.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|corp|ltd|prof|ave|blvd|rd|mt)\.(?!\w)
    | no\.(?=\s*\d)
    | (?:can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:gim|lem)(?=me\b))
    | [odl]['’](?=[^\W\d_]{2})(?!ll\b|re\b|ve\b)[^\W\d_]+(?='s\b|\b)
    | y'(?=all\b)
    | 'n'
    | '(?:\d\ds|s|m|d|re|ve|ll|n')(?!\w) | 't(?=is\b|was\b) | 'n(?!\w)
    | n't(?!\w)
    | [^\W\d_]+(?=n't(?!\w))
    | (?<!\w)\d+:\d+(?=[ap]m\b)                            # 10:30am
    | [-+]?(?<!\w)(?:\d+(?:[.,:/]\d+)+|\.\d+|\d+)(?![\w-])
    | (?<=\w)\.\d+(?:\.\d+)*
    | (?-i:[A-Z]+(?:&[A-Z]+)+)
    | (?:[#@](?=[^\W\d]))?\w+(?:[-/!?]\w+)*(?:\+\+|\#(?!\w))?
    | [:;=]-?[()]
    | [?!]{2,} | \*+ | \#+ | @+ | _+
    | [()\[\]{}]
    | [^\w\s.?!,:;'"`…–—\U00010000-\U0010ffff-]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """Return the words and signs (`#`, `&`) of `text`, lower case.

    Sentence punctuation, quotes and dashes are dropped.
    """
    plain = _ENTITY.sub(lambda entity: _ENTITIES[entity[0]], text).translate(_SPELLINGS)
    return [word.lower().translate(_BRACKETS) for word in _WORD.findall(plain)]
