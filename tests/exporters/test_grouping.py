"""Records by image: every record once, whatever their order, in bounded memory."""

from __future__ import annotations

import itertools
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from finished_runs import CAR, failure, read_records, record, write_records
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import ExportError, InputError
from md3cli.exporters.grouping import ImageIndex
from md3cli.refine.collection import as_collection


def groups(path: Path) -> list[tuple[str, list[str]]]:
    with closing(ImageIndex(as_collection(path))) as index:
        return [(group.name, [line["id"] for line in group.records]) for group in index.images()]


@pytest.mark.process
@given(names=st.lists(st.sampled_from(["a", "b", "c", "d/é.png"]), min_size=1, max_size=30))
def test_every_record_is_in_its_images_group_in_order(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    path = tmp_path_factory.mktemp("grouping") / "records.jsonl"
    lines = [record(name, "caption", id=str(number), caption="x") for number, name in enumerate(names)]
    write_records(path, lines)
    expected = {name: [line["id"] for line in lines if line["image"] == name] for name in dict.fromkeys(names)}
    assert groups(path) == list(expected.items())


def test_failures_and_text_only_queries_make_no_image(tmp_path: Path) -> None:
    lines = [
        failure("broken.jpg", "detect", "car"),
        record("half.jpg", "caption", id="1", caption="x"),
        failure("half.jpg", "detect", "car"),
        record(None, "query", "Why?", answer="because"),
    ]
    path = write_records(tmp_path / "records.jsonl", lines)
    assert groups(path) == [("half.jpg", ["1"])]
    with closing(ImageIndex(as_collection(path))) as index:
        assert (index.survey.num_records, index.survey.num_failures, index.survey.num_without_image) == (4, 2, 1)


def test_names_that_only_look_equal_are_told_apart(tmp_path: Path) -> None:
    lines = [
        record("\\xff.png", "caption", id="1", image_b64="/y5wbmc=", caption="x"),
        record("\\xff.png", "caption", id="2", caption="x"),
    ]
    assert groups(write_records(tmp_path / "records.jsonl", lines)) == [("\\xff.png", ["1"]), ("\\xff.png", ["2"])]


def test_pictures_of_one_name_are_told_apart_by_their_digest(tmp_path: Path) -> None:
    lines = [
        record("d/a.png", "caption", id="1", sha256="11", caption="x"),
        record("d/a.png", "caption", id="2", sha256="22", caption="x"),
        record("d/a.png", "query", "?", id="3", sha256="11", answer="x"),
    ]
    path = write_records(tmp_path / "records.jsonl", lines)
    assert groups(path) == [("d/a.png", ["1", "3"]), ("d/a.png", ["2"])]
    with closing(ImageIndex(as_collection(path))) as index:
        assert [group.distinct_name for group in index.images()] == ["d/a.png", "d/a.png#2"]
        assert [group.file_name for group in index.images()] == ["d/a.png", "d/a~2.png"]


@pytest.mark.process
def test_a_torn_tail_is_left_out(tmp_path: Path) -> None:
    path = write_records(tmp_path / "records.jsonl", [record("a", "caption", id="1", caption="é")])
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1):
        path.write_bytes(whole + whole[:length])
        assert groups(path) == [("a", ["1"])]


def test_a_last_line_without_newline_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = write_records(tmp_path / "records.jsonl", [record("a", "caption", id="1", caption="x")])
    path.write_bytes(path.read_bytes() + path.read_bytes().replace(b'"1"', b'"2"').rstrip(b"\n"))
    assert groups(path) == [("a", ["1", "2"])]


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b'{"image":"a"}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_a_broken_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = write_records(tmp_path / "records.jsonl", [record("a", "caption", caption="x")])
    path.write_bytes(path.read_bytes() + line + path.read_bytes())
    with pytest.raises(InputError, match="line 2"):
        list(read_records(path))


@pytest.mark.parametrize(
    "damage",
    [
        {"image": 7},
        {"width": 0},
        {"width": "640"},
        {"width": 2**20, "height": 2**20},
        {"objects": [{"label": "car"}]},
        {"objects": {"car": 1}},
        {"objects": [{**CAR, "x_min": "0.5"}]},
        {"objects": [{**CAR, "score": "high"}]},
        {"segments": [{"bbox": CAR}]},
        {"segments": [{"bbox": CAR, "svg_path": 7}]},
        {"points": [[0.1, 0.2]]},
        {"error": "broken"},
        {"meta": []},
        {"caption": ["x"]},
        {"model": ["x"]},
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage: dict[str, object]) -> None:
    path = write_records(tmp_path / "records.jsonl", [record("a", "detect", "car") | damage])
    with pytest.raises(InputError, match="line 1: a damaged record"):
        groups(path)


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record("a", "caption", caption="x\ud800y 😀")) + "\n")
    assert [line["caption"] for line in read_records(path)] == ["x?y 😀"]


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing"):
        ImageIndex(as_collection(tmp_path / "nothing.jsonl"))


def test_no_room_for_sorting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def connect_to_little(name: str) -> sqlite3.Connection:
        database = connect(name)
        database.execute("PRAGMA max_page_count = 4")
        return database

    monkeypatch.setattr(sqlite3, "connect", connect_to_little)
    path = write_records(tmp_path / "records.jsonl", (record(str(n), "caption", caption="x") for n in range(1000)))
    with pytest.raises(ExportError, match="TMPDIR"):
        ImageIndex(as_collection(path))


MEASURE = r"""
import re, sys
from pathlib import Path
from md3cli.exporters import ExportOptions, export_records
export_records(Path(sys.argv[1]), "coco", Path(sys.argv[2]), ExportOptions())
assert "torch" not in sys.modules and "pyarrow" not in sys.modules
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def peak_mib(folder: Path, num_images: int) -> int:
    """Peak memory of a COCO export of scattered records, two for each image."""
    template = record(
        "IMAGE", "detect", "car", objects=[{"label": "car", "x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]
    )
    line = json.dumps(template)
    path = folder / f"{num_images}.jsonl"
    with path.open("w") as file:
        for number in itertools.chain(range(num_images), range(num_images)):
            file.write(line.replace("IMAGE", f"folder/{number:09d}.jpg") + "\n")
    out = folder / f"{num_images}.json"
    done = subprocess.run([sys.executable, "-c", MEASURE, path, out], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.process
def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    small, large = peak_mib(tmp_path, 500), peak_mib(tmp_path, 10_000)
    assert large < small + 12
    assert large < 120
