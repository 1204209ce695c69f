"""Part `stages`: one forward pass at a time against the limit that binds it, and what it launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from md3cli.bench.stages import decode_bytes, prefill_flops, projection_flops, text_rows
from md3cli.images.crops import Tiling
from md3cli.model.engine.encoder import crop_flops
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.passes import decode_step, run_prefixes
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.vision import VisionEncoder

from .child import Run
from .launches import count_launches
from .limits import Limits, limits_of
from .models import BF16, model_in
from .timing import median_ms, replayed_ms

PICTURES = (1, 8, 16, 22)
ROWS = (1, 8, 16, 64, 128)
BEHIND_PREFIX = 20  # positions: a prompt and some text; 750 in the real model
ROOM = 32  # positions behind the prefix that the engine's slots start with
ATTENTIONS = {
    "cuDNN attention": SDPBackend.CUDNN_ATTENTION,
    "flash attention": SDPBackend.FLASH_ATTENTION,
    "efficient attention": SDPBackend.EFFICIENT_ATTENTION,
}


def measure(run: Run) -> None:
    """Vision, prefixes and steps in bf16; the profiler last, since what it does to later runs is its own affair."""
    model, limits = model_in(run, BF16), limits_of(run)
    for num_pictures in (1, 7) if run.is_cuda else (1,):
        with run.if_it_fits(f"vision, {9 * num_pictures} crops"):
            measure_vision(run, model, num_pictures, limits)
    for count in PICTURES:
        with run.if_it_fits(f"prefix, {count} pictures"):
            measure_prefix(run, model, count, limits)
    for rows in ROWS:
        with run.if_it_fits(f"decode step, {rows} rows"):
            measure_decode(run, model, rows, limits)
    for what, step in (("decode step, 1 row", decode_of(model, 1)), ("decode step, 64 rows", decode_of(model, 64))):
        report_launches(run, f"{what}, bf16", step)
    report_launches(run, "prefix, 16 pictures, bf16", prefix_of(model, 16))


def repeats(run: Run) -> int:
    return 20 if run.is_cuda else 2


# -- vision ----------------------------------------------------------------------------------------


def measure_vision(run: Run, model: Moondream3, num_pictures: int, limits: Limits) -> None:
    """Pictures of nine crops from bytes on the device to embeddings, and again with each attention alone."""
    name = f"vision, {9 * num_pictures} crops, bf16"
    step = vision_of(run, model, num_pictures)
    flops = num_pictures * (9 * crop_flops(model) + projection_flops(model))
    report(run, name, median_ms(step, run.device, repeats(run)), flops / limits.product)
    for attention, backend in ATTENTIONS.items() if run.is_cuda else ():
        with attention_alone(model, backend):
            try:
                ms = median_ms(step, run.device, repeats=5)
            except RuntimeError as error:  # "No available kernel": not built, or not for 72 wide heads
                run.note(f"{name}, {attention}", str(error).splitlines()[0])
                continue
        run.figure(f"{name}, {attention}", ms, "ms")


def vision_of(run: Run, model: Moondream3, num_pictures: int) -> Callable[[], object]:
    side, tiling = model.config.vision.crop_size, Tiling(2, 4)
    crops = torch.randint(256, (9 * num_pictures, side, side, 3), dtype=torch.uint8, device=run.device)

    def step() -> list[torch.Tensor]:
        features = model.vision.encode_rows(model.vision.patch_rows(crops))
        gathered = model.vision.gather(features.unflatten(0, (num_pictures, 9)), tiling)
        return [model.vision.proj_mlp(pictures) for pictures in gathered.split(4)]

    return step


@contextmanager
def attention_alone(model: Moondream3, backend: SDPBackend) -> Iterator[None]:
    """Let the vision encoder use no other attention: its form sets its own order, within which ours would not hold."""
    form = getattr(model.vision.encode_rows, "__self__", None)
    if isinstance(form, VisionEncoder):  # the plain one, where a kernel of the form has failed
        with sdpa_kernel(backend):
            yield
        return
    with patch.object(form, "attention", [backend]):
        yield


# -- text ------------------------------------------------------------------------------------------


def measure_prefix(run: Run, model: Moondream3, count: int, limits: Limits) -> None:
    """The prefixes of `count` pictures in one pass, beside the time of their products alone."""
    name = f"prefix, {plural(count, 'picture')}, {BF16}"
    ms = median_ms(prefix_of(model, count), run.device, repeats(run))
    floor_s = count * prefill_flops(model, model.config.prefix_len) / limits.product
    report(run, name, ms, floor_s)
    if count == 16:
        run.figure(f"{name}: over its product time", ms / 1e3 / floor_s, "ratio")


def prefix_of(model: Moondream3, count: int) -> Callable[[], None]:
    config, device = model.config, model.device
    cache = KVCache(config, count, config.prefix_len + ROOM, dtype=model.dtype, device=device)
    slots = torch.arange(count, device=device)
    embeddings = torch.randn(count, config.prefix_len - 1, config.text.dim, device=device).to(model.dtype)
    return lambda: run_prefixes(model, cache, slots, embeddings)


def measure_decode(run: Run, model: Moondream3, rows: int, limits: Limits) -> None:
    """One step of `rows` rows, each with a picture, a prompt and some text, beside the time to read it all."""
    name = f"decode step, {plural(rows, 'row')}, {BF16}"
    step = decode_of(model, rows)
    ms = median_ms(step, run.device, repeats(run))
    floor_s = decode_bytes(model, rows, model.config.prefix_len + BEHIND_PREFIX) / limits.copy
    report(run, name, ms, floor_s)
    if rows == 64:
        run.figure(f"{name}: over its read time", ms / 1e3 / floor_s, "ratio")
    report_replayed(run, name, step)


def decode_of(model: Moondream3, rows: int) -> Callable[[], object]:
    config, device = model.config, model.device
    cache = KVCache(config, rows, config.prefix_len + ROOM, dtype=model.dtype, device=device)
    state = text_rows(rows, config.prefix_len + BEHIND_PREFIX, device)
    inputs = torch.randn(rows, config.text.dim, device=device).to(model.dtype)
    return lambda: decode_step(model, cache, state, inputs, cache.capacity, is_sampled=False)


def report_replayed(run: Run, name: str, step: Callable[[], object]) -> float | None:
    """The same step replayed as a graph, in milliseconds; None where there are no graphs, or it cannot be captured."""
    if not run.is_cuda:
        return None
    try:
        ms = replayed_ms(step, run.device, repeats(run))
    except RuntimeError as error:
        run.note(f"{name}, replayed", str(error).splitlines()[0])
        return None
    run.figure(f"{name}, replayed", ms, "ms")
    return ms


def report(run: Run, name: str, ms: float, floor_s: float) -> None:
    run.figure(name, ms, "ms")
    run.figure(f"{name}: share of the limit", 1e3 * floor_s / ms, "share")


def report_launches(run: Run, what: str, step: Callable[[], object]) -> None:
    """What the device was asked to do in one pass (a CPU: operators that torch was asked for)."""
    with run.if_it_fits(f"launches, {what}"):
        counts = count_launches(step, run.device)
        if counts is None:
            run.note(f"launches, {what}", "torch's profiler sees nothing of the device")
            return
        run.figure(f"{'launches' if run.is_cuda else 'operators'}, {what}", counts.kernels, "count")
        if run.is_cuda:
            run.figure(f"copies to the device, {what}", counts.to_device, "count")
            run.figure(f"copies to the host, {what}", counts.to_host, "count")


def plural(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count > 1 else ''}"
