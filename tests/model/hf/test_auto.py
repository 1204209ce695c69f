"""`md3cli.original.AutoModelForCausalLM` and `AutoProcessor`, which know one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from golden_cases import CASES

from md3cli.errors import CheckpointError, ConfigError
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.hf.auto import AutoModelForCausalLM, AutoProcessor

FOLDER = str(CASES["a"][0])


def test_they_make_our_classes_of_any_layout() -> None:
    for name in ("a", "hf-port", "int4", "raw-fp8"):
        folder = str(CASES[name][0])
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        assert isinstance(model, Moondream3ForConditionalGeneration)
        assert isinstance(AutoProcessor.from_pretrained(folder, trust_remote_code=True), Moondream3Processor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("given", ["cuda:0", {"": "cuda"}, 0, {"": 0}, {"model.vision": "cpu", "model.text": 0}])
def test_a_gpu_that_is_not_there_is_told_in_words(given: Any) -> None:
    for loader in (AutoModelForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(ConfigError, match=r'^device_map="cuda(:0)?": '):
            loader.from_pretrained(FOLDER, trust_remote_code=True, device_map=given)


def test_another_model_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(str(tmp_path), trust_remote_code=True)
