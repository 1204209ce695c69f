"""One variant of `md3 bench --compare-quant`: decisions along one path, in a process of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from md3cli.bench import variant
from md3cli.bench.variant import VISION, VariantJob, measure, run_variant
from md3cli.commands import bench
from md3cli.errors import EngineError, InputError
from md3cli.model.engine.load import load_engine
from md3cli.model.quant.matrices import has_int8_products

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
PICTURES = tuple(str(SCENES / f"scene_0000{number}.png") for number in (0, 2))
FULL = VariantJob("tiny", "none", dtype="fp32", threads=1, images=PICTURES)


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
    job = replace(FULL, quant="int4", images=(), tests={"captions": rows}, records=str(tmp_path / "r.jsonl"))
    found = run_variant(job)
    assert found["peak_rss_bytes"] >= found["loaded_rss_bytes"] > 10**7
    assert found["memory"] == "resident memory"
    assert found["memory_bytes"] > 10**7
    assert found["seconds_per_query"] > 0
    assert found["tests"]["captions"]["requests"] == 1
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


@pytest.mark.process
def test_a_query_leaves_the_weights_as_they_were() -> None:
    """Answers of a fixed length are forced while the clock runs; what is judged afterwards ends by itself."""
    engine = load_engine(variant._options(FULL))
    before = engine.model.text.lm_head.bias.clone()
    assert variant._asked_alone(engine)["seconds_per_query"] > 0
    assert torch.equal(engine.model.text.lm_head.bias, before)


@pytest.mark.process
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_a_random_model_is_measured_in_few_bits(quant: str) -> None:
    found = measure(VariantJob(None, quant, config="mini", dtype="bf16", device="cpu", threads=1))
    assert {"none": 1.0, "int8": 0.7, "int4": 0.55}[quant] == pytest.approx(
        found["weights_bytes"] / 15_080_512, abs=0.03
    )
    assert found["decisions"] == []
    assert found["dtype"] == "bfloat16"


@pytest.mark.process
@pytest.mark.skipif(not has_int8_products(), reason="this CPU has no int8 products")
def test_the_vision_encoder_alone_has_few_bits_where_the_device_offers_that() -> None:
    job = VariantJob(None, VISION, config="mini", dtype="bf16", device="cpu", threads=1)
    assert measure(job)["vision_bits"] == "int8"
    assert "not computed in float32" in measure(replace(job, dtype="fp32"))["refused"]
