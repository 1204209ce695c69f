"""What OUTPUT has been asked and what a command asks: both together, the difference in words, what to type then."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import OutputMismatchError
from md3cli.records import Request, RunIdentity, Task, request_fields
from md3cli.run.asked import differences, is_grown, new_in, requests_in, together, way_on, with_asked_of, with_option
from md3cli.run.run_info import identity_of

RUN = RunIdentity(model="tiny@0")
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


# ---- both together -------------------------------------------------------------------------------

REQUESTS = st.builds(
    Request,
    st.sampled_from([Task.DETECT, Task.QUERY]),
    st.sampled_from(["circle", "star", "\U0001f7e2", "-x", "a=b"]),
    spatial_refs=st.just(((0.25, 0.5),)),
)
MANY = st.lists(REQUESTS, max_size=8)


@given(MANY, MANY)
def test_the_union_begins_with_what_is_there_and_has_each_once(held: list[Request], asked: list[Request]) -> None:
    both = together(held, asked)
    assert both[: len(held)] == tuple(held)
    assert set(both) == {*held, *asked}
    assert both[len(held) :] == tuple(request for request in asked if request not in held), "in the order typed"
    assert together(both, asked) == together(both, both) == together(both, held) == both, "twice is as good as once"
    assert new_in(asked, both) == ()
    before, now = identity_of(held, RUN, "/a"), identity_of(both, RUN, "/a")
    assert is_grown(before, now) == (len(both) > len(held))
    assert not is_grown(now, before)


@given(MANY)
def test_requests_come_back_from_run_json(requests: list[Request]) -> None:
    assert requests_in(json.loads(json.dumps(identity_of(requests, RUN, "/a")))) == tuple(requests)


@pytest.mark.parametrize("requests", [None, 3, "x", [3], [{}], [{"task": "fly"}], {"a": 1}, [[[]]]])
def test_requests_that_no_run_wrote_are_none(requests: object) -> None:
    assert requests_in({"requests": requests}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"task": "fly"},
        {"prompt": ["x"]},
        {"more": 1},
        {"max_tokens": "many"},
        {"max_tokens": -1},
        {"temperature": None},
        {"spatial_refs": [[2, 3]]},
        {"choices": [1]},
        {"choices": "yes"},
    ],
)
def test_a_changed_request_is_none(change: dict[str, Any]) -> None:
    good = json.loads(json.dumps(request_fields(CIRCLE)))
    assert requests_in({"requests": [good]}) == (CIRCLE,)
    assert requests_in({"requests": [good | change]}) is None
    assert requests_in({"requests": [{key: value for key, value in good.items() if key != next(iter(change))}]}) in (
        None,
        (CIRCLE,),  # a key that was not there
    )


def test_the_same_with_other_settings_is_refused() -> None:
    with pytest.raises(OutputMismatchError, match="OUTPUT has detect star with other settings: max-objects 150, now 3"):
        together([CIRCLE, STAR], [replace(STAR, max_objects=3)])
    assert together([CIRCLE], [replace(STAR, max_objects=3)]) == (CIRCLE, replace(STAR, max_objects=3))
    assert together([SHORT], [LONG]) == (SHORT, LONG)


# ---- what to type then ---------------------------------------------------------------------------

ADD = "To keep what is there and ask what is new as well, type `md3 detect 'my pictures' star -o o/ --add`. "


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([CIRCLE], [CIRCLE, STAR], ADD),
        ([CIRCLE], [STAR], ADD),
        ([CIRCLE, STAR], [STAR, CIRCLE], ADD.replace("keep", "go on with").replace(" and ask what is new as well", "")),
        ([CIRCLE, STAR], [STAR], "For a part of the records, type `md3 select o --prompt star -o PART.jsonl`. "),
        ([CIRCLE, SHORT], [SHORT], "For a part of the records, type `md3 select o --task caption -o PART.jsonl`. "),
        (
            [WHY, CIRCLE],
            [WHY],
            "For a part of the records, type `md3 select o --task query --prompt 'Why?' -o PART.jsonl`. ",
        ),
        ([CIRCLE], [replace(CIRCLE, seed=4), STAR], ""),
        ([], [STAR], ""),
        ([Request(Task.QUERY)], [WHY], ""),
        ([STAR], [], ""),
    ],
)
def test_the_command_that_goes_on(before: list[Request], now: list[Request], words: str) -> None:
    argv = ["md3", "detect", "my pictures", "star", "-o", "o/"]
    assert way_on(identity_of(before, RUN, "/a"), identity_of(now, RUN, "/a"), argv, "o") == words
    plans = [{"identity": identity_of(requests, RUN, "/a"), "input": {}} for requests in (before, now)]
    assert way_on(*plans, argv, "o") == words


def test_what_is_asked_about_objects_grows_too() -> None:
    def asking(*then: Request, **more: float) -> dict[str, Any]:
        return identity_of([CIRCLE], RUN, "/a", {"then": [request_fields(one) for one in then], "pad": 0.1} | more)

    bare, argv = identity_of([CIRCLE], RUN, "/a"), ["md3", "run"]
    assert is_grown(bare, asking(SHORT))
    assert is_grown(asking(SHORT), asking(SHORT, WHY))
    assert not is_grown(asking(SHORT), asking(WHY, SHORT))
    assert not is_grown(asking(SHORT), bare)
    assert with_asked_of(bare, asking(SHORT), is_pad_kept=True) == asking(SHORT)
    assert with_asked_of(asking(SHORT), bare) == bare
    assert with_asked_of(asking(SHORT), asking(WHY, pad=0.5), is_pad_kept=True) == asking(WHY)
    assert way_on(bare, asking(SHORT), argv, "o").endswith("type `md3 run --add`. ")
    assert way_on(bare, asking(SHORT), argv, "o", may_add_then=False) == ""
    assert way_on(asking(SHORT), asking(WHY, pad=0.5), argv, "o") == ""
    assert way_on(asking(SHORT), asking(replace(SHORT, seed=3)), argv, "o") == ""
    assert "--task detect --prompt circle" in way_on(asking(SHORT), bare, argv, "o")
    assert "go on with what is there" in way_on(asking(SHORT, WHY), asking(WHY), argv, "o")


def test_where_more_differs_nothing_can_be_added() -> None:
    before = identity_of([CIRCLE], RUN, "/a")
    assert way_on(before, identity_of([CIRCLE, STAR], RUN, "/b"), ["md3"], "o") == ""
    assert way_on(before | {"requests": [3]}, identity_of([STAR], RUN, "/a"), ["md3"], "o") == ""


def test_an_option_stands_before_what_are_no_options() -> None:
    assert with_option(["md3", "detect", "x", "--", "-y"], "--add") == ["md3", "detect", "x", "--add", "--", "-y"]


def test_a_long_command_is_not_repeated() -> None:
    argv = ["md3", "detect", "x", *map(str, range(1000))]
    words = way_on(identity_of([CIRCLE], RUN, "/a"), identity_of([STAR], RUN, "/a"), argv, "o")
    assert words == "To keep what is there and ask what is new as well, type the same command with --add. "
    many = [replace(CIRCLE, prompt=f"thing {number}") for number in range(20)]
    words = way_on(identity_of([CIRCLE, *many], RUN, "/a"), identity_of(many, RUN, "/a"), argv, "o")
    assert "--prompt 'thing 5' ... -o PART.jsonl" in words
