"""The state machine of a decode step, for all rows at once (Moondream 3 specification, sections 10 and 11).

Rows of all tasks share a batch and differ only in their `Rows` entries. `advance` reads the hidden state of every row,
takes each row's next decision (a token, a coordinate, a size, stop), and says what to feed next. Everything stays on
the device; the host gets one small `events` tensor a step. Knows nothing of slots, prompts or records.

Shape suffixes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor

from md3cli.model.network.moondream import Moondream3, coord_value, read_bins, size_value

LEAST_TEMPERATURE = 1e-30  # less is greedy: logits divided by it would leave the range of float32
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _place_of_float64(device: torch.device) -> torch.device:
    """Return where float64 is computed: on `device`, but on the CPU for Apple's GPU, which does not know it."""
    return torch.device("cpu") if device.type == "mps" else device


def uniform(seed: Tensor, draw: Tensor) -> Tensor:
    """Return uniform float64 in [0, 1) for int64 `seed` and `draw` of one shape (SplitMix64; Steele et al. 2014).

    A pure function: no generator's state lives anywhere, so a sampled answer depends on neither batch, order nor
    resume. On the device of `seed`; for Apple's GPU on the CPU.
    """
    z = seed * _MIX_1 + (draw + 1) * _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).to(_place_of_float64(z.device)).double() * 2.0**-53


def top_p_probabilities(logits: Tensor, temperature: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nucleus of the softmax: (probabilities, ids), each [N, V], sorted downwards, zero outside it.

    An entry is dropped when the mass *before* it exceeds `top_p`: the first always stays, and so
    does the one that crosses the threshold. What stays sums to 1.
    """
    p, ids = (logits / temperature[:, None]).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    mass_before = p.cumsum(dim=-1) - p
    p = p.masked_fill(mass_before > top_p[:, None], 0.0)
    return p / p.sum(dim=-1, keepdim=True), ids


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, u: Tensor) -> Tensor:
    """Draw ids [N] from the nucleus by inverting its cumulative mass at `u` (of `uniform`); temperature 0 is argmax.

    A row of NaN gets any id: whoever calls looks for NaN.
    """
    is_greedy = temperature < LEAST_TEMPERATURE
    p, ids = top_p_probabilities(logits, temperature.masked_fill(is_greedy, 1.0), top_p)
    cumulative = p.to(_place_of_float64(p.device)).double().cumsum(dim=-1)
    rank = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(dim=-1).to(p.device)
    last_kept = ((p > 0).sum(dim=-1) - 1).clamp(min=0)  # of NaN none is kept, and CUDA does not survive index -1
    drawn = ids.gather(1, torch.minimum(rank, last_kept)[:, None])[:, 0]
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn)


class Mode(IntEnum):
    """What the next decision of a row is about."""

    IDLE = 0  # no generation, or a finished one
    TEXT = 1  # caption or answer
    REASON = 2  # reasoning, grounded points in it
    X = 3  # detect, point: one more object? then its x, from the same hidden state
    Y = 4
    SIZE = 5  # detect: width and height
    SEGMENT = 6  # box and path tokens


class Finish(IntEnum):
    """Whether a row ended with this decision."""

    NO = 0
    STOP = 1
    LENGTH = 2


# Plain numbers for tensor code: compilers do not follow comparisons of tensors with enum members.
_IDLE, _TEXT, _REASON, _X, _Y, _SIZE, _SEGMENT = map(int, Mode)
_NO, _STOP, _LENGTH = map(int, Finish)


class Rows(NamedTuple):
    """Per row state, each [N]."""

    mode: Tensor  # int64, Mode
    is_first: Tensor  # bool: the next decision is the first after a prefill, when nothing is banned
    is_point: Tensor  # bool: objects without a size
    chooses: Tensor  # bool: its answer is chosen from a list, so the row falls idle where the answer would begin
    emitted: Tensor  # int64: tokens of this phase, or objects
    limit: Tensor  # int64: max_tokens or max_objects
    position: Tensor  # int64: where the next input goes; of an idle row behind what its slot still needs
    temperature: Tensor  # float32
    top_p: Tensor  # float32
    seed: Tensor  # int64
    draws: Tensor  # int64: decisions so far

    def pick(self, index: Tensor | slice) -> Rows:
        """Return the rows at `index` (views for a slice)."""
        return Rows(*(column[index] for column in self))

    def put(self, index: Tensor | slice, new: Rows) -> None:
        """Write rows back in place."""
        for column, value in zip(self, new, strict=True):
            column[index] = value


def idle_rows(num_rows: int, device: torch.device) -> Rows:
    """Return rows without a generation."""

    whole, flag, real = torch.int64, torch.bool, torch.float32
    kinds = (whole, flag, flag, flag, whole, whole, whole, real, real, whole, whole)
    return Rows(*(torch.zeros(num_rows, dtype=kind, device=device) for kind in kinds))


Draw = Callable[[Tensor, Rows], Tensor]  # logits [N, V], rows -> ids [N]


class Event(NamedTuple):
    """One row's decision, as the host reads it (columns of the events tensor, in this order).

    Masses are probabilities from the model's own distributions: going on rather than stopping, and
    the softmax mass near the chosen bin (`moondream.NEAR_FRACTION`). `continue_mass` is NaN where the decision is taken
    from values that are not finite, whichever head they come from.
    """

    mode: int
    token: int
    coord_bin: int
    width_bin: int
    height_bin: int
    finish: int
    continue_mass: float
    coord_mass: float
    width_mass: float
    height_mass: float

    @property
    def is_finite(self) -> bool:
        """False where the model computed NaN or infinity for what this decision is taken from."""
        return not isnan(self.continue_mass)


class Step(NamedTuple):
    """Result of `advance`: new state, inputs to feed [N, D], events float32 [N, len(Event)]."""

    rows: Rows
    next_ND: Tensor
    events: Tensor


def banned_logits(model: Moondream3, logits_NV: Tensor, rows: Rows) -> Tensor:
    """Set the ids that a phase never emits to minus infinity, in place; the first decision bans nothing."""
    ids = model.config.tokenizer
    later = ~rows.is_first
    in_text, in_reasoning = later & (rows.mode == _TEXT), later & (rows.mode == _REASON)
    for token, banned in ((ids.answer_id, in_text), (ids.eos_id, in_reasoning), (ids.size_id, in_reasoning)):
        logits_NV[:, token] = logits_NV[:, token].masked_fill(banned, float("-inf"))
    return logits_NV


def _is_finite(rows: Rows, token: Tensor, coord_id: int, are_finite: list[Tensor]) -> Tensor:
    """Return where all that a decision may be taken from is finite [N]: of text its logits, else every head's.

    `are_finite` says it of the logits of text, coordinates and sizes, each [N].
    """
    of_text, of_coord, of_size = are_finite
    is_text = (rows.mode == _TEXT) | ((rows.mode == _REASON) & (token != coord_id))
    return of_text & (is_text | (of_coord & of_size))


def draw_greedy(logits_NV: Tensor, rows: Rows) -> Tensor:
    """Return the likeliest ids."""
    return logits_NV.argmax(dim=-1)


def draw_sampled(logits_NV: Tensor, rows: Rows) -> Tensor:
    """Draw ids by each row's settings; rows that do not write text are greedy."""
    writes_text = (rows.mode == _TEXT) | (rows.mode == _REASON)
    temperature = rows.temperature.masked_fill(~writes_text, 0.0)
    return sample(logits_NV, temperature, rows.top_p, uniform(rows.seed, rows.draws))


def _choose_tokens(model: Moondream3, logits_NV: Tensor, rows: Rows, draw: Draw) -> Tensor:
    """Return every row's token [N]; for objects after the first, coord or eos, whichever scores higher."""
    ids = model.config.tokenizer
    goes_on = logits_NV[:, ids.coord_id] >= logits_NV[:, ids.eos_id]
    logits_NV = banned_logits(model, logits_NV, rows)
    token = draw(logits_NV, rows)
    either = torch.where(goes_on, ids.coord_id, ids.eos_id)
    token = torch.where((rows.mode == _X) & ~rows.is_first, either, token)
    budget_spent = (rows.mode == _REASON) & (rows.emitted == rows.limit)
    return torch.where(budget_spent, ids.answer_id, token)


def _next_mode(rows: Rows, token: Tensor, answer_id: int) -> Tensor:
    """Return the mode after this decision, finishing aside."""
    mode = rows.mode
    after_y = torch.where(rows.is_point, _X, _SIZE)
    after = torch.where(mode == _X, _Y, mode)
    after = torch.where(mode == _Y, after_y, after)
    after = torch.where(mode == _SIZE, _X, after)
    return torch.where((mode == _REASON) & (token == answer_id), _TEXT, after)


def advance(
    model: Moondream3,
    rows: Rows,
    hidden_ND: Tensor,
    max_context: int,
    *,
    is_sampled: bool = False,
    draw: Draw | None = None,
) -> Step:
    """Take every row's next decision from its hidden state (before the last LayerNorm).

    The plain twin of what kernels do on CUDA (`decisions.decide`).
    `draw` chooses ids from logits whose banned ids are at minus infinity; by default as `is_sampled` says.
    """
    draw = draw or (draw_sampled if is_sampled else draw_greedy)
    ids, region, mode = model.config.tokenizer, model.region, rows.mode
    logits_NV = model.text.logits(hidden_ND).float()
    coord, size = read_bins(region.coord_logits(hidden_ND)), read_bins(region.size_logits(hidden_ND))
    continue_mass = torch.sigmoid(logits_NV[:, ids.coord_id] - logits_NV[:, ids.eos_id])
    are_finite = [logits_NV.isfinite().all(dim=1), coord.are_finite, size.are_finite.all(dim=1)]
    token = _choose_tokens(model, logits_NV, rows, draw)  # bans ids, with minus infinity, in place
    continue_mass = continue_mass.masked_fill(~_is_finite(rows, token, ids.coord_id, are_finite), float("nan"))

    writes, reasons, segments = mode == _TEXT, mode == _REASON, mode == _SEGMENT
    starts_object, is_y, is_size = mode == _X, mode == _Y, mode == _SIZE
    ends = (writes | segments | starts_object) & (token == ids.eos_id)
    feeds_coord = is_y | (starts_object & ~ends) | ((reasons | segments) & (token == ids.coord_id))
    feeds_size = is_size | (segments & (token == ids.size_id))

    coord_ND = region.encode_coord(coord_value(coord.bins, region.num_coord_bins))
    size_ND = region.encode_size(size_value(size.bins, region.num_size_bins))
    next_ND = torch.where(feeds_coord[:, None], coord_ND, model.text.embed(token))
    next_ND = torch.where(feeds_size[:, None], size_ND, next_ND)

    turns_to_answer = reasons & (token == ids.answer_id)
    emits = ((writes | segments) & ~ends) | (reasons & ~turns_to_answer) | is_size | (is_y & rows.is_point)
    emitted = torch.where(turns_to_answer, 0, rows.emitted + emits.long())
    has_room = rows.position < max_context
    is_full = (emits & ~reasons & (emitted >= rows.limit)) | ~has_room
    is_idle = mode == _IDLE
    finish = torch.where(ends, _STOP, torch.where(is_full, _LENGTH, _NO))
    finish = finish.masked_fill(is_idle, _NO)
    is_broken = continue_mass.isnan()
    waits_for_choice = rows.chooses & (turns_to_answer | writes) & has_room & ~is_broken
    # A row whose numbers are not finite ends, too: the host hears of it steps later.
    is_over = is_idle | (finish != _NO) | waits_for_choice | is_broken

    new_rows = Rows(  # not `rows._replace(…)`: code that torch 2.11 compiles returns an empty tuple for it
        mode=torch.where(is_over, _IDLE, _next_mode(rows, token, ids.answer_id)),
        is_first=turns_to_answer,
        is_point=rows.is_point,
        chooses=rows.chooses,
        emitted=emitted,
        limit=rows.limit,
        # An idle row is stepped along, not skipped: what it writes must stay inside the cache and off the prefix. One
        # that waits for its choice stands behind its prompt, however many steps are launched until it has chosen.
        position=rows.position.masked_fill(is_over & ~(is_idle | waits_for_choice), model.config.prefix_len),
        temperature=rows.temperature,
        top_p=rows.top_p,
        seed=rows.seed,
        draws=rows.draws + 1,
    )
    bins, masses = (coord.bins, *size.bins.unbind(-1)), (coord.masses, *size.masses.unbind(-1))
    events = torch.stack([mode, token, *bins, finish, continue_mass, *masses], dim=-1).float()
    return Step(new_rows, next_ND, events)
