"""The whole engine at full size on fake CUDA tensors: no tensor on a wrong device, few copies, few launches.

Runs `fake_cuda.py` with a Python that has a CUDA build of torch and its triton (`conftest.cuda_python`), on a
machine that needs no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import FORMS, NUM_ADMITTED

from md3cli.model.network.config import ModelConfig

ROOT = Path(__file__).parents[3]
MOST_LAUNCHES = 310  # of a decode step of 24 layers; the state machine has 9 of them

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Found = dict[str, dict[str, int]]


@pytest.fixture(scope="module", params=FORMS)
def found(request: pytest.FixtureRequest, cuda_python: str) -> Found:
    """Counts of every scenario, for weights of one form."""
    command = [cuda_python, ROOT / "tests" / "support" / "fake_cuda.py", "--form", request.param]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts: Found = json.loads(done.stdout)
    for name, count in counts.items():
        print(request.param, name, *(f"{kind} {number}" for kind, number in count.items()), file=sys.stderr)
    return counts


def test_an_admission_is_three_copies_and_one_wait(found: Found) -> None:
    """Crops, whole numbers, real numbers go up; the rows' first decisions come down."""
    for name in ("admission", "admission_mixed"):
        assert found[name]["host_to_device"] <= 3
        assert found[name]["device_to_host"] == found[name]["waits"] == 1


def test_keeping_embeddings_adds_copies_that_nothing_waits_for_before_the_last(found: Found) -> None:
    saving = found["admission_saving"]
    assert saving["host_to_device"] <= 3
    assert saving["device_to_host"] == NUM_ADMITTED + 1
    assert saving["waits"] == 2  # for the last of them, and for the first decisions


def test_vision_takes_eight_launches_a_block_and_a_handful(found: Found) -> None:
    """A block: a product before and after attention, two of the feed-forward, two sums with their norms."""
    encoding = found["encoding"]
    assert 0 < encoding["launches"] <= 8 * ModelConfig().vision.enc_n_layers + 5
    assert encoding["host_to_device"] == encoding["device_to_host"] == encoding["waits"] == 0


def test_float8_vision_takes_three_launches_more_a_block(found: Found) -> None:
    """Rows are brought to codes before each product; the fourth time the activation is taken on the way."""
    encoding = found["encoding_float8"]
    assert 0 < encoding["launches"] <= found["encoding"]["launches"] + 4 * ModelConfig().vision.enc_n_layers
    assert encoding["host_to_device"] == encoding["device_to_host"] == encoding["waits"] == 0


def test_four_pictures_are_embedded_in_a_dozen_launches(found: Found) -> None:
    embedding = found["embedding"]
    assert 0 < embedding["launches"] <= 14
    assert embedding["host_to_device"] == embedding["device_to_host"] == embedding["waits"] == 0


def test_pictures_go_up_in_one_copy_and_nothing_waits(found: Found) -> None:
    pictures = found["pictures"]
    assert pictures["host_to_device"] == 1
    assert pictures["device_to_host"] == pictures["waits"] == 0


@pytest.mark.parametrize("name", ["step_1", "step_64"])
def test_a_decode_step_is_read_once_and_launches_little(found: Found, name: str) -> None:
    step = found[name]
    assert step["host_to_device"] == 0
    assert step["device_to_host"] == step["waits"] == 1
    assert 0 < step["launches"] <= MOST_LAUNCHES


def test_rows_end_without_a_launch(found: Found) -> None:
    assert found["finish"] == {"host_to_device": 0, "device_to_host": 1, "waits": 1, "launches": 0}


def test_choices_go_up_once_and_come_back_once(found: Found) -> None:
    choices = found["choices"]
    assert choices["host_to_device"] == choices["device_to_host"] == choices["waits"] == 1


@pytest.mark.parametrize("name", ["growth", "copy"])
def test_the_cache_is_moved_on_the_device(found: Found, name: str) -> None:
    assert found[name]["host_to_device"] == found[name]["device_to_host"] == found[name]["waits"] == 0
    assert found[name]["launches"] > 0


@pytest.mark.parametrize(("name", "num_tables"), [("cut", 4), ("cut_again", 0)])
def test_a_picture_is_cut_with_few_launches_and_no_wait(found: Found, name: str, num_tables: int) -> None:
    """Two axes for the global crop, two for the tiles, and both put in their places; weights go up once a size."""
    assert found[name] == {"host_to_device": num_tables, "device_to_host": 0, "waits": 0, "launches": 6}
