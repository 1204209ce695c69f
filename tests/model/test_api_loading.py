"""`Moondream.from_pretrained`: transformers' words for a dtype and a device, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import CASES

from md3cli import Moondream
from md3cli.config import ModelOptions
from md3cli.errors import ConfigError, UsageError
from md3cli.model import api
from md3cli.model.api_loading import read_device_map, read_dtype

FOLDER = str(CASES["a"][0])
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.bfloat16, "bf16"),
        ("bfloat16", "bf16"),
        ("torch.bfloat16", "bf16"),
        ("bf16", "bf16"),
        (torch.float16, "fp16"),
        ("float32", "fp32"),
        ("auto", "auto"),
        (None, "auto"),
    ],
)
def test_a_dtype_may_be_text_or_torchs(given: Any, name: str) -> None:
    assert read_dtype(given) == name


@pytest.mark.parametrize("given", [torch.int8, torch.float64, "int4", "", 16, True])
def test_a_dtype_that_nothing_is_computed_in_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"^dtype is .*; use auto, bfloat16, float32, float16$"):
        read_dtype(given)


@pytest.mark.parametrize("given", ["cpu", {"": "cpu"}, torch.device("cpu"), {"": torch.device("cpu")}])
def test_a_device_map_names_one_device(given: Any) -> None:
    assert read_device_map(given) == "cpu"


@pytest.mark.parametrize("given", [None, "auto", {"": "auto"}])
def test_a_device_map_may_leave_the_choice(given: Any) -> None:
    assert read_device_map(given) == "auto"


@pytest.mark.parametrize("given", [{"model.vision": 0, "model.text": 1}, {}, {"text": "cpu"}, "balanced", "sequential"])
def test_a_device_map_over_several_devices_names_the_class_for_them(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"device_map is .*one device; AutoModelForCausalLM of md3cli\.original"):
        read_device_map(given)


@pytest.mark.parametrize("given", [1.5, True, ["cuda"], {"": None, "x": 1}, {"": ["cpu"]}])
def test_a_device_map_of_another_kind_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="device_map is "):
        read_device_map(given)


@NO_CUDA
@pytest.mark.parametrize("given", ["cuda", {"": "cuda"}, {"": "cuda:0"}, 0, {"": 0}])
def test_a_gpu_that_is_not_there_is_told_in_words(given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Moondream.from_pretrained(FOLDER, trust_remote_code=True, dtype=torch.bfloat16, device_map=given)
    words = str(caught.value)
    assert words.startswith(('device_map="cuda": ', 'device_map="cuda:0": '))
    assert words.endswith('use device_map="cpu"')
    assert "--device" not in words


def test_an_unknown_keyword_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"takes no attn_implementation, low_cpu; it takes trust_remote_code, .*quant"):
        Moondream.from_pretrained(FOLDER, attn_implementation="sdpa", low_cpu=True)


@pytest.mark.parametrize("twice", [{"dtype": "auto", "torch_dtype": "auto"}, {"device": "cpu", "device_map": "cpu"}])
def test_a_setting_is_not_said_twice(twice: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="are one setting"):
        Moondream.from_pretrained(FOLDER, **twice)


def test_arguments_reach_load(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelOptions] = []

    def load_engine(options: ModelOptions) -> None:
        asked.append(options)

    monkeypatch.setattr(api, "load_engine", load_engine)
    Moondream.from_pretrained(
        "moondream/moondream3-preview",
        trust_remote_code=True,
        torch_dtype=torch.float16,
        device_map={"": "cpu"},
        revision="2025-09-01",
        quant="int8",
        adapter="lora",
        batch_size=8,
    )
    Moondream.from_pretrained()
    assert asked == [
        ModelOptions(
            model="moondream/moondream3-preview",
            revision="2025-09-01",
            adapter="lora",
            device="cpu",
            dtype="fp16",
            quant="int8",
            batch_size=8,
            cache=False,
        ),
        ModelOptions(model="moondream3", cache=False),
    ]


def test_what_it_loads_is_what_load_loads() -> None:
    model = Moondream.from_pretrained(FOLDER, dtype="bfloat16", device_map={"": "cpu"}, trust_remote_code=True)
    assert model.engine.model.dtype == torch.bfloat16
    assert model.engine.model.device.type == "cpu"
    again = Moondream.load(FOLDER, dtype="bf16", device="cpu")
    assert model.engine.identity.model == again.engine.identity.model
