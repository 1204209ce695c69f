"""What every test may rely on, whatever started pytest and whatever ran before in this process."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from forked import Forks
    from program import Program

# Two cores are shared, and the models of the tests are too small for more than one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels for a GPU run in Triton's interpreter here; the choice is made when they are first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples each time, and no clock: a newcomer's first run is no matter of luck. Fresh ones are looked for with
# `pytest --hypothesis-profile=search`; what that finds is kept as an @example.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("same")


FOR_TESTS = ("MD3_CUDA_PYTHON",)  # what tests themselves are told


def leave_the_users_machine_out() -> None:
    """Take settings of the person who runs the tests away, of md3 and of what it uses; their folders are left alone."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    programs = os.environ.get("MD3_PROGRAMS") or str(caches / "md3-programs")
    os.environ.setdefault("TEST_PROGRAMS", programs)  # md3 refuses to start where it does not know an MD3_* name
    odd = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "COLUMNS", "LINES", "RAY_ADDRESS")
    for name in list(os.environ):
        if name in odd or (name.startswith("MD3_") and name not in FOR_TESTS):
            del os.environ[name]
    for name in ("NO_PROXY", "no_proxy"):  # servers of the tests are on this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    os.environ.setdefault("MPLCONFIGDIR", str(caches / "matplotlib"))  # its list of fonts takes long to make
    home = tempfile.mkdtemp(prefix="md3-tests-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folders = {"XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache", "HF_HOME": "huggingface"}
    os.environ |= {name: f"{home}/{folder}" for name, folder in folders.items()}
    os.umask(0o022)


leave_the_users_machine_out()

# `nohup` and background jobs of a shell hand down ignored signals; programs started here expect none.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless `-m` names them: a second `-m` would overrule one in addopts."""
    if "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(autouse=True)
def as_if_alone() -> Iterator[None]:
    """What a test draws does not depend on the tests before it, nor how it reckons.

    Loading an engine switches denormals off for the process; the next test finds them on.
    """
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """The program in an empty working folder, with a stub in the model's place and nobody's settings."""
    from program import Program, isolate

    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return Program(monkeypatch)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The program with the stub in processes of their own, for tests that start and kill many."""
    from forked import Forks

    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


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
