"""Part `lowbits`: the same passes with weights in 8 and 4 bits, beside bf16 in the same process."""

from __future__ import annotations

from dataclasses import replace

from md3cli.model.moondream import Moondream3

from .child import Run
from .models import BF16, FP8, WEIGHT_FORMS, all_weight_bytes, free_memory, model_in
from .stages import decode_of, plural, prefix_of, repeats
from .timing import median_ms
from .workloads import loads_of, measure_load, pictures_for

ROWS = (1, 64)


def measure(run: Run) -> None:
    """Steps, a prefix and the weights' memory of each form, steps as ratio to bf16's; one workload in float8."""
    of_bf16: dict[int, float] = {}
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


def measure_step(run: Run, model: Moondream3, rows: int, form: str, of_bf16: dict[int, float]) -> None:
    """A decode step's time; remembers bf16's, and reports the others' ratio to it."""
    name = f"decode step, {plural(rows, 'row')}, {form}"
    ms = median_ms(decode_of(model, rows), run.device, repeats(run))
    run.figure(name, ms, "ms")
    if form == BF16:
        of_bf16[rows] = ms
    elif rows in of_bf16:
        run.figure(f"{name}: over bf16's", ms / of_bf16[rows], "ratio")
