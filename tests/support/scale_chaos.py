"""One output run in every form there is, killed again and again, compared with an undisturbed run of one process.

python tests/support/scale_chaos.py [--rows 20000] [--kills 200] [--seed 0] [--step-seconds 0.15] [--then]
                                    [--forms one,three,ray]

The forms: one process, three worker processes, a Ray cluster where Ray is installed, three ranks, one process
again. A kill is SIGKILL, SIGTERM or SIGINT to the program, or SIGKILL to one of its workers or ranks. In the end each
request has its record once, in input order, byte for byte that of the undisturbed run, and `md3 verify` agrees.
With --then each picture is asked for three objects and each of these two things, so that most records are children's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos import wait_until
from marked_processes import MARK, marked_processes
from program import STUB_MD3, clean_environment, make_pictures

NUM_PICTURES = 50  # each is asked again and again: the k of every repeat has to survive
FORMS = {
    "one": [[]],
    "three": [["--devices", "cpu", "--workers-per-device", "3"]],
    "ray": [["--engine", "ray"]],
    "ranks": [["--worker-rank", str(rank), "--world-size", "3"] for rank in range(3)],
}
THEN = ["--then", "query:What is on the {label}?", "--then", "detect:lid"]
UNHURRIED_S = 0.15  # a step, so that one output of 20,000 rows lives through 200 kills and their restarts
LOOK_S = 0.02
GRACE_S = 120.0
RAY_GRACE_S = 180.0  # an actor that keeps being killed is started later and later; a dead driver is noticed in minutes
FINISHED = 3  # some pictures are bad


def grace_of(form: str) -> float:
    """How long a form may take to begin, to recover, or to be gone."""
    return RAY_GRACE_S if form == "ray" else GRACE_S


def forms() -> tuple[str, ...]:
    """One after another, as far as they can be had here."""
    has_ray = importlib.util.find_spec("ray") is not None
    return ("one", "three", *(["ray"] if has_ray else []), "ranks", "one")


@dataclass
class ScaleChaos:
    """An output under attack; `kills` counts what was done to it."""

    folder: Path
    num_rows: int = 20_000
    seed: int = 0
    shard_size: int = 100
    step_s: float = 0.012
    forms: tuple[str, ...] = field(default_factory=lambda: forms())
    has_children: bool = False
    kills: Counter[str] = field(default_factory=Counter)
    num_finished_early: int = 0

    def __post_init__(self) -> None:
        self.chooser = random.Random(self.seed)
        pictures = make_pictures(self.folder / "pictures", NUM_PICTURES)
        (pictures / "p7.png").write_bytes(b"no picture")
        names = [f"pictures/p{i * 13 % NUM_PICTURES}.png" for i in range(self.num_rows)]
        self.manifest = self.folder / "rows.txt"
        self.manifest.write_text("".join(f"{name}\n" for name in names))
        self.output = self.folder / "undisturbed.jsonl"
        assert self._start([], step_s=0.0, batch_size=64).wait() == FINISHED
        self.expected = self.output.read_bytes()
        assert self.expected.count(b"\n") == self.num_records
        self.output = self.folder / "out" / "o.jsonl"

    # -- the program -------------------------------------------------------------------------------------

    def _start(
        self, options: list[str], *, step_s: float | None = None, batch_size: int = 8
    ) -> subprocess.Popen[bytes]:
        self._mark = f"{os.getpid()}-{self.chooser.getrandbits(64)}"
        environment = clean_environment(self.folder / "home") | {MARK: self._mark, "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        own = ["--step-seconds", str(self.step_s if step_s is None else step_s)]
        asked = [*self.command, "-o", str(self.output), "--workers", "1", "--no-progress"]
        asked += ["--batch-size", str(batch_size)]
        command = [sys.executable, str(STUB_MD3), *own, *asked, *options]
        self.output.parent.mkdir(exist_ok=True)
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(command, env=environment, stderr=log, stdout=log, start_new_session=True)

    @property
    def command(self) -> list[str]:
        """What is asked of the rows."""
        if not self.has_children:
            return ["caption", str(self.manifest)]
        return ["run", str(self.manifest), "--task", "detect:3 things", *THEN, "--no-reasoning"]

    @property
    def num_records(self) -> int:
        """How many there are in the end; of a bad picture nothing is asked then."""
        if not self.has_children:
            return self.num_rows
        num_bad = self.manifest.read_text().splitlines().count("pictures/p7.png")
        return self.num_rows + (self.num_rows - num_bad) * 3 * 2

    def _start_form(self, form: str) -> dict[int, tuple[subprocess.Popen[bytes], list[str], str]]:
        """The processes of a form by number, each with its options and mark."""
        started = {}
        for number, options in enumerate(FORMS[form]):
            # Only what begins a plan may say the size of its shards.
            sized = [*options, "--shard-size", str(self.shard_size)] if options else options
            started[number] = (self._start(sized), sized, self._mark)
        return started

    def _num_bytes(self) -> int:
        """Bytes of records on disk, roughly: what grows as the run gets on."""
        run = Path(f"{self.output}.md3run")
        journals = (path for path in run.glob("wip/*.jsonl") if "adopted" not in path.name)
        paths = [self.output, *journals, *run.glob("parts/*.jsonl")]
        total = 0
        for path in paths:
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    # -- kills ---------------------------------------------------------------------------------------------

    def attack(self, form: str, num_kills: int) -> None:
        """Run `form` and kill it so many times; what gets through before is begun again in a new output."""
        done = 0
        processes: dict[int, tuple[Any, list[str], str]] = {}
        while done < num_kills:
            if not processes:
                processes = self._start_form(form)
            self._wait_for_bytes(self._num_bytes() + self.chooser.randrange(1, self._stride), form, processes)
            time.sleep(self.chooser.random() * 0.02)
            if _has_ended(processes):
                processes = self._bury(form, processes)
                self._check_if_finished()
                continue
            self._kill_one(form, processes)
            done += 1
        for process, _, _ in processes.values():
            process.kill()
        self._bury(form, processes)

    def _wait_for_bytes(self, target: int, form: str, processes: dict[int, tuple[Any, list[str], str]]) -> None:
        try:
            wait_until(_seldom(lambda: self._num_bytes() >= target or _has_ended(processes)), form, grace_of(form))
        except AssertionError as error:
            raise AssertionError(f"{form} does not get on: {self.log()}") from error

    @property
    def _stride(self) -> int:
        """Up to how many bytes may come between two kills: few enough for one output to live through them all."""
        return max(2000, len(self.expected) // 400)

    def _kill_one(self, form: str, processes: dict[int, tuple[Any, list[str], str]]) -> None:
        number = self.chooser.choice(list(processes))
        process, options, mark = processes[number]
        workers = [pid for pid in marked_processes(mark) if _is_worker(pid)]
        if workers and self.chooser.random() < 0.6:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chooser.choice(workers), signal.SIGKILL)
            self.kills[f"{form}: worker"] += 1
            return
        kind = self.chooser.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send_signal(kind)
        self.kills[f"{form}: {kind.name}"] += 1
        process.wait(GRACE_S)
        _wait_until_gone(form, mark)
        del processes[number]
        if processes:  # another rank goes on; this one is started again
            processes[number] = (self._start(options), options, self._mark)

    def _bury(self, form: str, processes: dict[int, tuple[Any, list[str], str]]) -> dict[int, Any]:
        for process, _, mark in processes.values():
            status = process.wait(GRACE_S)
            assert status in (0, FINISHED, -signal.SIGKILL), (status, self.log())
            _wait_until_gone(form, mark)
        return {}

    def _check_if_finished(self) -> None:
        """A run that got through before it was killed often enough is as it should be, and makes room for the next."""
        self.num_finished_early += 1
        self.check_finished()
        self.output = self.output.parent.with_name(f"out{self.num_finished_early}") / "o.jsonl"

    # -- what must hold --------------------------------------------------------------------------------------

    def finish(self) -> None:
        """To the end in one process, as a user does who gives up on the others."""
        process = self._start([], step_s=0.0, batch_size=64)
        assert process.wait() == FINISHED, self.log()
        self.check_finished()

    def check_finished(self) -> None:
        """All there, in order, the very bytes; and what md3 itself says to it."""
        found = self.output.read_bytes()
        assert found.count(b"\n") == self.num_records
        assert found == self.expected, "the records differ from those of an undisturbed run"
        assert not (told := self.tracebacks()), told
        verify = [sys.executable, "-m", "md3cli", "verify", str(self.output)]
        checked = subprocess.run(verify, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr

    def log(self) -> str:
        """The end of what all starts have said."""
        return self._whole_log()[-4000:]

    def tracebacks(self) -> list[str]:
        """Those that any start has told, from their heads on."""
        return [f"Traceback{told[:2000]}" for told in self._whole_log().split("Traceback")[1:]]

    def _whole_log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def _has_ended(processes: dict[int, tuple[Any, list[str], str]]) -> bool:
    return all(process.poll() is not None for process, _, _ in processes.values())


def _seldom(is_met: Callable[[], bool]) -> Callable[[], bool]:
    """Asked so seldom that looking takes no core away from Ray's actors, which run at a low priority."""

    def look() -> bool:
        time.sleep(LOOK_S)
        return is_met()

    return look


def _wait_until_gone(form: str, mark: str) -> None:
    """Until nothing of a run that was killed is left."""
    try:
        wait_until(_seldom(lambda: not marked_processes(mark)), f"{form}: children outlive the run", grace_of(form))
    except AssertionError as error:
        raise AssertionError(f"{error}: {[_command_of(pid) for pid in marked_processes(mark)]}") from error


def _is_worker(pid: int) -> bool:
    """Whether it is a model process of a supervisor or an actor of Ray, not one that only decodes pictures."""
    command = _command_of(pid)
    return b"md3cli.scale.workers" in command or b"(ShardWorker)" in command


def _command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
    return b""


def run_scale_chaos(chaos: ScaleChaos, num_kills: int) -> None:
    """The kills shared out over all forms in turn, then to the end."""
    for number, form in enumerate(chaos.forms):
        chaos.attack(form, num_kills // len(chaos.forms) + (number < num_kills % len(chaos.forms)))
    chaos.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-seconds", type=float, default=UNHURRIED_S)
    parser.add_argument("--then", action="store_true")
    parser.add_argument("--forms", type=lambda text: tuple(text.split(",")), default=forms())
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="scale-chaos-") as folder:
        chaos = ScaleChaos(
            Path(folder),
            arguments.rows,
            arguments.seed,
            step_s=arguments.step_seconds,
            forms=arguments.forms,
            has_children=arguments.then,
        )
        try:
            run_scale_chaos(chaos, arguments.kills)
        finally:
            print(
                f"{sum(chaos.kills.values())} kills in {time.monotonic() - started:.0f} s, {chaos.num_finished_early} "
                f"runs got through meanwhile: {dict(sorted(chaos.kills.items()))}"
            )
    num_records = chaos.expected.count(b"\n")
    print(f"{num_records:,} records: none lost, none doubled, the same bytes, no traceback, md3 verify agrees")


if __name__ == "__main__":
    main()
