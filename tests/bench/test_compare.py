"""`md3 bench --compare-quant`: variants side by side, what each saves and loses, scenes with their truth."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from md3cli.bench import compare
from md3cli.bench.variant import VISION, VariantJob
from md3cli.commands import bench
from md3cli.errors import UsageError
from md3cli.model.weights.hub import model_path

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
PICTURES = tuple(str(SCENES / f"scene_0000{number}.png") for number in (0, 2))


def stub_variant(job: VariantJob) -> dict[str, Any]:
    """What a variant would find: int4 goes astray once, and answers one question in four wrong."""
    if job.quant == VISION and job.device == "cuda":
        return {"refused": "--quant-vision fp8 needs compute capability 8.9"}
    decisions = [[1, 2, 3, 4], [5, 6, 7, 8]] if job.quant != "int4" else [[1, 2, 9, 4], [5, 6, 7, 8]]
    if job.model is None:
        decisions = []
    elif job.quant != "none":
        assert job.followed == ((1, 2, 3, 4), (5, 6, 7, 8))
    seconds = {"none": 0.4, "int8": 0.2, "int4": 0.1, VISION: 0.5}[job.quant]
    if job.tests:
        assert sum(map(len, job.tests.values())) > 500
        Path(job.records or "").write_text("")
    return {
        "dtype": "bfloat16",
        "vision_bits": "int8" if job.quant == VISION else "none",
        "weights_bytes": {"none": 18 * 10**9, VISION: 5 * 10**6}.get(job.quant, 6 * 10**9),
        "memory": "VRAM" if job.device == "cuda" else "resident memory",
        "memory_bytes": {"none": 19_594, "int4": 7_332}.get(job.quant, 15_000) << 20,
        "seconds_per_query": 10 * seconds,
        "peak_rss_bytes": 10**9,
        "tests": {test: {"seconds": 30 * seconds, "requests": len(rows)} for test, rows in job.tests.items()},
        "decisions": decisions,
        "stages": {stage: {"seconds": seconds} for stage in bench.COMPARED_STAGES},
    }


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "run_variant", stub_variant)
    qualities = iter(
        [
            {"boxes AP50": 0.9, "answers": 0.8},
            {"boxes AP50": 0.9, "answers": 0.8},
            {"boxes AP50": 0.88, "answers": 0.79},
            {"boxes AP50": 0.9, "answers": 0.81},
        ]
    )
    monkeypatch.setattr(compare, "_quality", lambda records, folder: next(qualities))


def run(*args: str) -> str:
    result = CliRunner().invoke(bench.app, ["--compare-quant", *args], env={"COLUMNS": "80"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def words(output: str) -> list[str]:
    """Return the lines of a table that fits 80 columns, spaces once."""
    assert max(map(len, output.splitlines())) <= 80
    return [" ".join(line.split()) for line in output.splitlines()]


@pytest.mark.usefixtures("no_processes")
def test_variants_stand_side_by_side() -> None:
    found = json.loads(run("-m", "tiny", "--images", str(SCENES), "--json"))
    assert list(found["variants"]) == ["none", "int8", "int4", "vision"]
    assert found["pictures"] == 12
    int4 = found["variants"]["int4"]
    assert (int4["decisions"], int4["agreement"]) == (8, 7 / 8)
    assert int4["points_lost"] == pytest.approx(1.5)
    assert found["variants"]["int8"]["points_lost"] == 0
    assert found["variants"]["vision"]["points_lost"] == pytest.approx(-0.5)
    assert found["variants"]["vision"]["file_bytes"] is None
    assert int4["saved"] == pytest.approx(
        {"size_bytes": 0.36, "memory_bytes": 0.626, "seconds_per_query": 0.75}, abs=0.01
    )
    sizes = [found["variants"][name]["file_bytes"] for name in ("none", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] == pytest.approx((model_path("tiny") / "model.safetensors").stat().st_size, rel=0.01)


@pytest.mark.usefixtures("no_processes")
def test_the_table_says_what_was_won_and_lost() -> None:
    lines = words(run("-m", "tiny", "--images", str(SCENES), "--device", "cuda"))
    assert lines[0] == "configuration model size VRAM s/query points lost"
    assert lines[1] == "full, bfloat16 6.6 MB 19,594 MiB 4.000 0.00"
    assert lines[4] == "int4 4.2 MB 7,332 MiB 1.000 1.50"
    assert lines[5] == "reduction 36% 63% 75%"
    assert "test full int8 int4" in lines
    assert "boxes AP50 12.0 s 90.0% 6.0 s 90.0% 3.0 s 88.0%" in lines
    assert "answers 12.0 s 80.0% 6.0 s 80.0% 3.0 s 79.0%" in lines
    assert "points lost, mean 0.00 0.00 1.50" in lines
    assert "same of 8 decisions 100.0% 100.0% 87.5%" in lines
    assert "stage full int8 int4" in lines
    assert "decode, a token 400.0 ms 1.0x 200.0 ms 2.0x 100.0 ms 4.0x" in lines
    assert "vision: --quant-vision fp8 needs compute capability 8.9" in lines


@pytest.mark.usefixtures("no_processes")
def test_what_is_beside_three_columns_has_a_table_of_its_own() -> None:
    lines = words(run("-m", "tiny", "--device", "cpu"))
    assert "configuration model size resident memory s/query points lost" in lines
    assert "reduction 25% 23% -25%" in lines  # of the vision encoder alone, which takes longer here
    assert lines.index("test full int8 int4") < lines.index("test full int8 vision")
    assert "stage full int8 vision" in lines


@pytest.mark.usefixtures("no_processes")
def test_decisions_stand_in_for_points_where_there_is_no_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_is_tiny", lambda model: False)
    lines = words(run("-m", "tiny", "--images", str(SCENES)))
    assert lines[0] == "configuration model size resident memory s/query same decisions"
    assert lines[4].endswith("1.000 87.5%")
    assert not any(line.startswith("test ") and "s/query" in line for line in lines)
    assert "same of 8 decisions 100.0% 100.0% 87.5%" in lines


@pytest.mark.usefixtures("no_processes")
def test_a_random_model_has_sizes_and_times_alone() -> None:
    output = run("--config", "full")
    lines = words(output)
    assert lines[0] == "configuration model size resident memory s/query"
    assert lines[1] == "full, bfloat16 18.0 GB 19,594 MiB 4.000"
    assert not any(line.startswith("test ") for line in lines)
    found = json.loads(run("--config", "full", "--json"))
    assert found["model"] == "full"
    assert "quality" not in found["variants"]["int4"]


def test_stored_low_bits_are_a_variant_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "has_low_bits", lambda plan, quant: True)
    assert [row[2] for row in compare._variants("tiny", ())] == ["none", "stored", "int8", "int4", VISION]


def test_a_random_model_decides_nothing_that_could_be_compared() -> None:
    result = CliRunner().invoke(bench.app, ["--compare-quant", "--images", str(SCENES)])
    assert isinstance(result.exception, UsageError)
    assert "name them with -m" in str(result.exception)


def test_options_of_the_comparison_need_it() -> None:
    result = CliRunner().invoke(bench.app, ["--images", str(SCENES)])
    assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--compare-quant --workload detect", "--workload changes nothing of --compare-quant"),
        ("--compare-quant --batch-size 4", "--batch-size changes nothing"),
        ("--compare-quant --baseline", "--baseline changes nothing"),
        ("--compare-quant --seed 1", "--seed changes nothing"),
        ("--compare-quant -m tiny --config mini", "--config is the size of random weights"),
        ("-m tiny --config mini", "--config is the size of random weights"),
        ("--baseline-images 2", "--baseline-images is for --baseline"),
    ],
)
@pytest.mark.usefixtures("no_processes")
def test_an_option_that_would_do_nothing_is_refused(args: str, message: str) -> None:
    result = CliRunner().invoke(bench.app, args.split())
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith(message)


@pytest.mark.usefixtures("no_processes")
def test_a_setting_for_other_commands_does_not_stand_in_the_way() -> None:
    result = CliRunner().invoke(
        bench.app, ["--compare-quant", "--json"], default_map={"batch_size": 4, "seed": 1}, standalone_mode=False
    )
    assert result.exit_code == 0, result.exception


def test_pictures_inside_a_file_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(PICTURES[0], "a.png")
    with pytest.raises(UsageError, match="files of their own"):
        compare.compare_quant("tiny", "mid", (), str(tmp_path / "x.tar"), device="cpu", dtype="fp32", threads=1)


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
