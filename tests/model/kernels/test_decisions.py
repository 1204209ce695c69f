"""Decisions by kernels against `state.advance`, in Triton's interpreter: modes, ties, bans, rows without numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

from md3cli.model.engine.decisions import decide
from md3cli.model.engine.state import Event, Finish, Mode, Rows, advance, idle_rows
from md3cli.model.kernels import decision_kernels, decision_operators
from md3cli.model.kernels.forms import bin_tables
from md3cli.model.network.config import ModelConfig, RegionConfig, TextConfig, VisionConfig
from md3cli.model.network.moondream import NEAR_FRACTION, Moondream3

CPU = torch.device("cpu")
DIM, VOCABULARY = 128, decision_operators.SCANNED + 100  # two parts, the last one short
CONFIG = replace(
    ModelConfig(),
    text=TextConfig(dim=DIM, n_heads=2, n_layers=1, vocab_size=VOCABULARY, moe=None),
    vision=VisionConfig(enc_n_layers=1, enc_dim=36, enc_n_heads=1, crop_size=70, proj_out_dim=DIM),
    region=RegionConfig(dim=DIM, coord_feat_dim=24, coord_out_dim=100, size_feat_dim=40, size_out_dim=256),
)
IDS = CONFIG.tokenizer
SPECIAL = (IDS.eos_id, IDS.answer_id, IDS.coord_id, IDS.size_id)
MAX_CONTEXT, COUNT = 900, 112
NOTHING, INFINITY, NAN = float("-inf"), float("inf"), float("nan")
WHOLE = ("mode", "token", "coord_bin", "width_bin", "height_bin", "finish")

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("unwritten_memory_shows")]


class Heads:
    """A network whose heads say what a test wants of the row numbers that stand in for its hidden states."""

    def __init__(self, logits_NV: Tensor, coord_NC: Tensor, size_N2Z: Tensor, dtype: torch.dtype = torch.float32):
        torch.manual_seed(1)
        self.model = Moondream3(CONFIG)
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape).mul(0.3).to(dtype)
        self.model.requires_grad_(False)
        self.given = [part.to(dtype) for part in (logits_NV, coord_NC, size_N2Z)]
        text, region = self.model.text, self.model.region
        text.logits = lambda hidden: self._of(0, hidden)  # type: ignore[method-assign]
        region.coord_logits = lambda hidden: self._of(1, hidden)  # type: ignore[method-assign]
        region.size_logits = lambda hidden: self._of(2, hidden)  # type: ignore[method-assign]
        region.bin_logits = lambda hidden: (self._of(1, hidden), self._of(2, hidden))  # type: ignore[method-assign]

    def _of(self, head: int, hidden_N1: Tensor) -> Tensor:
        return self.given[head][hidden_N1[:, 0].long()]

    @property
    def fused(self) -> Moondream3:
        placed = copy.copy(self.model)
        placed._modules = dict(self.model._modules)
        placed.region = copy.copy(self.model.region)
        placed.region.tables = bin_tables(self.model.region)
        return placed


def random_logits(num_rows: int, *shape: int) -> Tensor:
    """Logits of few values, so that many are equal to the greatest."""
    return torch.randint(-30, 9, (num_rows, *shape)).float()


def random_heads(num_rows: int = COUNT, dtype: torch.dtype = torch.float32) -> Heads:
    """Heads of which three rows in four prefer an id with a meaning, and one in four has a number that is none."""
    torch.manual_seed(0)
    given = random_logits(num_rows, VOCABULARY), random_logits(num_rows, 100), random_logits(num_rows, 2, 128)
    for row in range(0, num_rows, 4):
        given[0][row, VOCABULARY - 1 - row % 50] = 9.0
    for row in range(num_rows):
        if row % 4:
            given[0][row, SPECIAL[torch.randint(0, 4, ()).item()]] = 12.0
            given[0][row, SPECIAL[torch.randint(0, 4, ()).item()]] = 12.0
        if row % 4 == 3:
            of = given[row // 4 % 3][row].view(-1)
            of[torch.randint(0, len(of), (1 + row % 3,))] = (NAN, INFINITY, NOTHING)[row // 12 % 3]
    return Heads(*given, dtype)


def random_rows(num_rows: int = COUNT) -> Rows:
    """Rows of all modes, many of them at a limit of theirs."""
    torch.manual_seed(2)
    limit = torch.randint(1, 6, (num_rows,))
    flags = [torch.rand(num_rows) < share for share in (0.3, 0.5, 0.3)]
    return Rows(
        torch.arange(num_rows) % len(Mode),
        *flags,
        emitted=(limit - torch.randint(0, 3, (num_rows,))).clamp_min(0),
        limit=limit,
        position=torch.tensor([800, 800, MAX_CONTEXT - 2, MAX_CONTEXT - 1, MAX_CONTEXT])[
            torch.randint(0, 5, (num_rows,))
        ],
        temperature=torch.rand(num_rows) * (torch.rand(num_rows) < 0.5),
        top_p=torch.rand(num_rows),
        seed=torch.randint(0, 1 << 40, (num_rows,)),
        draws=torch.randint(0, 9, (num_rows,)),
    )


def copied(rows: Rows) -> Rows:
    return Rows(*(column.clone() for column in rows))


def numbers(num_rows: int = COUNT) -> Tensor:
    """What stands in for hidden states."""
    return torch.arange(num_rows).float()[:, None]


def assert_same_rows(found: Rows, expected: Rows) -> None:
    for name, one, other in zip(Rows._fields, found, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def assert_same_events(found: Tensor, expected: Tensor) -> None:
    for column, name in enumerate(Event._fields):
        one, other = found[:, column], expected[:, column]
        if name in WHOLE:
            assert torch.equal(one, other), name
        else:
            assert torch.allclose(one, other, rtol=0, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize(("is_sampled", "was_fed"), [(False, True), (False, False), (True, True)])
def test_rows_of_all_modes_decide_as_the_twin(is_sampled: bool, was_fed: bool) -> None:
    heads, rows = random_heads(), random_rows()
    moved = rows._replace(position=rows.position + (rows.mode != Mode.IDLE)) if was_fed else rows
    expected = advance(heads.model, moved, numbers(), MAX_CONTEXT, is_sampled=is_sampled)
    next_ND = torch.full((COUNT, DIM), NAN)
    events = decide(heads.fused, rows, next_ND, numbers(), MAX_CONTEXT, is_sampled=is_sampled, was_fed=was_fed)
    assert_same_events(events, expected.events)
    assert_same_rows(rows, expected.rows)
    assert torch.allclose(next_ND, expected.next_ND, rtol=0, atol=1e-5)
    # Everything has been met: each mode before and after, each end, rows with and without numbers.
    assert {int(mode) for mode in expected.rows.mode} == set(map(int, Mode))
    assert {int(finish) for finish in expected.events[:, 5]} == set(map(int, Finish))
    assert 0.1 < expected.events[:, 6].isnan().float().mean() < 0.3


def test_first_decisions_go_where_the_index_says() -> None:
    heads, rows = random_heads(50), random_rows(50)
    index = torch.randperm(70)[:50]
    buffers, next_SD = idle_rows(70, CPU), torch.full((70, DIM), 7.0)
    plain, plain_next_SD = copied(buffers), next_SD.clone()
    for model, state, inputs in ((heads.fused, buffers, next_SD), (heads.model, plain, plain_next_SD)):
        state.put(index, rows)
        events = decide(model, state, inputs, numbers(50), MAX_CONTEXT, is_sampled=False, index=index)
        assert_same_events(events, advance(heads.model, rows, numbers(50), MAX_CONTEXT).events)
    assert_same_rows(buffers, plain)
    assert torch.allclose(next_SD, plain_next_SD, rtol=0, atol=1e-5)
    assert (next_SD == 7.0).all(dim=1).sum() == 20
    assert (buffers.draws == 0).sum() >= 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_has_the_same_bits_alone_and_in_company(dtype: torch.dtype) -> None:
    heads = random_heads(28, dtype)
    fused, together = heads.fused, random_rows(28)
    next_ND = torch.zeros(28, DIM, dtype=dtype)
    # Products of other sizes may be added up in another order: here only the kernels are asked.
    fused.region.size_encoder = torch.nn.Linear(40, DIM, bias=False).requires_grad_(False)
    fused.region.size_encoder.forward = lambda x: x.repeat(1, 4)[:, :DIM].contiguous()
    events = decide(fused, together, next_ND, numbers(28), MAX_CONTEXT, is_sampled=False, was_fed=True)
    for row in range(28):
        alone, inputs = random_rows(28).pick(slice(row, row + 1)), torch.zeros(1, DIM, dtype=dtype)
        found = decide(fused, alone, inputs, numbers(28)[row : row + 1], MAX_CONTEXT, is_sampled=False, was_fed=True)
        assert torch.equal(found.nan_to_num(-1.0)[0], events.nan_to_num(-1.0)[row])
        assert torch.equal(inputs[0], next_ND[row])
        assert_same_rows(alone, together.pick(slice(row, row + 1)))


def test_half_precision_decides_as_the_twin() -> None:
    heads, rows = random_heads(56, torch.float16), random_rows(56)
    expected = advance(heads.model, rows, numbers(56), MAX_CONTEXT)
    next_ND = torch.full((56, DIM), NAN, dtype=torch.float16)
    events = decide(heads.fused, rows, next_ND, numbers(56), MAX_CONTEXT, is_sampled=False)
    assert_same_events(events, expected.events)
    assert_same_rows(rows, expected.rows)
    assert torch.allclose(next_ND.float(), expected.next_ND.float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("scale", [0.3, 10.0, 300.0])
def test_features_are_cosine_and_sine_of_the_rounded_size(scale: float) -> None:
    heads = random_heads(60)
    heads.model.region.size_features.data *= scale
    rows = random_rows(60)._replace(mode=torch.full((60,), int(Mode.SIZE)))
    seen = []
    heads.model.region.size_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for model in (heads.fused, heads.model):
        decide(model, copied(rows), torch.zeros(60, DIM), numbers(60), MAX_CONTEXT, is_sampled=False)
    found, expected = seen
    assert found.shape == expected.shape == (60, CONFIG.region.size_feat_dim)
    assert (found - expected).abs().max() < 1e-6 * max(1.0, 20 * scale)  # the angle itself has 24 bits


def test_the_kernels_know_the_numbers_of_the_twin() -> None:
    for mode in Mode:
        assert getattr(decision_kernels, mode.name).value == mode
    for finish in Finish:
        assert getattr(decision_kernels, finish.name).value == finish
    assert decision_kernels.NEAR_FRACTION.value == NEAR_FRACTION
    assert len(Event._fields) == decision_operators.NUM_EVENT_COLUMNS
