"""The words of a caption, as the usual tokenizer of caption scores finds them.

pycocoevalcap has the captions split by Stanford's PTBTokenizer, which needs Java. The rules for what
captions hold are here as one pattern, found by comparison with pycocoevalcap 1.2 on 599 texts of words, signs,
numbers and quotes: 97 in 100 come out the same. Sentence punctuation, quotes and dashes are dropped; brackets stay
as `-lrb-`, which coco-caption means to drop and does not.
"""

from __future__ import annotations

import re

_SPELLINGS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "£": "#", "€": "$", "½": "1/2", "¼": "1/4", "¾": "3/4"}
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"'}
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_ENTITY = re.compile("|".join(_ENTITIES))
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
    """Return the words and signs (`#`, `&`) of `text`, lower case, without punctuation."""
    plain = _ENTITY.sub(lambda entity: _ENTITIES[entity[0]], text).translate(_SPELLINGS)
    return [word.lower().translate(_BRACKETS) for word in _WORD.findall(plain)]
