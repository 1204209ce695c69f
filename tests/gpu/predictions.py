"""What each figure should be, said before any card ran the check, and how that was reckoned.

For an H100 (SXM: 790 TFLOP/s in bf16, 3.0 TB/s) and an H200 (the same, 4.3 TB/s) at full size. On other
cards, other sizes and a CPU there is no prediction (null), except where a count is the same everywhere.
Sources: sections 2, 4 and 5 of the design of the CUDA path and section 4 of what was counted for it.

These are predictions for what the code does today. It launches its kernels one by one: a decode step is
512 launches (counted on fake tensors), 128 of our own kernels at 22 us of the host's time (8 us of torch's
dispatch were timed, 14 are reckoned for Triton's launcher) and the rest at 5, 4.7 ms, whatever it reads.
`GOALS` are what it must reach, some of them only when steps are replayed as graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Table = Mapping[str, "Prediction"]


@dataclass(frozen=True)
class Prediction:
    """A value for each card, its unit, and how it was reckoned."""

    h100: float
    h200: float
    unit: str
    source: str


@dataclass(frozen=True)
class Goal:
    """What a figure must not exceed, and what it would be good to reach; at least one of them."""

    at_most: float | None
    aim: float | None = None


_FLOAT8_64, _FLOAT8_1 = Goal(0.8), Goal(0.9)
_INT4_1 = Goal(None, 0.6)
GOALS: Mapping[str, Goal] = {
    "prefix, 16 pictures, bf16: over its product time": Goal(1.7, 1.45),
    "decode step, 64 rows, bf16: over its read time": Goal(1.35, 1.2),
    # A step as the engine launches it, and what the device needs for it: at one row launching hides what codes save.
    "decode step, 1 row, float8 experts: over bf16's": _FLOAT8_1,
    "decode step, 1 row, float8 experts, replayed: over bf16's": _FLOAT8_1,
    "decode step, 64 rows, float8 experts: over bf16's": _FLOAT8_64,
    "decode step, 64 rows, float8 experts, replayed: over bf16's": _FLOAT8_64,
    "decode step, 1 row, int4: over bf16's": _INT4_1,
    "decode step, 1 row, int4, replayed: over bf16's": _INT4_1,
}

_SEEN = "seen on such cards"
LIMITS: Table = {
    "product, 8192 x 8192 x 8192, bf16": Prediction(790, 790, "TFLOP/s", _SEEN),
    "copy in memory, 8192 MiB, read and written": Prediction(3.0, 4.3, "TB/s", _SEEN),
    "memory of the card": Prediction(85.0, 150.7, "GB", "79.2 and 140.4 GiB"),
    "memory free at the start": Prediction(84.5, 150.2, "GB", "less the context of 0.5 GB"),
    "copy from the host, pinned, 1024 MiB": Prediction(55, 55, "GB/s", "PCIe 5 x16, 63 GB/s less its overhead"),
    "smallest kernel, replayed in a graph": Prediction(1.6, 1.6, "us", "start and end of a kernel on the device"),
    "smallest operation, launched by torch": Prediction(5.0, 5.0, "us", "5 to 6 us a launch"),
}

_VISION = "765 us a layer of 13 crops, eager, as the vendor measured: 14.3 ms for 9 crops"
_PREFIX = "2.376 TFLOP a picture at the product rate, times 1.55"
_FEW = "all experts are read once (5.8 ms), beside 3.0 ms of products a picture"
_STEP = "weights at 75 to 80 % of the copy rate, slots at 60 % (all of their capacity is read, under a mask)"
_LAUNCHES = "the host's 512 launches; what is read meanwhile takes less"
_SHARE = "the limit's time over the time predicted"
_COUNTED = "counted on fake tensors"
_REPLAYED = "some 520 kernels of at least 2.2 us one after another, and what of the reading they do not hide"
STAGES: Table = {
    "vision, 9 crops, bf16": Prediction(14.3, 14.3, "ms", _VISION),
    "vision, 9 crops, bf16: share of the limit": Prediction(0.53, 0.53, "share", _SHARE),
    "vision, 63 crops, bf16": Prediction(100, 100, "ms", _VISION),
    "vision, 63 crops, bf16: share of the limit": Prediction(0.53, 0.53, "share", _SHARE),
    "vision, 9 crops, bf16, cuDNN attention": Prediction(13.9, 13.9, "ms", "cuDNN does not pad 72 wide heads to 96"),
    "vision, 9 crops, bf16, flash attention": Prediction(14.3, 14.3, "ms", "what torch takes by itself"),
    "vision, 9 crops, bf16, efficient attention": Prediction(16.5, 16.5, "ms", "half of flash's rate"),
    "vision, 63 crops, bf16, cuDNN attention": Prediction(97, 97, "ms", "cuDNN does not pad 72 wide heads to 96"),
    "vision, 63 crops, bf16, flash attention": Prediction(100, 100, "ms", "what torch takes by itself"),
    "vision, 63 crops, bf16, efficient attention": Prediction(115, 115, "ms", "half of flash's rate"),
    "prefix, 1 picture, bf16": Prediction(8.5, 7.5, "ms", _FEW),
    "prefix, 1 picture, bf16: share of the limit": Prediction(0.35, 0.40, "share", _SHARE),
    "prefix, 8 pictures, bf16": Prediction(38.5, 38.5, "ms", "2.376 TFLOP a picture at the product rate, times 1.6"),
    "prefix, 8 pictures, bf16: share of the limit": Prediction(0.62, 0.62, "share", _SHARE),
    "prefix, 16 pictures, bf16": Prediction(74.6, 74.6, "ms", _PREFIX),
    "prefix, 16 pictures, bf16: share of the limit": Prediction(0.645, 0.645, "share", _SHARE),
    "prefix, 16 pictures, bf16: over its product time": Prediction(1.55, 1.55, "ratio", "between goal and aim"),
    "prefix, 22 pictures, bf16": Prediction(102, 102, "ms", _PREFIX),
    "prefix, 22 pictures, bf16: share of the limit": Prediction(0.65, 0.65, "share", _SHARE),
    "decode step, 1 row, bf16": Prediction(4.7, 4.7, "ms", _LAUNCHES),
    "decode step, 1 row, bf16: share of the limit": Prediction(0.25, 0.17, "share", _SHARE),
    "decode step, 8 rows, bf16": Prediction(5.9, 4.7, "ms", f"{_STEP}; H200: launches"),
    "decode step, 8 rows, bf16: share of the limit": Prediction(0.74, 0.65, "share", _SHARE),
    "decode step, 16 rows, bf16": Prediction(8.0, 5.6, "ms", _STEP),
    "decode step, 16 rows, bf16: share of the limit": Prediction(0.75, 0.75, "share", _SHARE),
    "decode step, 64 rows, bf16": Prediction(12.5, 8.7, "ms", _STEP),
    "decode step, 64 rows, bf16: share of the limit": Prediction(0.72, 0.72, "share", _SHARE),
    "decode step, 64 rows, bf16: over its read time": Prediction(1.39, 1.39, "ratio", _STEP),
    "decode step, 128 rows, bf16": Prediction(17.9, 12.5, "ms", _STEP),
    "decode step, 128 rows, bf16: share of the limit": Prediction(0.68, 0.68, "share", _SHARE),
    "decode step, 1 row, bf16, replayed": Prediction(2.4, 2.2, "ms", _REPLAYED),
    "decode step, 8 rows, bf16, replayed": Prediction(5.9, 4.3, "ms", _STEP),
    "decode step, 16 rows, bf16, replayed": Prediction(7.9, 5.6, "ms", _STEP),
    "decode step, 64 rows, bf16, replayed": Prediction(12.4, 8.7, "ms", _STEP),
    "decode step, 128 rows, bf16, replayed": Prediction(17.8, 12.5, "ms", _STEP),
    "launches, decode step, 1 row, bf16": Prediction(512, 512, "count", _COUNTED),
    "launches, decode step, 64 rows, bf16": Prediction(512, 512, "count", _COUNTED),
    "launches, prefix, 16 pictures, bf16": Prediction(340, 340, "count", _COUNTED),
    "copies to the device, decode step, 1 row, bf16": Prediction(0, 0, "count", "all of a step lies on the device"),
    "copies to the device, decode step, 64 rows, bf16": Prediction(0, 0, "count", "all of a step lies on the device"),
    "copies to the device, prefix, 16 pictures, bf16": Prediction(0, 0, "count", "slots are on the device already"),
    "copies to the host, decode step, 1 row, bf16": Prediction(0, 0, "count", "the engine reads events, not the step"),
    "copies to the host, decode step, 64 rows, bf16": Prediction(
        0, 0, "count", "the engine reads events, not the step"
    ),
    "copies to the host, prefix, 16 pictures, bf16": Prediction(0, 0, "count", "nothing is asked of the host"),
}

_PICTURE = "vision 14.5, prefix 4.7, prompt 0.3, host 1.0 ms a request"
ENGINE: Table = {
    "query 3 tokens, batch 64, bf16": Prediction(47, 48, "req/s", f"{_PICTURE}, 3 steps over 64"),
    "query 3 tokens, batch 64, bf16: peak memory": Prediction(31, 31, "GB", "weights 18.5, slots 9.8, passes 2.5"),
    "query 3 tokens, batch 64, bf16: device busy": Prediction(0.93, 0.92, "share", "host 1.0 and 0.5 of waiting of 21"),
    "query 3 tokens, batch 1, bf16: device busy": Prediction(0.69, 0.65, "share", "prompt and steps wait for launches"),
    "query 3 tokens, batch 1, bf16": Prediction(
        23, 24, "req/s", "vision 14.5, prefix 8.5, prompt 4.7, 3 steps, host 1"
    ),
    "query 3 tokens, batch 1, bf16: peak memory": Prediction(20, 20, "GB", "weights 18.5, one slot, one pass"),
    "reasoning 30 tokens, batch 64, bf16": Prediction(38, 40, "req/s", f"{_PICTURE}, 31 steps over 64"),
    "reasoning 30 tokens, batch 64, bf16: peak memory": Prediction(32, 32, "GB", "as the query, slots of 790"),
    "caption 150 tokens, batch 64, bf16": Prediction(19.5, 24, "req/s", f"{_PICTURE}, 150 steps of 13 ms over 64"),
    "caption 150 tokens, batch 64, bf16: peak memory": Prediction(34, 34, "GB", "as the query, slots of 900"),
    "caption 150 tokens, batch 128, bf16": Prediction(23.5, 27.5, "req/s", f"{_PICTURE}, 150 steps of 19 ms over 128"),
    "caption 150 tokens, batch 128, bf16: peak memory": Prediction(46, 46, "GB", "weights 18.5, slots 23, passes 4"),
}

_READ = "weights at 75 % (int4: 60 %) of the copy rate, slots at 60 %"
_WIDENED = "bf16's time and what widening codes to bf16 adds"
_BOUND = "one row is bound by launches in every form until steps are graphs"
LOWBITS: Table = {
    "decode step, 1 row, bf16": STAGES["decode step, 1 row, bf16"],
    "decode step, 64 rows, bf16": STAGES["decode step, 64 rows, bf16"],
    "prefix, 16 pictures, bf16": STAGES["prefix, 16 pictures, bf16"],
    "weights, bf16": Prediction(18.5, 18.5, "GB", "9.27 billion values"),
    "weights, float8 experts": Prediction(10.5, 10.5, "GB", "8.05 of experts in a byte each, the rest in 16 bits"),
    "decode step, 1 row, float8 experts": Prediction(4.7, 4.7, "ms", _BOUND),
    "decode step, 1 row, float8 experts: over bf16's": Prediction(1.0, 1.0, "ratio", _BOUND),
    "decode step, 1 row, bf16, replayed": STAGES["decode step, 1 row, bf16, replayed"],
    "decode step, 64 rows, bf16, replayed": STAGES["decode step, 64 rows, bf16, replayed"],
    "decode step, 1 row, float8 experts, replayed": Prediction(2.0, 1.9, "ms", _REPLAYED),
    "decode step, 1 row, float8 experts, replayed: over bf16's": Prediction(0.85, 0.87, "ratio", _REPLAYED),
    "decode step, 64 rows, float8 experts, replayed": Prediction(9.3, 6.6, "ms", _READ),
    "decode step, 64 rows, float8 experts, replayed: over bf16's": Prediction(0.75, 0.76, "ratio", _READ),
    "decode step, 1 row, int4, replayed": Prediction(1.8, 1.8, "ms", _REPLAYED),
    "decode step, 1 row, int4, replayed: over bf16's": Prediction(0.77, 0.8, "ratio", _REPLAYED),
    "decode step, 64 rows, int4, replayed": Prediction(7.8, 5.6, "ms", _READ),
    "decode step, 64 rows, int4, replayed: over bf16's": Prediction(0.63, 0.64, "ratio", _READ),
    "decode step, 64 rows, float8 experts": Prediction(9.4, 6.6, "ms", _READ),
    "decode step, 64 rows, float8 experts: over bf16's": Prediction(0.75, 0.76, "ratio", _READ),
    "prefix, 16 pictures, float8 experts": Prediction(86, 86, "ms", f"{_WIDENED}: a sixth"),
    "query 3 tokens, batch 64, float8 experts": Prediction(46, 46, "req/s", "as bf16, 0.7 ms more of a prefix"),
    "query 3 tokens, batch 64, float8 experts: peak memory": Prediction(23, 23, "GB", "as bf16, weights of 10.5"),
    "weights, int4": Prediction(6.2, 6.2, "GB", "codes 4.3, scales and zero points 0.5, the rest in 16 bits"),
    "decode step, 1 row, int4": Prediction(5.7, 5.7, "ms", f"{_BOUND}; 56 dense layers more by our kernels"),
    "decode step, 1 row, int4: over bf16's": Prediction(1.2, 1.2, "ratio", _BOUND),
    "decode step, 64 rows, int4": Prediction(7.9, 5.7, "ms", f"{_READ}; H200: launches"),
    "decode step, 64 rows, int4: over bf16's": Prediction(0.63, 0.66, "ratio", _READ),
    "prefix, 16 pictures, int4": Prediction(100, 100, "ms", f"{_WIDENED}, a product for each group: a third"),
}

_WORKERS = "16 cores cut 355 of 2 and 71 of 12 megapixels a second"
FILES: Table = {
    "2 megapixels, cut before, batch 64, bf16": Prediction(47, 48, "img/s", "as the query of part engine"),
    "2 megapixels, crops of a picture": Prediction(9, 9, "count", "1920 x 1080: 2 x 4 tiles"),
    "2 megapixels, from files, batch 64, bf16": Prediction(44, 45, "img/s", f"{_WORKERS}; the engine binds"),
    "2 megapixels, from files, batch 64, bf16: of cut before": Prediction(0.94, 0.94, "share", _WORKERS),
    "12 megapixels, cut before, batch 64, bf16": Prediction(47, 48, "img/s", "as the query of part engine"),
    "12 megapixels, crops of a picture": Prediction(9, 9, "count", "4032 x 3024: 2 x 4 tiles"),
    "12 megapixels, from files, batch 64, bf16": Prediction(41, 42, "img/s", f"{_WORKERS}; cores are shared"),
    "12 megapixels, from files, batch 64, bf16: of cut before": Prediction(0.88, 0.88, "share", _WORKERS),
}

_RESIZED = "570 M products, 10 a clock and multiprocessor: single bytes, loaded from L1 in 2 to 4 lines a warp"
_RESIZED_2 = "120 M products at the same rate, 6 kernels"
_LAUNCHED = "4 launches of ours at 30 us and 2 of torch's; what the device needs beyond that"
RESIZING: Table = {
    "faults found at load": Prediction(0, 0, "count", "every byte is Pillow's"),
    "pictures compared, random sizes": Prediction(500, 500, "count", "sides from 1 to 1,500"),
    "pictures that differ from Pillow's, random sizes": Prediction(0, 0, "count", "whole numbers"),
    "pictures that differ from Pillow's, examples": Prediction(0, 0, "count", "whole numbers"),
    "axes of a huge picture that differ from the twin's": Prediction(0, 0, "count", "rows are found in 64 bits"),
    "cut, 12 megapixels": Prediction(0.27, 0.27, "ms", _LAUNCHED),
    "cut, 12 megapixels, replayed": Prediction(0.25, 0.25, "ms", _RESIZED),
    "cut, 12 megapixels, size not met before": Prediction(3.5, 3.5, "ms", "four tables at 0.6 to 1 ms of numpy"),
    "cut, 2 megapixels": Prediction(0.14, 0.14, "ms", _LAUNCHED),
    "cut, 2 megapixels, replayed": Prediction(0.05, 0.05, "ms", _RESIZED_2),
    "cut, 2 megapixels, size not met before": Prediction(2.0, 2.0, "ms", "four tables of 0.5 ms of numpy"),
}

_GROUPED = "products at 75 %, 694 kB of small operations a row, 24 launches"
KERNELS: Table = {
    "experts of a layer, 730 rows, bf16, own kernels": Prediction(380, 300, "us", "0.8 GB of weights, tiles half full"),
    "experts of a layer, 730 rows, bf16, grouped_mm": Prediction(600, 500, "us", _GROUPED),
    "experts of a layer, 5840 rows, bf16, own kernels": Prediction(1070, 1070, "us", "0.59 TFLOP at 70 %"),
    "experts of a layer, 5840 rows, bf16, grouped_mm": Prediction(2350, 2000, "us", _GROUPED),
    "experts of a layer, 16060 rows, bf16, own kernels": Prediction(2900, 2900, "us", "1.6 TFLOP at 70 %"),
    "experts of a layer, 16060 rows, bf16, grouped_mm": Prediction(6400, 5300, "us", _GROUPED),
}

RATES = {"h100": (790e12, 3.0e12), "h200": (790e12, 4.3e12)}  # FLOP/s, bytes/s
KERNEL_US = 4.0
ERRORS = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 2e-7}

# Decisions of the golden cases that are clear (tests/golden/README.md), and the share of all that agree before the
# first other one, as a CPU shows it. All clear ones must agree, on every device.
_CASES = {
    "float32": (3571, 1.0),
    "bf16": (24, 0.67),
    "low bits, float32": (932, 1.0),
    "low bits, bf16": (3, 0.48),
}
GOLDEN = {
    f"{figure}, {form}, batch {batch}": (float(value), unit)
    for form, (clear, share) in _CASES.items()
    for batch in (1, 8)
    for figure, value, unit in (
        ("clear decisions", clear, "count"),
        ("clear decisions that agree", clear, "count"),
        ("share before the first other", share, "share"),
    )
}
_AS_A_CPU = "as a CPU's kernels showed"
BLOCKS: Table = {
    "error of a dense text block, float32": Prediction(8e-7, 8e-7, "relative", _AS_A_CPU),
    "error of a sparse text block, float32": Prediction(7e-7, 7e-7, "relative", _AS_A_CPU),
    "error of a vision block, float32": Prediction(9e-7, 9e-7, "relative", _AS_A_CPU),
    "error of a dense text block, bf16": Prediction(3.4e-3, 3.4e-3, "relative", _AS_A_CPU),
    "error of a sparse text block, bf16": Prediction(3.7e-3, 3.7e-3, "relative", _AS_A_CPU),
    "error of a vision block, bf16": Prediction(4.3e-3, 4.3e-3, "relative", _AS_A_CPU),
}

TABLES: Mapping[str, Table] = {
    "limits": LIMITS,
    "golden": BLOCKS,
    "kernels": KERNELS,
    "resizing": RESIZING,
    "stages": STAGES,
    "engine": ENGINE,
    "lowbits": LOWBITS,
    "files": FILES,
}


def card_of(name: str, config: str) -> str:
    """The card whose predictions hold, `h100` or `h200`; empty where none do."""
    if config != "full" or "PCIe" in name or "NVL" in name:  # slower memory and clocks
        return ""
    return next((card for card in ("h100", "h200") if card.upper() in name), "")


def predictions(part: str, card: str) -> dict[str, tuple[float, str]]:
    """Value and unit of every figure that a part should have on a card of `card_of`; none for other cards."""
    if not card:
        return {}
    of_card = {name: (float(getattr(row, card)), row.unit) for name, row in TABLES.get(part, {}).items()}
    return of_card | (GOLDEN if part == "golden" else {})


def prediction_of(part: str, card: str, line: Mapping[str, object]) -> float | None:
    """What the figure that a child's line tells should be; None where nothing was predicted for it."""
    name = str(line["figure"])
    if name in GOLDEN:
        return GOLDEN[name][0]
    return predictions(part, card)[name][0] if name in predictions(part, card) else kernel_prediction(card, line)


def kernel_prediction(card: str, line: Mapping[str, object]) -> float | None:
    """What a figure of part `kernels` should be, from the bytes and operations that its line names.

    A kernel takes its limit's time at 70 % of the product rate or 75 % of the copy rate, and 4 us to
    start and end; errors are a few roundings of the kind of number.
    """
    name = str(line["figure"])
    if "dtype" in line:
        return ERRORS.get(str(line["dtype"]))
    if not card or "flops" not in line:
        return None
    product, copy = RATES[card]
    flops, num_bytes = float(str(line["flops"])), float(str(line["bytes"]))
    floor_us = 1e6 * max(flops / product, num_bytes / copy)
    took_us = KERNEL_US + 1e6 * max(flops / product / 0.7, num_bytes / copy / 0.75)
    return floor_us / took_us if name.endswith("share of the limit") else took_us
