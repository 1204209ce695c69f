"""Answers in any order, records in the order asked; what a killed start leaves waiting is written by the next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tickets import ticket

from md3cli.console.summary import Summary
from md3cli.records import Answer, RecordDict, RowFailure, RunIdentity
from md3cli.run.feed import Place
from md3cli.run.journal import encode_record
from md3cli.run.order import SLACK_LINES, OrderedRecords, WaitingRecords


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


# -- the file of those that wait ------------------------------------------------------------------------


class Start:
    """One start of a run: the records written so far are in `written`, answers come by hand."""

    def __init__(self, folder: Path, written: list[RecordDict], *, is_fresh: bool = False) -> None:
        done = {record["id"] for record in written}
        (folder / "o.jsonl").write_bytes(b"".join(map(encode_record, written)))
        self.waiting = WaitingRecords(folder / "o.jsonl", is_done=done.__contains__, is_fresh=is_fresh)
        self.records = OrderedRecords(RunIdentity("m@1"), written.extend, Summary(), self.waiting)

    def ask(self, keys: range, num_before: int) -> list[int]:
        """Tell of requests, counted anew from 0 as each start does; those that the engine must answer."""
        left = []
        for key in keys:
            asked = ticket(key)
            asked.key, asked.place = key - num_before, Place(key - num_before)
            if not self.records.recall(asked):
                self.records.expect(asked)
                left.append(asked.key)
        return left

    def answer(self, *keys: int) -> None:
        for key in keys:
            self.records.answer(Answer(key, {"caption": f"caption {key}"}, "stop", 5, 2))
        self.records.flush()


@given(order=st.permutations(range(8)), stop=st.integers(0, 8))
def test_no_answer_is_asked_for_twice(tmp_path_factory: Any, order: list[int], stop: int) -> None:
    folder, written = tmp_path_factory.mktemp("early"), []
    first = Start(folder, written)
    first.ask(range(8), 0)
    for key in order[:stop]:
        first.answer(key)  # then a kill: nothing is closed
    second, num_written = Start(folder, written), len(written)
    left = second.ask(range(num_written, 8), num_written)
    assert sorted(key + num_written for key in left) == sorted(order[stop:])
    second.answer(*left)
    assert [record["meta"]["n"] for record in written] == list(range(8))
    second.waiting.remove()
    assert [path.name for path in folder.iterdir()] == ["o.jsonl"]


def test_the_file_does_not_grow_with_the_run(tmp_path: Path) -> None:
    written: list[RecordDict] = []
    start = Start(tmp_path, written)
    num_requests = 20 * SLACK_LINES
    start.ask(range(num_requests), 0)
    most = 0
    for key in range(0, num_requests, 2):
        start.answer(key + 1)
        most = max(most, (tmp_path / "o.jsonl.early").read_bytes().count(b"\n"))
        start.answer(key)
    assert len(written) == num_requests
    assert SLACK_LINES // 2 < most <= SLACK_LINES + 3


@pytest.mark.parametrize("rubbish", [b"", b"[1]\n", b"\xff\n\n{}\n", b'{"schema":"md3/1","id":7}\n', b"[" * 99_999])
def test_a_torn_or_foreign_file_costs_only_what_it_lost(tmp_path: Path, rubbish: bytes) -> None:
    first = Start(tmp_path, [])
    first.ask(range(4), 0)
    first.answer(1, 3)
    path = tmp_path / "o.jsonl.early"
    whole = path.read_bytes()
    head, newline, rest = whole.partition(b"\n")
    path.write_bytes(head + newline + rubbish + rest[:-9])
    second = Start(tmp_path, [])
    is_glued = not rubbish.endswith(b"\n") and rubbish != b""
    assert second.ask(range(4), 0) == [0, 1, 2, 3] if is_glued else [0, 2, 3]
    assert second.ask(range(4, 5), 0) == [4]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: {**record, "tokens": {}},
        lambda record: {**record, "image": "other.png"},
        lambda record: {**record, "id": "f" * 32},
        lambda record: {key: value for key, value in record.items() if key != "caption"},
        lambda record: {**record, "width": "4"},
    ],
    ids=["no tokens", "another image", "another id", "no answer", "a text for a number"],
)
def test_a_record_that_is_not_whole_or_anothers_is_asked_again(tmp_path: Path, change: Any) -> None:
    first = Start(tmp_path, [])
    first.ask(range(2), 0)
    first.answer(1)
    head, line = (tmp_path / "o.jsonl.early").read_bytes().splitlines(keepends=True)
    (tmp_path / "o.jsonl.early").write_bytes(head + encode_record(change(json.loads(line))))
    assert Start(tmp_path, []).ask(range(2), 0) == [0, 1]


def test_beside_another_journal_it_is_not_believed(tmp_path: Path) -> None:
    """The journal may have grown since, and nothing else."""
    written: list[RecordDict] = []
    first = Start(tmp_path, written)
    first.ask(range(1), 0)
    first.answer(0)
    second = Start(tmp_path, written)
    second.ask(range(1, 4), 1)
    second.records.answer(Answer(1, {"caption": "caption 2"}, "stop", 5, 2))
    second.records.flush()
    assert Start(tmp_path, written).ask(range(1, 4), 1) == [0, 2]
    assert Start(tmp_path, []).ask(range(4), 0) == [0, 1, 2, 3], "begun anew"
    changed = [{**written[0], "meta": {"n": 7}}]
    assert Start(tmp_path, changed).ask(range(1, 4), 1) == [0, 1, 2]


def test_overwrite_forgets(tmp_path: Path) -> None:
    first = Start(tmp_path, [])
    first.ask(range(2), 0)
    first.answer(1)
    assert Start(tmp_path, [], is_fresh=True).ask(range(2), 0) == [0, 1]


def test_a_fifo_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "o.jsonl.early")
    assert Start(tmp_path, []).ask(range(1), 0) == [0]


def test_a_disk_that_refuses_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Start(tmp_path, [])
    start.ask(range(4), 0)
    start.answer(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        start.answer(2)
    start.answer(3)
    lines = (tmp_path / "o.jsonl.early").read_bytes().splitlines(keepends=True)
    assert set(lines[1:]) == {encode_record(record) for record in start.records._answers_waiting()}
    assert len(lines) == 4
