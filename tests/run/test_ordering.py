"""Answers in any order, records in the order asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tickets import ticket

from md3cli.console import Summary
from md3cli.records import Answer, RowFailure, RunIdentity
from md3cli.run.order import OrderedRecords


@given(order=st.permutations(range(12)), failed=st.sets(st.integers(0, 11)))
def test_every_record_once_and_in_order(order: list[int], failed: set[int]) -> None:
    written: list[dict[str, Any]] = []
    summary = Summary()
    records = OrderedRecords(RunIdentity("m@1"), written.extend, summary)
    tickets = [ticket(key) for key in range(12)]
    for each in tickets:
        records.expect(each)
    for key in order:
        failure = RowFailure("model", "no") if key in failed else None
        records.answer(Answer(key, None if failure else {"caption": "x"}, "stop", 5, 2, failure))
        records.flush()
        assert [record["meta"]["n"] for record in written] == list(range(len(written)))
        assert summary.num_images == len(written)
    assert [record["image"] for record in written] == [f"{key}.png" for key in range(12)]
    assert {record["meta"]["n"] for record in written if record["error"]} == failed
    assert (summary.num_ok, summary.num_failed) == (12 - len(failed), len(failed))
    assert (summary.prompt_tokens, summary.output_tokens) == (5 * summary.num_ok, 2 * summary.num_ok)
    assert records.has_room(1)


def test_nothing_is_counted_that_was_not_written() -> None:
    def full(_: object) -> None:
        raise OSError

    summary = Summary()
    records = OrderedRecords(RunIdentity("m@1"), full, summary)
    records.fail(ticket(0), RowFailure("io", "x"))
    for _ in range(2):
        try:
            records.flush()
        except OSError:
            assert (summary.num_images, summary.num_failed) == (0, 0)
        else:
            raise AssertionError("kept the record for a second try")


def test_how_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.run.order.BATCHES_AHEAD", 2)
    records = OrderedRecords(RunIdentity("m@1"), lambda _: None, Summary())
    for key in (3, 0, 1):
        records.expect(ticket(key))
    assert (records.has_room(1), records.has_room(2)) == (False, True)  # 3 ahead, and 2 or 4 may be
    records.answer(Answer(0, {"caption": "x"}))
    records.flush()
    assert not records.has_room(1)
    records.answer(Answer(1, {"caption": "x"}))
    records.flush()
    assert records.has_room(1)
