"""Run the whole engine at full size on a CUDA device that is not there, and count what it would ask of it.

    PYTHONPATH=. python tests/support/fake_cuda.py [--form bf16|float8|int4] [SCENARIO …]

Needs a CUDA build of torch (and its triton), no GPU: tensors are fake, they have shapes and devices and no
values. A tensor on the wrong device fails as it would on a GPU. Prints one JSON object: a scenario's
name -> its `Counts`. An operator of torch that does work on the device counts as one launch, attention
with a boolean mask as four, one of our own as the number of kernels that it is registered with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from md3cli.bench.runs import SilentTokenizer
from md3cli.images.crops import PreparedImage, Tiling, select_tiling
from md3cli.model.engine import encoder as encoder_module
from md3cli.model.engine import flight
from md3cli.model.engine.encoder import ImageEncoder, crop_sizes
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.kv_cache import KVCache
from md3cli.model.engine.prompts import Prompt
from md3cli.model.engine.resize import PictureCutter
from md3cli.model.engine.state import Event, Finish, Mode
from md3cli.model.kernels import vision_forms
from md3cli.model.kernels.float8_products import Float8Linear
from md3cli.model.kernels.tiles import WeightForm
from md3cli.model.kernels.vision_forms import place_vision_forms
from md3cli.model.kernels.weights import KernelWeight
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.layers import ExpertMatrices, Linear
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.vision import VisionEncoder
from md3cli.model.quant import layers as quant_layers
from md3cli.model.quant.layers import quantise_vision
from md3cli.model.quant.load import _place
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.names import INT4_GROUP, is_portable
from md3cli.records import Job, Request, RunIdentity, Task

FORMS = ("bf16", "float8", "int4")
NUM_ROWS = 64
NUM_ADMITTED = 44  # of these, in one go: an engine fills its passes of 22 pictures, and leaves the others for later
TILING = Tiling(2, 4)  # nine crops with the global one
DEVICE, CAPABILITY = torch.device("cuda", 0), (9, 0)  # of the card that is pretended


@dataclass
class Counts:
    """What a piece of the engine's work asks of the device; `waits` are the times the host stands still for it."""

    host_to_device: int = 0
    device_to_host: int = 0
    waits: int = 0
    launches: int = 0


# -- counting --------------------------------------------------------------------------------------

aten = torch.ops.aten
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_WORK = {"_unsafe_view", "detach_", "_reshape_alias", "resize_"}  # beside what torch itself calls a view
COPIES = {"copy_", "_to_copy"}
READS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2"}  # the host needs their values
INDEXED = {"index", "index_put_", "index_put", "where"}  # torch copies their CPU arguments to the device unasked
WHOLE = {"linear": 1, "scaled_dot_product_attention": 1}  # not taken to pieces: one kernel each
BOOLEAN_MASK = 3  # turned into numbers before attention reads it


class Counter(TorchDispatchMode):
    """Counts operators on CUDA tensors while it is active; put it around code that runs under fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._pinned: list[Tensor] = []  # fake tensors do not say whether they are

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if name not in WHOLE and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if name == "_to_copy" and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            # Not by `func`: of a tensor made from a list the fake mode knows the values, and would really copy them.
            result = torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        else:
            result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if kwargs.get("pin_memory") or (func.is_view and self._is_pinned(given[0])):
            self._pinned += made
        if any(tensor.is_cuda for tensor in (*given, *made)):
            self._count(func, name, args, kwargs, given, made)
        return result

    def _count(
        self,
        func: OpOverload,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
    ) -> None:
        if name in COPIES:
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
            is_blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            self._count_copy(source, target, is_blocking=is_blocking)
        elif name in READS:
            self.read()
        elif not (name in ALLOCATIONS or name in NO_WORK or func.is_view):
            if name in INDEXED:
                for _ in [tensor for tensor in given if not tensor.is_cuda]:
                    self.counts.host_to_device += 1
                    self.counts.waits += 1
            self.counts.launches += self._launches(func, name, args, kwargs)

    def _count_copy(self, source: Tensor, target: Tensor, *, is_blocking: bool) -> None:
        if source.is_cuda and target.is_cuda:
            self.counts.launches += 1
            return
        self.counts.host_to_device += target.is_cuda
        self.counts.device_to_host += source.is_cuda
        on_host = source if target.is_cuda else target
        self.counts.waits += is_blocking or not self._is_pinned(on_host)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor is pinned for pinned in self._pinned)

    def _launches(self, func: OpOverload, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if func.namespace == "md3":
            from md3cli.model.kernels.registry import LAUNCHES

            return LAUNCHES[f"md3::{name}"]
        if name == "scaled_dot_product_attention":
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            return WHOLE[name] + (BOOLEAN_MASK if mask is not None else 0)
        return WHOLE.get(name, 1)

    def read(self) -> None:
        """A small tensor is read by the host."""
        self.counts.device_to_host += 1
        self.counts.waits += 1

    @contextmanager
    def around(self) -> Iterator[Counts]:
        """Count what happens inside."""
        self.counts, self._pinned = Counts(), []
        with self:
            yield self.counts


class FakeDevice:
    """What CUDA is asked besides operators, answered without one; `finish` is what all rows' events say."""

    def __init__(self, counter: Counter) -> None:
        self.counter, self.finish = counter, Finish.NO

    @contextmanager
    def active(self) -> Iterator[None]:
        """Fake tensors, and these answers, while it lasts."""
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            patch.object(FakeTensor, "tolist", self._tolist()),
            patch.object(encoder_module, "milestone", lambda device: self._wait),
            patch.object(flight, "milestone", lambda device: self._wait),
            patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            # Whether cuDNN can serve an attention is asked of the driver.
            patch.object(vision_forms, "sdpa_kernel", lambda order, *, set_priority: nullcontext()),
        ):
            yield

    def _tolist(self) -> Callable[[Tensor], list[Any]]:
        """Events of rows that write text, from a matrix; zeros from a row of numbers."""

        def tolist(tensor: Tensor) -> list[Any]:
            if tensor.is_cuda:
                self.counter.read()
            event = Event(int(Mode.TEXT), 100, 1, 1, 1, int(self.finish), 0.5, 0.5, 0.5, 0.5)
            return [list(event)] * len(tensor) if tensor.dim() == 2 else [0.0] * len(tensor)

        return tolist

    def _wait(self) -> None:
        self.counter.counts.waits += 1


# -- the engine ------------------------------------------------------------------------------------


class StubPrompts:
    """Prompts of usual lengths without a tokenizer, with the request's points and boxes in them."""

    def __init__(self, config: ModelConfig) -> None:
        self.ids = config.tokenizer

    def build(self, request: Request, has_image: bool) -> Prompt:
        start, words = ([] if has_image else [self.ids.bos_id]), [1000] * (4 + len(request.prompt or ""))
        coords, sizes = [], []
        for ref in request.spatial_refs:
            coords += [(len(start) + i, value) for i, value in enumerate(ref[:2])]
            start += [self.ids.coord_id] * 2
            if len(ref) == 4:
                sizes.append((len(start), (ref[2], ref[3])))
                start.append(self.ids.size_id)
        return Prompt([*start, *words, self.ids.answer_id], tuple(coords), tuple(sizes))

    def encode_choices(self, request: Request) -> tuple[tuple[int, ...], ...]:
        return tuple((1000 + i,) * (1 + i) for i, _ in enumerate(request.choices))


class KeptEmbeddings:
    """A store that keeps what it is given, as the cache on disk would."""

    def __init__(self) -> None:
        self.saved: dict[str, Tensor] = {}

    def load(self, image_key: str) -> Tensor | None:
        return None

    def save(self, image_key: str, embeddings_PD: Tensor) -> None:
        assert embeddings_PD.device.type == "cpu"
        self.saved[image_key] = embeddings_PD


def fill(network: nn.Module) -> None:
    """Give the parameters of a network on no device memory on the pretended one, in bfloat16."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
            setattr(module, name, nn.Parameter(value, requires_grad=False))


def make_model(form: str) -> Moondream3:
    """The real model's sizes in bfloat16, in the forms of CUDA; its matrices in codes where `form` says so."""
    with torch.device("meta"):
        model = Moondream3(ModelConfig()).eval()
    fill(model)
    for name, module in list(model.named_modules()):
        is_experts = isinstance(module, ExpertMatrices)
        if form == "float8" and is_experts:
            _place(model, f"{name}.weight", coded(WeightForm.FP8, module))
        if form == "int4" and (is_experts or isinstance(module, Linear)) and is_held_in_bits(f"{name}.weight"):
            _place(model, f"{name}.weight", coded(WeightForm.INT4, module))
    optimise(model)
    return model


def quantise_with_codes(encoder: VisionEncoder) -> None:
    """Float8 products in every block, as `quant.layers.quantise_vision` puts them, without a search for scales."""

    def quantised(plain: nn.Module) -> Float8Linear:
        assert isinstance(plain, Linear)
        return Float8Linear(coded(WeightForm.FP8, plain), plain.bias)

    with patch.object(quant_layers, "_float8_linear", quantised):
        quantise_vision(encoder, LowBit.FP8)


def is_held_in_bits(name: str) -> bool:
    """What `quant.load.low_bit_of` says of a matrix."""
    return is_portable(name) and name.startswith("text.")


def coded(form: WeightForm, module: nn.Module) -> KernelWeight:
    """Codes of a matrix's size."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    count, outputs, inputs = (1, *weight.shape)[-3:]
    if form is WeightForm.FP8:
        codes = torch.empty(count, outputs, inputs, dtype=torch.uint8, device=DEVICE)
        return KernelWeight(form, codes, torch.empty(count, outputs, device=DEVICE))
    codes = torch.empty(count, outputs, inputs // 2, dtype=torch.uint8, device=DEVICE)
    scale, zero = (torch.empty(count, inputs // INT4_GROUP, outputs, device=DEVICE) for _ in range(2))
    return KernelWeight(form, codes, scale, zero)


def make_engine(model: Moondream3, store: KeptEmbeddings | None = None) -> Engine:
    """An engine of 64 rows."""
    return Engine(
        model,
        SilentTokenizer(),  # type: ignore[arg-type]
        StubPrompts(model.config),  # type: ignore[arg-type]
        ImageEncoder(model, store=store),
        identity=RunIdentity("fake"),
        batch_size=NUM_ROWS,
        max_context=model.config.text.max_context,
    )


def picture(config: ModelConfig, number: int) -> PreparedImage:
    """A picture of nine crops, whose pixels nobody reads."""
    side = config.vision.crop_size
    crops = np.empty((1 + TILING.rows * TILING.cols, side, side, 3), np.uint8)
    return PreparedImage(crops, TILING, side * TILING.cols, side * TILING.rows, f"picture {number}")


# -- what is counted -------------------------------------------------------------------------------

CAPTION = Request(Task.CAPTION)
REQUESTS = (  # a batch of everything that differs on its way to the device
    CAPTION,
    Request(Task.QUERY, "what?", reasoning=False, spatial_refs=((0.1, 0.2), (0.1, 0.2, 0.3, 0.4))),
    Request(Task.QUERY, "a longer question", temperature=0.7, seed=2**63),
    Request(Task.POINT, "it", spatial_refs=((0.5, 0.5),)),
)


class Counting:
    """The scenarios, by name; each has an engine of its own over one model."""

    def __init__(self, model: Moondream3, counter: Counter, device: FakeDevice) -> None:
        self.model, self.counter, self.device = model, counter, device

    def admission(self) -> Counts:
        """Encode 44 pictures of nine crops, run their prefixes and prompts, take the first decisions."""
        engine = self._filled(NUM_ADMITTED)
        return self._count_admission(engine)

    def admission_saving(self) -> Counts:
        """The same, with embeddings kept on disk."""
        store = KeptEmbeddings()
        engine = self._filled(NUM_ADMITTED, store=store)
        counts = self._count_admission(engine)
        assert len(store.saved) == NUM_ADMITTED
        return counts

    def admission_mixed(self) -> Counts:
        """64 rows of several tasks, a quarter of them without a picture, prompts in several groups."""
        engine = self._filled(NUM_ROWS, requests=REQUESTS)
        engine.prefill_tokens = engine.config.prefix_len
        return self._count_admission(engine)

    def encoding(self) -> Counts:
        """A micro-batch of 36 crops, from bytes on the device to features."""
        vision = self.model.vision
        crops = torch.empty(36, *[vision.config.crop_size] * 2, 3, dtype=torch.uint8, device=DEVICE)
        return self._count(lambda: vision.encode_rows(vision.patch_rows(crops)))

    def encoding_float8(self) -> Counts:
        """The same with the vision encoder's products in float8."""
        with torch.device("meta"):
            encoder = VisionEncoder(self.model.config.vision)
        fill(encoder)
        quantise_with_codes(encoder)
        place_vision_forms(encoder)
        crops = torch.empty(36, *[encoder.config.crop_size] * 2, 3, dtype=torch.uint8, device=DEVICE)
        return self._count(lambda: encoder.encode_rows(encoder.patch_rows(crops)))

    def embedding(self) -> Counts:
        """Four pictures of nine crops, from their features to their embeddings, for the second time."""
        encoder, vision = self._planned_encoder(), self.model.vision
        features = torch.empty(4, 9, vision.config.num_patches, vision.config.enc_dim, device=DEVICE).bfloat16()
        vision.gather(features, TILING)  # keeps a map of the tiling on the device
        return self._count(lambda: list(encoder._project([*vision.gather(features, TILING)])))

    def pictures(self) -> Counts:
        """Ten pictures of nine crops, as an engine of many slots encodes them: 3 micro-batches, 3 projections."""
        encoder = self._planned_encoder()
        images = [picture(self.model.config, number) for number in range(10)]
        return self._count(lambda: encoder.encode(images))

    def _planned_encoder(self) -> ImageEncoder:
        return ImageEncoder(self.model, max_crops=36, sizes=crop_sizes(36, DEVICE))

    def step_1(self) -> Counts:
        """A decode step with one row in flight."""
        return self._count_step(self._admitted(1))

    def step_64(self) -> Counts:
        """A decode step with 64 rows in flight."""
        return self._count_step(self._admitted(NUM_ROWS))

    def finish(self) -> Counts:
        """64 rows end in one step: what that adds to reading the step's events."""
        engine = self._admitted(NUM_ROWS)
        self.device.finish = Finish.STOP
        events = torch.zeros(NUM_ROWS, len(Event._fields), device=DEVICE)
        seats = [engine._slots.launch(slot) for slot in engine._slots.active]

        def read_a_step() -> None:
            engine._in_flight.add(events, seats, is_step=True)
            engine._absorb_arrivals(0)

        counts = self._count(read_a_step)
        self.device.finish = Finish.NO
        assert not engine._slots.active
        return counts

    def choices(self) -> Counts:
        """44 rows choose between three answers."""
        request = Request(Task.QUERY, "which?", reasoning=False, choices=("a", "b", "c"))
        engine = self._filled(NUM_ADMITTED, requests=(request,))
        with patch.object(engine, "_choose") as choose:
            self._count_admission(engine)
        (choosing,) = choose.call_args.args
        counts = self._count(lambda: engine._choose(choosing))
        assert not engine._slots.active
        return counts

    def growth(self) -> Counts:
        """A cache that is not fixed, as a network with plain parts has it, grows to 900 positions."""
        cache = KVCache(self.model.config, 4, 800, dtype=torch.bfloat16, device=DEVICE)
        return self._count(lambda: cache.fit(900))

    def copy(self) -> Counts:
        """A prefix is copied to another slot."""
        engine = make_engine(self.model)
        return self._count(lambda: engine.cache.copy(0, 1, engine.config.prefix_len))

    def cut(self) -> Counts:
        """A picture of 12 megapixels is cut whose size was not met before."""
        return self._count(self._cutter())

    def cut_again(self) -> Counts:
        """The next picture of that size is cut."""
        cut = self._cutter()
        cut()
        return self._count(cut)

    def _cutter(self) -> Callable[[], object]:
        crops = self.model.config.vision.crop_config
        cutter, pixels = PictureCutter(DEVICE, crops), torch.empty(3024, 4032, 3, dtype=torch.uint8, device=DEVICE)
        return lambda: cutter.cut(pixels, select_tiling(4032, 3024, crops))

    def _filled(
        self, num_rows: int, requests: tuple[Request, ...] = (CAPTION,), store: KeptEmbeddings | None = None
    ) -> Engine:
        engine = make_engine(self.model, store)
        for number in range(num_rows):
            request = requests[number % len(requests)]
            has_picture = not (len(requests) > 1 and request.temperature > 0)
            engine.add(Job(number, picture(self.model.config, number) if has_picture else None, replace(request)))
        assert not engine._finished
        return engine

    def _admitted(self, num_rows: int) -> Engine:
        engine = self._filled(num_rows)
        while engine._waiting:
            self._count_admission(engine)
        assert len(engine._slots.active) == num_rows
        return engine

    def _count_admission(self, engine: Engine) -> Counts:
        def admit() -> None:
            with patch.object(engine, "_decode"), patch.object(engine, "_look_ahead"):  # neither is of an admission
                engine.step()
            engine._absorb_arrivals(0)

        return self._count(admit)

    def _count_step(self, engine: Engine) -> Counts:
        def step() -> None:
            engine._decode()
            engine._absorb_arrivals(0)

        return self._count(step)

    def _count(self, run: Callable[[], object]) -> Counts:
        with self.counter.around() as counts:
            run()
        return replace(counts)


SCENARIOS = [name for name in vars(Counting) if not name.startswith("_")]


@torch.inference_mode()
def count(form: str, names: list[str]) -> dict[str, Counts]:
    """Counts of each scenario, over a model whose weights have this form."""
    counter = Counter()
    device = FakeDevice(counter)
    with device.active():
        counting = Counting(make_model(form), counter, device)
        return {name: getattr(counting, name)() for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, default="bf16")
    parser.add_argument("scenario", nargs="*", choices=[*SCENARIOS, []], default=[])
    options = parser.parse_args()
    found = count(options.form, options.scenario or SCENARIOS)
    print(json.dumps({name: asdict(counts) for name, counts in found.items()}, indent=1))


if __name__ == "__main__":
    main()
