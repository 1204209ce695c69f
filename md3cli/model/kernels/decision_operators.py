"""The kernels of a decision as operators of torch; see `operators.py`, which would be too long with them.

The state of rows is written where it lies: columns of `engine.state.Rows`, whose places `index` gives, or the first N.

Importing this file imports triton: only `forms.py` does so, when an engine on CUDA is built.

Shape suffixes: N rows, V vocabulary, P parts of it, C coordinate bins, Z size bins, F frequencies, D width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from md3cli.model.kernels import decision_kernels
from md3cli.model.kernels.registry import launch, operator

SCANNED = 2048  # ids that one program looks at: one row has 25 programs, each with two 16-byte loads a thread
SCAN_WARPS = 4
DECIDE_WARPS = 4  # three heads of 1,024 bins, 8 values of each a thread
FED_COLUMNS = 512
NUM_EVENT_COLUMNS = 10  # of `engine.state.Event`


def _fake_scan_vocabulary(
    logits: Tensor, mode: Tensor, is_first: Tensor, index: Tensor | None, answer_id: int, eos_id: int, size_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[0], triton.cdiv(logits.shape[1], SCANNED)
    best = logits.new_empty(shape, dtype=torch.float32)
    best_at, is_finite = (logits.new_empty(shape, dtype=torch.int32) for _ in range(2))
    return best, best_at, is_finite


@operator(
    "scan_vocabulary(Tensor logits, Tensor mode, Tensor is_first, Tensor? index, int answer_id, int eos_id, "
    "int size_id) -> (Tensor, Tensor, Tensor)",
    1,
    _fake_scan_vocabulary,
)
def _scan_vocabulary(
    logits: Tensor, mode: Tensor, is_first: Tensor, index: Tensor | None, answer_id: int, eos_id: int, size_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find each part's greatest logit that may be emitted: float32 best, int32 best_at and is_finite [N, P]."""
    assert logits.is_contiguous(), logits.stride()
    found = _fake_scan_vocabulary(logits, mode, is_first, index, answer_id, eos_id, size_id)
    num_rows, num_ids = logits.shape
    launch(
        decision_kernels.scan_vocabulary, (num_rows, found[0].shape[1]),
        logits, mode, is_first, index, *found,
        V=num_ids, PART=SCANNED, ANSWER=answer_id, EOS=eos_id, SIZE_ID=size_id,
        HAS_INDEX=index is not None, warps=SCAN_WARPS,
    )  # fmt: skip
    return found


def _fake_decide(
    logits: Tensor, best: Tensor, best_at: Tensor, is_finite: Tensor, coord_logits: Tensor, size_logits: Tensor,
    drawn: Tensor | None, sizes: Tensor, frequencies: Tensor, index: Tensor | None,
    mode: Tensor, is_first: Tensor, is_point: Tensor, chooses: Tensor, emitted: Tensor, limit: Tensor,
    position: Tensor, draws: Tensor, prefix_len: int, max_context: int,
    answer_id: int, eos_id: int, coord_id: int, size_id: int, was_fed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows = logits.shape[0]
    events = logits.new_empty((num_rows, NUM_EVENT_COLUMNS), dtype=torch.float32)
    features = frequencies.new_empty((num_rows, 2 * frequencies.shape[1]))
    return events, features, logits.new_empty((num_rows, 2), dtype=torch.int32)


@operator(
    "decide(Tensor logits, Tensor best, Tensor best_at, Tensor is_finite, Tensor coord_logits, Tensor size_logits, "
    "Tensor? drawn, Tensor sizes, Tensor frequencies, Tensor? index, Tensor(a!) mode, Tensor(b!) is_first, "
    "Tensor is_point, Tensor chooses, Tensor(c!) emitted, Tensor limit, Tensor(d!) position, Tensor(e!) draws, "
    "int prefix_len, int max_context, int answer_id, int eos_id, int coord_id, int size_id, bool was_fed) "
    "-> (Tensor, Tensor, Tensor)",
    1,
    _fake_decide,
)
def _decide(
    logits: Tensor, best: Tensor, best_at: Tensor, is_finite: Tensor, coord_logits: Tensor, size_logits: Tensor,
    drawn: Tensor | None, sizes: Tensor, frequencies: Tensor, index: Tensor | None,
    mode: Tensor, is_first: Tensor, is_point: Tensor, chooses: Tensor, emitted: Tensor, limit: Tensor,
    position: Tensor, draws: Tensor, prefix_len: int, max_context: int,
    answer_id: int, eos_id: int, coord_id: int, size_id: int, was_fed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Take every row's decision, and write its state.

    logits [N, V], coord_logits [N, C], size_logits [N, 2, Z] in any dtype; `drawn` int64 [N] or None for the
    likeliest; `sizes` float32 [Z] of each bin, frequencies [2, F]. Return events float32 [N, 10], the size encoder's
    features [N, 2 F], and what each row is fed, for `feed`.
    """
    state = mode, is_first, is_point, chooses, emitted, limit, position, draws
    assert all(part.is_contiguous() for part in (logits, coord_logits, size_logits, sizes, frequencies, *state))
    assert index is not None or len(mode) == len(logits)
    assert all(part.dtype is torch.int64 for part in (mode, emitted, limit, position, draws))
    made = events, features, source = _fake_decide(
        logits, best, best_at, is_finite, coord_logits, size_logits, drawn, sizes, frequencies, index,
        *state, prefix_len, max_context, answer_id, eos_id, coord_id, size_id, was_fed,
    )  # fmt: skip
    num_parts, num_coords, num_sizes, num_frequencies = (
        part.shape[-1] for part in (best, coord_logits, size_logits, frequencies)
    )
    launch(
        decision_kernels.decide, (logits.shape[0],),
        logits, best, best_at, is_finite, coord_logits, size_logits, drawn, sizes, frequencies, index,
        *state, events, features, source, prefix_len, max_context,
        V=logits.shape[1], P=num_parts, BP=triton.next_power_of_2(num_parts),
        C=num_coords, BC=triton.next_power_of_2(num_coords), Z=num_sizes, BZ=triton.next_power_of_2(num_sizes),
        F=num_frequencies, BF=triton.next_power_of_2(num_frequencies),
        ANSWER=answer_id, EOS=eos_id, COORD=coord_id, SIZE_ID=size_id,
        HAS_DRAWN=drawn is not None, HAS_INDEX=index is not None, WAS_FED=was_fed, warps=DECIDE_WARPS,
    )  # fmt: skip
    return made


def _fake_feed(
    source: Tensor, tokens: Tensor, coords: Tensor, size_embeddings: Tensor, index: Tensor | None, next_inputs: Tensor
) -> None:
    pass


@operator(
    "feed(Tensor source, Tensor tokens, Tensor coords, Tensor size_embeddings, Tensor? index, "
    "Tensor(a!) next_inputs) -> ()",
    1,
    _fake_feed,
)
def _feed(
    source: Tensor, tokens: Tensor, coords: Tensor, size_embeddings: Tensor, index: Tensor | None, next_inputs: Tensor
) -> None:
    """Write every row's next input into `next_inputs` [S, D]; tokens [V, D], coords [C, D], size_embeddings [N, D]."""
    assert all(part.is_contiguous() for part in (tokens, coords, size_embeddings, next_inputs))
    num_rows, width = size_embeddings.shape
    columns = min(FED_COLUMNS, triton.next_power_of_2(width))
    launch(
        decision_kernels.feed, (num_rows, triton.cdiv(width, columns)),
        source, tokens, coords, size_embeddings, index, next_inputs,
        D=width, BD=columns, HAS_INDEX=index is not None, warps=2,
    )  # fmt: skip
