"""What tests of single kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def unwritten_memory_shows() -> Iterator[None]:
    """What a kernel forgets to write stays NaN, or 255 where it is bytes."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
