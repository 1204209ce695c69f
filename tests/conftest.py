"""What every test may rely on, whatever started pytest and whatever ran before in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def crops_as_recorded() -> Iterator[None]:
    """Pictures are resized as the golden cases were made."""
    from golden_cases import resized_as_recorded

    with resized_as_recorded():
        yield


@pytest.fixture(scope="session")
def cuda_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python whose torch is built for CUDA, with md3cli's dependencies; it needs no GPU.

    The one that MD3_CUDA_PYTHON names, or a new environment of 5 GB, for slow tests alone: on Linux PyPI's torch is
    such a build, and the oldest one that md3cli takes is what many users have.
    """
    named = os.environ.get("MD3_CUDA_PYTHON")
    if named is not None:
        return named
    if sys.platform != "linux":
        pytest.skip("PyPI's torch is built for CUDA on Linux alone; MD3_CUDA_PYTHON may name a Python that has one")
    environment = tmp_path_factory.mktemp("cuda") / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.11.0", Path(__file__).parents[1]], check=True)
    return python
