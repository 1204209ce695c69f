"""finished_run: records, run.json and pictures of a run on disk."""

from __future__ import annotations

import base64
import json
import os

import pytest

from md3cli.errors import ImageError, InputError
from md3cli.finished_run import find_records, load_run_info, picture_of, read_records

RECORD = {"image": "a.jpg", "task": "detect", "prompt": "car", "objects": []}


def test_records_come_in_the_order_of_the_file_without_a_torn_tail(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(RECORD | {"prompt": name}) for name in ("one", "two", "three")]
    path.write_text("\n".join(lines) + '\n{"image": "b.j')
    assert [record["prompt"] for record in read_records(path)] == ["one", "two", "three"]
    path.write_text("\n\n".join(lines))  # a whole last line without its newline counts
    assert len(list(read_records(path))) == 3


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"image": "a"}', '{"task": "detect"}', '{"image": "a", "task": []}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"line 2 of records\.jsonl"):
        list(read_records(path))


def test_a_run_folder_stands_for_its_records(tmp_path):
    with pytest.raises(InputError, match="no records at"):
        find_records(tmp_path)
    (tmp_path / "records.jsonl").touch()
    assert find_records(tmp_path) == find_records(tmp_path / "records.jsonl") == tmp_path / "records.jsonl"


@pytest.mark.parametrize(
    ("records_name", "run_name"),
    [
        ("records.jsonl", "run.json"),
        ("cars.jsonl", "cars.jsonl.run.json"),
        ("cars.json.records.jsonl", "cars.json.run.json"),
    ],
)
def test_run_json_is_found_beside_the_records(tmp_path, records_name, run_name):
    assert load_run_info(tmp_path / records_name).root is None
    (tmp_path / run_name).write_text('{"root": "/data/cars"}')
    assert str(load_run_info(tmp_path / records_name).root) == "/data/cars"
    (tmp_path / run_name).write_text("{")
    with pytest.raises(InputError, match=r"is not JSON"):
        load_run_info(tmp_path / records_name)


def test_a_name_that_is_not_utf8_is_opened_by_its_bytes(tmp_path):
    raw = b"caf\xe9.jpg"
    item = picture_of({"image": "caf\\xe9.jpg", "image_b64": base64.b64encode(raw).decode()}, tmp_path)
    assert os.fsencode(item.path) == os.fsencode(tmp_path) + b"/" + raw
    with pytest.raises(ImageError):
        picture_of({"image": "x", "image_b64": "?"}, tmp_path)


@pytest.mark.parametrize(
    ("name", "error_type"),
    [
        ("../secret.png", "outside_root"),
        ("/etc/x.png", "outside_root"),
        ("https://a/b.png", "not_found"),
        (None, "not_found"),
    ],
)
def test_a_confined_root_is_not_left(tmp_path, name, error_type):
    with pytest.raises(ImageError) as caught:
        picture_of({"image": name}, tmp_path, is_confined=True)
    assert caught.value.type == error_type
