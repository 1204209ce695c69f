"""A run.json that anybody may have written: each command that reads it says what it says, or refuses in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import Program, isolate, make_pictures

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


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    isolate(monkeypatch, tmp_path / "home")
    return Program(monkeypatch)


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
