"""Part `golden`: the reference cases of tests/golden on the device, and one layer of each kind at real size.

The cases run through the engine with the device's own forms, on CUDA with its step as a graph. In float32
every decision must be the reference's; in bf16 they are compared up to the first close one
(tests/golden/README.md says which are), because these random models leave the reference early. Crops are cut
on the CPU, from the files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from support.golden_cases import CASES, LEAST_MARGIN, LEAST_MOE_MARGIN, GoldenCase, assert_answer, load_case

from md3cli.config import ModelOptions
from md3cli.model.engine.generation import Decisions, Generation
from md3cli.model.engine.kv_cache import KVCache, PrefixStore
from md3cli.model.engine.load import load_weights
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.layers import MoeMlp
from md3cli.model.network.moondream import SIZE_OCTAVES, Moondream3
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.model.weights.random_weights import random_model
from md3cli.records import Answer, Task

from .child import Run
from .models import apply_forms

LOW_BIT_CASES = ("raw-fp8", "int4")
BATCHES = (1, 16)  # of each plan of sizes: an engine for single questions, and one for many
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# A decision with less of either is close: golden/README.md, "Tolerances".
MARGINS = {"float32": (LEAST_MARGIN, LEAST_MOE_MARGIN), "bf16": (1.5, 0.05)}
LAYER_TOLERANCE = {"float32": 1e-5, "bf16": 1e-2}
INPUT_SCALE = 0.05
CLOSE_EXPERTS = {"float32": 1e-4, "bf16": 0.05}  # gap of router logits at which a rounding may choose otherwise

Decision = tuple[str, int]


@dataclass
class Tally:
    """Decisions of several cases: of all, those before the first difference; of the clear ones, those that agree."""

    total: int = 0
    before_difference: int = 0
    clear: int = 0
    agreed: int = 0


def measure(run: Run) -> None:
    """All cases in both dtypes at both batch sizes, low bits as they are stored, and the layers."""
    for form, dtype in DTYPES.items():
        for batch in BATCHES:
            models = ((name, prepared(run, plain_model(run, name, dtype))) for name in CASES)
            report(run, f"{form}, batch {batch}", compare(run, models, form, batch))
    for form in DTYPES if run.is_cuda else ("bf16",):  # a CPU computes with float8 codes rounded to int8
        for batch in BATCHES:
            stored = ((name, prepared(run, stored_model(run, name, DTYPES[form]))) for name in LOW_BIT_CASES)
            report(run, f"low bits, {form}, batch {batch}", compare(run, stored, form, batch))
    for form, dtype in DTYPES.items():
        measure_layers(run, form, dtype)


# -- cases -----------------------------------------------------------------------------------------


def plain_model(run: Run, name: str, dtype: torch.dtype) -> Moondream3:
    return copy.deepcopy(load_case(name).model).to(run.device, dtype)


def stored_model(run: Run, name: str, dtype: torch.dtype) -> Moondream3:
    """The case's checkpoint with its codes kept in the bits they have in the file; activations in `dtype`."""
    folder = CASES[name][0]
    options = ModelOptions(model=str(folder), quant="stored", cache=False)
    return load_weights(options, plan_checkpoint(folder), dtype=dtype, device=run.device)


def prepared(run: Run, model: Moondream3) -> Moondream3:
    apply_forms(run, model)
    return model


def report(run: Run, what: str, tally: Tally) -> None:
    run.figure(f"clear decisions, {what}", tally.clear, "count")
    run.figure(f"clear decisions that agree, {what}", tally.agreed, "count")
    run.figure(f"share before the first other, {what}", tally.before_difference / tally.total, "share")


def compare(run: Run, models: Iterator[tuple[str, Moondream3]], form: str, batch: int) -> Tally:
    """Every request of the cases through the engine against the reference's decisions."""
    tally = Tally()
    for name, model in models:
        case = load_case(name)
        for key, (generation, answer) in answered(case, model, batch).items():
            found = decisions_of(generation) if generation is not None else []
            problem = compare_request(tally, case.expected[key], found, form)
            if problem is None and form == "float32" and case.is_certain(key):
                problem = problem_of_answer(answer, case.expected[key])
            if problem is not None:
                run.fail(f"case {name}, request {key}, {form}, batch {batch}: {problem}")
    return tally


def answered(
    case: GoldenCase, model: Moondream3, batch: int, count: int | None = None
) -> dict[int, tuple[Generation | None, Answer]]:
    """All requests of a case, or the first `count`, each with the row that decided (None: it was refused)."""
    engine = case.engine(batch, model)
    if model.device.type == "cuda":
        engine.capture()
    generations = {key: engine.add(case.job(key)) for key in range(len(case.requests))[:count]}
    answers: dict[int, Answer] = {}
    while engine.has_work:
        answers.update((answer.key, answer) for answer in engine.step())
    return {key: (generation, answers[key]) for key, generation in generations.items()}


def compare_request(tally: Tally, expected: dict[str, Any], found: list[Decision], form: str) -> str | None:
    """Count one request's decisions; what is wrong with the first clear one that differs."""
    trace = expected["trace"]
    margin, moe_margin = MARGINS[form]
    num_clear = sum(1 for _ in takewhile(lambda t: t["margin"] >= margin and t["moe_margin"] >= moe_margin, trace))
    wanted = [(entry["kind"], entry["choice"]) for entry in trace]
    num_same = sum(1 for _ in takewhile(lambda pair: is_same(*pair, expected), zip(found, wanted, strict=False)))
    tally.total += len(wanted)
    tally.before_difference += num_same
    tally.clear += num_clear
    tally.agreed += min(num_same, num_clear)
    if num_same >= num_clear:
        return None
    took = found[num_same] if num_same < len(found) else "nothing"
    return f"decision {num_same} is {took}, not {wanted[num_same]} (margin {trace[num_same]['margin']:.4g})"


def is_same(found: Decision, wanted: Decision, expected: dict[str, Any]) -> bool:
    """Whether a decision is the reference's.

    Of the first one of detect and point an answer shows only whether it was the end: the kind is `begins`.
    """
    if found[0] != "begins":
        return found == wanted
    return bool(found[1]) == (not expected["first_choice"]["argmax_is_eos"])


def problem_of_answer(answer: Answer, expected: dict[str, Any]) -> str | None:
    try:
        assert_answer(answer, expected)
    except AssertionError as error:
        return f"the answer is another: {str(error) or answer.result}"
    return None


def decisions_of(generation: Generation) -> list[Decision]:
    """What a finished generation decided, in the words of the reference's trace."""
    ids = generation.config.tokenizer
    if generation.job.request.task in (Task.DETECT, Task.POINT):
        return list(object_decisions(generation))
    found: list[Decision] = []
    for phase, end in ((generation.reasoning, ids.answer_id), (generation.answer, ids.eos_id)):
        if phase is not None:
            found += text_decisions(generation, phase)
            if phase.finish_reason == "stop":
                found.append(("token", end))
    return found


def text_decisions(generation: Generation, phase: Decisions) -> Iterator[Decision]:
    """Tokens, each followed by the bins it brought: coordinates in reasoning and paths, sizes in paths."""
    ids, coords, sizes = generation.config.tokenizer, iter(phase.coords), iter(phase.sizes)
    for token in phase.token_ids:
        yield "token", token
        if token == ids.coord_id and phase.coords:
            yield "coord", coord_bin(generation.config, next(coords))
        elif token == ids.size_id and phase.sizes:
            yield from size_decisions(generation.config, next(sizes))


def object_decisions(generation: Generation) -> Iterator[Decision]:
    """For each object: whether there is one, its coordinates, its size; at last that there is no more."""
    ids, answer = generation.config.tokenizer, generation.answer
    sizes = iter(answer.sizes)
    kind, goes_on, ends = "begins", 1, 0
    for x, y in zip(answer.coords[0::2], answer.coords[1::2], strict=True):
        yield kind, goes_on
        yield "coord", coord_bin(generation.config, x)
        yield "coord", coord_bin(generation.config, y)
        if generation.job.request.task is Task.DETECT:
            yield from size_decisions(generation.config, next(sizes))
        kind, goes_on, ends = "coord_or_eos", ids.coord_id, ids.eos_id
    if answer.finish_reason == "stop":
        yield kind, ends


def coord_bin(config: ModelConfig, value: float) -> int:
    return round(value * config.region.coord_out_dim)


def size_decisions(config: ModelConfig, size_wh: tuple[float, float]) -> Iterator[Decision]:
    """The bins that stand for a width and a height."""
    last_bin = config.region.size_out_dim // 2 - 1
    for kind, value in zip(("size_w", "size_h"), size_wh, strict=True):
        yield kind, round((math.log2(value) + SIZE_OCTAVES) / SIZE_OCTAVES * last_bin)


# -- layers ----------------------------------------------------------------------------------------


def measure_layers(run: Run, form: str, dtype: torch.dtype) -> None:
    """One vision block, one dense and one sparse text block with the device's forms, against float64 on the CPU."""
    for kind, error in layer_errors(run, form, dtype):
        run.figure(f"error of a {kind} block, {form}", error, "relative")
        if not error < LAYER_TOLERANCE[form]:
            run.fail(f"{kind} block, {form}: relative error {error:.3g}, allowed {LAYER_TOLERANCE[form]:g}")


def layer_errors(run: Run, form: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    config = run.config
    assert config.text.moe is not None
    for kind, start_layer in (("dense text", 1), ("sparse text", 0)):
        text = replace(config.text, n_layers=1, vocab_size=64, moe=replace(config.text.moe, start_layer=start_layer))
        yield kind, text_layer_error(run, replace(config, text=text), dtype, CLOSE_EXPERTS[form])
    small = replace(config.text, n_layers=1, vocab_size=64)
    yield "vision", vision_layer_error(run, replace(config, text=small), dtype)


@torch.inference_mode()
def text_layer_error(run: Run, config: ModelConfig, dtype: torch.dtype, close: float) -> float:
    """Of a picture's prefix, leaving out tokens that stand between two experts: a rounding may move them."""
    model = random_model(config, dtype=dtype, device=run.device, seed=3)
    exact = as_float64(model.text)
    apply_forms(run, model)
    length = config.prefix_len
    x = block_input(run, length, config.text.dim, dtype)
    position = torch.arange(length, device=run.device)[None]
    cache = KVCache(config, 1, length, dtype=dtype, device=run.device)
    store = PrefixStore(cache, torch.zeros(1, dtype=torch.int64, device=run.device))
    found = model.text(x, position, None, store)[0]
    expected = exact(x.cpu().double(), position.cpu())[0]
    block = exact.blocks[0]
    if isinstance(block.mlp, MoeMlp):
        logits = block.mlp.router(block.ln(x.cpu().double()))[0].sort(dim=-1, descending=True).values
        chosen = block.mlp.config.experts_per_token
        is_clear = logits[:, chosen - 1] - logits[:, min(chosen, logits.shape[1] - 1)] > close
        found, expected = found[is_clear.to(run.device)], expected[is_clear]
    return relative_error(found, expected)


@torch.inference_mode()
def vision_layer_error(run: Run, config: ModelConfig, dtype: torch.dtype) -> float:
    """Of one crop."""
    config = replace(config, vision=replace(config.vision, enc_n_layers=1))
    model = random_model(config, dtype=dtype, device=run.device, seed=4)
    exact = as_float64(model.vision.blocks[0])
    apply_forms(run, model)
    x = block_input(run, config.vision.num_patches, config.vision.enc_dim, dtype)
    return relative_error(model.vision.blocks[0](x), exact(x.cpu().double()))


def block_input(run: Run, length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [1, length, width] that let every part of a block be seen in its output.

    They are small, so that what a block adds outweighs them, and alike, so that attention, an average, does
    not cancel what it averages.
    """
    torch.manual_seed(width)
    shared, own = torch.randn(1, 1, width, device=run.device), torch.randn(1, length, width, device=run.device)
    return ((shared + own) * INPUT_SCALE).to(dtype)


def as_float64(module: Any) -> Any:
    """A copy with the same weights on the CPU; rotation, tau and sums over experts stay in float32 as written."""
    return copy.deepcopy(module).cpu().double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    difference = (found.cpu().double() - expected).norm() / expected.norm()
    return float(difference)
