"""`md3 cache` counts and removes encodings, and compiled code beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.file_cache import COMPILED, FileCache


def md3_cache(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)], prog_name="md3")
    assert result.exit_code == 0, result.output
    return result.stdout


def of_json(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(md3_cache(*arguments, "--json"))
    return found


def fill(folder: Path, *, with_code: bool) -> None:
    FileCache(folder, 1 << 30).put("aa" * 32, bytes(1000))
    if with_code:
        FileCache(folder, 1 << 30, folder=COMPILED).put("bb" * 32, bytes(2000))


def test_code_is_counted_where_there_is_any(tmp_path: Path) -> None:
    fill(tmp_path, with_code=False)
    assert len(md3_cache("info", "--cache-dir", tmp_path).splitlines()) == 1
    assert of_json("info", "--cache-dir", tmp_path)["compiled_bytes"] == 0
    assert not (tmp_path / COMPILED).exists()
    fill(tmp_path, with_code=True)
    encodings, code = md3_cache("info", "--cache-dir", tmp_path).splitlines()
    assert "holds 1 encodings" in encodings
    assert f"{tmp_path / COMPILED}: holds 1 files of compiled code" in code
    found = of_json("info", "--cache-dir", tmp_path)
    assert found["files"] == 1
    assert 1000 < found["bytes"] < 2000 < found["compiled_bytes"] < 3000


def test_prune_and_clear_remove_code_too(tmp_path: Path) -> None:
    for command in (("prune", "--size", "0"), ("clear",)):
        fill(tmp_path, with_code=True)
        assert of_json(*command, "--cache-dir", tmp_path)["compiled_bytes"] > 2000
        found = of_json("info", "--cache-dir", tmp_path)
        assert (found["bytes"], found["compiled_bytes"]) == (0, 0)


def test_clear_removes_what_earlier_versions_compiled(tmp_path: Path) -> None:
    (tmp_path / "inductor" / "fxgraph").mkdir(parents=True)
    (tmp_path / "inductor" / "fxgraph" / "code").write_text("old")
    (tmp_path / "other").mkdir()
    md3_cache("clear", "--cache-dir", tmp_path)
    assert not (tmp_path / "inductor").exists()
    assert (tmp_path / "other").exists()
