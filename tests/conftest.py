"""What every test may rely on, whatever started pytest and whatever ran before in this process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

# Two cores are shared, and the models of the tests are too small for more than one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels for a GPU run in Triton's interpreter here; the choice is made when they are first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# `nohup` and background jobs of a shell hand down ignored signals; programs started here expect none.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def denormals_as_they_were() -> Iterator[None]:
    """Loading an engine switches denormals off for the process; the next test finds them on."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
