"""Part `stages`: vision and prefixes against the limit that binds them, and the engine's own decode step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from md3cli.bench.stages import prefill_flops, projection_flops
from md3cli.images.crops import Tiling
from md3cli.model.engine.encoder import crop_flops
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.passes import run_prefixes
from md3cli.model.network.moondream import Moondream3

from .child import Run
from .launches import count_launches
from .limits import Limits, limits_of
from .models import BF16, all_weight_bytes, model_in
from .parts import STEP_MS
from .steps import RunningEngine, measure_step, plural, report_syncs, report_twin
from .timing import median_ms, repeats

PICTURES = (1, 16)  # of a pass of prefixes: of an engine for single questions, and of one for many
MICRO_BATCHES = (9, 36)  # crops that both encode at a time
STEPS = ((64, 64), (8, 1), (1, 1))  # slots of an engine, and rows in flight


def measure(run: Run) -> None:
    """In bf16; the profiler last, since what it does to later runs is its own affair."""
    model, limits = model_in(run, BF16), limits_of(run)
    run.figure(f"weights, {BF16}", all_weight_bytes(model) / 1e9, "GB")
    for num_crops in MICRO_BATCHES if run.is_cuda else MICRO_BATCHES[:1]:
        with run.if_it_fits(f"vision, {num_crops} crops"):
            measure_vision(run, model, num_crops, limits)
    for count in PICTURES:
        with run.if_it_fits(f"prefix, {count} pictures"):
            measure_prefix(run, model, count, limits)
    measure_steps(run, model, limits)
    with run.if_it_fits("launches, prefix"):
        report_launches(run, "prefix, 16 pictures, bf16", prefix_of(model, 16))


def measure_steps(run: Run, model: Moondream3, limits: Limits) -> None:
    """Steps of each engine; what a step of 64 rows asks of the host, launches, and whether its twin has its bits."""
    step_ms: dict[str, float] = {}
    for slots, rows in STEPS:
        with run.if_it_fits(f"decode step, {rows} of {slots} rows"):
            engine = RunningEngine(model, slots, rows)
            step_ms[f"{rows} of {slots}"] = measure_step(run, engine, BF16, limits)
            run.note(STEP_MS, step_ms)  # for the parts that come later
            if slots == rows > 1:
                for report_more in (report_syncs, report_twin):
                    with run.if_it_fits(report_more.__name__):
                        report_more(run, engine, BF16)
                report_launches(run, f"decode step, {plural(rows, 'row')}, {BF16}", engine.step)
            del engine


# -- vision ----------------------------------------------------------------------------------------


def measure_vision(run: Run, model: Moondream3, num_crops: int, limits: Limits, form: str = BF16) -> None:
    """Pictures of nine crops from bytes on the device to embeddings."""
    flops = num_crops * crop_flops(model) + num_crops // 9 * projection_flops(model)
    ms = median_ms(vision_of(run, model, num_crops), run.device, repeats(run.device))
    report(run, f"vision, {num_crops} crops, {form}", ms, flops / limits.product)


def vision_of(run: Run, model: Moondream3, num_crops: int) -> Callable[[], object]:
    side, tiling = model.config.vision.crop_size, Tiling(2, 4)
    crops = torch.randint(256, (num_crops, side, side, 3), dtype=torch.uint8, device=run.device)

    def step() -> list[torch.Tensor]:
        features = model.vision.encode_rows(model.vision.patch_rows(crops))
        gathered = model.vision.gather(features.unflatten(0, (num_crops // 9, 9)), tiling)
        return [model.vision.proj_mlp(pictures) for pictures in gathered.split(4)]

    return step


# -- text ------------------------------------------------------------------------------------------


def measure_prefix(run: Run, model: Moondream3, count: int, limits: Limits) -> None:
    """The prefixes of `count` pictures in one pass, beside the time of their products alone."""
    name = f"prefix, {plural(count, 'picture')}, {BF16}"
    ms = median_ms(prefix_of(model, count), run.device, repeats(run.device))
    floor_s = count * prefill_flops(model, model.config.prefix_len) / limits.product
    report(run, name, ms, floor_s)
    if count == 16:
        run.figure(f"{name}: over its product time", ms / 1e3 / floor_s, "ratio")


def prefix_of(model: Moondream3, count: int) -> Callable[[], None]:
    config, device = model.config, model.device
    cache = KVCache(config, count, config.prefix_len, dtype=model.dtype, device=device, is_fixed=device.type == "cuda")
    slots = torch.arange(count, device=device)
    embeddings = torch.randn(count, config.prefix_len - 1, config.text.dim, device=device).to(model.dtype)
    return lambda: run_prefixes(model, cache, slots, embeddings)


def report(run: Run, name: str, ms: float, floor_s: float) -> None:
    run.figure(name, ms, "ms")
    run.figure(f"{name}: share of the limit", 1e3 * floor_s / ms, "share")


def report_launches(run: Run, what: str, step: Callable[[], object]) -> None:
    """What the device is asked to do in one pass (a CPU: operators that torch is asked for)."""
    counts = count_launches(step, run.device)
    if counts is None:
        run.note(f"launches, {what}", "torch's profiler sees nothing of the device")
        return
    run.figure(f"{'launches' if run.is_cuda else 'operators'}, {what}", counts.kernels, "count")
    if run.is_cuda:
        run.figure(f"copies to the device, {what}", counts.to_device, "count")
        run.figure(f"copies to the host, {what}", counts.to_host, "count")
