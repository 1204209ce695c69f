"""`md3 models`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from md3cli.commands import models
from md3cli.errors import CheckpointError, Md3Error, UsageError
from md3cli.model import hub_download
from md3cli.model.hub_download import DownloadPlan

GOLDEN = Path(__file__).parent / "golden"
CASE_A = GOLDEN / "case-a" / "checkpoint"


def run(*args: object, fails_with: type[Md3Error] | None = None) -> str:
    result = CliRunner().invoke(models.app, [str(arg) for arg in args])
    if fails_with is not None:
        assert isinstance(result.exception, fails_with), result.output
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def test_info_shows_format_parts_and_what_would_load() -> None:
    output = run("info", CASE_A)
    assert ": original, revision " in output
    assert "3 text layers of width 128, 5 experts from layer 1; 5 vision layers" in output
    assert "image prefix 26 positions, context 256; skills: caption, detect, point, query, segment" in output
    assert "region LayerNorm: yes; tokenizer: yes" in output
    lines = [line.split() for line in output.splitlines()]
    assert ["experts", "92,160", "184.3", "kB"] in lines
    assert ["total", "944,832", "1.9", "MB"] in lines


def test_info_as_json() -> None:
    summary = json.loads(run("info", GOLDEN / "case-c-formats" / "int4", "--json"))
    assert summary["format"] == "int4"
    assert summary["parts"]["experts"]["parameters"] == 49_152
    assert sum(part["bytes"] for part in summary["parts"].values()) == sum(summary["dtypes"].values())


def test_info_of_what_does_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    assert "is cut short" in run("info", tmp_path, fails_with=CheckpointError)


def test_info_fetches_nothing() -> None:
    message = run("info", "moondream3", fails_with=CheckpointError)
    assert "fetch it with: md3 models pull moondream3" in message


def test_info_imports_no_torch() -> None:
    script = (
        "import sys; from md3cli.commands.models import app; "
        f"app(['info', {str(CASE_A)!r}], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)


def test_list_names_every_alias() -> None:
    rows = json.loads(run("list", "--json"))
    assert [row["name"] for row in rows] == ["moondream3", "moondream3.1", "tiny"]
    output = run("list")
    assert "not here" in output
    assert "md3 models pull NAME" in output


def test_convert_writes_and_compares(tmp_path: Path) -> None:
    output = run("convert", CASE_A, tmp_path / "raw", "--to", "raw")
    assert f"{tmp_path / 'raw'}: raw, 1.9 MB in 1 files, compared" in output
    assert json.loads(run("info", tmp_path / "raw", "--json"))["format"] == "raw"


def test_convert_to_the_port_needs_weights_without_region_ln(tmp_path: Path) -> None:
    message = run("convert", CASE_A, tmp_path / "hf", "--to", "hf", fails_with=CheckpointError)
    assert "write original or raw instead" in message
    assert not (tmp_path / "hf").exists()


def test_pull_of_a_local_model_is_a_usage_error() -> None:
    assert "nothing to fetch" in run("pull", CASE_A, fails_with=UsageError)


def test_pull_says_sizes_first_and_refuses_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plan(repo: str, revision: str | None) -> DownloadPlan:
        return DownloadPlan(repo, "abc", 18_500_000_000, 18_500_000_000, tmp_path, 5_000_000_000)

    monkeypatch.setattr(hub_download, "plan_download", plan)
    result = CliRunner().invoke(models.app, ["pull", "moondream3"])
    assert "moondream/moondream3-preview@abc: 18.5 GB, 18.5 GB to fetch into" in result.output
    assert "5.0 GB free" in result.output
    assert "too little room" in str(result.exception)
