"""`--compile` and `compile()`: make an engine ready, so that its next request is as fast as its hundredth.

On a CPU the decode step of a small float32 model is compiled (`compiled.py`) if that pays on this machine: an eager
step is timed, compiled ones beside it, and each size keeps the faster. What was found, and the code, are kept on disk
under all they depend on, whole or not at all (`FileCache`). Code that is read there will be run, so it bears the user's
own seal (`finished.run_json`): what a stranger put into the folder is compiled anew. On CUDA a step is a graph of
kernels already. Then made-up requests are answered, until whatever is done once has been done. Where nothing
is compiled, one warning says why, and the engine is as it was; no compiler runs after `make_ready`.

Knows nothing of checkpoints and options.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from md3cli.errors import EngineError, OutputError
from md3cli.file_cache import COMPILED, FileCache
from md3cli.files import held_folder
from md3cli.finished.run_json import is_own, seal_of
from md3cli.images.crops import CropConfig, PreparedImage, select_tiling
from md3cli.model.engine.compiled import (
    WORK,
    CompiledSteps,
    DecodeStep,
    LoadedStep,
    Parts,
    calling,
    compile_step,
    facts,
    flat_inputs,
    in_parts,
)
from md3cli.model.engine.engine import ROOM, Engine, EngineStats
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.passes import decode_step
from md3cli.model.engine.state import Event, Mode, Rows, idle_rows
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.layers import has_packed_weights
from md3cli.records import Job, Request, Task
from md3cli.settings import user_cache_dir

SEAL_BYTES = 64  # of a seal, in front of code
STORE_BYTES = 1 << 28  # a hundred compiled steps
LEAST_GAIN = 0.1  # of a step's time; less is not worth another way to compute
ROUNDS, ROUND_S, MOST_STEPS = 7, 0.03, 16  # eager and compiled steps are timed in turns, so many at a time
SEVERAL = 4  # rows of the example that a form for any number is traced with
CLOSE = 1e-3  # by how much probabilities and inputs of a compiled step may differ in the check of a form
WARM_UP_S = {"cpu": 1.0, "cuda": 60.0, "mps": 5.0}  # made-up requests; the first ones compile a GPU's kernels
_COMPILERS = {"win32": "cl", "darwin": "clang++"}
_DECISIONS = slice(0, Event._fields.index("continue_mass"))


class CannotCompileError(Exception):
    """Nothing is compiled; the text says why."""


class Timing(NamedTuple):
    """Milliseconds that an eager step of `rows` rows takes, and a compiled one."""

    rows: int
    eager: float
    compiled: float

    @property
    def pays(self) -> bool:
        """Whether the compiled step is faster by enough."""
        return self.compiled <= (1 - LEAST_GAIN) * self.eager


def make_ready(engine: Engine, cache_dir: Path | None) -> None:
    """Compile what pays, then answer made-up requests; warn where nothing is compiled. The engine must have no work.

    Compiled code is kept in `cache_dir`, by default the user's cache folder.
    """
    reason = None
    try:
        if not (engine.is_captured or isinstance(engine.passes.decode, CompiledSteps)):
            _compile(engine, cache_dir)
    except CannotCompileError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - a compiler fails in many ways, and none of them is the end of a run
        lines = str(error).strip().splitlines() or [""]
        reason = f"the compiler failed ({type(error).__name__}: {lines[0]:.200})"
    if reason is not None:
        warnings.warn(f"nothing is compiled: {reason}; the answers are the same", stacklevel=3)
    _warm_up(engine)


def _warm_up(engine: Engine) -> None:
    """Answer made-up requests, so that what is done once has been done; nothing of them stays in the engine."""
    encoder, stats, device = engine.encoder, engine.stats, engine.model.device.type
    deadline = time.perf_counter() + WARM_UP_S.get(device, WARM_UP_S["cpu"])
    engine.encoder, engine.stats = encoder.forgetful(), EngineStats(batch_sizes=stats.batch_sizes)
    try:
        for job in _made_up_jobs(engine.crop_config):
            if time.perf_counter() > deadline:
                break
            engine.add(job)
            while engine.has_work and time.perf_counter() < deadline:
                engine.step()
    except EngineError:
        pass  # a request that fails says so
    finally:
        engine.encoder, engine.stats = encoder, stats
        engine.forget()


def _made_up_jobs(config: CropConfig) -> Iterator[Job]:
    """Yield requests about grey pictures of the usual shapes; the first answer is as long as usual ones, too."""
    side, length = config.crop_size, 64
    shapes = ((1, 1), (4000, 3000), (3000, 4000), (4000, 4000), (4800, 2700), (4500, 3000))
    for tiling in dict.fromkeys(select_tiling(*shape, config) for shape in shapes):
        crops = np.full((tiling.num_crops, side, side, 3), 128, np.uint8)
        picture = PreparedImage(crops, tiling, side * tiling.cols, side * tiling.rows, f"made up {tiling}")
        yield Job(0, picture, Request(Task.CAPTION, max_tokens=length))
        yield Job(0, picture, Request(Task.DETECT, "it", max_objects=2))
        length = 4


def why_not(model: Moondream3) -> str | None:
    """Return why steps of a model cannot be compiled on this machine, in words; None when they can."""
    device = model.device
    if device.type == "cuda":
        return "this network runs on the GPU in its plain parts, and Moondream.load has kernels for them"
    if device.type != "cpu" or any(tensor.device != device for tensor in model.parameters()):
        return f"what is compiled is a network that lies whole on a CPU, and this one is on {device}"
    if has_packed_weights(model):
        return "weights in 8 or 4 bits are multiplied by code that no compiler changes"
    if model.dtype is not torch.float32:
        dtype = str(model.dtype).removeprefix("torch.")
        return f"compiled code rounds {dtype} differently; on a CPU only float32 is compiled"
    name = os.environ.get("CXX", _COMPILERS.get(sys.platform, "g++"))  # the one that torch takes
    if shutil.which(name) is None:
        return f"no C++ compiler ({name}{'' if 'CXX' in os.environ else '; CXX may name another'}) is installed"
    return None


def _compile(engine: Engine, cache_dir: Path | None) -> None:
    """Give an engine's passes compiled steps.

    Raises:
        CannotCompileError: no compiled step would be faster, or there can be none.
    """
    fault = why_not(engine.model)
    if fault is not None:
        raise CannotCompileError(fault)
    with torch.inference_mode():
        found = Search(engine.model, engine.batch_size, engine.max_context, _open_store(cache_dir))
        engine.passes.decode = found.steps(engine.passes.decode)


# -- what pays -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Example:
    """Slots and rows that serve nobody: steps are traced, compared and timed over them."""

    cache: KVCache
    start: Rows
    start_next_ND: Tensor
    rows: Rows
    next_ND: Tensor

    @classmethod
    def of(cls, model: Moondream3, count: int) -> Example:
        """Make `count` rows in the middle of answers of all kinds."""
        random = torch.Generator().manual_seed(count)
        prefix_len, ids = (
            model.config.prefix_len,
            torch.randint(model.config.text.vocab_size, (count,), generator=random),
        )
        cache = KVCache(model.config, count, prefix_len + ROOM, dtype=model.dtype, device=model.device)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_(generator=random)
        rows = idle_rows(count, model.device)
        modes = [mode for mode in Mode if mode is not Mode.IDLE]
        rows.mode.copy_(torch.tensor([int(modes[index % len(modes)]) for index in range(count)]))
        rows.limit.fill_(1 << 20)
        rows.position.fill_(prefix_len)
        next_ND = model.text.embed(ids)
        return cls(cache, rows, next_ND, Rows(*(column.clone() for column in rows)), next_ND.clone())

    def restart(self) -> None:
        """Put the rows back to where they began."""
        self.rows.put(slice(None), self.start)
        self.next_ND.copy_(self.start_next_ND)

    def run(self, step: DecodeStep, max_context: int) -> Tensor:
        """Take the rows' next decisions."""
        return step(self.cache, self.rows, self.next_ND, max_context, is_sampled=False)

    def seconds(self, step: DecodeStep, max_context: int, num_steps: int) -> float:
        """Return the seconds of a step, as the mean of so many from the beginning on."""
        self.restart()
        started = time.perf_counter()
        for _ in range(num_steps):
            self.run(step, max_context)
        return (time.perf_counter() - started) / num_steps


@dataclass(slots=True)
class Search:
    """Looks for compiled steps of a network that are faster than eager ones, and remembers on disk what it found."""

    model: Moondream3
    batch_size: int
    max_context: int
    store: FileCache | None
    timings: dict[int, Timing] = field(default_factory=dict)  # by rows, as far as they are known

    def steps(self, eager: DecodeStep) -> CompiledSteps:
        """Return steps that are compiled for sizes where that is faster, and eager elsewhere.

        Raises:
            CannotCompileError: it is faster nowhere.
        """
        with in_parts(self.model) as parts:
            outside = self._share_outside(parts)
            key = facts(self.model, parts, self.max_context)
        verdict = {**key, "batch": self.batch_size}
        kept = self._kept_timings(verdict)
        if not kept and outside < LEAST_GAIN:
            inside = f"products take {1 - outside:.0%} of a step"
            raise CannotCompileError(f"{inside}, and a compiler leaves those as they are")
        steps = CompiledSteps(eager, self.max_context)
        timings = self.timings = dict(kept)
        for count, sizes in ((1, [1]), (SEVERAL, sorted({2, 8, self.batch_size} - {1}))):
            sizes = [size for size in sizes if size <= self.batch_size]
            if not sizes or not self._may_pay(sizes[0], timings):
                break
            form = self._form(parts, key, count)
            self._check(eager, form, count)
            timings.update((size, self._time(eager, form, size)) for size in sizes if size not in timings)
            most = _most_paying([timings[size] for size in sizes])
            if most:
                steps.forms[sizes[0], most] = form
        if timings != kept:
            self._keep(verdict, json.dumps(list(timings.values())).encode())
        if not steps.forms:
            first = timings[1]
            took = f"{first.compiled:.2f} ms, an eager one {first.eager:.2f} ms"
            raise CannotCompileError(f"it would not be faster here: a compiled step took {took}")
        return steps

    @staticmethod
    def _may_pay(least: int, timings: dict[int, Timing]) -> bool:
        """Return False where the form for sizes from `least` on, or the one before it, is known not to pay."""
        known = [timings[size] for size in (1, least) if size in timings]
        return all(timing.pays for timing in known)

    def _share_outside(self, parts: Parts) -> float:
        """Return the share of an eager step of one row that is spent outside of its parts; learn their widths."""
        example, shares = Example.of(self.model, 1), []
        with calling(parts):
            for _ in range(5):
                parts.seconds = 0.0
                seconds = example.seconds(partial(decode_step, self.model), self.max_context, 1)
                shares.append(1 - parts.seconds / seconds)
        return median(shares)

    def _form(self, parts: Parts, key: dict[str, Any], count: int) -> LoadedStep:
        """Return the compiled step for one row or for several, from disk where it is there and can be loaded."""
        where = {**key, "rows": count}
        kept = self._kept_code(where)
        if kept is not None:
            with contextlib.suppress(RuntimeError, OSError, KeyError):  # made where libraries are others, say
                return LoadedStep(self.model, parts, kept, self.max_context)
        example = Example.of(self.model, count)
        given = flat_inputs(example.cache, example.rows, example.next_ND)
        with in_parts(self.model) as traced, held_folder(WORK) as folder:
            traced.widths[:] = parts.widths
            code = compile_step(self.model, traced, given, self.max_context, folder)
        form = LoadedStep(self.model, parts, code, self.max_context)
        self._keep_code(where, code)
        return form

    def _check(self, eager: DecodeStep, compiled: DecodeStep, count: int) -> None:
        """Refuse a compiled step that decides otherwise than its eager twin."""
        found = []
        for step in (eager, compiled):
            example = Example.of(self.model, count)
            events = example.run(step, self.max_context)
            found.append([events[:, _DECISIONS], example.rows.mode, events, example.next_ND, *example.cache.keys])
        (decisions, modes, *near), (other_decisions, other_modes, *other_near) = found
        are_equal = torch.equal(decisions, other_decisions) and torch.equal(modes, other_modes)
        if not are_equal or not all(
            torch.allclose(a, b, rtol=CLOSE, atol=CLOSE, equal_nan=True) for a, b in zip(near, other_near, strict=True)
        ):
            raise CannotCompileError("a compiled step gave other numbers than its eager twin")

    def _time(self, eager: DecodeStep, compiled: DecodeStep, size: int) -> Timing:
        """Time both kinds of steps of `size` rows, in turns."""
        example, context = Example.of(self.model, size), self.max_context
        example.seconds(compiled, context, 1)
        num_steps = max(1, min(MOST_STEPS, int(ROUND_S / example.seconds(eager, context, 1))))
        rounds = [[example.seconds(step, context, num_steps) for step in (eager, compiled)] for _ in range(ROUNDS)]
        eager_s, compiled_s = (median(column) for column in zip(*rounds, strict=True))
        return Timing(size, 1000 * eager_s, 1000 * compiled_s)

    # -- on disk ----------------------------------------------------------------------------------

    def _kept_timings(self, key: dict[str, Any]) -> dict[int, Timing]:
        """Return what an earlier search found here; nothing where it is not there or makes no sense."""
        kept = self.store.get(_digest(key)) if self.store is not None else None
        try:
            rows = [
                Timing(int(rows), float(eager), float(compiled)) for rows, eager, compiled in json.loads(kept or b"[]")
            ]
        except (ValueError, TypeError, OverflowError, RecursionError):
            return {}
        is_sound = all(0 < row.rows <= self.batch_size and min(row[1:]) > 0 and isfinite(sum(row)) for row in rows)
        return {row.rows: row for row in rows} if is_sound and rows and rows[0].rows == 1 else {}

    def _kept_code(self, key: dict[str, Any]) -> bytes | None:
        """Return the code under a key; None where there is none that this user compiled."""
        kept = self.store.get(_digest(key)) if self.store is not None else None
        if kept is None:
            return None
        seal, code = kept[:SEAL_BYTES], kept[SEAL_BYTES:]
        return code if is_own(_claim(key, code), seal.decode("latin-1")) else None

    def _keep_code(self, key: dict[str, Any], code: bytes) -> None:
        seal = seal_of(_claim(key, code)) if self.store is not None else None
        if seal is not None:
            self._keep(key, seal.encode() + code)
        elif self.store is not None:
            self.store = None
            _warn_not_kept(f"{user_cache_dir()} cannot hold the key of its seal")

    def _keep(self, key: dict[str, Any], payload: bytes) -> None:
        try:
            if self.store is not None:
                self.store.put(_digest(key), payload)
        except OSError as error:
            self.store = None
            _warn_not_kept(error.strerror or str(error))


def _most_paying(timings: Sequence[Timing]) -> int:
    """Return the largest size up to which all timed ones pay; 0 for none."""
    most = 0
    for timing in timings:
        if not timing.pays:
            break
        most = timing.rows
    return most


def _open_store(cache_dir: Path | None) -> FileCache | None:
    try:
        return FileCache(cache_dir or user_cache_dir(), STORE_BYTES, folder=COMPILED)
    except OutputError as error:
        _warn_not_kept(str(error))
        return None


def _warn_not_kept(reason: str) -> None:
    warnings.warn(f"what is compiled is not kept for the next run: {reason}", stacklevel=2)


def _claim(key: dict[str, Any], code: bytes) -> str:
    """Return what a seal of code says."""
    return f"compiled code {hashlib.sha256(code).hexdigest()} of {_digest(key)}"


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
