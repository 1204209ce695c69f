"""The journal: what is on disk after kills, cuts, full disks, retries; and that reading it back is exact."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from md3cli.errors import OutputError, OutputMismatchError
from md3cli.records import (
    Answer,
    ImageFacts,
    ImageItem,
    RecordDict,
    Request,
    RowFailure,
    RunIdentity,
    Task,
    make_record,
    request_id,
)
from md3cli.run.journal import Journal, encode_record

FACTS = ImageFacts(640, 480, "0" * 64)
RUN = RunIdentity(model="tiny@0")
QUERY = Request(Task.QUERY, "was ist größer als 東京? 🦊")

several_examples = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def record_of(name: str, answer: str = "größer 東京 🦊", failure: str | None = None) -> RecordDict:
    record_id = request_id(name, QUERY, RUN)
    image = ImageItem(name, name)
    if failure is not None:
        failed = Answer(0, failure=RowFailure(failure, "no \x1b luck"))
        return make_record(record_id, image, None, QUERY, RUN, failed, {})
    answered = Answer(0, {"answer": answer}, "stop", 9, 2)
    return make_record(record_id, image, FACTS, QUERY, RUN, answered, {"schema": "md3/1", "id": "in meta"})


def lines_of(count: int) -> list[bytes]:
    return [encode_record(record_of(f"ä{i}.jpg")) for i in range(count)]


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit status (negative: the signal that killed it)."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the parent's tests must not go on here
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- appending and resuming ------------------------------------------------------------------------


def test_what_was_appended_is_there_and_known_on_the_next_start(tmp_path: Path) -> None:
    good, bad = record_of("a.jpg"), record_of("b.jpg", failure="decode")
    with Journal.open(tmp_path / "new" / "out.jsonl") as journal:
        journal.append([good, bad])
        assert (journal.num_ok, journal.num_failed) == (1, {"decode": 1})
    with Journal.open(tmp_path / "new" / "out.jsonl") as journal:
        assert journal.state(good["id"]) == "ok"
        assert journal.state(bad["id"]) == "failed"
        assert journal.state(record_of("c.jpg")["id"]) is None
        assert journal.first_record == good
        assert (journal.num_ok, journal.num_failed, journal.cut_bytes) == (1, {"decode": 1}, 0)
    assert [json.loads(line) for line in (tmp_path / "new/out.jsonl").read_bytes().splitlines()] == [good, bad]


def test_overwrite_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"anything at all")
    with Journal.open(path, mode="overwrite") as journal:
        assert journal.num_ok == 0
        journal.append([record_of("a.jpg")])
    assert path.read_bytes() == encode_record(record_of("a.jpg"))


def test_a_lone_surrogate_does_not_reach_the_file() -> None:
    assert json.loads(encode_record(record_of("a.jpg", answer="cut \ud83e"))) == record_of("a.jpg", answer="cut ?")


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_cut_at_every_byte_keeps_the_whole_lines_and_a_resume_completes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)  # 2,000 of them take long, and nobody cuts the power
    path, lines = tmp_path / "out.jsonl", lines_of(4)
    whole = b"".join(lines)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Journal.open(path) as journal:
            kept = [i for i in range(4) if journal.state(record_of(f"ä{i}.jpg")["id"]) == "ok"]
            assert kept == list(range(whole[:cut].count(b"\n")))
            assert journal.cut_bytes == cut - len(b"".join(lines[: len(kept)]))
            journal.append([record_of(f"ä{i}.jpg") for i in range(len(kept), 4)])
        assert path.read_bytes() == whole


@pytest.mark.process
@several_examples
@given(start=st.integers(0, 3000), length=st.integers(1, 5000))
def test_zeros_from_a_power_cut_lose_only_the_lines_they_hit(tmp_path: Path, start: int, length: int) -> None:
    path, lines = tmp_path / "out.jsonl", lines_of(9)
    whole = bytearray(b"".join(lines))
    start %= len(whole)
    whole[start : start + length] = bytes(len(whole[start : start + length]))
    path.write_bytes(whole)
    end, untouched = 0, []
    for line in lines:
        untouched += [line] if whole[end : end + len(line)] == line else []
        end += len(line)
    with Journal.open(path, is_ours=True) as journal:
        assert journal.num_ok == len(untouched)
        journal.settle()
    assert path.read_bytes() == b"".join(untouched)


DAMAGES = {
    "glued": lambda line: line[:60] + line,  # two records, as an append behind a torn tail does
    "not utf-8": lambda line: line[:-20] + b"\xff" + line[-20:],
    "control": lambda line: line[:-20] + b"\x1b" + line[-20:],
    "blank": lambda line: b"",
    "id of another type": lambda line: line.replace(b'"id":"', b'"id":7,"was":"'),
    "no end": lambda line: line.replace(b'"error":null', b'"error":{"type":"decode"'),
    "deep": lambda line: b"[" * 100_000,
    "a list": lambda line: b"[1]",
    "another schema": lambda line: line.replace(b"md3/1", b"md3/0"),
    "a key changed": lambda line: line.replace(b'"width"', b'"widthX"'),
    "a key missing": lambda line: line.replace(b'"width":640,', b""),
    "a key twice": lambda line: line.replace(b'"width":640', b'"width":640,"width":640'),
    "a key twice in meta": lambda line: line.replace(b'"id":"in meta"', b'"schema":"in meta"'),
    "nan": lambda line: line.replace(b'"width":640', b'"width":NaN'),
    "infinite": lambda line: line.replace(b'"width":640', b'"width":1e999'),
    "huge": lambda line: line.replace(b'"width":640', b'"width":1' + b"0" * 400),
    "digits without end": lambda line: line.replace(b'"width":640', b'"width":1' + b"0" * 9_000),
    "a text": lambda line: line.replace(b'"width":640', b'"width":"640"'),
    "true": lambda line: line.replace(b'"width":640', b'"width":true'),
    "half a character": lambda line: line.replace(b'"answer":"', b'"answer":"\\ud83e'),
    "upper case": lambda line: line[:24] + line[24:56].upper() + line[56:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("at", [0, 2])
def test_damage_costs_its_line_only_and_is_copied(tmp_path: Path, damage: Callable[[bytes], bytes], at: int) -> None:
    path, lines = tmp_path / "out.jsonl", lines_of(5)
    bad = damage(lines[at].rstrip()) + b"\n"
    is_glued = bad.endswith(lines[at])
    path.write_bytes(b"".join([*lines[:at], bad, *lines[at + 1 :]]))
    for _ in range(2):  # killed after the first
        with Journal.open(path) as journal:
            assert journal.num_ok == (5 if is_glued else 4)
            assert [(lines.first, lines.last) for lines in journal.damaged] == [(at + 1, at + 1)]
            assert (journal.state(record_of(f"ä{at}.jpg")["id"]) == "ok") == is_glued
    copied = (tmp_path / "out.jsonl.damaged").read_bytes()
    assert copied == (bad[:60] + b"\n" if is_glued else bad), "once"
    with Journal.open(path) as journal:
        journal.settle()
    assert path.read_bytes() == b"".join(line for line in lines if is_glued or line != lines[at])


def test_a_line_that_is_too_long_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.run.journal_scan.LINE_LIMIT_BYTES", 3000)
    monkeypatch.setattr("md3cli.run.journal_scan.BLOCK_BYTES", 500)
    path, lines = tmp_path / "out.jsonl", lines_of(5)
    path.write_bytes(b"".join([*lines[:2], b"x" * 9999 + b"\n", *lines[2:]]))
    with Journal.open(path) as journal:
        assert (journal.num_ok, journal.damaged[0].first, len(journal.damaged)) == (5, 3, 1)
        journal.settle()
    assert path.read_bytes() == b"".join(lines)


def test_what_other_tools_write_is_whole(tmp_path: Path) -> None:
    record = record_of("a.jpg") | {"width": 640.0, "caption": None, "objects": None}
    (tmp_path / "out.jsonl").write_text(json.dumps(record, indent=None) + "\n")
    with Journal.open(tmp_path / "out.jsonl") as journal:
        assert (journal.num_ok, journal.damaged) == (1, [])


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"schema":"md3/2","id":"0"}\n', b"[1]\n", b"\x89PNG\r\n"]
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(OutputMismatchError, match="holds something else"):
        Journal.open(path)
    assert path.read_bytes() == content


# -- failures of the disk ----------------------------------------------------------------------------


def test_a_full_disk_leaves_whole_lines_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    with Journal.open(path) as journal:
        journal.append([record_of("a.jpg")])
        real_write, calls = os.write, []

        def full(fd: int, data: bytes) -> int:
            calls.append(len(data))
            if len(calls) == 1:
                return real_write(fd, data[:100])  # what a disk does before it is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OutputError, match=r"out\.jsonl: No space left on device; make space"):
                journal.append([record_of("b.jpg"), record_of("c.jpg")])
        assert path.read_bytes() == encode_record(record_of("a.jpg"))
        journal.append([record_of("b.jpg")])
    assert path.read_bytes() == b"".join(encode_record(record_of(name)) for name in ("a.jpg", "b.jpg"))


@pytest.mark.process
def test_the_file_size_limit_stops_the_run_and_a_resume_goes_on(tmp_path: Path) -> None:
    path, lines = tmp_path / "out.jsonl", lines_of(50)

    def write_all() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with Journal.open(path) as journal:
            for i in range(50):
                journal.append([record_of(f"ä{i}.jpg")])

    def expect_error() -> None:
        with pytest.raises(OutputError, match="File too large"):
            write_all()

    assert in_child(expect_error) == 0
    num_kept = 5000 // len(lines[0])
    assert path.read_bytes() == b"".join(lines[:num_kept])
    with Journal.open(path) as journal:
        assert (journal.num_ok, journal.cut_bytes) == (num_kept, 0)


def kill_writers(path: Path, times: int, chooser: random.Random) -> None:
    """Kill a writer at random points; it goes on each time. Nothing reported may be lost, doubled or torn."""
    expected = [f"ä{i}.jpg" for i in range(100_000)]
    num_before = 0
    for _ in range(times):
        reported, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            with Journal.open(path) as journal:
                for i in range(journal.num_ok, len(expected), 7):
                    journal.append([record_of(name, answer="x" * 1000) for name in expected[i : i + 7]])
                    os.write(report, b".")
            os._exit(0)
        os.close(report)
        os.read(reported, 1)
        time.sleep(chooser.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        num_reported = 1
        while data := os.read(reported, 65536):
            num_reported += len(data)
        os.close(reported)
        with Journal.open(path) as journal:
            assert journal.num_ok >= num_before + 7 * num_reported
            num_before = journal.num_ok
    names = [json.loads(line)["image"] for line in path.read_bytes().splitlines()]
    assert names == expected[:num_before]


@pytest.mark.process
def test_sigkill_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    kill_writers(tmp_path / "out.jsonl", 6, random.Random(6))


@pytest.mark.slow
def test_sigkill_many_times_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    kill_writers(tmp_path / "out.jsonl", 100, random.Random(100))


# -- the lock ----------------------------------------------------------------------------------------


def test_a_second_run_on_the_same_output_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to(path)
    with Journal.open(path) as journal:
        assert journal.is_locked
        for name in (path, tmp_path / "link.jsonl"):
            with pytest.raises(OutputError, match=f"process {os.getpid()} on {socket.gethostname()}"):
                Journal.open(name, mode="overwrite")
        journal.append([record_of("a.jpg")])
    with Journal.open(path) as journal:
        assert journal.num_ok == 1
    assert (tmp_path / "out.jsonl.lock").exists()


@pytest.mark.process
def test_a_killed_run_holds_no_lock(tmp_path: Path) -> None:
    def hold_and_die() -> None:
        Journal.open(tmp_path / "out.jsonl")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold_and_die) == -signal.SIGKILL
    Journal.open(tmp_path / "out.jsonl").close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.jsonl")
    for path in (tmp_path / "out.jsonl", tmp_path, Path("/dev/null")):
        with pytest.raises(OutputError, match="not a regular file"):
            Journal.open(path, lock_path=tmp_path / "lock")


# -- doing failures again ------------------------------------------------------------------------------


@pytest.mark.process
@several_examples
@given(st.lists(st.sampled_from(["ok", "io", "decode"]), max_size=12), st.data())
def test_after_a_retry_each_request_stands_once_in_input_order(
    tmp_path: Path, first: list[str], data: st.DataObject
) -> None:
    path = tmp_path / "out.jsonl"
    names = [f"{i}.jpg" for i in range(len(first))]

    def attempt(name: str, outcome: str, answer: str) -> RecordDict:
        return record_of(name, answer, None if outcome == "ok" else outcome)

    with Journal.open(path, mode="overwrite") as journal:
        journal.append([attempt(name, outcome, "first") for name, outcome in zip(names, first, strict=True)])
    final = [attempt(name, outcome, "first") for name, outcome in zip(names, first, strict=True)]
    with Journal.open(path) as journal:
        for i, name in enumerate(names):
            if journal.state(final[i]["id"]) == "failed":
                final[i] = attempt(name, data.draw(st.sampled_from(["ok", "io", "timeout"])), "second")
                journal.append([final[i]])
        assert journal.found.has_replaced == any(outcome != "ok" for outcome in first)
    with Journal.open(path) as journal:  # killed before the rewrite: the next start knows
        assert journal.found.has_replaced == any(outcome != "ok" for outcome in first)
        journal.settle()
        assert not journal.found.has_replaced
        assert journal.num_ok == sum(record["error"] is None for record in final)
        assert sum(journal.num_failed.values()) == sum(record["error"] is not None for record in final)
        journal.append([record_of("last.jpg")])
    assert path.read_bytes() == b"".join(map(encode_record, [*final, record_of("last.jpg")]))
