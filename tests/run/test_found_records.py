"""What stands in a journal, asked in any order: the same answers as from a dict."""

from __future__ import annotations

import resource
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.run.record_index import FoundRecords, outcome_code

# Few of them, some alike in their first eight bytes or in their last.
digests = st.builds(lambda first, second: first * 8 + second * 8, *[st.sampled_from([b"a", b"b", b"\0", b"\xff"])] * 2)
outcomes = st.sampled_from([None, "io", "decode"])


def found_in(lines: list[tuple[bytes, str | None]]) -> FoundRecords:
    return FoundRecords(b"".join(digest for digest, _ in lines), bytes(outcome_code(outcome) for _, outcome in lines))


@given(st.lists(st.tuples(digests, outcomes)), st.lists(digests))
def test_the_last_record_of_a_request_counts(lines: list[tuple[bytes, str | None]], asked: list[bytes]) -> None:
    found, plain = found_in(lines), dict(lines)
    assert len(found) == len(plain)
    assert found.has_superseded == (len(plain) < len(lines))
    assert found.num_ok == sum(outcome is None for outcome in plain.values())
    assert found.num_failed == Counter(outcome for outcome in plain.values() if outcome is not None)
    for digest in [*asked, *plain, *reversed(plain), *asked]:
        place = found.place_of(digest)
        assert place == (list(plain).index(digest) if digest in plain else None)
        if place is not None:
            assert found.is_ok(place) == (plain[digest] is None)
            assert found.is_failed(place) == (plain[digest] is not None)


@given(st.lists(st.tuples(digests, outcomes), min_size=1), st.data())
def test_what_is_done_again_counts_no_more(lines: list[tuple[bytes, str | None]], data: st.DataObject) -> None:
    plain = dict(lines)
    found = found_in(list(plain.items()))
    redone = data.draw(st.sampled_from(list(plain)))
    place = found.place_of(redone)
    assert place is not None
    found.supersede(place)
    assert found.has_superseded
    assert not found.is_ok(place)
    assert not found.is_failed(place)
    assert found.num_ok + sum(found.num_failed.values()) == len(plain) - 1


@pytest.mark.slow
def test_ten_million_records_fit() -> None:
    count = 10_000_000
    chooser = np.random.default_rng(1)
    digests, codes = chooser.bytes(16 * count), bytes(count)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = FoundRecords(digests, codes)
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    assert found.place_of(digests[-16:]) == count - 1
    assert peak_mb + len(digests) / 2**20 < 600
