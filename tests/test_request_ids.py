"""Ids made fast are the ids of the record, whatever stands in OUTPUT already."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from md3cli.digest_set import digest_of
from md3cli.found_records import FoundRecords
from md3cli.records import Request, RunIdentity, Task, request_id
from md3cli.request_ids import RequestIds

RUN = RunIdentity("m@1")
names = st.none() | st.sampled_from("abc") | st.text(max_size=5)
requests = st.builds(
    Request,
    st.sampled_from(Task),
    st.none() | st.text(max_size=5),
    temperature=st.floats(0, 2),
    spatial_refs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=2).map(tuple),
)


def plain_ids(asked: list[tuple[str | None, Request]]) -> list[str]:
    """One after the other, as the record's section says."""
    return [request_id(*each, RUN, repeat=asked[:i].count(each)) for i, each in enumerate(asked)]


@given(st.lists(st.tuples(names, st.just(Request(Task.CAPTION)) | requests), max_size=12), st.data())
def test_fast_ids_are_the_ids_of_the_record(asked: list[tuple[str | None, Request]], data: st.DataObject) -> None:
    expected = plain_ids(asked)
    stored = data.draw(st.lists(st.sampled_from(expected), unique=True) if expected else st.just([]))
    in_order = [record_id for record_id in expected if record_id in stored]
    for found_ids in ([], stored, in_order, expected):
        found = FoundRecords(b"".join(map(digest_of, found_ids)), bytes(len(found_ids)))
        ids = RequestIds(RUN, found)
        assert [ids.next_id(*each) for each in asked] == expected
        counter = RequestIds(RUN, found)
        assert [counter.id_of(*each, counter.next_repeat(*each)) for each in asked] == expected
