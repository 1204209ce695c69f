"""One stage of the model at a time beside the limit that binds it: a share is the rate divided by that limit.

Matrix products bind vision and prefill. Reading weights binds a decode step and, with many rows, so does reading keys
and values. What memory can do is measured as a bare read on a CPU and as a bare copy on CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from md3cli.images.crops import PreparedImage
from md3cli.model.engine.encoder import ImageEncoder, crop_flops, crops_per_batch
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.passes import Passes
from md3cli.model.engine.state import Mode, Rows, idle_rows
from md3cli.model.engine.stepper import Stepper
from md3cli.model.engine.uploads import num_distinct_crops
from md3cli.model.network.moondream import Moondream3

GEMM_SIDES = {"cuda": 8192}
GEMM_SIDE = 4096  # on other devices
READ_BYTES = 1 << 30
NUM_CROPS = 20  # at least, of the vision stage; on CUDA at least one micro-batch
DECODE_STEPS = 8


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the least time of several runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def wait_for(device: torch.device) -> None:
    """Wait until a CUDA device has done all that it was given; other devices have done it when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_limits(model: Moondream3) -> dict[str, float]:
    """Measure what a bare matrix product (large, and of the vision encoder's shapes) and a bare read reach here.

    On CUDA a bare copy is measured, too; its bytes count twice, because they are read and written.
    """
    device, v = model.device, model.config.vision
    side = GEMM_SIDES.get(device.type, GEMM_SIDE)
    block = torch.ones(READ_BYTES // 4, device=device)
    memory = {"read_gbytes": READ_BYTES / best_seconds(block.sum, device) / 1e9}
    if device.type == "cuda":
        memory["copy_gbytes"] = copy_rate(block) / 1e9
    del block
    shapes = [(3 * v.enc_dim, v.enc_dim), (v.enc_dim, v.enc_dim), (v.enc_ff_dim, v.enc_dim), (v.enc_dim, v.enc_ff_dim)]
    crops = crops_per_batch(model)
    return {
        "gemm_gflops": gemm_rate(side, [(side, side)], model) / 1e9,
        "vision_gemm_gflops": gemm_rate(crops * v.num_patches, shapes, model) / 1e9,
        **memory,
    }


def copy_rate(block: torch.Tensor) -> float:
    """Return the bytes that are read and written per second by copying `block`."""
    copy = torch.empty_like(block)
    return 2.0 * block.nbytes / best_seconds(lambda: copy.copy_(block), block.device)


def gemm_rate(num_rows: int, shapes: list[tuple[int, int]], model: Moondream3) -> float:
    """Return the floating-point operations per second of bare products of `num_rows` rows with matrices [out, in]."""
    cases = []
    for out_features, in_features in shapes:
        x, weight = (torch.randn(n, in_features, device=model.device).to(model.dtype) for n in (num_rows, out_features))
        cases.append((x, weight.t(), x.new_empty(num_rows, out_features)))

    def run() -> None:
        for x, weight, out in cases:
            torch.mm(x, weight, out=out)

    operations = 2.0 * num_rows * sum(out_features * in_features for out_features, in_features in shapes)
    return operations / best_seconds(run, model.device, repeats=8)


def bench_vision(model: Moondream3, images: list[PreparedImage], limits: dict[str, float]) -> dict[str, float]:
    """Encode pictures of mixed crop counts as the engine does, at least `NUM_CROPS`; return time and rates."""
    encoder = ImageEncoder(model, memory_bytes=0)
    is_cuda = model.device.type == "cuda"
    least = max(NUM_CROPS, encoder.max_crops) if is_cuda else NUM_CROPS
    chosen, num_crops = [], 0
    for image in images:
        if num_crops >= least:
            break
        chosen.append(image)
        num_crops += num_distinct_crops(image.tiling)
    if is_cuda:  # the first run of a size takes memory from the driver and chooses algorithms
        seconds = best_seconds(lambda: encoder.encode(chosen), model.device)
    else:  # a second run of these would take a minute
        encoder.encode(chosen[:1])
        started = time.perf_counter()
        encoder.encode(chosen)
        seconds = time.perf_counter() - started
    rate = (num_crops * crop_flops(model) + len(chosen) * projection_flops(model)) / seconds / 1e9
    return {
        "seconds": seconds,
        "crops_per_second": num_crops / seconds,
        "gflops": rate,
        "share": rate / limits["vision_gemm_gflops"],
    }


def projection_flops(model: Moondream3) -> float:
    """Return the floating-point operations from one picture's pooled features to its embeddings."""
    v = model.config.vision
    return 2.0 * v.num_patches * v.proj_inner_dim * (2 * v.enc_dim + v.proj_out_dim)


def bench_prefill(model: Moondream3, limits: dict[str, float], num_images: int = 1) -> dict[str, float]:
    """Run the prefixes of `num_images` pictures through the decoder in one pass; return time and rates."""
    length = model.config.prefix_len
    x = torch.randn(num_images, length, model.config.text.dim, device=model.device).to(model.dtype)
    position = torch.arange(length, device=model.device).expand(num_images, -1)
    seconds = best_seconds(lambda: model.text(x, position), model.device, repeats=2)
    rate = num_images * prefill_flops(model, length) / seconds / 1e9
    return {
        "seconds": seconds,
        "tokens_per_second": num_images * length / seconds,
        "gflops": rate,
        "share": rate / limits["gemm_gflops"],
    }


def bench_decode(model: Moondream3, batch_size: int, limits: dict[str, float]) -> dict[str, float]:
    """Run decode steps right behind a picture's prefix, as an engine takes them; return time and rates.

    Their limit is a bare copy on CUDA and a bare read elsewhere.
    """
    device, start = model.device, model.config.prefix_len + 8
    is_cuda = device.type == "cuda"
    cache = KVCache(
        model.config, batch_size, start + DECODE_STEPS + 2, dtype=model.dtype, device=device, is_fixed=is_cuda
    )
    stepper = Stepper(Passes(model), cache, batch_size)
    if is_cuda:
        stepper.capture(cache.capacity)
    stepper.rows.put(slice(0, batch_size), text_rows(batch_size, start, device))
    stepper.next_SD.normal_()

    def step() -> None:
        stepper.step(batch_size, cache.capacity, is_sampled=False)

    seconds = best_seconds(step, device, repeats=DECODE_STEPS)
    rate = decode_bytes(model, batch_size, start) / seconds / 1e9
    return {
        "seconds": seconds,
        "tokens_per_second": batch_size / seconds,
        "gbytes": rate,
        "share": rate / limits.get("copy_gbytes", limits["read_gbytes"]),
    }


def text_rows(batch_size: int, position: int, device: torch.device) -> Rows:
    """Return rows that write text at `position` and never end."""
    rows = idle_rows(batch_size, device)
    return rows._replace(
        mode=torch.full_like(rows.mode, int(Mode.TEXT)),
        limit=torch.full_like(rows.limit, 1 << 30),
        position=torch.full_like(rows.position, position),
    )


def prefill_flops(model: Moondream3, length: int) -> float:
    """Return the floating-point operations of a prefix through the decoder, without the head."""
    t = model.config.text
    attention = 4 * t.dim**2 + 2 * t.n_heads * 3 * t.dim + 2 * length * t.dim
    total = 0
    for layer in range(t.n_layers):
        total += attention
        if t.moe is not None and t.is_moe_layer(layer):
            total += t.dim * t.moe.num_experts + t.moe.experts_per_token * 3 * t.dim * t.moe.expert_inner_dim
        else:
            total += 2 * t.dim * t.ff_dim
    return 2.0 * length * total


def decode_bytes(model: Moondream3, batch_size: int, context: int) -> float:
    """Return the bytes of weights and cache that one decode step reads; of experts those that uniform routing meets."""
    t = model.config.text
    elements = float(t.vocab_size * t.dim)
    for layer in range(t.n_layers):
        elements += 4 * t.dim**2 + 2 * t.n_heads * 3 * t.dim
        if t.moe is not None and t.is_moe_layer(layer):
            missed = (1 - t.moe.experts_per_token / t.moe.num_experts) ** batch_size
            elements += t.moe.num_experts * (1 - missed) * 3 * t.dim * t.moe.expert_inner_dim
            elements += t.dim * t.moe.num_experts
        else:
            elements += 2 * t.dim * t.ff_dim
    region = model.config.region
    elements += t.dim * (region.coord_out_dim + region.size_out_dim)
    elements += batch_size * context * 2 * t.n_layers * t.dim
    return elements * model.dtype.itemsize
