"""The next decision of rows whose state lies in buffers: by the kernels of a GPU, or by their plain twin.

Kernels are there where `kernels.forms` has put them (`model.region.tables` says so); elsewhere `state.advance` decides
and its result is copied into the buffers. Kernels write where the state lies, so that a step ends with few launches:
cuBLAS for the heads and the size encoder, three kernels of our own for all between (`kernels/decision_kernels.py`).
It stands apart from `state.py`, which is what a decision means and knows no buffers.

Shape suffixes: N rows that decide, S rows of the buffers, D width, V vocabulary, F frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from md3cli.model.engine.state import Mode, Rows, advance, banned_logits, draw_sampled
from md3cli.model.network.moondream import BinTables, Moondream3

OPS = torch.ops.md3
IDLE = int(Mode.IDLE)


def decide(
    model: Moondream3,
    rows: Rows,
    next_SD: Tensor,
    hidden_ND: Tensor,
    max_context: int,
    *,
    is_sampled: bool,
    index: Tensor | None = None,
    was_fed: bool = False,
) -> Tensor:
    """Take the next decisions of rows, and write their state and next inputs; return events [N, len(Event)].

    `rows` and `next_SD` are written in place: at `index` int64 [N], or all of them, which are N then. An index may come
    twice where its row is idle. `hidden_ND` are hidden states before the last LayerNorm. With `was_fed` live rows have
    taken an input since their last decision, and stand one position further.
    """
    if model.region.tables is not None:
        tables = model.region.tables
        return _decide_by_kernels(model, tables, rows, next_SD, hidden_ND, max_context, is_sampled, index, was_fed)
    place = slice(None) if index is None else index
    given = rows.pick(place)
    if was_fed:
        given = given._replace(position=given.position + (given.mode != IDLE))
    step = advance(model, given, hidden_ND, max_context, is_sampled=is_sampled)
    rows.put(place, step.rows)
    next_SD[place] = step.next_ND
    return step.events


def _decide_by_kernels(
    model: Moondream3,
    tables: BinTables,
    rows: Rows,
    next_SD: Tensor,
    hidden_ND: Tensor,
    max_context: int,
    is_sampled: bool,
    index: Tensor | None,
    was_fed: bool,
) -> Tensor:
    ids, region = model.config.tokenizer, model.region
    logits_NV = model.text.logits(hidden_ND)
    coord_logits, size_logits = region.bin_logits(hidden_ND)
    scanned = OPS.scan_vocabulary(logits_NV, rows.mode, rows.is_first, index, ids.answer_id, ids.eos_id, ids.size_id)
    drawn_N = _draw(model, logits_NV, rows if index is None else rows.pick(index)) if is_sampled else None
    state = rows.mode, rows.is_first, rows.is_point, rows.chooses, rows.emitted, rows.limit, rows.position, rows.draws
    events, features_NF, source = OPS.decide(
        logits_NV, *scanned, coord_logits, size_logits, drawn_N, tables.sizes_Z, region.size_features, index, *state,
        model.config.prefix_len, max_context, ids.answer_id, ids.eos_id, ids.coord_id, ids.size_id, was_fed,
    )  # fmt: skip
    OPS.feed(source, model.text.wte, tables.coords_CD, region.size_encoder(features_NF), index, next_SD)
    return events  # type: ignore[no-any-return]


def _draw(model: Moondream3, logits_NV: Tensor, rows: Rows) -> Tensor:
    """Draw tokens [N] as `advance` does: torch sorts the vocabulary, which is no work for a kernel of ours."""
    # A copy: the kernels read the logits as they were before any were banned.
    return draw_sampled(banned_logits(model, logits_NV.to(torch.float32, copy=True), rows), rows)
