"""What keeps the kernels of a GPU from running, each told in one line that says what to do. No GPU is needed."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from md3cli.errors import ConfigError
from md3cli.model.kernels import availability
from md3cli.model.kernels.availability import LEAST_TRITON, cuda_fault, kernel_fault, require_kernels

CUDA = torch.device("cuda", 0)


def use_triton(monkeypatch: pytest.MonkeyPatch, version: str, starts: BaseException | None = None) -> None:
    """A module `triton` of this version, whose driver fails as told."""

    class Runtime:
        @property
        def active(self) -> str:
            if starts is not None:
                raise starts
            return "driver"

    triton = ModuleType("triton")
    triton.__version__ = version  # type: ignore[attr-defined]
    triton.runtime = SimpleNamespace(driver=Runtime())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CUDA device that all is well with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    use_triton(monkeypatch, "3.6.0")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch that can use no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(sys, "platform", "linux")


def fail_to_start(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def init() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("version", [".".join(map(str, LEAST_TRITON)), "3.6.0", "3.10.0+git1234", "4.0.0"])
def test_where_all_is_well_nothing_is_said(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch, version)
    require_kernels(CUDA)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("version", ["3.3.1", "2.3.0", "3", "unknown"])
def test_an_old_triton_is_said(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch, version)
    with pytest.raises(ConfigError) as error:
        require_kernels(CUDA)
    expected = f"cuda:0: triton {version} is too old, the kernels need 3.4; pip install --upgrade triton"
    assert str(error.value) == expected


@pytest.mark.usefixtures("card")
def test_a_missing_triton_is_said_as_the_system_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert kernel_fault(CUDA) == "the kernels need triton; pip install triton"
    monkeypatch.setattr(sys, "platform", "win32")
    assert "WSL 2" in (kernel_fault(CUDA) or "")


@pytest.mark.usefixtures("card")
def test_a_damaged_triton_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "triton_version", lambda: "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert kernel_fault(CUDA) == "triton cannot be imported; pip install --force-reinstall triton"


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC."), "Failed to find C compiler"),
        (AssertionError("libcuda.so cannot found!\nPossible files are"), "libcuda.so cannot found!"),
        (subprocess.CalledProcessError(1, ["gcc", "a" * 300]), "its launcher does not compile"),
    ],
)
def test_a_triton_without_a_compiler_is_said(
    error: BaseException, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_triton(monkeypatch, "3.6.0", starts=error)
    fault = kernel_fault(CUDA)
    assert fault is not None
    assert fault.startswith(f"triton cannot start ({reason}); install a C compiler and Python's headers")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("capability", "is_fine"), [((6, 1), False), ((7, 0), False), ((7, 5), True), ((12, 0), True)])
def test_a_card_that_is_too_old_is_said(
    capability: tuple[int, int], is_fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fault = kernel_fault(CUDA)
    if is_fine:
        assert fault is None
    else:
        found = ".".join(map(str, capability))
        assert fault is not None
        assert fault.startswith(f"Some Card has compute capability {found}, and 7.5 is needed")


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040). Please update", "update the driver"),
        ("Found no NVIDIA driver on your system. Please check that", "Found no NVIDIA driver on your system; see what"),
    ],
)
def test_a_driver_that_torch_cannot_use_is_said(message: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_start(monkeypatch, message)
    fault = kernel_fault(CUDA)
    assert fault == cuda_fault()
    assert fault is not None
    assert expected in fault
    assert "\n" not in fault


@pytest.mark.usefixtures("broken")
def test_a_build_without_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ConfigError, match="is built without CUDA; install a CUDA build of torch"):
        require_kernels(CUDA)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cuda_fault() == "Macs have no CUDA; use --device mps"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_this_machine_itself_says_what_is_missing() -> None:
    fault = cuda_fault()
    assert fault is not None
    assert fault.endswith("or use --device cpu") or sys.platform == "darwin"


@pytest.mark.process
def test_without_a_cuda_device_triton_is_never_imported() -> None:
    program = (
        "import sys, torch, md3cli.model.engine.load as load; "
        "from md3cli.model.engine.load import device_facts; "
        "load.prepare_device(torch.device('cpu')); load.prepare_device(torch.device('mps')); "
        "facts = device_facts('cpu'); "
        "sys.exit('triton' in sys.modules or facts.triton != '' or facts.kernel_fault is not None)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
