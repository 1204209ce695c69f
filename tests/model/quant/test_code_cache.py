"""Codes found once are found again, and nothing else is taken for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from md3cli.config import ModelOptions
from md3cli.file_cache import FileCache
from md3cli.model.engine.load import load_weights
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant import load, search
from md3cli.model.quant.search import CodeCache
from md3cli.model.weights.codes import LowBit, quantise
from md3cli.model.weights.files import WeightFiles, find_weight_files
from md3cli.model.weights.hub import model_path

TINY = model_path("tiny")
SHAPE = (4, 512, 512)
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> CodeCache:
    return CodeCache(FileCache(tmp_path, 1 << 30), find_weight_files(TINY), torch.bfloat16, CPU)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LowBit)
def test_codes_come_back_bit_for_bit(kind: LowBit, cache: CodeCache) -> None:
    made = quantise(weight(*SHAPE), kind)
    assert cache.load("w", kind, SHAPE) is None
    cache.save("w", made)
    found = cache.load("w", kind, SHAPE)
    assert found is not None
    assert torch.equal(found.dequantise(torch.float32), made.dequantise(torch.float32))
    assert all(cache.load("w", other, SHAPE) is None for other in LowBit if other is not kind)
    assert cache.load("v", kind, SHAPE) is None
    assert cache.load("w", kind, (8, 512, 512)) is None


def test_small_weights_are_not_worth_a_file(cache: CodeCache) -> None:
    cache.save("w", quantise(weight(64, 128), LowBit.INT8))
    assert cache.files.info().num_files == 0


def test_a_checkpoint_that_changed_has_other_codes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    files = FileCache(tmp_path, 1 << 30)

    def of_now() -> CodeCache:
        return CodeCache(files, WeightFiles(tmp_path, (file,), None, None, {}), torch.bfloat16, CPU)

    of_now().save("w", quantise(weight(*SHAPE), LowBit.INT8))
    assert of_now().load("w", LowBit.INT8, SHAPE) is not None
    os.utime(file, ns=(1, 1))
    assert of_now().load("w", LowBit.INT8, SHAPE) is None


def test_codes_of_weights_read_in_another_dtype_are_others(cache: CodeCache) -> None:
    cache.save("w", quantise(weight(*SHAPE), LowBit.INT8))
    same, other = (
        CodeCache(cache.files, find_weight_files(TINY), dtype, CPU) for dtype in (torch.bfloat16, torch.half)
    )
    assert same.load("w", LowBit.INT8, SHAPE) is not None
    assert other.load("w", LowBit.INT8, SHAPE) is None, "rounded otherwise before scales were searched"


@pytest.mark.parametrize("kind", LowBit)
def test_codes_come_back_on_the_device_that_asks(kind: LowBit, cache: CodeCache) -> None:
    cache.save("w", quantise(weight(*SHAPE), kind))
    meta = torch.device("meta")  # stands in for a GPU
    found = CodeCache(cache.files, find_weight_files(TINY), torch.bfloat16, meta).load("w", kind, SHAPE)
    assert found is not None
    assert {found.codes.device, found.scale.device} == {meta}


def test_a_full_disk_ends_keeping_not_the_start(cache: CodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key: str, payload: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.files, "put", refuse)
    cache.save("w", quantise(weight(*SHAPE), LowBit.INT8))
    assert not cache.is_writable


def test_a_second_start_searches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LEAST_ELEMENTS", 0)
    options = ModelOptions(model=str(TINY), quant="int4", cache_dir=tmp_path)

    def start() -> Moondream3:
        return load_weights(options, TINY, dtype=torch.float32, device=CPU).model

    first = start()

    def refuse(weight: torch.Tensor, kind: LowBit) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(load, "search", refuse)
    second = start()
    x = torch.randn(1, 5, first.config.text.dim)
    position = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(first.text(x, position), second.text(x, position))
