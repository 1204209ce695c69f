"""Part `lowbits`: steps, requests and memory with weights in 8 and 4 bits, beside bf16."""

from __future__ import annotations

from collections.abc import Sequence

from md3cli.images.crops import PreparedImage
from md3cli.model.network.moondream import Moondream3

from .child import Run
from .limits import limits_of
from .models import BF16, FP8, FP8_VISION, INT4, all_weight_bytes, free_memory, model_in
from .parts import STEP_MS
from .stages import measure_vision, prefix_of
from .steps import RunningEngine, measure_step, plural
from .timing import median_ms, repeats
from .workloads import CAPTION, QUERY, REASONING, Load, measure_load, pictures_for

STEPS = {FP8: ((64, 64), (1, 1)), FP8_VISION: (), INT4: ((1, 1), (64, 64))}  # slots and rows
LOADS = {
    FP8: (
        Load(QUERY, "query", 1, 32, is_alone=True),
        Load(REASONING, "reasoning", 64, 128),
        Load(CAPTION, "captions", 128, 256),
        Load(QUERY, "query", 64, 256),
    ),
    FP8_VISION: (Load(QUERY, "query", 64, 256),),
    INT4: (Load(QUERY, "query", 1, 16, is_alone=True),),
}
CPU_LOADS = {
    FP8: (Load(QUERY, "query", 8, 8), Load(QUERY, "query", 1, 2, is_alone=True)),
    FP8_VISION: (),
    INT4: (Load(QUERY, "query", 1, 2, is_alone=True),),
}


def measure(run: Run) -> None:
    """Each form: memory of its weights, steps as ratio to bf16's, a prefix pass, and the loads that goals speak of."""
    of_bf16 = steps_of_bf16(run)
    loads = LOADS if run.is_cuda else CPU_LOADS
    most = max(load.num_requests for some in loads.values() for load in some)
    pictures: list[PreparedImage] = []
    for form, steps in STEPS.items():
        if form == FP8_VISION and not run.is_cuda:
            run.note(form, "needs CUDA")
            continue
        model = model_in(run, form)
        run.figure(f"weights, {form}", all_weight_bytes(model) / 1e9, "GB")
        for slots, rows in steps:
            with run.if_it_fits(f"decode step, {rows} rows, {form}"):
                report_step(run, model, slots, rows, form, of_bf16)
        report_passes(run, model, form)
        pictures = pictures or pictures_for(model, most)
        measure_loads(run, model, loads[form], pictures, form)
        del model
        free_memory(run)


def steps_of_bf16(run: Run) -> dict[str, float]:
    """Milliseconds of bf16's steps by their rows: what `stages` found, or measured now."""
    known: dict[str, float] = run.known.get(STEP_MS, {})
    wanted = sorted({sizes for form in STEPS.values() for sizes in form})
    if all(f"{rows} of {slots}" in known for slots, rows in wanted):
        return known
    model, found = model_in(run, BF16), {}
    for slots, rows in wanted:
        running = RunningEngine(model, slots, rows)
        found[f"{rows} of {slots}"] = median_ms(running.step, run.device, repeats(run.device))
        del running
    del model
    free_memory(run)
    return found


def report_step(run: Run, model: Moondream3, slots: int, rows: int, form: str, of_bf16: dict[str, float]) -> None:
    """A step's time, and its ratio to bf16's."""
    ms = measure_step(run, RunningEngine(model, slots, rows), form, limits_of(run))
    run.figure(f"decode step, {plural(rows, 'row')}, {form}: over bf16's", ms / of_bf16[f"{rows} of {slots}"], "ratio")


def report_passes(run: Run, model: Moondream3, form: str) -> None:
    """A pass of the part that is in few bits: vision, or 16 prefixes."""
    if form == FP8_VISION:
        with run.if_it_fits(f"vision, 36 crops, {form}"):
            measure_vision(run, model, 36, limits_of(run), form)
        return
    with run.if_it_fits(f"prefix, 16 pictures, {form}"):
        ms = median_ms(prefix_of(model, 16), run.device, repeats(run.device))
        run.figure(f"prefix, 16 pictures, {form}", ms, "ms")


def measure_loads(
    run: Run, model: Moondream3, loads: Sequence[Load], pictures: Sequence[PreparedImage], form: str
) -> None:
    for load in loads:
        with run.if_it_fits(load.figure_name(form)):
            measure_load(run, model, load, pictures, form)
