"""English nouns in the singular: by rules, with the exceptions that pictures show.

A wrong singular makes a name that is asked for in vain, so what is not sure stays as it is.
"""

from __future__ import annotations


def words_of(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


_PLURALS = dict(
    pair.split(":")
    for pair in words_of("""
    people:person children:child men:man women:woman feet:foot teeth:tooth geese:goose mice:mouse oxen:ox
    knives:knife leaves:leaf shelves:shelf wolves:wolf loaves:loaf halves:half wives:wife calves:calf scarves:scarf
    thieves:thief elves:elf hooves:hoof cacti:cactus lenses:lens gases:gas canvases:canvas irises:iris quizzes:quiz
    axes:axe shoes:shoe toes:toe canoes:canoe ties:tie pies:pie taxis:taxi skis:ski kiwis:kiwi bikinis:bikini""")
)
_NO_PLURALS = words_of("""
    glasses sunglasses eyeglasses scissors pants trousers jeans shorts binoculars goggles pliers tongs tweezers
    tights leggings pajamas pyjamas clothes headphones earphones series species gas lens canvas atlas christmas
    rhinoceros chaos news texas overalls dominoes""")
_IE_WORDS = words_of("""
    cookies movies zombies hoodies selfies brownies smoothies birdies necktie neckties bowties magpies collies
    veggies genies pixies""")
_MEN_WORDS = words_of("specimen abdomen ramen acumen regimen stamen omen")
_SHE_WORDS = words_of("quiches avalanches caches moustaches mustaches horseshoes snowshoes oboes fuses muses")


def singular(word: str) -> str:
    """Return an English noun in lower case as one of its kind is called; other words, and "glasses", stay."""
    before, hyphen, last = word.rpartition("-")
    if hyphen:
        return before + hyphen + singular(last)
    if word in _NO_PLURALS or not (word.isascii() and word.isalpha()):
        return word
    for plural, single in (("children", "child"), ("women", "woman"), ("people", "person")):
        if word.endswith(plural):
            return word.removesuffix(plural) + single
    if word in _PLURALS:
        return _PLURALS[word]
    if word.endswith("men") and len(word) > 4 and word not in _MEN_WORDS:
        return f"{word[:-3]}man"
    return without_s(word)


def without_s(word: str) -> str:
    """Return a word as if it were an ordinary plural: without its s, of "glasses" too."""
    if len(word) < 3 or not word.endswith("s") or word.endswith(("ss", "us", "is", "'s")):
        return word
    if word.endswith("ies") and len(word) > 4 and word not in _IE_WORDS:
        return f"{word[:-3]}y"
    is_es = word.endswith(("sses", "uses", "xes", "ches", "shes", "oes")) and not word.endswith("ouses")
    return word[:-2] if is_es and word not in _SHE_WORDS else word[:-1]
