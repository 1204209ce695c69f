"""Part `lowbits`: the same passes with weights in 8 and 4 bits, beside bf16 in the same process."""

from __future__ import annotations

from dataclasses import replace

from md3cli.model.network.moondream import Moondream3

from .child import Run
from .models import BF16, FP8, WEIGHT_FORMS, all_weight_bytes, free_memory, model_in
from .stages import decode_of, plural, prefix_of, repeats, report_replayed
from .timing import median_ms
from .workloads import loads_of, measure_load, pictures_for

ROWS = (1, 64)


def measure(run: Run) -> None:
    """Steps, a prefix and the weights' memory of each form, steps as ratio to bf16's; one workload in float8."""
    of_bf16: dict[str, float] = {}
    for form in WEIGHT_FORMS:
        model = model_in(run, form)
        run.figure(f"weights, {form}", all_weight_bytes(model) / 1e9, "GB")
        for rows in ROWS:
            with run.if_it_fits(f"decode step, {rows} rows, {form}"):
                measure_step(run, model, rows, form, of_bf16)
        with run.if_it_fits(f"prefix, 16 pictures, {form}"):
            run.figure(f"prefix, 16 pictures, {form}", median_ms(prefix_of(model, 16), run.device, repeats(run)), "ms")
        if form == FP8:
            load = replace(loads_of(run)[0], shows_busy=False)
            measure_load(run, model, load, pictures_for(model, load.num_requests), form)
        del model
        free_memory(run)


def measure_step(run: Run, model: Moondream3, rows: int, form: str, of_bf16: dict[str, float]) -> None:
    """A decode step's time, launched and replayed; remembers bf16's, and reports the others' ratios to it."""
    name, step = f"decode step, {plural(rows, 'row')}, {form}", decode_of(model, rows)
    ms = median_ms(step, run.device, repeats(run))
    run.figure(name, ms, "ms")
    for way, found in (("", ms), (", replayed", report_replayed(run, name, step))):
        if form == BF16 and found is not None:
            of_bf16[f"{rows}{way}"] = found
        elif found is not None and f"{rows}{way}" in of_bf16:
            run.figure(f"{name}{way}: over bf16's", found / of_bf16[f"{rows}{way}"], "ratio")
