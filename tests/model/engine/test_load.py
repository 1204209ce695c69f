"""From options to an engine: devices, dtypes, and weights that must fit before they are read. No GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from md3cli.config import ModelOptions
from md3cli.errors import ConfigError
from md3cli.model.engine import engine as engine_module
from md3cli.model.engine import load
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.load import (
    check_weights_fit,
    choose_device,
    choose_dtype,
    load_engine,
    load_weights,
    prepare_device,
    warn_of_another_base,
    weight_bytes,
)
from md3cli.model.engine.machine import MemoryPlan, least_room
from md3cli.model.network.config import ModelConfig
from md3cli.model.quant.layers import low_bit_matrices
from md3cli.model.weights.hub import model_path
from md3cli.model.weights.names import Format, expected_tensors, slots
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
TINY = model_path("tiny")


def real_plan(layout: Format = Format.RAW) -> CheckpointPlan:
    """The real model's tensors, as a layout stores them."""
    table = slots(expected_tensors(ModelConfig(), has_region_ln=True), layout)
    return replace(plan_checkpoint(TINY), layout=layout, config=ModelConfig(), slots=tuple(table))


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "quant", "dtype", "gigabytes"),
    [
        (Format.RAW, "stored", BF16, 18.54),
        (Format.RAW, "int4", BF16, 6.19),
        (Format.RAW, "int8", BF16, 9.97),
        (Format.RAW, "int4", torch.float32, 37.07),  # computed plainly, from the values of the codes
        (Format.RAW_FP8, "stored", BF16, 10.51),
        (Format.RAW_FP8, "none", torch.float16, 18.54),
        (Format.INT4, "stored", BF16, 6.19),
    ],
)
def test_the_real_models_sizes(layout: Format, quant: str, dtype: torch.dtype, gigabytes: float) -> None:
    assert weight_bytes(real_plan(layout), quant, dtype) / 1e9 == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(("quant", "within"), [("stored", 0.0), ("int8", 0.03), ("int4", 0.03)])
def test_sizes_are_those_of_a_model_that_was_loaded(quant: str, within: float) -> None:
    options = ModelOptions(model="tiny", quant=quant, cache=False)
    model = load_weights(options, plan_checkpoint(TINY), dtype=BF16, device=CPU)
    packed = sum(matrix.num_bytes for matrix in low_bit_matrices(model))
    size = packed + sum(tensor.nbytes for tensor in model.state_dict().values())
    assert weight_bytes(plan_checkpoint(TINY), quant, BF16) == pytest.approx(size, rel=within, abs=0)


def check(free: float, layout: Format = Format.RAW, quant: str = "stored", dtype: torch.dtype = BF16) -> None:
    check_weights_fit(
        real_plan(layout), "moondream3", quant=quant, dtype=dtype, max_context=4096, device=CUDA, free=int(free)
    )


def test_weights_that_fit_are_no_matter() -> None:
    needed = weight_bytes(real_plan(), "stored", BF16) + least_room(ModelConfig(), BF16, 4096)
    check(needed)
    with pytest.raises(ConfigError):
        check(needed - 1)


@pytest.mark.parametrize(
    ("free", "layout", "quant", "dtype", "advice"),
    [
        (15.6e9, Format.RAW, "stored", BF16, "use --quant int8 (10.0 GB), or --device cpu"),
        (10.9e9, Format.RAW, "none", BF16, "use --quant int4 (6.2 GB), or --device cpu"),
        (15.6e9, Format.RAW_FP8, "none", torch.float16, "use --quant stored (10.5 GB), or --device cpu"),
        (23.4e9, Format.RAW, "stored", torch.float32, "use --dtype auto (18.5 GB), or --device cpu"),
        (10.9e9, Format.INT4, "none", BF16, "use --quant stored (6.2 GB), or --device cpu"),
        (10.9e9, Format.RAW, "stored", torch.float32, "use --dtype auto --quant int4 (6.2 GB), or --device cpu"),
        (3.9e9, Format.RAW, "int4", BF16, "use a card with more memory, or --device cpu"),
    ],
)
def test_what_would_fit_is_said(free: float, layout: Format, quant: str, dtype: torch.dtype, advice: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(free, layout, quant, dtype)
    assert str(error.value).endswith(f"cuda:0 has {free / 1e9:.1f} GB free: {advice}")


@pytest.mark.parametrize(
    ("quant", "start"),
    [
        ("none", "moondream3 in 16 bits takes 18.5 GB and 1.3 GB to work in, and cuda:0 has 5.0 GB free: "),
        ("stored", "moondream3 as stored takes 10.5 GB and 1.3 GB to work in, and cuda:0 has 5.0 GB free: "),
        ("int8", "moondream3 in int8 takes 10.0 GB and 1.3 GB to work in, and cuda:0 has 5.0 GB free: "),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(quant: str, start: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(5e9, Format.RAW_FP8, quant)
    assert str(error.value).startswith(start)


def test_weights_are_weighed_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_bytes", lambda device: 1 << 20)
    options = ModelOptions(model="tiny", device="cuda", cache=False)
    with pytest.raises(ConfigError, match=r"tiny in 16 bits takes 0\.0 GB .* cuda:0 has 0\.0 GB free"):
        load_weights(options, plan_checkpoint(TINY), dtype=BF16, device=CUDA)
    with pytest.raises(ConfigError, match="--max-context 1"):
        load_weights(replace(options, max_context=1), plan_checkpoint(TINY), dtype=BF16, device=CUDA)


# -- devices and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), BF16), ((8, 6), BF16), ((12, 0), BF16)]
)
def test_auto_on_cuda_is_never_float32(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", CUDA, 18 * 10**9) is dtype
    assert choose_dtype("auto", CUDA, 10**6) is dtype
    assert choose_dtype("fp32", CUDA, 10**6) is torch.float32


def test_cuda_where_there_is_none_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "cuda_fault", lambda: "the NVIDIA driver is too old; update it")
    for name in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(ConfigError) as error:
            choose_device(name)
        assert str(error.value) == f"--device {name}: the NVIDIA driver is too old; update it"


def test_a_gpu_that_cannot_be_used_is_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "is_cuda_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(load, "cuda_fault", lambda: "the NVIDIA driver is too old; update it")
    with pytest.warns(UserWarning, match="no GPU is used: the NVIDIA driver is too old"):
        assert choose_device("auto") == CPU


def test_one_of_several_cuda_devices_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "cuda_fault", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda") == CUDA
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"--device cuda:2: this machine has 2 CUDA device\(s\)"):
        choose_device("cuda:2")


def test_a_cuda_device_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    products = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(products, name) for name in names}
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(load, "require_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for name in (*load.ALLOCATOR_VARIABLES, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    try:
        for name in names:
            setattr(products, name, True)
        prepare_device(CPU)
        assert not chosen
        assert "PYTORCH_ALLOC_CONF" not in os.environ
        prepare_device(torch.device("cuda", 1), Path("kept"))
        assert chosen == [torch.device("cuda", 1)]
        assert os.environ["TRITON_CACHE_DIR"] == str(Path("kept/triton"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        with pytest.warns(UserWarning, match=r"Tesla T4 is older than compute capability 8.0: slow, and .* fp16"):
            prepare_device(CUDA)
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert not any(getattr(products, name) for name in names)
    finally:
        for name, value in before.items():
            setattr(products, name, value)


@pytest.mark.parametrize("name", load.ALLOCATOR_VARIABLES)
def test_an_allocator_that_was_set_up_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "require_kernels", lambda device: (_ for _ in ()).throw(ConfigError("enough")))
    for other in (*load.ALLOCATOR_VARIABLES, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "backend:native")
    with pytest.raises(ConfigError, match="enough"):
        prepare_device(CUDA)
    assert [os.environ.get(other) for other in load.ALLOCATOR_VARIABLES if other != name] == [None, None]
    assert os.environ[name] == "backend:native"


@pytest.mark.process
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_torch_reads_the_allocators_variables_after_it_was_imported(name: str) -> None:
    """It refuses a wrong value when it first needs the settings, not before; so one set by then counts."""
    program = (
        f"import os, torch; os.environ[{name!r}] = 'expandable_segments:perhaps'\n"
        "try: torch._C._accelerator_setAllocatorSettings('garbage_collection_threshold:0.5')\n"
        "except ValueError as error: print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in load.ALLOCATOR_VARIABLES}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "'perhaps'" in done.stdout, done.stderr


# -- the engine ------------------------------------------------------------------------------------


def test_the_engine_is_made_as_memory_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "plan_memory", lambda *args: MemoryPlan(3, 5, 777))
    engine = load_engine(ModelOptions(model="tiny", device="cpu", cache=False))
    assert (engine.batch_size, engine.encoder.max_crops, engine.prefill_tokens) == (3, 5, 777)


def test_a_batch_that_found_less_memory_than_planned_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def cache(config: ModelConfig, num_slots: int, *rest: object, **more: object) -> KVCache:
        if num_slots > 4:
            raise torch.OutOfMemoryError("out of memory (made up)")
        return KVCache(config, num_slots, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module, "KVCache", cache)
    with pytest.warns(UserWarning, match="free for a batch of 8 and then held 4: something else runs on cpu"):
        load_engine(ModelOptions(model="tiny", device="cpu", batch_size=8, cache=False))


def test_on_the_cpu_the_engine_has_its_usual_sizes() -> None:
    engine = load_engine(ModelOptions(model="tiny", device="cpu", batch_size=7, cache=False))
    assert (engine.batch_size, engine.prefill_tokens) == (7, 1024)


def test_missing_kernels_are_found_before_weights_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise ConfigError(f"{device}: the kernels need triton; pip install triton")

    monkeypatch.setattr(load, "choose_device", lambda name: CUDA)
    monkeypatch.setattr(load, "require_kernels", fail)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    with pytest.raises(ConfigError, match="pip install triton"):
        load_engine(ModelOptions(model=str(tmp_path / "nothing"), device="cuda", cache=False))


def test_an_adapter_of_another_repository_is_told(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    for base, is_told in (("someone/other", True), ("Moondream/moondream3-preview", False), ("/a/folder", False)):
        config.write_text(json.dumps({"base_model_name_or_path": base}))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            warn_of_another_base(tmp_path, "moondream3")
            warn_of_another_base(tmp_path, "tiny")
        assert [f"trained on {base}" in str(warning.message) for warning in told] == [True] * is_told
