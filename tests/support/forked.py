"""`md3` with the stub in processes of their own that are forked from one which has imported all: a start costs little.

For tests that start it by the dozen, to be killed at one file operation after the other. As a script it is the
process that is forked: it reads what to run from stdin, a line of JSON each, and prints how each ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


class Forks:
    """Runs `md3 ...` in a fork and waits for its end; the process that is forked starts with the first run.

    It has imported what a run with the stub needs, and `modules`.
    """

    def __init__(self, folder: Path, *modules: str) -> None:
        self._log = folder / "forked.log"
        self._modules = modules
        self._parent: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run stub_md3.py with `arguments` in the working folder of now; stdout and stderr come as one, in `stderr`."""
        if self._parent is None:
            command, pipe = [sys.executable, str(Path(__file__)), *self._modules], subprocess.PIPE
            self._parent = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        argv = list(map(str, arguments))
        run = {"argv": argv, "env": env, "cwd": os.getcwd(), "log": str(self._log)}
        self._parent.stdin.write(f"{json.dumps(run)}\n")
        self._parent.stdin.flush()
        status = int(self._parent.stdout.readline())
        return subprocess.CompletedProcess(argv, status, "", self._log.read_text(errors="replace"))

    def close(self) -> None:
        """End the process that is forked, and what hangs in it."""
        if self._parent is not None:
            os.killpg(self._parent.pid, signal.SIGKILL)
            self._parent.communicate()


def _become(run: dict[str, Any]) -> None:
    """In a fork: take on the arguments, environment, folder and streams of a program that was started."""
    log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(run["env"])
    os.chdir(run["cwd"])
    sys.argv[1:] = run["argv"]


def _serve() -> None:
    import stub_md3  # first, as it takes over the signals

    import md3cli.commands.annotate
    import md3cli.exporters
    import md3cli.run.local
    import md3cli.scale.run  # noqa: F401

    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
            stub_md3.main()
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
