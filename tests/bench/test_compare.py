"""`md3 bench --compare-quant`: variants side by side, decisions along one path, scenes with their truth."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from md3cli.bench import compare
from md3cli.bench.compare import VariantJob, measure, run_variant
from md3cli.commands import bench
from md3cli.errors import EngineError, InputError, UsageError
from md3cli.model.weights.hub import model_path

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
PICTURES = tuple(str(SCENES / f"scene_0000{number}.png") for number in (0, 2))
FULL = VariantJob("tiny", "none", dtype="fp32", threads=1, images=PICTURES)


def stub_variant(job: VariantJob) -> dict[str, Any]:
    """What a variant would find: int4 goes astray once, and answers one question in four wrong."""
    decisions = [[1, 2, 3, 4], [5, 6, 7, 8]] if job.quant != "int4" else [[1, 2, 9, 4], [5, 6, 7, 8]]
    if job.quant != "none":
        assert job.followed == ((1, 2, 3, 4), (5, 6, 7, 8))
    seconds = {"none": 0.4, "int8": 0.2, "int4": 0.1}[job.quant]
    stages = {stage: {"seconds": seconds} for stage in bench.COMPARED_STAGES}
    if job.records is not None:
        assert len(job.requests) > 500
        Path(job.records).write_text("")
    return {"peak_rss_bytes": 10**9, "decisions": decisions, "stages": stages}


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "run_variant", stub_variant)
    qualities = iter(
        [
            {"boxes AP50": 0.9, "answers": 0.8},
            {"boxes AP50": 0.9, "answers": 0.8},
            {"boxes AP50": 0.88, "answers": 0.79},
        ]
    )
    monkeypatch.setattr(compare, "_quality", lambda records, folder: next(qualities))


def run(*args: str) -> str:
    result = CliRunner().invoke(bench.app, ["--compare-quant", *args])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.usefixtures("no_processes")
def test_variants_stand_side_by_side() -> None:
    found = json.loads(run("-m", "tiny", "--images", str(SCENES), "--json"))
    assert list(found["variants"]) == ["none", "int8", "int4"]
    assert found["pictures"] == 12
    int4 = found["variants"]["int4"]
    assert (int4["decisions"], int4["agreement"]) == (8, 7 / 8)
    assert int4["points_lost"] == pytest.approx(1.5)
    assert found["variants"]["int8"]["points_lost"] == 0
    sizes = [one["file_bytes"] for one in found["variants"].values()]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] == pytest.approx((model_path("tiny") / "model.safetensors").stat().st_size, rel=0.01)


@pytest.mark.usefixtures("no_processes")
def test_the_table_says_what_was_won_and_lost() -> None:
    lines = [" ".join(line.split()) for line in run("-m", "tiny", "--images", str(SCENES)).splitlines()]
    assert "full int8 int4" in lines
    assert "decode, a token 400.0 ms 1.0x 200.0 ms 2.0x 100.0 ms 4.0x" in lines
    assert "points lost, mean 0.00 0.00 1.50" in lines
    assert "same of 8 decisions 100.0% 100.0% 87.5%" in lines


def test_weights_must_be_named() -> None:
    result = CliRunner().invoke(bench.app, ["--compare-quant"])
    assert isinstance(result.exception, UsageError)
    assert "-m tiny" in str(result.exception)


def test_options_of_the_comparison_need_it() -> None:
    result = CliRunner().invoke(bench.app, ["--images", str(SCENES)])
    assert isinstance(result.exception, UsageError)


def test_pictures_inside_a_file_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(PICTURES[0], "a.png")
    with pytest.raises(UsageError, match="files of their own"):
        compare.compare_quant("tiny", (), str(tmp_path / "x.tar"), device="cpu", dtype="fp32", threads=1)


def test_scenes_are_asked_what_their_truth_knows(tmp_path: Path) -> None:
    rows = list(compare.unpack_scenes(tmp_path))
    tasks = Counter(row["task"] for row in rows)
    assert (tasks["detect"], tasks["caption"]) == (48 * 8, 48)
    assert tasks["point"] > 48
    assert tasks["query"] > 200
    assert all(Path(row["image"]).is_file() for row in rows)
    instances = json.loads((tmp_path / "instances.json").read_text())
    assert instances["info"]["seed"] == 1000  # the card's held-out collection, not the training one


def test_scenes_are_those_of_the_generator() -> None:
    """Held-out scene 0 is what `examples/shapes.py --seed 1000` draws (whose own test fixes the pixels)."""
    with tarfile.open(model_path("tiny") / "held_out.tar.gz") as scenes:
        names = sorted(scenes.getnames())
    assert names[0] == "captions.json"
    assert len(names) == 48 + 3


@pytest.mark.process
def test_full_precision_follows_its_own_path() -> None:
    free = measure(replace(FULL, images=PICTURES[:1]))
    again = measure(replace(FULL, images=PICTURES[:1], followed=(tuple(free["decisions"][0]),)))
    assert again["decisions"] == free["decisions"]
    assert len(free["decisions"][0]) > 10
    assert set(free["stages"]) == set(bench.COMPARED_STAGES)
    assert all(stage["seconds"] > 0 for stage in free["stages"].values())


@pytest.mark.process
def test_another_path_is_followed_to_its_end() -> None:
    """Every decision is asked for, also behind one that was made otherwise."""
    free = measure(replace(FULL, images=PICTURES[:1]))["decisions"][0]
    turned = [free[0] + 1, *free[1:]]
    led = measure(replace(FULL, images=PICTURES[:1], followed=(tuple(turned),)))["decisions"][0]
    assert len(led) == len(turned)
    assert led[0] == free[0]


@pytest.mark.process
def test_a_variant_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    rows = ({"image": PICTURES[0], "name": "a.png", "task": "caption", "length": "short"},)
    job = replace(FULL, quant="int4", images=(), requests=rows, records=str(tmp_path / "r.jsonl"))
    found = run_variant(job)
    assert found["peak_rss_bytes"] >= found["loaded_rss_bytes"] > 10**7
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert record["image"] == "a.png"
    assert record["error"] is None


@pytest.mark.process
def test_a_variant_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("random.py").write_text("raise SystemExit('code that lies beside pictures was run')")
    with pytest.raises(EngineError, match=r"no-such-model with --quant int8: .*no such file or folder"):
        run_variant(replace(FULL, model="no-such-model", quant="int8"))


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"x\.png"):
        measure(replace(FULL, images=(str(tmp_path / "x.png"),)))
