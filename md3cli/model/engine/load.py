"""From options to a ready engine: which files, which device, which dtype, how many at once, and whether it all fits.

`load_engine` is the one way in. What is not to be had on this machine is a ConfigError that says what to do instead,
files that do not fit are a CheckpointError, a --cache-dir that cannot be used is an OutputError. How large weights
become is read from headers alone, before any weight is loaded; `device_facts` says what a machine offers, for
`md3 doctor`. Knows nothing of pictures and requests.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from operator import itemgetter
from pathlib import Path

import torch

from md3cli.config import ModelOptions
from md3cli.errors import ConfigError, OutputError
from md3cli.file_cache import FileCache
from md3cli.model.engine.cutting import DeviceCutter
from md3cli.model.engine.encoder import EncodingCache, ImageEncoder, crop_sizes
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.machine import MemoryPlan, free_bytes, least_room, plan_memory
from md3cli.model.engine.prompts import Prompts, Tokenizer
from md3cli.model.engine.ready import make_ready
from md3cli.model.engine.resize import PictureCutter
from md3cli.model.kernels.availability import (
    cuda_fault,
    is_cuda_available,
    kernel_fault,
    require_kernels,
    triton_version,
)
from md3cli.model.kernels.float8_products import float8_fault
from md3cli.model.network.config import MAX_CONTEXT_LIMIT, ModelConfig
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.layers import quantise_vision
from md3cli.model.quant.load import NONE, STORED, has_low_bits, load_dequantised, load_low_bit, low_bit_of
from md3cli.model.quant.matrices import has_int8_products
from md3cli.model.quant.search import CodeCache
from md3cli.model.weights.adapters import base_of, merge_adapter
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.hub import is_repo_id, repo_of, resolve_model
from md3cli.model.weights.names import INT4_GROUP, Slot
from md3cli.model.weights.plan import CheckpointPlan, plan_checkpoint
from md3cli.model.weights.read import CheckpointReader, assign_weights
from md3cli.records import RunIdentity
from md3cli.settings import user_cache_dir
from md3cli.system import keep_freed_memory

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
QUANTS = ("stored", "none", "int8", "int4")
# Products of a model below this are too small to share: a second thread waits (and spins) more than it
# computes, ten times over when the machine has other work. Process-wide, as torch has it.
ONE_THREAD_BYTES = 64 << 20
SMALL_MODEL_BYTES = 1 << 30  # on CPU, models below it gain nothing from 16 bits
FULL_CAPABILITY = (8, 0)  # bf16 units, and matrix units that Triton knows how to use
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_SCALE_BYTES = 4  # scales and zero points are float32


def weight_bytes(plan: CheckpointPlan, quant: str, dtype: torch.dtype) -> int:
    """Return the bytes of all weights as `--quant` holds them, the plain ones in `dtype`; in float32 all are plain."""
    return sum(_slot_bytes(slot, quant, dtype) for slot in plan.slots)


def _slot_bytes(slot: Slot, quant: str, dtype: torch.dtype) -> int:
    count = prod(slot.shape)
    match low_bit_of(slot, quant) if dtype is not torch.float32 else None:
        case None:
            return count * dtype.itemsize
        case LowBit.INT4:
            return count // 2 + count // INT4_GROUP * 2 * _SCALE_BYTES
        case LowBit.INT8 | LowBit.FP8:
            return count + count // slot.shape[-1] * _SCALE_BYTES


def check_weights_fit(
    plan: CheckpointPlan,
    name: str,
    *,
    quant: str,
    dtype: torch.dtype,
    max_context: int,
    device: torch.device,
    free: int,
) -> None:
    """Refuse weights that do not fit, with one picture's work, into `free` bytes of `device`.

    `name` is the model as the user calls it, `quant` as `--quant`.
    """

    def fits(size: int, kind: torch.dtype) -> bool:
        return size + least_room(plan.config, kind, max_context) <= free

    needed = weight_bytes(plan, quant, dtype)
    if fits(needed, dtype):
        return
    fitting = [(size, flags) for flags, size, kind in _other_forms(plan, quant, dtype) if fits(size, kind)]
    advice = "use a card with more memory"
    if fitting:
        size, flags = max(fitting, key=itemgetter(0))  # of equals the first
        advice = f"use {flags} ({size / 1e9:.1f} GB)"
    room = least_room(plan.config, dtype, max_context)
    raise ConfigError(
        f"{name} {_form(plan, quant, dtype)} takes {needed / 1e9:.1f} GB and {room / 1e9:.1f} GB to work in, "
        f"and {device} has {free / 1e9:.1f} GB free: {advice}, or --device cpu"
    )


def _form(plan: CheckpointPlan, quant: str, dtype: torch.dtype) -> str:
    if dtype is torch.float32 or not has_low_bits(plan, quant):
        return f"in {8 * dtype.itemsize} bits"
    return "as stored" if quant == STORED else f"in {quant}"


def _other_forms(plan: CheckpointPlan, quant: str, dtype: torch.dtype) -> Iterator[tuple[str, int, torch.dtype]]:
    """Yield what else can be asked for: (the options that say it, bytes of the weights, dtype of the activations)."""
    half = torch.bfloat16 if dtype is torch.float32 else dtype
    shorter = "--dtype auto" if dtype is torch.float32 else ""
    for other in dict.fromkeys((quant, STORED, NONE, LowBit.INT8, LowBit.INT4)):
        flags = " ".join(filter(None, (shorter, f"--quant {other}" if other != quant else "")))
        if flags:
            yield flags, weight_bytes(plan, other, half), half


def load_engine(options: ModelOptions) -> Engine:
    """Resolve, load and set up the model named by `options`.

    Raises:
        CheckpointError: the weights, config or tokenizer cannot be had or do not fit.
        ConfigError: a device, dtype or setting that is not to be had here.
    """
    torch.set_flush_denormal(True)  # denormals make CPU arithmetic five times slower
    device = choose_device(options.device)
    prepare_device(device, options.cache_dir)
    files = resolve_model(
        options.model, revision=options.revision, tokenizer=options.tokenizer, offline=options.offline
    )
    checkpoint = plan_checkpoint(files.path)
    num_bytes = checkpoint.files.num_bytes
    vision_threads = torch.get_num_threads()
    if device.type == "cpu" and num_bytes < ONE_THREAD_BYTES:
        torch.set_num_threads(1)
    dtype = choose_dtype(options.dtype, device, num_bytes)
    model = load_weights(options, checkpoint, dtype=dtype, device=device)
    store = open_cache(options, model)  # before kernels take the weights over: its keys cover them
    if options.quant_vision != "none":
        quantise_vision_for(options, model)
    keep_freed_memory()  # from here on: what loading takes and frees is of other sizes
    tokenizer = Tokenizer.load(files.tokenizer_file, model.config)
    max_context = choose_max_context(options.max_context, model.config)
    optimise(model)
    plan = plan_memory(options.batch_size, model.config, dtype, device, max_context)
    engine = make_engine(
        model,
        tokenizer,
        files.name,
        options.identity(files.identity),
        plan,
        max_context=max_context,
        store=store,
        threads=vision_threads,
    )
    engine.cutter = make_cutter(device, model.config)
    if device.type == "cuda":
        engine.capture()
    if options.compile:
        make_ready(engine, options.cache_dir)
    if engine.batch_size < plan.slots:
        found = f"memory was free for a batch of {plan.slots} and then held {engine.batch_size}"
        warnings.warn(f"{found}: something else runs on {device}", stacklevel=2)
    return engine


def make_engine(
    model: Moondream3,
    tokenizer: Tokenizer,
    name: str,
    identity: RunIdentity,
    plan: MemoryPlan,
    *,
    max_context: int | None = None,
    store: EncodingCache | None = None,
    threads: int | None = None,
    is_planned: bool | None = None,
) -> Engine:
    """Build an engine of the sizes in `plan`; `name` is the model's, for `Prompts`, `threads` are the vision encoder's.

    `max_context` None is the config's, `is_planned` None what the device asks for (`Engine`).
    """
    return Engine(
        model,
        tokenizer,
        Prompts(model.config, tokenizer, name),
        ImageEncoder(
            model,
            store=store,
            max_crops=plan.max_crops,
            sizes=crop_sizes(plan.max_crops, model.device),
            threads=threads,
        ),
        identity=identity,
        batch_size=plan.slots,
        max_context=max_context or model.config.text.max_context,
        prefill_tokens=plan.prefill_tokens,
        is_planned=is_planned,
    )


def make_cutter(device: torch.device, config: ModelConfig) -> DeviceCutter | None:
    """Return what cuts pictures on a CUDA device, as Pillow would; or None, with a warning where it differs."""
    if device.type != "cuda":
        return None
    fault = PictureCutter(device, config.vision.crop_config).fault()
    if fault is None:
        return DeviceCutter(device, config.vision.crop_config)
    warnings.warn(f"pictures are cut on the CPU, not on {device}: {fault}", stacklevel=2)
    return None


def load_weights(
    options: ModelOptions, plan: CheckpointPlan, *, dtype: torch.dtype, device: torch.device
) -> Moondream3:
    """Read the network of a checkpoint, its adapter merged, in as many bits as the options say.

    With `--dtype fp32` low bits are what values are rounded to, not how they are computed: the plain
    float32 network of the values that the codes stand for.
    """
    if options.quant not in QUANTS:
        raise ConfigError(f"--quant {options.quant:.80}: use {', '.join(QUANTS)}")
    quant = options.quant
    if device.type == "cuda":  # elsewhere the system pages, or says so itself
        context, free = choose_max_context(options.max_context, plan.config), free_bytes(device)
        check_weights_fit(plan, options.model, quant=quant, dtype=dtype, max_context=context, device=device, free=free)
    adapter = Path(options.adapter) if options.adapter else None
    with torch.device("meta"):
        model = Moondream3(plan.config, has_region_ln=plan.has_region_ln)
    if not has_low_bits(plan, quant):
        with CheckpointReader(plan, dtype=dtype, device=device) as weights:
            assign_weights(model, weights)
        if adapter is not None:
            merge_adapter(model, adapter)
    elif options.dtype == "fp32":
        load_dequantised(model, plan, quant=quant, device=device, adapter=adapter)
    else:
        files, is_cuda = open_files(options), device.type == "cuda"
        cache = CodeCache(files, plan.files, dtype, device) if files is not None else None
        load_low_bit(
            model, plan, quant=quant, dtype=dtype, device=device, adapter=adapter, cache=cache, for_kernels=is_cuda
        )
    if adapter is not None:
        warn_of_another_base(adapter.expanduser(), options.model)
    return model


def warn_of_another_base(adapter: Path, model: str) -> None:
    """Warn where an adapter names another repository as its base than the one it is merged into."""
    base, repo = base_of(adapter), repo_of(model)
    if base is not None and is_repo_id(base) and repo is not None and base.lower() != repo.lower():
        warnings.warn(f"adapter {adapter} says it was trained on {base}; it is merged into {repo}", stacklevel=2)


def quantise_vision_for(options: ModelOptions, model: Moondream3) -> None:
    """Put the vision encoder's products into the bits that `--quant-vision` asks for."""
    said, vision = f"--quant-vision {options.quant_vision:.80}", model.config.vision
    if options.quant_vision not in (LowBit.INT8, LowBit.FP8):
        raise ConfigError(f"{said}: use none, int8 or fp8")
    kind = LowBit(options.quant_vision)
    if options.dtype == "fp32":
        raise ConfigError(f"{said} is not computed in float32; leave --dtype fp32 out")
    if kind is LowBit.FP8:
        fault = float8_fault(model.device, model.dtype, (vision.enc_dim, vision.enc_ff_dim))
        if fault is not None:
            raise ConfigError(f"{said} {fault}; leave it out")
    elif model.device.type != "cpu" or not has_int8_products():
        raise ConfigError(f"{said} needs a CPU with torch's int8 engine (x86); leave it out")
    quantise_vision(model.vision, kind)


def open_cache(options: ModelOptions, model: Moondream3) -> EncodingCache | None:
    """Open the cache of encodings on disk, where it is wanted and can be used."""
    files = open_files(options)
    if files is None:
        return None
    return EncodingCache(files, model, background=options.background, quant_vision=options.quant_vision)


def open_files(options: ModelOptions) -> FileCache | None:
    """Return the folder of what outlives a run; None where it is not wanted, or, with a warning, unusable."""
    if not options.cache:
        return None
    try:
        return FileCache(options.cache_dir or user_cache_dir(), options.cache_size)
    except OutputError as error:
        if options.cache_dir is not None:
            raise
        warnings.warn(f"nothing is kept for the next run: {error}", stacklevel=2)
        return None


def prepare_device(device: torch.device, cache_dir: Path | None = None) -> None:
    """Set this process up for a CUDA device, before anything is allocated there; do nothing for others.

    Compiled kernels are kept in `cache_dir`, by default the user's cache folder, and not in a folder of Triton's own.
    """
    if device.type != "cuda":
        return
    if os.environ.keys().isdisjoint(ALLOCATOR_VARIABLES):
        # torch reads it when CUDA allocates first (2.11 and 2.13: not when it is imported). Segments that grow
        # leave no holes where caches and micro-batches of other sizes were.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    with contextlib.suppress(OSError):  # then in Triton's own
        folder = (cache_dir or user_cache_dir()) / "triton"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
    require_kernels(device)
    if torch.cuda.get_device_capability(device) < FULL_CAPABILITY:
        name, least = torch.cuda.get_device_name(device), ".".join(map(str, FULL_CAPABILITY))
        # Triton compiles products for them without matrix instructions, and spills.
        warnings.warn(f"{name} is older than compute capability {least}: slow, and computed in fp16", stacklevel=2)
    torch.cuda.set_device(device)
    # Sums of a product's parts stay in float32, so that they do not depend on how cuBLAS cuts it.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def choose_device(name: str) -> torch.device:
    """Choose a device: `auto` is the first CUDA device, else Apple's GPU, else the CPU; warn of an unusable GPU."""
    if name == "auto":
        if is_cuda_available():
            return torch.device("cuda", 0)
        if torch.cuda.device_count():  # counted by the driver, whatever its age
            warnings.warn(f"no GPU is used: {cuda_fault()}", stacklevel=2)
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name:.80}: no such kind of device; use cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (fault := cuda_fault()) is not None:
        raise ConfigError(f"--device {name}: {fault}")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: this machine has {count} CUDA device(s), from cuda:0 on")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: no Apple GPU here; try --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device {name}: use cpu, cuda, cuda:1 or mps")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def choose_dtype(name: str, device: torch.device, weight_bytes: int) -> torch.dtype:
    """Choose a dtype: `auto` is bf16; on a CPU fp32 without bf16 units or for a small model, where bf16 gains nothing.

    On CUDA below compute capability 8.0 `auto` is fp16: these cards have no bf16 units, and float32 does not fit.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"--dtype {name:.80}: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu" and (weight_bytes < SMALL_MODEL_BYTES or not has_fast_bf16_cpu()):
        return torch.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FULL_CAPABILITY:
        return torch.float16
    return torch.bfloat16


def has_fast_bf16_cpu() -> bool:
    """Return True where this CPU multiplies bf16 natively (AVX512-BF16 or AMX on x86, BF16 on Arm)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_max_context(asked: int | None, config: ModelConfig) -> int:
    """Return the positions that a generation may fill: as asked, else the config's."""
    least = config.prefix_len + 1
    if asked is not None and not least <= asked <= MAX_CONTEXT_LIMIT:
        raise ConfigError(
            f"--max-context {asked}: an image alone takes {config.prefix_len}; use {least} to {MAX_CONTEXT_LIMIT}"
        )
    return min(config.text.max_context if asked is None else asked, MAX_CONTEXT_LIMIT)


LARGE_MODEL_BYTES = 18 * 10**9  # the real one in 16 bits


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What this machine offers a model, for `md3 doctor`.

    `dtype` is what `auto` means on this device for the real model; `free_bytes` is the device's memory.
    `triton` is its version, empty where it is not installed or not used; `kernel_fault` what keeps the CUDA kernels
    from running on the device, in words.
    """

    torch_version: str
    device: str
    name: str
    dtype: str
    num_threads: int
    free_bytes: int
    triton: str = ""
    kernel_fault: str | None = None


def device_facts(device: str = "auto") -> DeviceFacts:
    """Return what this machine offers on `device`, a name as `choose_device` takes it."""
    chosen = choose_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    dtype = str(choose_dtype("auto", chosen, LARGE_MODEL_BYTES)).removeprefix("torch.")
    facts = DeviceFacts(torch.__version__, str(chosen), name, dtype, torch.get_num_threads(), free_bytes(chosen))
    if chosen.type == "cuda":
        facts = replace(facts, triton=triton_version(), kernel_fault=kernel_fault(chosen))
    return facts
