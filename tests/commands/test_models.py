"""`md3 models`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from md3cli.commands import models
from md3cli.errors import CheckpointError, InputError, Md3Error, OutputError, UsageError
from md3cli.model.weights import hub
from md3cli.model.weights.hub import DownloadPlan, model_path

GOLDEN = Path(__file__).parents[1] / "golden"
CASE_A = GOLDEN / "case-a" / "checkpoint"
TINY = model_path("tiny")


def run(*args: object, fails_with: type[Md3Error] | None = None) -> str:
    result = CliRunner().invoke(models.app, [str(arg) for arg in args])
    if fails_with is not None:
        assert isinstance(result.exception, fails_with), result.output
        return str(result.exception)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
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
    assert ["experts", "92,160", "184.3", "kB", "bf16"] in lines
    assert ["total", "944,832", "1.9", "MB"] in lines


def test_info_says_whether_it_segments_and_under_which_terms(tmp_path: Path) -> None:
    output = " ".join(run("info", "tiny").split())
    assert "published mask scores use a second network behind it, a refiner" in output
    assert "terms of use: Apache-2.0" in output
    plain, newer = tmp_path / "plain", tmp_path / "moondream3.1"
    for folder in (plain, newer):
        shutil.copytree(CASE_A, folder)
        config = json.loads((folder / "config.json").read_text())
        tokenizer = config.get("tokenizer") or config["config"]["tokenizer"]
        del tokenizer["templates"]["segment"]
        (folder / "config.json").write_text(json.dumps(config))
    assert "segment is refused: config.json has no template" in " ".join(run("info", plain).split())
    assert "segment" in json.loads(run("info", newer, "--json"))["skills"]
    assert "segment" not in json.loads(run("info", plain, "--json"))["skills"]


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


@pytest.mark.process
def test_info_imports_no_torch() -> None:
    script = (
        "import sys; from md3cli.commands.models import app; "
        f"app(['info', {str(CASE_A)!r}], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240, capture_output=True)


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


# -- quantize and verify ---------------------------------------------------------------------------


@pytest.mark.process
def test_quantize_writes_what_info_and_verify_describe(tmp_path: Path) -> None:
    output = run("quantize", "tiny", tmp_path / "q", "--quant", "int4", "--vision", "int8", "--scales", "bf16")
    assert f"{tmp_path / 'q'}: int4, 2.8 MB in 1 files, read back" in output
    lines = [line.split() for line in run("info", tmp_path / "q").splitlines()]
    assert next(line for line in lines if line[:1] == ["experts"])[-1] == "int4"
    assert next(line for line in lines if line[:1] == ["routers"])[-1] == "bf16"
    vision = " ".join(next(line for line in lines if line[:1] == ["vision"]))
    assert "int8 1.2 MB, bf16" in vision
    output = run("verify", tmp_path / "q")
    assert "SHA256SUMS" in output
    assert "names and shapes as the config asks for" in output


@pytest.mark.parametrize(("quant", "layout"), [("int8", "int8"), ("int4", "int4"), ("fp8", "original-fp8")])
def test_quantize_offers_three_schemes(tmp_path: Path, quant: str, layout: str) -> None:
    run("quantize", "tiny", tmp_path / "q", "--quant", quant)
    found = json.loads(run("verify", tmp_path / "q", "--json"))
    assert found["format"] == layout
    assert found["files"][0]["compared_with"] == "SHA256SUMS"
    assert len(found["files"][0]["sha256"]) == 64


def test_quantize_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    message = run("quantize", "tiny", tmp_path / "q", "--quant", "int4", fails_with=OutputError)
    assert "already there" in message


def test_quantize_fetches_nothing(tmp_path: Path) -> None:
    message = run("quantize", "moondream3", tmp_path / "q", "--quant", "int4", fails_with=CheckpointError)
    assert "fetch it with: md3 models pull moondream3" in message


@pytest.mark.process
def test_quantize_looks_at_pictures(tmp_path: Path) -> None:
    scenes = Path(__file__).parents[2] / "examples" / "scenes"
    run("quantize", "tiny", tmp_path / "plain", "--quant", "int4")
    run("quantize", "tiny", tmp_path / "q", "--quant", "int4", "--calibrate", scenes, "--calibrate-limit", "1")
    plain, calibrated = (json.loads(run("verify", tmp_path / name, "--json"))["files"] for name in ("plain", "q"))
    assert plain[0]["bytes"] == calibrated[0]["bytes"]
    assert plain[0]["sha256"] != calibrated[0]["sha256"]


@pytest.mark.process
def test_quantize_looks_at_pictures_in_a_table(tmp_path: Path) -> None:
    scene = Path(__file__).parents[2] / "examples" / "scenes" / "scene_00000.png"
    (tmp_path / "pictures").mkdir()
    shutil.copy(scene, tmp_path / "pictures")
    cells = pa.array([{"bytes": scene.read_bytes(), "path": scene.name}])
    pq.write_table(pa.table({"image": cells}), tmp_path / "pictures.parquet")
    for name in ("pictures", "pictures.parquet"):
        run("quantize", "tiny", tmp_path / f"q-{name}", "--quant", "int4", "--calibrate", tmp_path / name)
    weights = [(tmp_path / f"q-{name}" / "model.safetensors").read_bytes() for name in ("pictures", "pictures.parquet")]
    assert weights[0] == weights[1]


def test_quantize_with_no_picture_to_look_at_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = run(
        "quantize", "tiny", tmp_path / "q", "--quant", "int4", "--calibrate", tmp_path / "empty", fails_with=InputError
    )
    assert "no picture could be read" in message
    assert not (tmp_path / "q").exists()


def test_verify_names_the_file_that_changed(tmp_path: Path) -> None:
    run("quantize", "tiny", tmp_path / "q", "--quant", "int8")
    file = tmp_path / "q" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    message = run("verify", tmp_path / "q", fails_with=CheckpointError)
    assert "model.safetensors has the SHA-256" in message
    assert "SHA256SUMS says" in message


def test_verify_reads_the_tokenizer_too(tmp_path: Path) -> None:
    shutil.copytree(CASE_A, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("<html>404</html>")
    assert "is a web page" in run("verify", tmp_path / "copy", fails_with=CheckpointError)
    convert = ("convert", tmp_path / "copy", tmp_path / "raw", "--to", "raw")
    assert "is a web page" in run(*convert, fails_with=CheckpointError)
    assert not (tmp_path / "raw").exists()
    too_long = tmp_path / ("x" * 300)
    assert "cannot be written" in run("convert", CASE_A, too_long, "--to", "raw", fails_with=OutputError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_verify_does_not_wait_for_a_fifo(tmp_path: Path) -> None:
    shutil.copytree(CASE_A, tmp_path / "copy")
    os.mkfifo(tmp_path / "copy" / "SHA256SUMS")
    assert "no digest known" in run("verify", tmp_path / "copy")


def test_verify_trusts_the_names_of_the_hubs_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    digest = hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest()
    shutil.copy(TINY / "model.safetensors", blobs / digest)
    shutil.copy(TINY / "config.json", snapshot)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    assert json.loads(run("verify", snapshot, "--json"))["files"][0]["compared_with"] == "the hub"
    (snapshot / "model.safetensors").unlink()
    (blobs / digest).rename(blobs / ("0" * 64))
    (snapshot / "model.safetensors").symlink_to(blobs / ("0" * 64))
    assert "the hub says 0000" in run("verify", snapshot, fails_with=CheckpointError)


def test_verify_says_where_there_is_nothing_to_compare_with() -> None:
    assert "no digest known" in run("verify", CASE_A)


@pytest.mark.process
def test_verify_imports_no_torch() -> None:
    script = (
        "import sys; from md3cli.commands.models import app; "
        f"app(['verify', {str(CASE_A)!r}], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240, capture_output=True)


def test_pull_of_a_local_model_is_a_usage_error() -> None:
    assert "nothing to fetch" in run("pull", CASE_A, fails_with=UsageError)


def test_the_model_of_the_package_is_pulled_already() -> None:
    result = CliRunner().invoke(models.app, ["pull", "tiny"])
    assert result.exit_code == 0
    assert result.stdout.startswith("tiny@")
    assert "tiny is in this package" in result.stderr
    assert "nothing to fetch" in result.stderr


def test_pull_says_sizes_first_and_refuses_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plan(repo: str, revision: str | None) -> DownloadPlan:
        return DownloadPlan(repo, "abc", 18_500_000_000, 18_500_000_000, tmp_path, 5_000_000_000)

    monkeypatch.setattr(hub, "plan_download", plan)
    result = CliRunner().invoke(models.app, ["pull", "moondream3"])
    assert "moondream/moondream3-preview@abc: 18.5 GB, 18.5 GB to fetch into" in result.output
    assert "5.0 GB free" in result.output
    assert "too little room" in str(result.exception)
