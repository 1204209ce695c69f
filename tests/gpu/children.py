"""A process that measures: started ahead, told to go, read line by line, killed whole at its deadline.

A child imports torch (seconds) and then waits for one line on its standard input before it touches the
device, so that the next one can be started while this one measures. It says what it found in a file of
JSON lines, each written whole: what it found before it crashed is not lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
POLL_S = 0.05
_TAIL_LINES = 12  # of what a child printed before it died

Line = dict[str, Any]


@dataclass(frozen=True)
class Ending:
    """How a child ended: `is_late` when its deadline did it; `error` is empty where all went well."""

    is_late: bool
    error: str


class Child:
    """One measuring process, in a session and process group of its own."""

    def __init__(self, module: str, *, folder: Path, label: str, arguments: list[str], environment: Mapping[str, str]):
        """Start it; `label` names its files in `folder`."""
        self.lines_file, self._log_file = folder / f"{label}.jsonl", folder / f"{label}.log"
        self.lines_file.write_bytes(b"")
        self._offset = 0
        path = os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._log_file.open("wb") as log:  # -P: a folder called torch where this is run is no business of ours
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gpu.child", module, str(self.lines_file), *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path} | dict(environment),
                start_new_session=True,
            )

    def go(self, message: Mapping[str, Any]) -> None:
        """Let it touch the device; `message` is what it should know from those before it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which `wait` will say
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.close()

    def wait(self, deadline: float, heard: Callable[[Line], None]) -> Ending:
        """Hand each of its lines to `heard` until it has ended, or kill it at `deadline` (of `time.monotonic`)."""
        while not (has_ended := self._has_ended()) and time.monotonic() < deadline:
            self._hear(heard)
            time.sleep(POLL_S)
        status = self.kill()  # also what it left behind
        self._hear(heard)
        if not has_ended:
            return Ending(is_late=True, error="")
        return Ending(is_late=False, error="" if status == 0 else self._last_words(status))

    def kill(self) -> int:
        """Kill it and everything in its process group; its status. May be called twice."""
        if self._process.returncode is None:  # not waited for: the group's number is still its own
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _has_ended(self) -> bool:
        """True once it has ended; it stays a zombie, so that nobody else gets its number before `kill`."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _hear(self, heard: Callable[[Line], None]) -> None:
        for line in self._new_lines():
            heard(line)

    def _new_lines(self) -> Iterator[Line]:
        """Whole lines that were written since the last call."""
        with self.lines_file.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)

    def _last_words(self, status: int) -> str:
        how = f"ended with status {status}" if status > 0 else f"died of signal {-status} ({signal.strsignal(-status)})"
        said = self._log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join([*said[-_TAIL_LINES:], how])
