"""What runs in a measuring process: `python -m gpu.child MODULE LINES_FILE DEVICE CONFIG ARGUMENT`.

The module (a part of the check) is imported at once; its `measure(run)` is called when the parent has
sent its line. Whatever is found goes into the lines file as it is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from md3cli.model.engine.load import prepare_device
from md3cli.model.engine.machine import is_out_of_memory
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights.random_weights import CONFIGS

PR_SET_PDEATHSIG = 1
FACTS = "gpu.facts"
_TRACE_LINES = 12


class Run:
    """One child's task, and where it says what it found.

    `argument` is what this child is to do where a part has several; `known` is what the parent knew when it
    sent the child off: what `limits` noted (`product_rate`, `copy_rate`), and `twins`, the kernels that
    failed and are to be replaced.
    """

    def __init__(self, lines_file: str, device: str, config_name: str, argument: str, known: dict[str, Any]) -> None:
        self._lines_fd = os.open(lines_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.config_name, self.argument, self.known = config_name, argument, known

    @property
    def config(self) -> ModelConfig:
        return CONFIGS[self.config_name]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def figure(self, name: str, value: float, unit: str, **more: float | str) -> None:
        """A measured figure; its name says workload, batch and weight form. `more` is what a prediction needs.

        What is no number has no value: JSON knows neither NaN nor infinity.
        """
        self._write({"figure": name, "value": value if math.isfinite(value) else None, "unit": unit} | more)

    def fail(self, text: str) -> None:
        """Something is wrong: the part has failed, and goes on."""
        self._write({"fail": text})

    def note(self, name: str, value: Any) -> None:
        """Something worth keeping beside the figures."""
        self._write({"note": name, "value": value})

    @contextlib.contextmanager
    def if_it_fits(self, what: str) -> Iterator[None]:
        """Around a measurement, so that the part goes on behind it.

        What a small card has no memory for is noted; any other error is a failure.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001  what it is, is told; the next measurement may have none
            if is_out_of_memory(error):
                self.note(f"does not fit: {what}", str(error).splitlines()[0])
            else:
                self.fail(f"{what}: {last_lines(traceback.format_exc())}")
        finally:
            if self.is_cuda:
                torch.cuda.empty_cache()

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._lines_fd, json.dumps(line).encode() + b"\n")  # one call: whole or not at all


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone (Linux): nothing may stay on the device."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(module_name: str, lines_file: str, device: str, config_name: str, argument: str) -> int:
    """Import, wait for the parent's line, measure; 0 also where the part failed and could say so."""
    die_with_parent()
    warnings.simplefilter("ignore")  # torch's, about deterministic fills and the profiler
    try:
        module, problem = importlib.import_module(module_name), ""
    except Exception:  # noqa: BLE001  whatever it is, the parent is told when it asks
        module, problem = None, last_lines(traceback.format_exc())
    line = sys.stdin.readline()
    if not line:
        return 0  # not wanted any more
    run = Run(lines_file, device, config_name, argument, json.loads(line))
    if module is None:
        run.fail(problem)
        return 0
    try:
        prepare(run, touches_device=module_name != FACTS)
        module.measure(run)
    except Exception:  # noqa: BLE001
        run.fail(last_lines(traceback.format_exc()))
    return 0


def prepare(run: Run, *, touches_device: bool) -> None:
    """Set this process up as `load_engine` would; `facts` says itself what keeps a device from being used."""
    torch.set_flush_denormal(True)
    if run.device.type == "cpu" and run.config_name == "mini":
        torch.set_num_threads(1)  # so small a model's second thread would wait, spinning
    torch.set_float32_matmul_precision("highest")
    if touches_device:
        prepare_device(run.device)


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_TRACE_LINES:])


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
