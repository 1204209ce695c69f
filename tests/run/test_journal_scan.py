"""Reading records back: quick or line by line, it is the same."""

from __future__ import annotations

import io
import resource
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.finished.digest import digest_of
from md3cli.finished.record_shape import read_record
from md3cli.records import (
    ERROR_TYPES,
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
from md3cli.run.journal import encode_record
from md3cli.run.journal_scan import HEAD, RecordsVerification, journal_lines, scan_journal
from md3cli.run.log import DamagedLines
from md3cli.run.record_index import outcome_code

RUN, QUERY = RunIdentity("m@1"), Request(Task.QUERY, "größer? 🦊")
FACTS = ImageFacts(64, 48, "0" * 64)
Facts = list[tuple[int, bytes, int]]  # offset behind the line, digest, outcome


def record_of(name: str, answer: str, failure: str | None) -> RecordDict:
    image, record_id = ImageItem(name, name), request_id(name, QUERY, RUN)
    if failure is not None:
        return make_record(record_id, image, None, QUERY, RUN, Answer(0, failure=RowFailure(failure, answer)), {})
    return make_record(
        record_id, image, FACTS, QUERY, RUN, Answer(0, {"answer": answer}, "stop", 9, 2), {"error": None}
    )


def read_plainly(data: bytes) -> Facts:
    """Each line judged by itself; of one that is no record, whether its end is."""
    facts: Facts = []
    end = 0
    for line in io.BytesIO(data):
        end += len(line)
        heads = [0, *(at for at in range(1, len(line)) if line.startswith(HEAD, at))]
        records = [read_record(line[at:]) for at in heads] if line.endswith(b"\n") else []
        record = next((record for record in records if record is not None), None)
        if record is not None:
            code = outcome_code(record["error"] and record["error"]["type"])
            facts.append((end, digest_of(record["id"]), code))
    return facts


def read_quickly(data: bytes, block_bytes: int) -> Facts:
    with patch("md3cli.run.journal_scan.BLOCK_BYTES", block_bytes):
        spans = [lines for lines in journal_lines(io.BytesIO(data)) if not isinstance(lines, DamagedLines)]
    return [
        (int(end), digest.tobytes(), int(outcome))
        for span in spans
        for end, digest, outcome in zip(span.ends, span.digests, span.outcomes, strict=True)
    ]


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda line: line,
    lambda line: line.upper().replace(b"MD3/1", b"md3/1"),
    lambda line: line.replace(b"{", b"[", 1),
    lambda line: line[:60] + line,
    lambda line: line[:-20] + b"\xff" + line[-20:],
    lambda line: line[:-20] + b"\x1b" + line[-20:],
    lambda line: line.replace(b'"prompt":"', b'"prompt":"\x7f'),
    lambda line: b"",
    lambda line: line + b" ",
    lambda line: line.replace(b'"id":"', b'"id":7,"was":"'),
    lambda line: line.replace(b'"id":"', b'"id":"g', 1),
    lambda line: line.replace(b'"id":"', b'"id":"00', 1),
    lambda line: HEAD + b'short","error":null}',
    lambda line: HEAD + b'%s","error":null}' % (b"0F" * 16),
    lambda line: b'{"schema":"md3/1","error":null}',
    lambda line: line.replace(b"null}", b"nul}"),
    lambda line: b"[1]",
]


@pytest.mark.process
@given(
    st.lists(
        st.tuples(
            st.text(max_size=9),
            st.text(max_size=99),
            st.none() | st.none() | st.sampled_from(sorted(ERROR_TYPES)),
            st.sampled_from([0] * len(DAMAGES) + list(range(len(DAMAGES)))),
        ),
        max_size=8,
    ),
    st.integers(1, 2000),
    st.integers(0, 60),
)
def test_quick_reading_agrees_with_parsing_each_line(
    records: list[tuple[str, str, str | None, int]], block_bytes: int, cut: int
) -> None:
    lines = []
    for name, answer, failure, damage in records:
        line = encode_record(record_of(name, answer, failure)).rstrip(b"\n")
        lines.append(DAMAGES[damage](line) + b"\n")
    data = b"".join(lines)
    data = data[: len(data) - cut]
    assert read_quickly(data, block_bytes) == read_plainly(data)


@pytest.mark.slow
def test_a_million_records_are_read_back_in_seconds(tmp_path: Path) -> None:
    path, count, name = tmp_path / "out.jsonl", 1_000_000, "a.jpg"
    # With a key `error` in its `meta`, as the others here have, a line is read by itself, ten times as slowly.
    record = encode_record({**record_of(name, "x" * 200, None), "meta": {"split": "train"}})
    head, tail = record.split(request_id(name, QUERY, RUN).encode())
    with open(path, "wb") as file:
        file.writelines(head + digest_of(str(i)).hex().encode() + tail for i in range(count))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with open(path, "rb", buffering=0) as file:
        found, end, damaged = scan_journal(file)
    assert (len(found), end, damaged) == (count, path.stat().st_size, [])
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000


def test_a_verification_names_some_damaged_places_and_counts_the_rest(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    good = encode_record(record_of("a", "b", None))
    records.write_bytes((b"damaged\n" + good) * 23)
    found = list(RecordsVerification(records).findings())
    assert [finding for finding in found if "is no whole record" in finding] == found[:20]
    assert found[20] == "3 more places are damaged"
