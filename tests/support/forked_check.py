"""`gpu_check.py` whose processes are forked from its own, which has imported torch and triton and nothing of md3cli.

A run of all parts on a CPU starts dozens of them; each still imports what it measures by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO
from unittest.mock import patch

sys.path[0] = str(Path(__file__).parents[1])

from gpu import children  # noqa: E402
from gpu_check import main  # noqa: E402


class Fork:
    """In the place of `subprocess.Popen`, as gpu.children calls it for `python -P -m gpu.child`."""

    def __init__(
        self,
        args: list[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
        env: Mapping[str, str],
        start_new_session: bool,
    ) -> None:
        assert (args[1:4], stdin, start_new_session) == (["-P", "-m", "gpu.child"], subprocess.PIPE, True)
        self.returncode: int | None = None
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(reader, 0)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            os.closerange(3, writer + 1)
            os._exit(_run_child(args[4:], env))
        with contextlib.suppress(OSError):  # whoever is first
            os.setpgid(self.pid, self.pid)
        os.close(reader)
        self.stdin = os.fdopen(writer, "wb")

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _run_child(arguments: list[str], environment: Mapping[str, str]) -> int:
    """What `python -m gpu.child` does, in a fork; its status."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["child.py", *arguments]
    try:
        runpy.run_module("gpu.child", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # the choice is made at the import
    for name in ("torch", "triton"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    forking = SimpleNamespace(Popen=Fork, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    with patch.object(children, "subprocess", forking):  # of the check alone: pictures are still decoded by programs
        sys.exit(main(sys.argv[1:]))
