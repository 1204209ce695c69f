"""Blocks of numbers come out as they went in, and every part of one where kernels like to find it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from md3cli.model.engine.host_block import milestone, send, start_download, upload

CPU = torch.device("cpu")
INTS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), max_size=12)
REALS = st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=40), max_size=6)


@pytest.mark.process
@given(INTS, REALS)
def test_what_was_sent_is_there_in_order(ints: list[list[int]], reals: list[list[float]]) -> None:
    whole, real = send(CPU, ints, reals)
    assert [part.tolist() for part in whole] == ints
    assert [part.tolist() for part in real] == reals
    assert all(part.dtype is torch.int64 for part in whole)
    assert all(part.dtype is torch.float32 for part in real)


def test_all_parts_are_of_one_block_and_aligned() -> None:
    (first, second, third), _ = send(CPU, [[1, 2, 3], [4], [5] * 17])
    assert first.untyped_storage().data_ptr() == third.untyped_storage().data_ptr()
    assert all(part.storage_offset() * part.itemsize % 64 == 0 for part in (first, second, third))


def test_elsewhere_than_on_cuda_copies_are_complete_at_once() -> None:
    tensor = torch.arange(3)
    assert upload(tensor, CPU) is tensor
    assert start_download(tensor) is tensor
    assert milestone(CPU) is None
