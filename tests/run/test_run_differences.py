"""How the difference between two runs is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from md3cli.records import Request, RunIdentity, Task
from md3cli.run.run_info import differences, identity_of

RUN = RunIdentity("tiny@0")
CIRCLE, STAR = Request(Task.DETECT, "circle"), Request(Task.DETECT, "star")
SHORT, LONG = Request(Task.CAPTION, length="short"), Request(Task.CAPTION, length="long")
WHY = Request(Task.QUERY, "Why?")
SAME = "word " * 40


def told(before: list[Request], now: list[Request]) -> list[str]:
    return differences(identity_of(before, RUN, "/a"), identity_of(now, RUN, "/a"))


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([CIRCLE], [CIRCLE], []),
        ([CIRCLE], [CIRCLE, STAR], ["it has detect circle; you now ask detect star as well"]),
        ([CIRCLE, STAR], [CIRCLE], ["it has detect circle and detect star; you now ask only detect circle"]),
        ([CIRCLE], [STAR], ["it has detect circle; you now ask detect star"]),
        (
            [CIRCLE, STAR],
            [STAR, CIRCLE],
            [
                "it has detect circle and detect star; you now ask the same in another order: "
                "detect star and detect circle"
            ],
        ),
        ([SHORT], [LONG], ["it has caption short; you now ask caption long"]),
        ([SHORT], [SHORT, WHY, LONG], ['it has caption short; you now ask query "Why?" and caption long as well']),
        ([WHY], [WHY, WHY], ['it has query "Why?"; you now ask query "Why?" as well']),
        ([], [CIRCLE], ["it has what the rows of a manifest say; you now ask detect circle"]),
        ([CIRCLE], [], ["it has detect circle; you now ask what the rows of a manifest say"]),
        ([CIRCLE, STAR], [replace(r, temperature=0.3) for r in (CIRCLE, STAR)], ["temperature 0, now 0.3"]),
        ([CIRCLE, STAR], [CIRCLE, replace(STAR, max_objects=3)], ["max-objects 150, now 3 for detect star"]),
        ([WHY], [replace(WHY, reasoning=False)], ["reasoning on, now off"]),
        ([WHY], [replace(WHY, choices=("yes", "no"))], ['choices none, now ["yes", "no"]']),
        (
            [CIRCLE],
            [replace(CIRCLE, seed=4), STAR],
            ["it has detect circle; you now ask detect star as well", "seed 0, now 4 for detect circle"],
        ),
    ],
)
def test_requests_in_words(before: list[Request], now: list[Request], words: list[str]) -> None:
    assert told(before, now) == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "big@1"}, "model tiny@0, now big@1"),
        ({"adapter": "lora"}, "adapter none, now lora"),
        ({"background": "white"}, "background none, now white"),
        ({"root": "/b"}, "the folder of INPUT /a, now /b"),
        ({"ids": "md3/9"}, "the way in which ids are made"),
    ],
)
def test_the_rest_in_words(change: dict[str, Any], words: str) -> None:
    before = identity_of([CIRCLE], RUN, "/a")
    (told,) = differences(before, before | change)
    assert told.startswith(words)


def test_a_plan_tells_of_its_input() -> None:
    identity = identity_of([CIRCLE], RUN, "/a")
    before = {"identity": identity, "input": {"inputs": ["photos"], "limit": None, "follow_links": False}}
    now = {"identity": identity, "input": {"inputs": ["pics"], "limit": 5, "follow_links": True}}
    assert differences(before, now) == [
        'INPUT ["photos"], now ["pics"]',
        "limit none, now 5",
        "follow-links off, now on",
    ]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([WHY], [replace(WHY, prompt=SAME + "one"), replace(WHY, prompt=SAME + "two")]),
        ([replace(WHY, prompt=SAME + "one")], [replace(WHY, prompt=SAME + "two")]),
        ([replace(WHY, prompt=SAME + "one")], [replace(WHY, prompt=SAME + "one"), replace(WHY, prompt=SAME + "two")]),
    ],
)
def test_long_texts_are_told_apart(before: list[Request], now: list[Request]) -> None:
    (words,) = told(before, now)
    has, _, ask = words.partition("; you now ask ")
    assert has.removeprefix("it has ") != ask.removesuffix(" as well")
    assert "two" in ask
    assert len(words) < 300


def test_long_values_are_told_apart() -> None:
    run = identity_of([CIRCLE], RUN, "/a")
    (words,) = differences(run | {"root": "/data" * 50 + "x"}, run | {"root": "/data" * 50 + "y"})
    assert words == "the folder of INPUT …/data/data/data/datax, now …/data/data/data/datay"


def test_many_requests_are_not_all_named() -> None:
    many = [replace(CIRCLE, prompt=f"thing {number}") for number in range(2000)]
    (words,) = told([CIRCLE], [CIRCLE, *many])
    assert words.endswith("detect thing 5 and 1,994 more as well")


@pytest.mark.parametrize("requests", [None, 3, "x", [3], [None], [{}], [{"task": {}, "prompt": []}], {"a": 1}, [[[]]]])
def test_an_identity_that_anybody_wrote_is_told_too(requests: object) -> None:
    run = identity_of([CIRCLE], RUN, "/a")
    (words,) = differences(run | {"requests": requests}, run)[:1]
    assert words
    assert "\x1b" not in "".join(differences(run | {"\x1b[2J": "\x1b"}, run))
