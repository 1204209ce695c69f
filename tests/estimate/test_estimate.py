"""`md3 estimate` with a clock that the stub engine turns: what is counted, timed, left out and told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from program import Program, clean_environment, isolate, make_pictures, records_of
from stub_engine import StubEngine, StubModel
from typer.testing import CliRunner

import md3cli.estimate
from md3cli.cli import app
from md3cli.estimate import estimate
from md3cli.records import Answer

LOAD_S, COLD_S, CROP_S, REQUEST_S = 1000.0, 100.0, 0.5, 0.25
SCENES = Path(__file__).parents[2] / "examples" / "scenes"


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class TimedEngine(StubEngine):
    """A crop takes CROP_S and a request REQUEST_S; the first of each tiling takes COLD_S more."""

    clock: Any = None
    vision_s: float = 0.0

    def __post_init__(self) -> None:
        self.known: set[int] = set()

    def step(self) -> Sequence[Answer]:
        for job in list(self._waiting)[: self.batch_size]:
            crops = 0 if job.image is None else len(job.image.crops)
            self.vision_s += CROP_S * (1 if crops == 2 else crops)
            self.clock.now_s += CROP_S * (1 if crops == 2 else crops) + REQUEST_S
            self.clock.now_s += 0 if crops in self.known else COLD_S
            self.known.add(crops)
        return super().step()

    def stage_seconds(self) -> Mapping[str, float]:
        return {"vision": self.vision_s, "prefill": 0.0, "decode": 0.0}


@dataclass
class TimedModel(StubModel):
    clock: Any = None

    def load(self) -> StubEngine:
        self.clock.now_s += LOAD_S
        self.engine = TimedEngine(self.options.batch_size or self.batch_size, clock=self.clock)
        return self.engine


class TimedProgram(Program):
    """As `Program`, in a time that only the stub's work passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)

        def timed(config: Any, source: Any, console: Any, *, find: Any) -> int:
            clock = Clock()
            return estimate(config, source, console, find=lambda options: self._timed(options, clock), clock=clock)

        monkeypatch.setattr(md3cli.estimate, "estimate", timed)

    def _timed(self, options: Any, clock: Clock) -> TimedModel:
        self.models.append(TimedModel(options, clock=clock))
        return self.models[-1]  # type: ignore[return-value]

    def estimate(self, *arguments: object) -> dict[str, Any]:
        result = self("estimate", *arguments)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)  # type: ignore[no-any-return]


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TimedProgram:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    isolate(monkeypatch, tmp_path / "home")
    return TimedProgram(monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """30 pictures of one tile, 10 of four."""
    folder = make_pictures(tmp_path / "pictures", 30)
    for i in range(10):
        Image.new("RGB", (56, 56), (i, 0, 0)).save(folder / f"q{i}.png")
    return folder


def spread(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def test_buckets_are_weighted_by_their_counts(md3: TimedProgram, pictures: Path) -> None:
    found = md3.estimate(pictures, "--task", "detect:a,b", "--estimate-sample", 4)
    seconds = 30 * 2 * (CROP_S + REQUEST_S) + 10 * 2 * (5 * CROP_S + REQUEST_S)
    assert found["seconds"] == spread(seconds)
    assert found["buckets"] == [
        {"crops": 2, "images": 30, "sampled": 4, "seconds_per_image": 1.5},
        {"crops": 5, "images": 10, "sampled": 4, "seconds_per_image": 5.5},
    ]
    assert (found["images"], found["requests"], found["sample"]["requests"]) == (40, 80, 16)
    assert found["images_per_second"] == spread(float(f"{40 / seconds:.4g}"))
    assert found["requests_per_second"] == spread(float(f"{80 / seconds:.4g}"))


def test_loading_and_warming_up_are_told_apart(md3: TimedProgram, pictures: Path) -> None:
    found = md3.estimate(pictures, "--task", "caption")
    assert found["load_seconds"] == LOAD_S
    assert 2 * COLD_S < found["warm_up_seconds"] < 2 * COLD_S + 10
    assert found["seconds"]["value"] == 30 * 0.75 + 10 * 2.75


def test_tokens_and_bytes_scale(md3: TimedProgram, pictures: Path) -> None:
    found = md3.estimate(pictures, "--task", "query:Is it?", "--estimate-sample", 30)
    assert (found["prompt_tokens"], found["output_tokens"]) == (spread(400), spread(120))
    assert found["cache_bytes"] == 40 * 100_000
    records = md3("run", pictures, "--task", "query:Is it?").stdout_bytes
    assert found["records_bytes"]["value"] == pytest.approx(len(records), rel=1e-3)


def test_the_cache_takes_no_more_than_it_may(md3: TimedProgram, pictures: Path) -> None:
    ask = (pictures, "--task", "caption")
    assert md3.estimate(*ask, "--cache-size", "1 MB")["cache_bytes"] == 1_000_000
    assert md3.estimate(*ask, "--no-cache")["cache_bytes"] == 0


def test_money(md3: TimedProgram, pictures: Path) -> None:
    found = md3.estimate(pictures, "--task", "caption", "--price-per-gpu-hour", 36, "--price-per-1000", 50)
    assert found["gpu_hours"]["value"] == pytest.approx(50 / 3600, rel=1e-3)
    assert found["cost"] == spread(0.5)
    assert found["cost_per_1000"] == spread(12.5)
    assert found["cost_elsewhere"] == 2.0
    free = md3.estimate(pictures, "--task", "caption")
    assert (free["cost"], free["cost_per_1000"], free["cost_elsewhere"]) == (None, None, None)


def test_devices_share_the_work_and_all_cost(md3: TimedProgram, pictures: Path) -> None:
    ask = (pictures, "--task", "caption", "--price-per-gpu-hour", 36)
    found = md3.estimate(*ask, "--devices", "cuda:0,cuda:1", "--world-size", 5)
    assert (found["devices"], found["seconds"]["value"]) == (10, 5.0)
    assert md3.models[-1].options.device == "cuda:0", "one of those that were named is measured"
    assert found["cost"] == md3.estimate(*ask)["cost"] == spread(0.5)


def test_some_pictures_stand_for_all(md3: TimedProgram, pictures: Path) -> None:
    ask = (pictures, "--task", "caption", "--estimate-open", 20)
    found, again = md3.estimate(*ask), md3.estimate(*ask)
    assert found == again, "the same pictures are drawn"
    assert (found["images"], found["opened"]) == (40, 20)
    assert sum(bucket["images"] for bucket in found["buckets"]) == 40
    assert found["seconds"]["low"] < found["seconds"]["value"] < found["seconds"]["high"], "shares are uncertain now"
    assert found["seconds"]["low"] < 50 < found["seconds"]["high"]


def test_other_pictures_would_give_other_numbers(md3: TimedProgram, pictures: Path) -> None:
    rows = [{"image": f"p{i}.png", "task": "detect", "prompt": "x" * (1 + i * 9)} for i in range(20)]
    manifest = pictures / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = md3.estimate(manifest)["records_bytes"]
    assert found["low"] < found["value"] < found["high"]


def test_questions_about_one_picture_are_sampled_together(md3: TimedProgram, pictures: Path) -> None:
    rows = [{"image": f"p{i}.png", "task": "detect", "prompt": word} for i in range(20) for word in "abc"]
    manifest = pictures / "rows.jsonl"
    manifest.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"image": None, "task": "query", "prompt": "Why?"}])
    )
    found = md3.estimate(manifest, "--estimate-sample", 5)
    assert (found["images"], found["requests"], found["opened"]) == (60, 61, 21)
    assert [(bucket["crops"], bucket["images"], bucket["sampled"]) for bucket in found["buckets"]] == [
        (0, 1, 1),
        (2, 20, 5),
    ]
    assert found["sample"]["requests"] == 16
    assert found["seconds"]["value"] == pytest.approx(20 * 3 * 0.75 + REQUEST_S)


def test_bad_pictures_cost_nothing_and_are_told(md3: TimedProgram, pictures: Path) -> None:
    for i in range(5):
        (pictures / f"p{i}.png").write_bytes(b"broken")
    found = md3.estimate(pictures, "--task", "caption")
    assert found["bad"] == {"not_an_image": 5}
    assert found["seconds"]["value"] == 25 * 0.75 + 10 * 2.75
    assert found["images_per_second"]["value"] == pytest.approx(35 / found["seconds"]["value"], rel=1e-3)


def test_failures_of_the_model_are_told(md3: TimedProgram, pictures: Path) -> None:
    found = md3.estimate(pictures, "--task", "detect:fail me,a")
    assert found["sample"]["failed"] == found["sample"]["requests"] / 2
    assert found["failed_requests"] == spread(40)


def test_a_dry_run_with_estimate_is_the_same(md3: TimedProgram, pictures: Path) -> None:
    expected = md3.estimate(pictures, "--task", "detect:car,dog")
    result = md3("detect", pictures, "car", "dog", "--dry-run", "--estimate")
    assert json.loads(result.stdout) == expected


def test_what_records_ask_next_is_told_as_not_counted(md3: TimedProgram, pictures: Path) -> None:
    told = "what records ask next: about each object found (--then), or to find what they list (--everything)"
    command = (pictures, "--task", "detect:car", "--then", "query:Why?")
    assert told in md3.estimate(*command)["not_included"]
    counted = json.loads(md3("run", *command, "--dry-run").stdout)
    assert (counted["requests"], counted["not_counted"]) == (counted["images"], [told])
    assert told in json.loads(md3("detect", pictures, "--everything", "--dry-run").stdout)["not_counted"]
    assert md3.estimate(*command)["sample"] == md3.estimate(*command[:3])["sample"]
    for words in (command[:3], (pictures, "--task", "caption")):
        assert told not in md3.estimate(*words)["not_included"]
        assert "not_counted" not in json.loads(md3("run", *words, "--dry-run").stdout)


def test_nothing_is_written(md3: TimedProgram, pictures: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    md3.estimate(pictures, "--task", "caption", "-o", "out.jsonl")
    assert sorted(tmp_path.rglob("*")) == before
    assert md3.models[-1].options.cache is False, "nor is the cache asked, which would make it look fast"


@pytest.mark.parametrize(("name", "message"), [("empty", "nothing to annotate in"), ("bad", "none of the 1 pictures")])
def test_nothing_to_estimate(md3: TimedProgram, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).mkdir()
    if name == "bad":
        (tmp_path / name / "a.png").write_bytes(b"broken")
    result = md3("estimate", tmp_path / name, "--task", "caption")
    assert result.exit_code == 1
    assert message in result.stderr
    assert all(model.engine is None for model in md3.models), "found out before the model is loaded"


def test_nothing_asked_is_a_usage_error(md3: TimedProgram, pictures: Path) -> None:
    result = md3("estimate", pictures)
    assert result.exit_code == 2
    assert "say what with --task" in result.stderr


def test_lines_for_people(md3: TimedProgram, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.console.RunConsole.is_stdout_terminal", True)
    prices = ("--price-per-gpu-hour", 3600, "--price-per-1000", 5000)
    text = md3("estimate", pictures, "--task", "caption", *prices).stdout
    assert "images     40\nrequests   40\ncrops      30 of 2 crops at 0.75 s, 10 of 5 crops at 2.75 s\n" in text
    assert "before that 16:40 of loading" in text
    assert "time       50.0 s (50.0 s to 50.0 s), bound by the model\nspeed      0.8 images/s, 0.8 requests/s\n" in text
    assert "tokens     400 prompt, 120 output\n" in text
    assert "cost       50.00 (50.00 to 50.00) at 3600 a GPU hour: 1,250.00 per 1,000 images\n" in text
    assert "elsewhere  200.00 at 5000 per 1,000 images: 4 times as much\n" in text
    assert "not in it  loading the model" in text
    assert json.loads(md3("estimate", pictures, "--task", "caption", "--json").stdout)["images"] == 40


@pytest.mark.process
def test_tiny_says_what_its_run_then_does(tmp_path: Path) -> None:
    """All pictures are in the sample here, so tokens and bytes must be those of the run itself."""
    ask = [str(SCENES), "--task", "detect:red circle", "--task", "caption", "-m", "tiny", "--offline"]
    environment = clean_environment(tmp_path)
    found = json.loads(CliRunner().invoke(app, ["estimate", *ask], env=environment).stdout)
    lines = CliRunner().invoke(app, ["run", *ask, "--no-cache"], env=environment).stdout_bytes
    tokens = [record["tokens"] for record in records_of(lines)]
    assert found["output_tokens"]["value"] == sum(each["output"] for each in tokens)
    assert found["prompt_tokens"]["value"] == sum(each["prompt"] for each in tokens)
    assert found["records_bytes"]["value"] == pytest.approx(len(lines), rel=1e-3)
    assert found["seconds"]["low"] <= found["seconds"]["value"] <= found["seconds"]["high"]
    assert found["sample"]["device"].startswith(("cpu", "cuda", "mps"))
