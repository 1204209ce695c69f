"""What each figure should be, said before any card ran the code as it is, and how that was reckoned.

For an H100 (SXM: 790 TFLOP/s in bf16, 3.0 TB/s) and an H200 (the same, 4.3 TB/s) at full size. On other
cards, other sizes and a CPU there is no prediction (null), except where a count is the same everywhere.

An H200 has run the part before: steps launched one by one, attention under a mask, GELU and norms of their own
(examples/gpu). `SEEN` are its figures. What a graph, fused passes and new kernels change is reckoned on top of
them, in `Card`; an H100 reads slower by the ratio of both copy rates, and computes alike. What was predicted
before that run stands in examples/gpu/predicted-2026-11-26.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Table = Mapping[str, "Prediction"]


@dataclass(frozen=True)
class Prediction:
    """A value for each card, its unit, and how it was reckoned."""

    h100: float
    h200: float
    unit: str
    source: str


# What an H200 showed on 2026-11-27, in milliseconds.
SEEN = {
    "vision, 9 crops": 95.3 / 7,
    "prefix, one of 16 pictures": 78.9 / 16,
    "prefix in float8, one of 16 pictures": 97.2 / 16,
    "step of 64 rows, replayed": 8.23,
    "step of 128 rows, replayed": 11.23,
    "step of 1 row, replayed": 2.52,
}
HOST = 1.02  # times the device's time, where the host only keeps it fed: 0.96 of the time was busy with eager steps


@dataclass(frozen=True)
class Card:
    """Milliseconds of each stage on a card that copies at `copy` bytes/s (times 1e-12)."""

    copy: float

    def slower(self, gigabytes: float) -> float:
        """What reading or writing so much takes longer than on an H200."""
        return gigabytes / self.copy - gigabytes / 4.3

    @cached_property
    def vision(self) -> float:
        """Nine crops: GELU no longer written and read (3.05 GB), a sum and its norm in three passes of five (1.66)."""
        return SEEN["vision, 9 crops"] - (3.05 + 1.66) / 4.3 + self.slower(7.2 - 3.05 - 1.66)

    @cached_property
    def vision_float8(self) -> float:
        """Linear products (two thirds of the time) take 0.65 of it, rows turned into codes included."""
        return self.vision * (1 / 3 + 0.65 * 2 / 3)

    @cached_property
    def prefix(self) -> float:
        """One of 16 pictures: as seen; 90 kB of small operations a token and layer."""
        return SEEN["prefix, one of 16 pictures"] + self.slower(1.58)

    @cached_property
    def prefix_float8(self) -> float:
        """Codes are widened by moving bits, not by converting: half of what they cost before."""
        extra = SEEN["prefix in float8, one of 16 pictures"] - SEEN["prefix, one of 16 pictures"]
        return self.prefix + extra / 2

    @cached_property
    def prompt(self) -> float:
        """One of 64 prompts of a block: experts read once in a pass, 64 rows of attention over 750 positions."""
        return (5.0 + self.slower(17.4 + 9.4)) / 64

    @cached_property
    def step_64(self) -> float:
        """17.4 GB of weights and 9.4 of slots; 247 kernels of 1.5 us less, and no mask."""
        return SEEN["step of 64 rows, replayed"] - 0.57 + self.slower(26.8)

    @cached_property
    def step_128(self) -> float:
        """17.5 GB of weights and 18.9 of slots."""
        return SEEN["step of 128 rows, replayed"] - 0.6 + self.slower(36.4)

    @property
    def float8_saves(self) -> float:
        """In a step that reads all experts: a third of a layer's time in the kernels of 20, 8 GB less to read."""
        return 1.3 + self.slower(8.05) * 0.9

    @cached_property
    def step_1(self) -> float:
        """3.5 GB to read, hidden in part by 302 kernels one after another, of which 549 were seen."""
        return SEEN["step of 1 row, replayed"] - 0.42 + self.slower(3.5) * 0.6

    @cached_property
    def step_1_float8(self) -> float:
        """1.6 GB less: up-gate and down take 33 us of 43 in a layer."""
        return self.step_1 - 0.2 - self.slower(1.0) * 0.6

    @cached_property
    def step_1_int4(self) -> float:
        """Products take a third of the 3.0 ms seen, without conversions and with scales a turn ahead; all else 0.83."""
        return 1.83 + self.slower(0.9) * 0.4

    @cached_property
    def alone(self) -> float:
        """One question: vision, a graph of 762 rows (experts of a layer: 0.3 ms for 730), two steps, the host."""
        return self.vision + 8.5 + self.slower(16) * 0.4 + 2 * (self.step_1 + 0.3) + 1.5

    def rate(self, vision: float, prefix: float, step: float = 0.0, steps: int = 0, rows: int = 64) -> float:
        """Requests a second; `step` is of `rows` rows."""
        return 1e3 / HOST / (vision + prefix + self.prompt + steps * step / rows)

    def query(self, *, float8: bool = False, float8_vision: bool = False) -> float:
        """Three tokens: the prompt's pass gives the first, and two steps the others."""
        step = self.step_64 - (self.float8_saves if float8 else 0)
        prefix = self.prefix_float8 if float8 else self.prefix
        return self.rate(self.vision_float8 if float8_vision else self.vision, prefix, step, 2)

    def reasoning(self, *, float8: bool = False) -> float:
        """30 tokens, the answer's id and what ends both: 31 steps."""
        step = self.step_64 - (self.float8_saves if float8 else 0)
        return self.rate(self.vision, self.prefix_float8 if float8 else self.prefix, step, 31)

    @property
    def caption_float8(self) -> float:
        """149 steps of 128 rows."""
        return self.rate(self.vision, self.prefix_float8, self.step_128 - self.float8_saves, 149, rows=128)

    @property
    def detect(self) -> float:
        """Objects a second, 32 a picture in 96 steps."""
        return 32 * self.rate(self.vision, self.prefix, self.step_64, 96)

    @property
    def detect_replayed(self) -> float:
        """The same at one row whose results are read at once: 0.3 ms of the host's time between two steps."""
        return 32e3 / (96 * (self.step_1 + 0.3) + self.alone)

    @property
    def again(self) -> float:
        """Requests a second without vision; the host reads an encoding in 1.5 ms, which hides behind prefixes but for
        a fifth."""
        return 1e3 / HOST / (self.prefix + self.prompt + 2 * self.step_64 / 64 + 0.2 * 1.5 + 0.5)


H100, H200 = Card(3.0), Card(4.3)


def _both(unit: str, source: str, h100: float, h200: float) -> Prediction:
    """Three digits of each."""
    return Prediction(float(f"{h100:.3g}"), float(f"{h200:.3g}"), unit, source)


def _doc(name: str) -> str:
    """How a stage of `Card` was reckoned, from its docstring."""
    found = getattr(Card, name)
    return " ".join(str(found.__doc__).split())


def _of(name: str, unit: str = "ms", factor: float = 1.0) -> Prediction:
    """A stage of `Card`, times `factor`."""
    return _both(unit, _doc(name), factor * getattr(H100, name), factor * getattr(H200, name))


def _none(source: str) -> Prediction:
    return Prediction(0, 0, "count", source)


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

_SHARE = "the limit's time over the time predicted"
_ENGINE = "the device's time, and 2 % where the host keeps it fed; one row: 0.2 ms of the host's"
_NEVER = "nothing in a step asks the host, and nothing is captured twice"
_PRODUCT = 790.0  # TFLOP/s
_VISION_FLOPS, _PREFIX_FLOPS = 6.05, 2.376  # TFLOP of a picture of nine crops
_READ_64 = {"h100": 26.9 / 3.0, "h200": 26.9 / 4.3}  # ms
_READ_1 = {"h100": 3.49 / 3.0, "h200": 3.49 / 4.3}


def _vision_share(name: str = "vision") -> Prediction:
    floor = 1e3 * _VISION_FLOPS / _PRODUCT
    return _both("share", _SHARE, floor / getattr(H100, name), floor / getattr(H200, name))


def _prefix_ratio(inverse: bool = False) -> Prediction:
    floor = 1e3 * _PREFIX_FLOPS / _PRODUCT
    values = [floor / card.prefix if inverse else card.prefix / floor for card in (H100, H200)]
    return _both("share" if inverse else "ratio", _SHARE, *values)


STAGES: Table = {
    "weights, bf16": Prediction(18.5, 18.5, "GB", "9.27 billion values"),
    "vision, 9 crops, bf16": _of("vision"),
    "vision, 9 crops, bf16: share of the limit": _vision_share(),
    "vision, 36 crops, bf16": _of("vision", factor=4),
    "vision, 36 crops, bf16: share of the limit": _vision_share(),
    "prefix, 1 picture, bf16": Prediction(12, 12, "ms", "some 300 launches at 40 us of a slow host"),
    "prefix, 1 picture, bf16: share of the limit": Prediction(0.25, 0.25, "share", _SHARE),
    "prefix, 16 pictures, bf16": _of("prefix", factor=16),
    "prefix, 16 pictures, bf16: share of the limit": _prefix_ratio(inverse=True),
    "prefix, 16 pictures, bf16: over its product time": _prefix_ratio(),
    "decode step, 64 rows, bf16": _of("step_64"),
    "decode step, 64 rows, bf16: through the engine": _both("ms", _ENGINE, 1.02 * H100.step_64, 1.02 * H200.step_64),
    "decode step, 64 rows, bf16: over its read time": _both(
        "ratio", _doc("step_64"), H100.step_64 / _READ_64["h100"], H200.step_64 / _READ_64["h200"]
    ),
    "decode step, 1 row of 8, bf16": _both(
        "ms", "as one row; idle rows read nothing", H100.step_1 + 0.1, H200.step_1 + 0.1
    ),
    "decode step, 1 row of 8, bf16: through the engine": _both("ms", _ENGINE, H100.step_1 + 0.3, H200.step_1 + 0.3),
    "decode step, 1 row of 8, bf16: over its read time": _both(
        "ratio", _doc("step_1"), (H100.step_1 + 0.1) / _READ_1["h100"], (H200.step_1 + 0.1) / _READ_1["h200"]
    ),
    "decode step, 1 row, bf16": _of("step_1"),
    "decode step, 1 row, bf16: through the engine": _both("ms", _ENGINE, H100.step_1 + 0.2, H200.step_1 + 0.2),
    "decode step, 1 row, bf16: over its read time": _both(
        "ratio", _doc("step_1"), H100.step_1 / _READ_1["h100"], H200.step_1 / _READ_1["h200"]
    ),
    "host syncs, 16 steps of 64 rows, bf16": _none(_NEVER),
    "steps with other bits than launched one by one, bf16": _none("the same kernels on the same buffers"),
    "launches, decode step, 64 rows, bf16": Prediction(302, 302, "count", "counted on fake tensors"),
    "copies to the device, decode step, 64 rows, bf16": _none("all of a step lies on the device"),
    "copies to the host, decode step, 64 rows, bf16": _none("the engine reads events, not the step"),
    "launches, prefix, 16 pictures, bf16": Prediction(300, 300, "count", "308 seen, less what masks took"),
    "copies to the device, prefix, 16 pictures, bf16": _none("slots are on the device already"),
    "copies to the host, prefix, 16 pictures, bf16": _none("nothing is asked of the host"),
}

_SLOTS = "weights, slots of 1,536 positions at 302 MB each, 2.5 GB of passes"
_CARD = "the peak and 3 % of it that torch holds for later, 0.6 GB of context"


def _memory(name: str, weights: float, slots: int, passes: float) -> Table:
    peak = weights + 0.302 * slots + passes
    return {
        f"{name}: peak memory": _both("GB", _SLOTS, peak, peak),
        f"{name}: card's memory": _both("GB", _CARD, 1.03 * peak + 0.6, 1.03 * peak + 0.6),
    }


_ALONE_BUSY = "the pass behind vision waits for its launches"
ENGINE: Table = {
    "query 3 tokens, batch 64, bf16": _both("req/s", _doc("query"), H100.query(), H200.query()),
    **_memory("query 3 tokens, batch 64, bf16", 18.5, 64, 2.8),
    "query 3 tokens, batch 64, bf16: device busy": Prediction(0.98, 0.98, "share", "2 % of waiting"),
    "reasoning 30 tokens, batch 64, bf16": _both("req/s", _doc("reasoning"), H100.reasoning(), H200.reasoning()),
    **_memory("reasoning 30 tokens, batch 64, bf16", 18.5, 64, 2.8),
    "query 3 tokens, batch 1, bf16": _both("req/s", _doc("alone"), 1e3 / H100.alone, 1e3 / H200.alone),
    **_memory("query 3 tokens, batch 1, bf16", 18.5, 1, 0.4),
    "query 3 tokens, batch 1, bf16: device busy": Prediction(0.75, 0.72, "share", _ALONE_BUSY),
    "query 3 tokens, one of batch 8, bf16": _both(
        "req/s", "as at batch 1: idle rows cost nothing", 1e3 / (H100.alone + 0.3), 1e3 / (H200.alone + 0.3)
    ),
    **_memory("query 3 tokens, one of batch 8, bf16", 18.5, 8, 0.5),
    "query 3 tokens, batch 64, bf16, encodings kept": _both(
        "req/s", "as the first time: a thread writes", 0.97 * H100.query(), 0.97 * H200.query()
    ),
    "query 3 tokens, batch 64, bf16, asked again": _of("again", "req/s"),
    "query 3 tokens, batch 64, bf16, asked again: of the first": _both(
        "ratio", _doc("again"), H100.again / H100.query(), H200.again / H200.query()
    ),
    "detect, batch 64, bf16": _of("detect", "obj/s"),
    "detect, one row, eager, bf16": Prediction(13, 13, "obj/s", "steps of 25 ms, as one row's eager ones were"),
    "detect, batch 64, bf16: over one row, eager": _both("ratio", "both", H100.detect / 13, H200.detect / 13),
    "detect, one row, replayed, bf16": _of("detect_replayed", "obj/s"),
    "detect, batch 64, bf16: over one row, replayed": _both(
        "ratio", "both", H100.detect / H100.detect_replayed, H200.detect / H200.detect_replayed
    ),
    "captures after the start": _none(_NEVER),
}

_RATIO = "both steps"


def _step(rows: str, form: str, h100: float, h200: float, of: tuple[float, float], source: str) -> Table:
    name, extra = f"decode step, {rows}, {form}", 0.2
    return {
        name: _both("ms", source, h100, h200),
        f"{name}: through the engine": _both("ms", _ENGINE, h100 + extra, h200 + extra),
        f"{name}: over bf16's": _both("ratio", _RATIO, h100 / of[0], h200 / of[1]),
    }


_BF16_64, _BF16_1 = (H100.step_64, H200.step_64), (H100.step_1, H200.step_1)
LOWBITS: Table = {
    "weights, float8 experts": Prediction(10.5, 10.5, "GB", "8.05 of experts in a byte each, the rest in 16 bits"),
    **_step(
        "64 rows", "float8 experts", H100.step_64 - H100.float8_saves, H200.step_64 - H200.float8_saves,
        _BF16_64, _doc("float8_saves"),
    ),
    **_step(
        "1 row", "float8 experts", H100.step_1_float8, H200.step_1_float8, _BF16_1, _doc("step_1_float8")
    ),
    "prefix, 16 pictures, float8 experts": _of("prefix_float8", factor=16),
    "query 3 tokens, batch 1, float8 experts": _both(
        "req/s", "as bf16: half the bytes, which are widened", 1e3 / (H100.alone - 0.5), 1e3 / (H200.alone - 0.4)
    ),
    **_memory("query 3 tokens, batch 1, float8 experts", 10.5, 1, 0.4),
    "reasoning 30 tokens, batch 64, float8 experts": _both(
        "req/s", _doc("reasoning"), H100.reasoning(float8=True), H200.reasoning(float8=True)
    ),
    **_memory("reasoning 30 tokens, batch 64, float8 experts", 10.5, 64, 2.8),
    "caption 150 tokens, batch 128, float8 experts": _of("caption_float8", "req/s"),
    **_memory("caption 150 tokens, batch 128, float8 experts", 10.5, 128, 2.8),
    "query 3 tokens, batch 64, float8 experts": _both(
        "req/s", _doc("query"), H100.query(float8=True), H200.query(float8=True)
    ),
    **_memory("query 3 tokens, batch 64, float8 experts", 10.5, 64, 2.8),
    "weights, all float8": Prediction(10.1, 10.1, "GB", "0.4 GB of the encoder's products less"),
    "vision, 36 crops, all float8": _of("vision_float8", factor=4),
    "vision, 36 crops, all float8: share of the limit": _vision_share("vision_float8"),
    "query 3 tokens, batch 64, all float8": _both(
        "req/s", _doc("vision_float8"),
        H100.query(float8=True, float8_vision=True), H200.query(float8=True, float8_vision=True),
    ),
    **_memory("query 3 tokens, batch 64, all float8", 10.1, 64, 2.8),
    "weights, int4": Prediction(6.2, 6.2, "GB", "codes 4.3, scales and zero points 0.5, the rest in 16 bits"),
    **_step("1 row", "int4", H100.step_1_int4, H200.step_1_int4, _BF16_1, _doc("step_1_int4")),
    **_step("64 rows", "int4", 8.3, 7.1, _BF16_64, "codes at 40 % of the copy rate, slots as in bf16"),
    "prefix, 16 pictures, int4": Prediction(140, 140, "ms", "234 seen; half of what widening cost"),
    "query 3 tokens, batch 1, int4": _both(
        "req/s", "as bf16, and its pass widens codes", 1e3 / (H100.alone + 2), 1e3 / (H200.alone + 2)
    ),
    **_memory("query 3 tokens, batch 1, int4", 6.2, 1, 0.4),
}  # fmt: skip

_RING = "decoders alone on 14 cores, 200 a second and more; what is left is the card's time for the pictures"
_TWELVE = "37 MB of a picture copied in 0.7 ms, cut in 0.3, and cores shared with the engine's own thread"


def _files(size: str, share: float, source: str) -> Table:
    of_files = [share * card.query() for card in (H100, H200)]
    return {
        f"{size}, crops of a picture": Prediction(9, 9, "count", "2 x 4 tiles"),
        f"{size}, from files, batch 64, bf16": _both("img/s", source, *of_files),
        f"{size}, from files, batch 64, bf16: of cut before": _both("share", source, share, share),
    }


FILES: Table = {
    "cut before, batch 64, bf16": _both("img/s", _doc("query"), H100.query(), H200.query()),
    **_files("2 megapixels", 0.94, _RING),
    **_files("12 megapixels", 0.85, _TWELVE),
}

_SAME = "sizes of passes are fixed, no kernel adds in an order of the moment"
SAMENESS: Table = {
    "crops with other bits, in another place": _none(_SAME),
    "pictures with other bits, in another place": _none(_SAME),
    "rows with other bits, in another order": _none(_SAME),
    "rows with other bits, alone": _none(_SAME),
    "captures after the start": _none(_NEVER),
}

_RESIZED = "570 M products, 10 a clock and multiprocessor: single bytes, loaded from L1 in 2 to 4 lines a warp"
_RESIZED_2 = "120 M products at the same rate, 6 kernels"
_LAUNCHED = "4 launches of ours at 30 us and 2 of torch's; what the device needs beyond that"
RESIZING: Table = {
    "faults found at load": _none("every byte is Pillow's"),
    "pictures compared, random sizes": Prediction(500, 500, "count", "sides from 1 to 1,500"),
    "pictures that differ from Pillow's, random sizes": _none("whole numbers"),
    "pictures that differ from Pillow's, examples": _none("whole numbers"),
    "axes of a huge picture that differ from the twin's": _none("rows are found in 64 bits"),
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
    for batch in (1, 16)
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
    "stages": STAGES,
    "engine": ENGINE,
    "lowbits": LOWBITS,
    "files": FILES,
    "sameness": SAMENESS,
    "resizing": RESIZING,
    "golden": BLOCKS,
    "speeds": KERNELS,
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
    """What a figure of parts `kernels` and `speeds` should be, from the bytes and operations that its line names.

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
