"""What stands in a journal, asked in any order: the same answers as from a dict, and the same ids."""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import Program, make_pictures, records_of

from md3cli.finished.digest import digest_of
from md3cli.records import ImageItem, Request, RunIdentity, SourceRow, Task, request_id
from md3cli.run.record_index import RecordIndex, RequestIds, outcome_code

# Few of them, some alike in their first eight bytes or in their last.
digests = st.builds(lambda first, second: first * 8 + second * 8, *[st.sampled_from([b"a", b"b", b"\0", b"\xff"])] * 2)
outcomes = st.sampled_from([None, "io", "decode"])


def found_in(lines: list[tuple[bytes, str | None]]) -> RecordIndex:
    return RecordIndex(b"".join(digest for digest, _ in lines), bytes(outcome_code(outcome) for _, outcome in lines))


@given(st.lists(st.tuples(digests, outcomes)), st.lists(digests))
def test_the_last_record_of_a_request_counts(lines: list[tuple[bytes, str | None]], asked: list[bytes]) -> None:
    found, plain = found_in(lines), dict(lines)
    assert len(found) == len(plain)
    assert found.has_replaced == (len(plain) < len(lines))
    assert found.num_ok == sum(outcome is None for outcome in plain.values())
    assert found.num_failed == Counter(outcome for outcome in plain.values() if outcome is not None)
    for digest in [*asked, *plain, *reversed(plain), *asked]:
        place = found.find(digest)
        assert place == (list(plain).index(digest) if digest in plain else None)
        if place is not None:
            assert found.is_ok(place) == (plain[digest] is None)
            assert found.is_failed(place) == (plain[digest] is not None)


@given(st.lists(st.tuples(digests, outcomes), min_size=1), st.data())
def test_what_is_done_again_counts_no_more(lines: list[tuple[bytes, str | None]], data: st.DataObject) -> None:
    plain = dict(lines)
    found = found_in(list(plain.items()))
    redone = data.draw(st.sampled_from(list(plain)))
    place = found.find(redone)
    assert place is not None
    found.mark_replaced(place)
    assert found.has_replaced
    assert not found.is_ok(place)
    assert not found.is_failed(place)
    assert found.num_ok + sum(found.num_failed.values()) == len(plain) - 1


@pytest.mark.slow
def test_ten_million_records_fit() -> None:
    count = 10_000_000
    chooser = np.random.default_rng(1)
    digests, codes = chooser.bytes(16 * count), bytes(count)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = RecordIndex(digests, codes)
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    assert found.find(digests[-16:]) == count - 1
    assert peak_mb + len(digests) / 2**20 < 600


# ---- ids that are made fast ----------------------------------------------------------------------


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


@pytest.mark.process
@given(st.lists(st.tuples(names, st.just(Request(Task.CAPTION)) | requests), max_size=12), st.data())
def test_fast_ids_are_the_ids_of_the_record(asked: list[tuple[str | None, Request]], data: st.DataObject) -> None:
    expected = plain_ids(asked)
    stored = data.draw(st.lists(st.sampled_from(expected), unique=True) if expected else st.just([]))
    in_order = [record_id for record_id in expected if record_id in stored]
    for found_ids in ([], stored, in_order, expected):
        found = RecordIndex(b"".join(map(digest_of, found_ids)), bytes(len(found_ids)))
        ids = RequestIds(RUN, found)
        assert [ids.next_id(*each) for each in asked] == expected
        counter = RequestIds(RUN, found)
        assert [counter.id_of(*each, counter.next_repeat(*each)) for each in asked] == expected


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
@pytest.mark.parametrize("options", [("-o", "out.jsonl"), ("-o", "out/", "--engine", "local")])
@pytest.mark.parametrize("first", [0, 1])
def test_two_files_that_are_shown_alike_are_never_taken_for_each_other(
    md3: Program, tmp_path: Path, options: tuple[str, ...], first: int
) -> None:
    """One file's name holds a byte, the other's its escape; only one is asked at first, then both, then the other."""
    make_pictures(tmp_path, 1)
    exact = [b"\xff.png", rb"\xff.png"]
    for name in exact:
        (tmp_path / os.fsdecode(name)).write_bytes((tmp_path / "p0.png").read_bytes())

    def asked(*names: bytes) -> list[bytes]:
        (tmp_path / "list.txt").write_bytes(b"".join(name + b"\n" for name in names))
        result = md3("caption", "list.txt", *options, "--no-progress")
        assert result.exit_code == 0, result.stderr
        out = tmp_path / options[1]
        found = records_of(out / "records.jsonl" if out.is_dir() else out)
        assert {record["image"] for record in found} == {r"\xff.png"}
        assert len({record["id"] for record in found}) == len(found)
        return [base64.b64decode(r["image_b64"]) if "image_b64" in r else r["image"].encode() for r in found]

    one, other = exact[first], exact[1 - first]
    assert asked(one) == [one]
    if "--engine" in options:  # its plan is of one list
        shutil.rmtree(tmp_path / "out")
        assert asked(one, other) == [one, other]
        return
    assert asked(other) == [one, other]
    assert asked(one, other) == [one, other]
    assert asked(other) == [one, other]


def test_an_ordinary_name_has_the_id_it_always_had() -> None:
    item = ImageItem(r"\xff.png", "x")
    assert SourceRow(item, ()).id_name == item.name
    assert request_id(item.name, Request(Task.CAPTION), RUN) == "6203cd3d85660ae8c52543389521c57d"


@pytest.mark.parametrize("inputs", [("a/c", "b/c"), ("a/c", "a/c.tar"), ("a/*.tar",)])
def test_pictures_called_alike_in_several_places_are_pictures_of_their_own(
    md3: Program, tmp_path: Path, inputs: tuple[str, ...]
) -> None:
    for folder in ("a/c", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        make_pictures(tmp_path / folder, 1)
    for name in ("c", "d"):
        with tarfile.open(tmp_path / f"a/{name}.tar", "w") as tar:
            tar.add(tmp_path / "b/c/p0.png", "p0.png")
    result = md3("caption", *inputs, "-o", "out.jsonl", "--no-progress")
    assert result.exit_code == 0, result.stderr
    found = records_of(tmp_path / "out.jsonl")
    assert [len({record[key] for record in found}) for key in ("image", "id")] == [2, 2]
    assert md3("export", "out.jsonl", "-f", "coco", "-o", "coco.json").exit_code == 0
    images = json.loads((tmp_path / "coco.json").read_bytes())["images"]
    assert {image["file_name"] for image in images} == {record["image"] for record in found}
    assert len({image["id"] for image in images}) == 2


def test_a_parquet_table_of_questions_is_asked_without_q(md3: Program, tmp_path: Path) -> None:
    make_pictures(tmp_path, 2)
    asked = [("p0.png", "How many?"), ("p1.png", "Which colour?")]
    images, prompts = zip(*asked, strict=True)
    pq.write_table(pa.table({"image": images, "prompt": prompts}), tmp_path / "x.parquet")
    result = md3("query", "x.parquet", "--quiet")
    assert result.exit_code == 0, result.stderr
    found = records_of(result.stdout)
    assert [(record["image"], record["prompt"], record["task"]) for record in found] == [
        (*row, "query") for row in asked
    ]
