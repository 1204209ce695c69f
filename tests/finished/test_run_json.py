"""finished_run: the records and run.json of a run on disk."""

from __future__ import annotations

import json

import pytest

from md3cli.errors import InputError
from md3cli.finished.run_json import find_records, load_run_info


def test_a_run_folder_stands_for_its_records(tmp_path):
    with pytest.raises(InputError, match="no records at"):
        find_records(tmp_path)
    (tmp_path / "records.jsonl").touch()
    assert find_records(tmp_path) == find_records(tmp_path / "records.jsonl") == tmp_path / "records.jsonl"


def test_a_document_stands_for_the_records_it_was_made_from(tmp_path):
    document, journal = tmp_path / "boxes.json", tmp_path / "boxes.json.records.jsonl"
    document.touch()
    assert find_records(document) == document, "records of another name"
    journal.touch()
    assert find_records(document) == find_records(journal) == journal


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


def test_times_are_read_from_all_starts_and_damage_is_nothing(tmp_path):
    records = tmp_path / "records.jsonl"
    document = {"starts": [{"elapsed_s": 2.5}, {"elapsed_s": None}, {"elapsed_s": 4}], "stages": {"decode": 1.5}}
    (tmp_path / "run.json").write_text(json.dumps(document | {"timeline": [[1, 10], [2, 30]]}))
    run = load_run_info(records)
    assert (run.elapsed_s, run.stages_s, run.timeline) == (6.5, {"decode": 1.5}, [(1.0, 10.0), (2.0, 30.0)])
    (tmp_path / "run.json").write_text('{"starts": 3, "stages": [], "timeline": [[1], "x"], "root": 7}')
    run = load_run_info(records)
    assert (run.elapsed_s, run.stages_s, run.timeline, run.root) == (None, {}, [], None)
