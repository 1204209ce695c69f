"""The engine's forward passes: pictures' prefixes, prompts, one decode step.

Three functions of tensors do the work: `run_prefixes`, `run_prompts`, `decode_step`. `Passes` prepares their inputs and
sends all that a batch of prompts needs to the device at once (`machine`). Which generation goes into which slot is the
engine's business.

Passes take the sizes as they come, but on CUDA every pass has the one size that a `ShapePlan` gives it, because a
library may compute a product of other sizes in another order: a row has the same bits alone and in company. There
prompts are cut into blocks, and padding rows have no slot (`NO_SLOT`): nothing is read, computed by experts or stored
for them. No padding changes an answer.

Shape suffixes: B rows of a prefill, N rows of a decode step or of a group's prompts, P image positions,
T new positions, D width, V vocabulary, C coordinates and Z sizes that prompts refer to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from md3cli.model.engine.decisions import decide
from md3cli.model.engine.flight import Seat
from md3cli.model.engine.generation import Generation
from md3cli.model.engine.kv_cache import DecodeStore, KVCache, PictureStore, PrefixStore, PromptStore
from md3cli.model.engine.machine import send
from md3cli.model.engine.state import Mode, Rows
from md3cli.model.network.moondream import Moondream3
from md3cli.model.network.text import PassKind
from md3cli.records import Task

IDLE = int(Mode.IDLE)
BLOCK = 16  # positions of a prompt's block: what most prompts have, and the rows of a tile in attention
NO_SLOT = -1  # of a padding row
LEAST_THROUGHPUT_BATCH = 16  # engines of fewer slots answer single questions and should not wait for large passes


class ShapePlan(NamedTuple):
    """The size of every prefill pass of an engine on CUDA.

    Attributes:
        pictures: of a pass of prefixes.
        blocks: of a pass of prompts.
        blocks_behind: of a prompt, in one pass with its picture's prefix, so that the experts are read once; where
            there are any, pictures have no passes of their own. Large passes would gain nothing.
    """

    pictures: int
    blocks: int
    blocks_behind: int = 0

    @classmethod
    def of(cls, batch_size: int, pictures: int) -> ShapePlan:
        """Return the plan of an engine of `batch_size` slots whose memory holds a pass of so many `pictures`."""
        return cls(pictures, 64) if batch_size >= LEAST_THROUGHPUT_BATCH else cls(1, 8, blocks_behind=2)


def run_prefixes(model: Moondream3, cache: KVCache, slots_B: Tensor, embeddings_BPD: Tensor) -> None:
    """Run pictures' prefixes into their slots; a prefix attends to all of itself and to nothing else."""
    x_BTD = model.prefix_embeddings(embeddings_BPD)
    position = torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[0], -1)
    is_real_BT = (slots_B >= 0)[:, None].expand(position.shape)
    model.text(x_BTD, position, None, PrefixStore(cache, slots_B), is_real_BT, only_stores=True)


def run_picture(
    model: Moondream3, cache: KVCache, slots_1: Tensor, embeddings_1PD: Tensor, x_1TD: Tensor, last_1: Tensor
) -> Tensor:
    """Run one picture's prefix and the beginning of a prompt behind it; return the hidden state at `last_1` [1, D]."""
    prefix_len = model.config.prefix_len
    x_1SD = torch.cat([model.prefix_embeddings(embeddings_1PD), x_1TD], dim=1)
    position_1S = torch.arange(x_1SD.shape[1], device=x_1SD.device)[None]
    store = PictureStore(cache, slots_1, prefix_len, x_1SD.shape[1])
    hidden_1SD: Tensor = model.text(x_1SD, position_1S, None, store, position_1S <= prefix_len + last_1)
    return hidden_1SD[0].index_select(0, prefix_len + last_1)


def run_prompts(
    model: Moondream3, cache: KVCache, slots_B: Tensor, x_BTD: Tensor, start_B: Tensor, last_B: Tensor, total: int
) -> Tensor:
    """Run prompts into slots behind position `start_B`; return the hidden state at index `last_B` of each [B, D].

    A `last_B` of -1 marks a row that is padding.
    """
    device = x_BTD.device
    position_BT = start_B[:, None] + torch.arange(x_BTD.shape[1], device=device)
    is_real_BT = torch.arange(x_BTD.shape[1], device=device) <= last_B[:, None]  # not padding behind a short prompt
    store = PromptStore(cache, slots_B, position_BT, total)
    hidden_BTD = model.text(x_BTD, position_BT, None, store, is_real_BT)
    return hidden_BTD[torch.arange(x_BTD.shape[0], device=device), last_B]  # type: ignore[no-any-return]


def decode_step(
    model: Moondream3, cache: KVCache, rows: Rows, next_ND: Tensor, max_context: int, *, is_sampled: bool
) -> Tensor:
    """Feed slots 0 … N-1 their next inputs and take their next decisions; return the events [N, len(Event)].

    The new state is written into `rows`, and what to feed next into `next_ND`.
    """
    position_N1 = rows.position[:, None]
    is_live_N = rows.mode != IDLE
    store = DecodeStore(cache, rows.position, is_live_N)
    hidden_ND = model.text(next_ND[:, None], position_N1, None, store, is_live_N[:, None])[:, 0]
    return decide(model, rows, next_ND, hidden_ND, max_context, is_sampled=is_sampled, was_fed=True)


class Passes:
    """The three passes over one model.

    Attributes:
        prefill_prefixes, prefill_picture, prefill_prompts, decode: `run_prefixes`, `run_picture`, `run_prompts` and
            `decode_step` over the model. `ready.make_ready` may put another `decode`.
        plan: the one size of each pass; None where passes take the sizes as they come.
    """

    def __init__(self, model: Moondream3) -> None:
        self.model = model
        self.plan: ShapePlan | None = None
        self.prefill_prefixes = partial(run_prefixes, model)
        self.prefill_picture = partial(run_picture, model)
        self.prefill_prompts = partial(run_prompts, model)
        self.decode: Callable[..., Tensor] = partial(decode_step, model)

    @property
    def steps_all_slots(self) -> bool:
        """Whether a step is of all slots, idle ones too, because its size is fixed."""
        return self.plan is not None

    def cut_prefixes(self, to_prefill: Sequence[tuple[int, str]], size: int) -> list[Sequence[tuple[int, str]]]:
        """Cut slots and their pictures into passes of `size`.

        None where the plan runs prefixes with the prompts behind them.
        """
        if self.plan is not None and self.plan.blocks_behind:
            return []
        return [to_prefill[first : first + size] for first in range(0, len(to_prefill), size)]

    def group(
        self,
        batch: Sequence[Generation],
        slots: Sequence[int],
        max_tokens: int,
        to_prefill: Sequence[tuple[int, str]] = (),
    ) -> list[Group]:
        """Sort prompts into groups, each of which is run in one pass.

        Where the plan runs prompts behind their prefixes, those come first, one for each picture of `to_prefill`.
        """
        if self.plan is None:
            return self._group_by_length(batch, slots, max_tokens)
        seated = dict(zip(slots, batch, strict=True))
        width = self.plan.blocks_behind * BLOCK
        behind = [Group([Block(seated[slot], slot)], width, 1, 1, picture) for slot, picture in to_prefill if width]
        num_rows = max(1, min(self.plan.blocks, max_tokens // BLOCK))
        first = {group.blocks[0].slot: width for group in behind}
        return [*behind, *_cut_into_blocks(batch, slots, first, num_rows)]

    def _group_by_length(self, batch: Sequence[Generation], slots: Sequence[int], max_tokens: int) -> list[Group]:
        """Make groups of similar length: of at most `max_tokens`, padding included, or of one prompt.

        Prompts as long as a picture's prefix go apart: kernels compute them in other tiles (`PassKind`), and a
        short prompt padded to their width would round otherwise than alone.
        """
        lengths = [len(generation.prompt.ids) for generation in batch]
        kinds = [PassKind.of(length, self.model.config.prefix_len) for length in lengths]
        groups: list[list[int]] = [[]]
        for i in sorted(range(len(batch)), key=lengths.__getitem__):
            group = groups[-1]
            if group and ((len(group) + 1) * lengths[i] > max_tokens or kinds[i] is not kinds[group[-1]]):
                groups.append([])
            groups[-1].append(i)
        return [
            Group([Block(batch[i], slots[i]) for i in group], lengths[group[-1]], len(group), len(group))
            for group in groups
        ]

    def last_written(self, group: Group) -> int:
        """Return one behind the last position that a pass writes; blocks write no padding."""
        return max(block.generation.prompt_end for block in group.blocks) if self.plan else group.total

    def send(
        self, prefix_slots: Sequence[Sequence[int]], groups: Sequence[Group], num_slots: int
    ) -> tuple[list[Tensor], list[PromptInputs]]:
        """Copy what a batch of prompts needs to the device, in one block of whole numbers and one of real ones.

        Return the slots of each pass of prefixes [B], and what each group's pass and first decision need.
        """
        if self.plan is not None:
            prefix_slots = [[*some, *[NO_SLOT] * (self.plan.pictures - len(some))] for some in prefix_slots]
        columns = [_columns(group, num_slots) for group in groups]
        ints, reals = send(
            self.model.device,
            [*prefix_slots, *chain.from_iterable(ints for ints, _ in columns)],
            [*chain.from_iterable(reals for _, reals in columns)],
        )
        whole, real = iter(ints), iter(reals)
        slots = list(islice(whole, len(prefix_slots)))
        return slots, [
            PromptInputs(
                PromptInts(*islice(whole, len(PromptInts._fields))),
                PromptReals(*islice(real, len(PromptReals._fields))),
            )
            for _ in groups
        ]


# -- what a pass of prompts is given ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A generation's prompt from its id number `first` on: one row of a pass."""

    generation: Generation
    slot: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """What is run in one pass: blocks of at most `width` ids.

    The pass is padded with rows without a slot to `num_rows`, and takes `num_seats` rows' first decisions, padding
    included. With a `picture` its prefix is run in the same pass.
    """

    blocks: Sequence[Block]
    width: int
    num_rows: int
    num_seats: int
    picture: str | None = None

    @property
    def ending(self) -> list[int]:
        """Return the rows whose block ends its prompt."""
        ends = (len(block.generation.prompt.ids) - block.first for block in self.blocks)
        return [row for row, left in enumerate(ends) if left <= self.width][: self.num_seats]

    @property
    def generations(self) -> list[Generation]:
        """Return the generations whose prompt ends in this pass, in order."""
        return [self.blocks[row].generation for row in self.ending]

    @property
    def slots(self) -> list[int]:
        """Return the slots of `generations`."""
        return [self.blocks[row].slot for row in self.ending]

    def seats(self, first_row: int) -> list[Seat]:
        """Return the places of `generations` in a launch in which the rows of this pass begin at `first_row`."""
        who = enumerate(zip(self.slots, self.generations, strict=True), first_row)
        return [Seat(row, slot, generation, generation.prompt_end) for row, (slot, generation) in who]

    @property
    def total(self) -> int:
        """One behind the last position that is written, padding included."""
        return self.width + max(block.generation.start + block.first for block in self.blocks)


def _cut_into_blocks(
    batch: Sequence[Generation], slots: Sequence[int], first_of: Mapping[int, int], num_rows: int
) -> list[Group]:
    """Cut prompts into blocks and these, in order, into passes; a prompt may begin in one and end in a later one.

    `first_of` a slot is the prompt's first id that is not run yet.
    """
    blocks = [
        Block(generation, slot, first)
        for generation, slot in zip(batch, slots, strict=True)
        for first in range(first_of.get(slot, 0), len(generation.prompt.ids), BLOCK)
    ]
    cut = [blocks[first : first + num_rows] for first in range(0, len(blocks), num_rows)]
    return [Group(some, BLOCK, num_rows, num_seats=num_rows) for some in cut]


V = TypeVar("V")
N = TypeVar("N")


class PromptInts(NamedTuple, Generic[V]):
    """Whole numbers: lists on the host, int64 tensors on the device."""

    ids: V  # [B * T]
    slots: V  # [B]
    start: V  # [B] position of a prompt's first id
    last: V  # [B] index of its last id
    coord_at: V  # [C] which of the B * T inputs are coordinates, and which are sizes
    size_at: V  # [Z]
    ends_at: V  # [N] which of the B rows end a prompt
    seat: V  # [N] where the state of these goes
    mode: V  # [N] this and what follows: `state.Rows`
    is_point: V
    chooses: V
    limit: V
    position: V
    seed: V


class PromptReals(NamedTuple, Generic[V]):
    """Real numbers: lists on the host, float32 tensors on the device."""

    coords: V  # [C]
    sizes: V  # [Z * 2] width, height
    temperature: V  # [N]
    top_p: V  # [N]


class PromptInputs(NamedTuple):
    """What one group of prompts needs, on the device."""

    ints: PromptInts[Tensor]
    reals: PromptReals[Tensor]

    def rows(self) -> Rows:
        """Return the state of the group's rows when their prompts have just been run."""
        ints, reals = self.ints, self.reals
        nothing_yet = torch.zeros_like(ints.mode)
        return Rows(
            mode=ints.mode,
            is_first=torch.ones_like(ints.mode, dtype=torch.bool),
            is_point=ints.is_point.bool(),
            chooses=ints.chooses.bool(),
            emitted=nothing_yet,
            limit=ints.limit,
            position=ints.position,
            temperature=reals.temperature,
            top_p=reals.top_p,
            seed=ints.seed,
            draws=nothing_yet,
        )


def _columns(group: Group, num_slots: int) -> tuple[PromptInts[list[int]], PromptReals[list[float]]]:
    """Return a group as lists; decisions that are padding are for a seat behind all slots."""
    width, blocks, num_idle = group.width, group.blocks, group.num_rows - len(group.blocks)
    generations, ending = group.generations, group.ending
    eos_id, prefix_len = blocks[0].generation.config.tokenizer.eos_id, blocks[0].generation.config.prefix_len
    fed = [block.generation.prompt.ids[block.first : block.first + width] for block in blocks]
    coords = list(_placed(blocks, width, [block.generation.prompt.coords for block in blocks]))
    sizes = list(_placed(blocks, width, [block.generation.prompt.sizes for block in blocks]))
    requests = [generation.job.request for generation in generations]

    def column(values: Iterable[N], idle: N) -> list[N]:
        return [*values, *[idle] * (group.num_seats - len(ending))]

    ints = PromptInts(
        ids=[id for ids in (*fed, *[[]] * num_idle) for id in (*ids, *[eos_id] * (width - len(ids)))],
        slots=[*(block.slot for block in blocks), *[NO_SLOT] * num_idle],
        start=[*(block.generation.start + block.first for block in blocks), *[prefix_len] * num_idle],
        last=[*(len(ids) - 1 for ids in fed), *[-1] * num_idle],
        coord_at=[index for index, _ in coords],
        size_at=[index for index, _ in sizes],
        ends_at=column(ending, 0),
        seat=column(group.slots, num_slots),
        mode=column((int(generation.start_mode) for generation in generations), IDLE),
        is_point=column((int(request.task is Task.POINT) for request in requests), 0),
        chooses=column((int(bool(generation.choices)) for generation in generations), 0),
        limit=column((generation.limit for generation in generations), 0),
        position=column((generation.prompt_end for generation in generations), prefix_len),
        seed=column(((request.seed + 2**63) % 2**64 - 2**63 for request in requests), 0),  # of any size, in 64 bits
    )
    reals = PromptReals(
        coords=[value for _, value in coords],
        sizes=[side for _, size_wh in sizes for side in size_wh],
        temperature=column((request.temperature for request in requests), 0.0),
        top_p=column((request.top_p for request in requests), 1.0),
    )
    return ints, reals


def _placed(
    blocks: Sequence[Block], width: int, of_blocks: Sequence[Sequence[tuple[int, N]]]
) -> Iterator[tuple[int, N]]:
    """Yield what stands at an index of a prompt at its index among all inputs of the pass."""
    for row, (block, found) in enumerate(zip(blocks, of_blocks, strict=True)):
        for index, value in found:
            if block.first <= index < block.first + width:
                yield row * width + index - block.first, value


def embed_prompts(model: Moondream3, inputs: PromptInputs) -> Tensor:
    """Return a group's prompts [B, T, D], spatial references filled in (plain: `plain.prompt_embeddings`)."""
    ints, reals = inputs
    x_TD = model.text.embed(ints.ids)  # T: the positions of all rows, one row behind the other
    if len(ints.coord_at):
        x_TD.index_copy_(0, ints.coord_at, model.region.encode_coord(reals.coords))
    if len(ints.size_at):
        x_TD.index_copy_(0, ints.size_at, model.region.encode_size(reals.sizes.view(-1, 2)))
    return x_TD.view(len(ints.slots), -1, x_TD.shape[1])
