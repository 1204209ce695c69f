"""JSON Lines: the records again, whole."""

from __future__ import annotations

import json

from datasets import load_dataset
from finished_runs import Run


def test_every_record_is_copied_and_a_torn_tail_is_not(detect_run: Run) -> None:
    lines = detect_run.records.read_bytes()
    detect_run.records.write_bytes(lines + b'{"schema":"md3/1","im')
    report, out = detect_run.export("jsonl", "copy.jsonl")
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == [
        json.loads(line) for line in lines.splitlines()
    ]
    assert report.num_records == len(lines.splitlines())
    assert "\\u" not in out.read_text(encoding="utf-8")


def test_datasets_reads_it(detect_run: Run, tmp_path_factory) -> None:
    _, out = detect_run.export("jsonl", "copy.jsonl")
    rows = load_dataset("json", data_files=str(out), cache_dir=str(tmp_path_factory.mktemp("cache")), split="train")
    assert rows[2]["objects"][0]["label"] == "dog"
