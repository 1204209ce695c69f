"""A decode step as machine code of its own: compiled ahead of time for a CPU, loaded from disk in milliseconds.

A step of a small model on a CPU is some five hundred small operations, each of which costs the host more than the
arithmetic. torch's AOTInductor makes a few loops of them. Matrix products and experts stay what they are (`Part`): the
compiled step calls the very modules of the eager one, so that there is one copy of the weights, in whichever form they
lie, and products have the same bits. Two forms are made, for one row and for several, with any number of slots and
positions. Other steps, those with sampled rows among them, run eagerly; nothing is compiled while a request waits.

`CompiledSteps` and `LoadedStep` are called like `decode_step`, their eager twin. A form is bytes (`compile_step`), and
`facts` says all that they depend on. `ready.py` keeps them on disk, and decides whether they pay.

Idea: opaque operators around what a compiler should leave alone are vLLM's "splitting ops".

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from md3cli import __version__
from md3cli.files import held_folder
from md3cli.model.engine.kv_cache import GROWTH, KVCache, round_up
from md3cli.model.engine.passes import decode_step
from md3cli.model.engine.state import Rows
from md3cli.model.network.layers import LayerNorm
from md3cli.model.network.moondream import Moondream3, RegionHeads
from md3cli.model.network.text import Tau, TextAttention, TextBlock, TextDecoder

# What the compiler looks into; every other module is a part, which it calls.
_SEEN_THROUGH = (TextDecoder, nn.ModuleList, TextBlock, TextAttention, Tau, RegionHeads, LayerNorm)
WORK = "md3-compile-"  # begins the names of folders for what a compiler writes on its way
_MOST_ROWS = 1 << 12
_HEADROOM = 2  # capacity grows by an eighth at least, and so may pass the context


# -- parts -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Parts:
    """The parts of one network, in order: what they call, how wide their results are, and the time spent in them."""

    calls: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Part(nn.Module):
    """Stands for a part while a network is traced."""

    def __init__(self, parts: Parts, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.parts, self.index = parts, len(parts.calls)
        parts.calls.append(call)
        parts.widths.append(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the part's result [..., its width], through an operator that no compiler looks into."""
        return torch.ops.md3cli.part(x, self.index, self.parts.widths[self.index])  # type: ignore[no-any-return]


class _Running(threading.local):
    """Whose parts the operator calls in this thread; the innermost is the last."""

    def __init__(self) -> None:
        self.parts: list[Parts] = []


_running = _Running()


def _call_part(x: Tensor, index: int, width: int) -> Tensor:
    parts = _running.parts[-1]
    started = time.perf_counter()
    y = parts.calls[index](x)
    parts.seconds += time.perf_counter() - started
    parts.widths[index] = y.shape[-1]
    return y


@cache
def _define_operator() -> torch.library.Library:
    """Make the operator known to torch, once; it is there as long as what is returned."""
    library = torch.library.Library("md3cli", "DEF")
    library.define("part(Tensor x, int index, int width) -> Tensor")
    library.impl("part", _call_part, "CompositeExplicitAutograd")

    def fake(x: Tensor, index: int, width: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], width))

    torch.library.register_fake("md3cli::part", fake, lib=library)
    return library


@contextlib.contextmanager
def in_parts(model: Moondream3) -> Iterator[Parts]:
    """Put a `Part` in the place of each part of the decoder and the region heads, and undo it at the end."""
    _define_operator()
    parts = Parts()
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def split(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, _SEEN_THROUGH):
                split(child)
            else:
                undo.append((module._modules, name, child))
                module._modules[name] = Part(parts, child)  # not setattr: the order of modules stays
        if isinstance(module, Tau) and not isinstance(module.products, nn.Module):
            undo.append((module.__dict__, "products", module.products))
            module.__dict__["products"] = Part(parts, module.products)

    try:
        split(model.text)
        split(model.region)
        yield parts
    finally:
        for names, name, child in undo:
            names[name] = child


@contextlib.contextmanager
def calling(parts: Parts) -> Iterator[None]:
    """Have the operator call these parts, in this thread."""
    _running.parts.append(parts)
    try:
        yield
    finally:
        _running.parts.pop()


# -- a step of flat tensors ------------------------------------------------------------------------


class _Slots(NamedTuple):
    """What a `DecodeStore` asks of a cache."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    capacity: int


class FlatStep(nn.Module):
    """`decode_step` without sampling, of nothing but tensors: keys and values of each layer, columns, next inputs."""

    def __init__(self, model: Moondream3, max_context: int) -> None:
        super().__init__()
        self.network, self.max_context = model, max_context

    def forward(self, *given: Tensor) -> Tensor:
        """Take the next decisions of the rows; return their events [N, len(Event)]."""
        num_layers = self.network.config.text.n_layers
        keys, values = given[:num_layers], given[num_layers : 2 * num_layers]
        *columns, next_ND = given[2 * num_layers :]
        slots: Any = _Slots(keys, values, keys[0].shape[2])
        return decode_step(self.network, slots, Rows(*columns), next_ND, self.max_context, is_sampled=False)


def flat_inputs(cache: KVCache, rows: Rows, next_ND: Tensor) -> list[Tensor]:
    """Return what `FlatStep` is given for the first slots of a cache, as many as there are rows; views."""
    count = len(next_ND)
    return [*(t[:count] for t in cache.keys), *(t[:count] for t in cache.values), *rows, next_ND]


def compile_step(model: Moondream3, parts: Parts, given: Sequence[Tensor], max_context: int, folder: Path) -> bytes:
    """Compile the step for one row or, where `given` has more, for any number from two on; return a torch package.

    `model` is in its `parts`, whose widths are known. What the compiler writes on the way lies in `folder`.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache
    from torch.export import Dim, export

    capacity = GROWTH * Dim("c", min=2, max=_most_capacity(max_context) // GROWTH)
    size = {} if len(given[-1]) == 1 else {0: Dim("n", min=2, max=_MOST_ROWS)}
    num_stored = 2 * model.config.text.n_layers
    shapes = tuple({**size, 2: capacity} if index < num_stored else size for index in range(len(given)))
    settings = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.precompile_headers": False,  # torch keeps 300 MB of them, where a kill leaves them torn
        "compile_threads": 1,
    }
    target = folder / "step.pt2"
    with _silent(), fresh_cache(dir=str(folder)), torch.no_grad(), calling(parts), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own parts
        traced = export(
            FlatStep(model, max_context),
            tuple(tensor.clone() for tensor in given),
            dynamic_shapes=(shapes,),
            strict=False,
        )
        aoti_compile_and_package(traced, package_path=str(target), inductor_configs=settings)
    return target.read_bytes()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep torch from telling that a failed compiler's files are kept, for they go with the folder that they are in."""
    logger = logging.getLogger("torch._inductor.utils")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _most_capacity(max_context: int) -> int:
    return round_up(max_context, GROWTH) * _HEADROOM


DecodeStep = Callable[..., Tensor]  # called like `decode_step` without its model


def _load(package: bytes, folder: Path) -> Any:
    """Have torch load a package, of which no file is needed afterwards."""
    path = folder / "step.pt2"
    path.write_bytes(package)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    # Not torch._inductor.aoti_load_package: it imports the compiler and tries it out, which takes seconds.
    load = torch._C._aoti.AOTIModelPackageLoader
    try:
        return load(str(folder / "step"), "model", True, 1, -1)
    except RuntimeError:  # an earlier torch unpacks for itself, into a folder that stays when the process is killed
        return load(str(path), "model", True, 1, -1)


class LoadedStep:
    """A compiled step over the weights of a network, which it shares."""

    def __init__(self, model: Moondream3, parts: Parts, package: bytes, max_context: int) -> None:
        """Load what `compile_step` made; whoever calls knows that the bytes are whole, for they are code."""
        _define_operator()
        self._parts, self._max_context = parts, max_context
        with held_folder(WORK) as folder:
            loaded = _load(package, folder)
        tensors = dict(FlatStep(model, max_context).named_parameters())
        self._weights = {name: tensors[name].detach() for name in loaded.get_constant_fqns()}
        loaded.load_constants(self._weights, False, True, True)  # all of them; ours to keep alive, and not copied
        self._loaded = loaded

    def __call__(self, cache: KVCache, rows: Rows, next_ND: Tensor, max_context: int, *, is_sampled: bool) -> Tensor:
        """Do what `decode_step` does, for the context it was compiled for and rows that are not sampled."""
        assert max_context == self._max_context
        assert not is_sampled
        with calling(self._parts):
            events: Tensor = self._loaded.boxed_run(flat_inputs(cache, rows, next_ND))[0]
        return events


class CompiledSteps:
    """`decode_step` over a network: compiled where a form for the size is at hand, eager everywhere else.

    Attributes:
        eager: the plain twin.
        forms: a compiled step for from … to … rows.
    """

    def __init__(self, eager: DecodeStep, max_context: int) -> None:
        self.eager, self._max_context = eager, max_context
        self._most_capacity = _most_capacity(max_context)
        self.forms: dict[tuple[int, int], DecodeStep] = {}

    def __call__(self, cache: KVCache, rows: Rows, next_ND: Tensor, max_context: int, *, is_sampled: bool) -> Tensor:
        """Do what `decode_step` does."""
        step, count = self.eager, len(next_ND)
        if not is_sampled and max_context == self._max_context and cache.capacity <= self._most_capacity:
            step = next((form for (least, most), form in self.forms.items() if least <= count <= most), self.eager)
        return step(cache, rows, next_ND, max_context, is_sampled=is_sampled)


# -- what compiled code depends on -----------------------------------------------------------------


def facts(model: Moondream3, parts: Parts, max_context: int) -> dict[str, Any]:
    """Return all that compiled steps of a network depend on but its values; equal facts mean equal code."""
    tensors = FlatStep(model, max_context).named_parameters()
    return {
        "config": asdict(model.config),
        "context": max_context,
        "tensors": {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors},
        "parts": parts.widths,
        "forms": [str(block.attn.attend.__qualname__) for block in _blocks(model)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": _machine(),
        "md3cli": [__version__, _source_digest()],
    }


def _blocks(model: Moondream3) -> list[TextBlock]:
    return [block for block in model.text.blocks if isinstance(block, TextBlock)]


@cache
def _machine() -> list[str]:
    """Return what generated code expects of a processor: it is compiled for the one it was made on."""
    lines: set[str] = set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        lines = {line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))}
    capabilities = sorted(f"{key}={value}" for key, value in torch.cpu.get_capabilities().items())
    return [platform.system(), platform.machine(), platform.processor(), *capabilities, *sorted(lines)]


@cache
def _source_digest() -> str:
    """Return a digest of the code that is traced."""
    engine = Path(__file__).parent
    traced = [engine / f"{name}.py" for name in ("compiled", "decisions", "kernels", "kv_cache", "passes", "state")]
    digest = hashlib.sha256()
    for path in sorted([*traced, *(engine.parent / "network").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
