"""The records and run.json of a run on disk, also of a run.json that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import Program, make_pictures

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


def test_the_time_of_joining_is_not_that_of_the_run(tmp_path):
    """Ranks do the records; the last one's start has none of them, and a rate of it would be a thousandfold."""
    document = {"starts": [{"elapsed_s": 0.02}], "counts": {"ok": 36, "failed": 0, "errors": {}}}
    (tmp_path / "run.json").write_text(json.dumps(document | {"timeline": [[0.02, 0]]}))
    assert load_run_info(tmp_path / "records.jsonl").elapsed_s is None


# ---- each command says what rubbish says, or refuses it in words ---------------------------------


RUBBISH = {
    "deep": '{"starts":' + "[" * 100_000 + "]" * 100_000 + "}",
    "huge whole numbers": '{"schema":"md3-run/1","starts":[{"elapsed_s":1' + "0" * 400 + "}]}",
    "too many digits": '{"schema":"md3-run/1","starts":[{"elapsed_s":' + "9" * 5000 + "}]}",
    "huge numbers": '{"schema":"md3-run/1","counts":{"ok":1e999,"failed":-1e999},"records":{"bytes":1e999}}',
    "not numbers": '{"schema":"md3-run/1","counts":{"ok":NaN},"timeline":[[NaN,Infinity]],"stages":{"a":NaN}}',
    "lists for objects": '{"schema":"md3-run/1","identity":[],"counts":[],"stages":[],"records":[]}',
    "objects for lists": '{"schema":"md3-run/1","starts":{},"timeline":{},"arguments":{}}',
    "texts for all": '{"schema":"md3-run/1","identity":"","starts":"","timeline":"","counts":"","records":"","root":3}',
    "wrong items": '{"schema":"md3-run/1","starts":[1,null,[]],"timeline":[1,[],[1]],"root":["/"],"seal":{}}',
    "no object": "[null]",
}


@pytest.mark.process
@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH.keys())
def test_no_run_json_ends_in_an_unexpected_error(md3: Program, tmp_path: Path, content: str) -> None:
    pictures, out = make_pictures(tmp_path / "pictures", 3), tmp_path / "run"
    md3("detect", pictures, "x", "-o", out)
    records = (out / "records.jsonl").read_bytes()
    commands = [
        ("verify", out),
        ("status", out),
        ("report", out, "-o", tmp_path / "report.html"),
        ("export", out, "-f", "coco", "-o", tmp_path / "coco.json", "--overwrite"),
        ("detect", pictures, "x", "-o", out),
    ]
    for command in commands:
        (out / "run.json").write_text(content)
        result = md3(*command)
        assert result.exit_code in (0, 1, 2), (command, result.stderr)
        assert "unexpected" not in result.stderr
        assert "Traceback" not in result.stderr
    assert (out / "records.jsonl").read_bytes() == records, "no record is lost"


def test_a_run_json_too_long_is_refused_in_words(md3: Program, tmp_path: Path) -> None:
    pictures, out = make_pictures(tmp_path / "pictures", 3), tmp_path / "run"
    md3("detect", pictures, "x", "-o", out)
    with open(out / "run.json", "r+b") as file:
        file.truncate((64 << 20) + 1)  # zeros, that take no room
    refused = md3("detect", pictures, "x", "-o", out)
    assert refused.exit_code == 2
    assert "run.json" in refused.stderr
