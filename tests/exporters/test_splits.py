"""Sets for training: shares, groups that stay together, the same answer whatever stands around a picture."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import UsageError
from md3cli.exporters.splits import ONE_SET, Sets, Splits

HALF = (("train", 0.8), ("val", 0.15), ("test", 0.05))


@given(st.text(max_size=50))
def test_every_picture_is_in_one_set_and_stays_there(name: str) -> None:
    assert Splits(HALF).of(name, []) == Splits(HALF).of(name, [{"x": 1}])
    assert Splits(HALF).of(name, []) in Splits(HALF).names


def test_the_shares_come_out() -> None:
    counts = Counter(Splits(HALF).of(f"photos/{number}.jpg", []) for number in range(20_000))
    for name, share in HALF:
        assert abs(counts[name] / 20_000 - share) < 0.01


def test_a_larger_share_keeps_who_was_in_it() -> None:
    small, large = Splits((("train", 0.6), ("val", 0.4))), Splits((("train", 0.8), ("val", 0.2)))
    names = [f"{number}.jpg" for number in range(500)]
    assert {name for name in names if small.of(name, []) == "train"} <= {
        name for name in names if large.of(name, []) == "train"
    }


def test_an_empty_share_gets_nothing() -> None:
    splits = Splits((("train", 0.0), ("val", 1.0)))
    assert {splits.of(str(number), []) for number in range(1000)} == {"val"}


@given(st.lists(st.sampled_from(["a", "b", "c", "d/e", ""]), min_size=1, max_size=40))
def test_folders_stay_together(folders: list[str]) -> None:
    splits = Splits(HALF, "folder")
    found: dict[str, set[str]] = {}
    for number, folder in enumerate(folders):
        name = f"{folder}/{number}.jpg" if folder else f"{number}.jpg"
        found.setdefault(folder, set()).add(splits.of(name, []))
    assert all(len(sets) == 1 for sets in found.values())


def test_values_of_a_column_stay_together_and_what_has_none_is_told() -> None:
    sets = Sets(Splits((("train", 0.5), ("val", 0.5)), "patient"))
    found: dict[int, set[str]] = {}
    for number in range(200):
        found.setdefault(number % 20, set()).add(sets.add(f"{number}.png", [{}, {"meta": {"patient": number % 20}}]))
    assert all(len(names) == 1 for names in found.values())
    assert {name for names in found.values() for name in names} == {"train", "val"}
    sets.add("alone.png", [{"meta": None}])
    notes = list(sets.notes())
    assert notes[0].startswith("sets: train ")
    assert "1 pictures have no 'patient'" in notes[1]


def test_a_column_that_no_picture_has_is_refused() -> None:
    sets = Sets(Splits((("train", 0.5), ("val", 0.5)), "pati\nent"))
    assert list(sets.notes()) == ["sets: train 0, val 0"]  # no pictures, nothing to keep together
    sets.add("a.png", [{"meta": {"other": 1}}])
    with pytest.raises(UsageError, match=r"no picture has a column pati\\x0aent"):
        list(sets.notes())


def test_a_whole_number_is_one_value_however_it_is_written() -> None:
    splits = Splits(HALF, "site")
    for number in range(100):
        assert splits.of("a.png", [{"site": number}]) == splits.of("b.png", [{"site": float(number)}])


def test_a_set_that_no_picture_fell_to_is_told() -> None:
    sets = Sets(Splits((("train", 1.0), ("val", 1e-9), ("test", 0.0))))
    sets.add("a.png", [])
    assert [note for note in sets.notes() if "no picture fell to val," in note]


def test_two_sets_that_a_program_takes_for_one_are_refused() -> None:
    called = {"val": "valid"}
    assert Sets(Splits((("train", 0.5), ("val", 0.5)))).folders(called, "it") == {"train": "train", "val": "valid"}
    assert Sets(None).folders(called, "it") == {"": ""}
    with pytest.raises(UsageError, match="val and Valid are one set for it"):
        Sets(Splits((("val", 0.5), ("Valid", 0.5)))).folders(called, "it")


def test_without_splits_there_is_one_set_and_it_is_said() -> None:
    sets = Sets(None)
    assert (sets.add("a.jpg", []), sets.names, list(sets.notes())) == ("", ("",), [])  # one cannot be parted
    assert (sets.add("b.jpg", []), list(sets.notes())) == ("", [ONE_SET])


def test_a_picture_that_was_not_written_is_in_no_set() -> None:
    """Nor is it one that nothing keeps together; yet the column that it has is a column of the records."""
    sets = Sets(Splits((("train", 0.5), ("val", 0.5)), "site"))
    sets.place("missing.png", [{"meta": {"site": 7}}])
    sets.place("missing too.png", [{"meta": {}}])
    sets.add("alone.png", [{"meta": {}}])
    assert (sets.counts.total(), list(sets.notes())[-1]) == (
        1,
        "1 pictures have no 'site' to keep them together; each stands alone",
    )
