"""What the large matrices are multiplied with on the user's own pictures: the mean square of each input column.

The network answers ordinary requests while hooks add up squares; `quant/search.py` weights errors with them. An expert
sees only the tokens routed to it, so rare experts lean on what all tokens of their layer look like. To first order the
mean squares are the diagonal of the Hessian that GPTQ inverts whole (Frantar et al., 2022, arXiv:2210.17323).
`md3 models quantize` alone asks for them. The file is apart from `quant/` because it runs the engine, a room above.

Measured on the embedded model, 64 pictures, squared error of products on 12 others against scales by
extremes: int4 experts 0.76 (searched scales without: 0.87), vision 0.81, dense 0.86; int8 experts 0.95 (0.99).

Shape suffixes: P tokens of a matrix (for experts: token-expert pairs in order of the expert), C input columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from md3cli.errors import ImageError, InputError
from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage, prepare_image
from md3cli.model.engine.load import make_engine
from md3cli.model.engine.machine import MemoryPlan
from md3cli.model.engine.prompts import Tokenizer
from md3cli.model.network.layers import ExpertMatrices, Linear
from md3cli.model.network.moondream import Moondream3
from md3cli.model.quant.quantise import Importance
from md3cli.model.weights.hub import ModelFiles
from md3cli.model.weights.names import is_int8_vision, is_portable
from md3cli.model.weights.read import load_model
from md3cli.records import ImageItem, Job, Request, RunIdentity, SourceRow, Task, counted, printable

# Asked of every picture where a manifest does not say otherwise: each head and each kind of prompt once.
REQUESTS = (
    Request(Task.CAPTION, max_tokens=64),
    Request(Task.QUERY, "What is in this picture?", reasoning=False, max_tokens=32),
    Request(Task.DETECT, "object", max_objects=8),
    Request(Task.POINT, "object", max_objects=8),
)
DAMPING = 0.01  # of the mean column, added to every column, as GPTQ does: errors in no column are free
PRIOR_TOKENS = 64.0  # of the layer's average token, added to what each expert saw


class InputMoments:
    """Adds up the squares of what a network's matrices are multiplied with, until `close`.

    Only the plain parts of a network call the hooks; `kernels.optimise` puts others in their place.
    """

    def __init__(self, model: Moondream3) -> None:
        self._dense: dict[str, _Sums] = {}
        self._experts: dict[str, _Sums] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            weight = f"{name}.weight"
            if isinstance(module, ExpertMatrices):
                num_experts, _, width = module.weight.shape
                self._experts[weight] = _Sums(num_experts, width)
                self._watch(module, self._experts[weight].add_by_expert)
            elif isinstance(module, Linear) and (is_portable(weight) or is_int8_vision(weight)):
                self._dense[weight] = _Sums(1, module.in_features)
                self._watch(module, self._dense[weight].add)

    def _watch(self, module: nn.Module, add: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda module, inputs: add(*inputs)))

    def close(self) -> None:
        """Stop adding up."""
        for handle in self._handles:
            handle.remove()

    def importance(self) -> Importance:
        """Return mean squares by weight name, float32 [in] or [experts, in], of all matrices that were used."""
        found = {name: sums.means()[0] for name, sums in self._dense.items() if sums.num_seen}
        return found | {name: sums.means() for name, sums in self._experts.items() if sums.num_seen}


class _Sums:
    """Sums of squares for each of several matrices with the same input columns."""

    def __init__(self, num_matrices: int, width: int) -> None:
        self.squares = torch.zeros(num_matrices, width, dtype=torch.float64)
        self.counts = torch.zeros(num_matrices, 1, dtype=torch.float64)

    @property
    def num_seen(self) -> int:
        """The number of tokens of all matrices."""
        return int(self.counts.sum())

    def add(self, x: Tensor) -> None:
        self._add_rows(0, x.reshape(-1, x.shape[-1]))

    def add_by_expert(self, x_PC: Tensor, counts: list[int]) -> None:
        for expert, part in enumerate(x_PC.split(counts)):
            if len(part):
                self._add_rows(expert, part)

    def _add_rows(self, number: int, x_PC: Tensor) -> None:
        self.squares[number] += x_PC.float().square().sum(dim=0).cpu()
        self.counts[number] += len(x_PC)

    def means(self) -> Tensor:
        average = self.squares.sum(dim=0) / self.counts.sum()
        prior = PRIOR_TOKENS if len(self.counts) > 1 else 0.0
        means = (self.squares + prior * average) / (self.counts + prior)
        return (means + DAMPING * means.mean(dim=1, keepdim=True)).float()


def prepare_local(item: ImageItem, config: CropConfig) -> PreparedImage:
    """Prepare a picture file, or a member of a tar."""
    return prepare_image(item, config, ImageLimits(), None)


def collect_importance(
    files: ModelFiles,
    rows: Iterable[SourceRow],
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda num_images: None,
    prepare: Callable[[ImageItem, CropConfig], PreparedImage] = prepare_local,
) -> Importance:
    """Run `rows` (as `source.open_source` gives them) through the model; return what its matrices were multiplied with.

    Pictures that cannot be read are skipped with one warning. `prepare` opens a picture.

    Raises:
        CheckpointError: the model cannot be loaded.
        InputError: no picture could be read.
    """
    model = load_model(files.path, dtype=dtype, device=device)
    tokenizer = Tokenizer.load(files.tokenizer_file, model.config)
    plan = MemoryPlan(slots=1)  # one request at a time, so that no padding is counted
    engine = make_engine(model, tokenizer, files.name, RunIdentity(files.identity), plan, is_planned=False)
    moments = InputMoments(model)
    try:
        jobs = _jobs(rows, engine.crop_config, progress, prepare)
        num_answers = sum(answer.failure is None for answer in engine.run(jobs))
    finally:
        moments.close()
    if not num_answers:
        raise InputError("nothing to calibrate with: no picture could be read and asked about")
    return moments.importance()


def _jobs(
    rows: Iterable[SourceRow],
    config: CropConfig,
    progress: Callable[[int], None],
    prepare: Callable[[ImageItem, CropConfig], PreparedImage],
) -> Iterator[Job]:
    key, skipped, first = 0, 0, ""
    for row in rows:
        progress(1)
        try:
            if row.image is None or row.failure is not None:
                raise ImageError("bad_request", "no picture" if row.failure is None else row.failure.message)
            picture = prepare(row.image, config)
        except ImageError as error:
            skipped += 1
            first = first or f"{'a row' if row.image is None else printable(row.image.name)}: {printable(str(error))}"
            continue
        for request in row.requests:
            yield Job(key, picture, replace(request, temperature=0.0))
            key += 1
    if skipped:
        rows_are = counted(skipped, "row was", "rows were")
        warnings.warn(f"{rows_are} skipped for want of a picture that can be read; the first: {first}", stacklevel=2)
