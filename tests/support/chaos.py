"""Interrupts whole runs in every way there is, resumes them until they are done, and compares with an undisturbed run.

python tests/support/chaos.py [--interruptions 500] [--seed 0] [--format jsonl|coco|parquet] [--model CHECKPOINT]

Without --model a stub answers in the model's place. After every interruption: the records are a prefix
of the undisturbed run's, in the same order, none torn, none doubled, none different, none lost that
was there before; no traceback, no process left, the right exit status, no half document, and no more
redone than one batch. Prints one line with the counts; an AssertionError names what broke.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import Forks
from marked_processes import MARK, marked_processes
from program import STUB_MD3, clean_environment, make_pictures
from record_equality import is_same
from small_disk import has_small_disks, small_disk

BATCH_SIZE = 4
LOOK_S = 0.005  # so that looking leaves the cores to what is waited for
PATIENCE_S = 120.0  # for anything to happen at all; machines may be loaded
SIGNALS = {
    "int": (signal.SIGINT, 1),
    "int-twice": (signal.SIGINT, 2),
    "term": (signal.SIGTERM, 1),
    "hup": (signal.SIGHUP, 1),
    "kill-leader": (signal.SIGKILL, 1),
}
KINDS = (*SIGNALS, "kill-group", "stop-cont", "closed-stderr", "file-size", "full-disk", "kill-at-op", "fail-at-op")
DISK_FAULTS = ("file-size", "full-disk", "fail-at-op")
FINISHED = (0, 3)


def wait_until(is_met: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait, and fail with `what` when it takes too long."""
    deadline = time.monotonic() + patience_s
    while not is_met():
        assert time.monotonic() < deadline, what
        time.sleep(LOOK_S)


@dataclass
class Ending:
    """How one start of the program ended."""

    status: int
    stderr: str
    num_answered: int


@dataclass
class Chaos:
    """One command under attack. `report` counts interruptions by kind, and what else is worth knowing.

    With a `delay` a real model's results are read so many launches late; the undisturbed run reads them at once.
    """

    folder: Path
    seed: int = 0
    format: str = "jsonl"
    model: str | None = None
    delay: int | None = None
    num_pictures: int = 240
    workers: int = 2
    has_children: bool = False
    forks: Forks | None = None  # where given, starts that end by themselves are forks
    report: Counter[str] = field(default_factory=Counter)
    most_redone: int = 0
    _num_outputs: int = 0

    def __post_init__(self) -> None:
        self.chooser = random.Random(self.seed)
        self.pictures = make_pictures(self.folder / "pictures", self.num_pictures)
        for i in range(5, self.num_pictures, 20):
            (self.pictures / f"p{i}.png").write_bytes(b"no picture")
        self.step_s = 0.0 if self.model else 0.01
        self._new_output()
        ending = self._run(*([] if self.delay is None else ["--delay", "0"]))
        assert ending.status == 3, ending
        num_bad = len(range(5, self.num_pictures, 20))
        num_children = (self.num_pictures - num_bad) * 2 * 2 if self.has_children else 0
        assert self.journal.read_bytes().count(b"\n") == 2 * self.num_pictures + num_children
        self.expected = self.journal.read_bytes().splitlines(keepends=True)
        self.expected_names = self._names()
        self.expected_document = self._document()
        self._new_output()

    # -- the program under attack --------------------------------------------------------------------

    def _new_output(self) -> None:
        self._num_outputs += 1
        folder = self.folder / f"out{self._num_outputs}"
        folder.mkdir()
        self._take_output(folder)

    def _take_output(self, folder: Path) -> None:
        suffix = {"jsonl": "jsonl", "coco": "json", "parquet": "parquet"}[self.format]
        self.output = folder / f"o.{suffix}"
        self.journal = self.output if self.format == "jsonl" else folder / f"o.{suffix}.records.jsonl"
        self._num_safe = 0

    def command(self, *options: str) -> list[str]:
        model = ["--real"] if self.model else ["--step-seconds", str(self.step_s)]
        model += [] if self.delay is None else ["--delay", str(self.delay)]
        asked = ["detect", str(self.pictures), "a", "b"]
        if self.has_children:
            then = ["--then", "query:What is on the {label}?", "--then", "point:lid", "--no-reasoning"]
            asked = ["run", str(self.pictures), "--task", "detect:a,b", *then]
        asked += ["-o", str(self.output), "--batch-size", str(BATCH_SIZE)]
        settings = ["--format", self.format, "--workers", str(self.workers)]
        settings += [] if self.has_children else ["--max-objects", "3"]
        chosen = ["-m", self.model] if self.model else []
        script = [sys.executable, str(STUB_MD3), *model, *options]
        return [*script, "--count", str(self._count), *asked, *settings, *chosen]

    @property
    def _count(self) -> Path:
        return self.folder / "answers"

    @property
    def _log(self) -> Path:
        return self.folder / "stderr"

    def _start(self, *options: str, **settings: Any) -> subprocess.Popen[bytes]:
        environment = self._environment()
        with open(self._log, "wb") as log:
            settings = {"stderr": log, "stdout": subprocess.DEVNULL, "start_new_session": True} | settings
            return subprocess.Popen(self.command(*options), env=environment, **settings)

    def _environment(self) -> dict[str, str]:
        """That of the next start, with a new mark; its answers are counted from 0."""
        self._count.unlink(missing_ok=True)
        self._mark = f"{os.getpid()}-{self.chooser.getrandbits(64)}"
        return clean_environment(self.folder / "home") | {MARK: self._mark, "OMP_NUM_THREADS": "1"}

    def _finish(self, process: subprocess.Popen[bytes]) -> Ending:
        status = process.wait(PATIENCE_S)
        wait_until(lambda: not marked_processes(self._mark), "children outlive the run")
        return Ending(status, self._log.read_text(), self._num_answered())

    def _run(self, *options: str) -> Ending:
        """One start that nothing comes to from outside, to its end."""
        if self.forks is None:
            return self._finish(self._start(*options))
        done = self.forks(*self.command(*options)[2:], env=self._environment())
        wait_until(lambda: not marked_processes(self._mark), "children outlive the run")
        return Ending(done.returncode, done.stderr, self._num_answered())

    def _num_answered(self) -> int:
        return self._count.stat().st_size if self._count.exists() else 0

    def _num_lines(self) -> int:
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.output.parent.iterdir())

    def _document(self) -> bytes | None:
        return self.output.read_bytes() if self.format != "jsonl" and self.output.exists() else None

    def _count_safe_answers(self) -> int:
        """Answers that no start has to compute again: written, or kept until it is their turn."""
        safe = set()
        for path in (self.journal, self.journal.with_name(f"{self.journal.name}.early")):
            for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                if line.endswith(b"\n") and b'"error":null}' in line:
                    safe.add(json.loads(line)["id"])
        return len(safe)

    # -- interruptions -------------------------------------------------------------------------------

    def interrupt(self, kind: str) -> None:
        """One start of the program, one interruption of `kind`, all checks; a run that got through starts anew."""
        num_before = self._num_lines()
        with self._cause(kind) as (process, statuses):
            ending = self._finish(process)
        self.check(ending, num_before, {*statuses, *FINISHED}, is_disk_good=kind not in DISK_FAULTS)
        if ending.status in FINISHED:
            self.report["finished first" if kind != "closed-stderr" else kind] += 1
            self.check_finished(ending)
            self._new_output()
        else:
            self.report[kind] += 1

    def interrupt_at_operation(self, action: str, at: int) -> bool:
        """Kill the program before its `at`-th file operation, or fail that; True when it got through before."""
        num_before = self._num_lines()
        ending = self._run("--fault", f"{action}:{at}:{self.output.parent}")
        statuses = {-signal.SIGKILL} if action == "kill" else {1}
        self.check(ending, num_before, {*statuses, *FINISHED}, is_disk_good=action == "kill")
        self.report[f"{action}-at-op"] += ending.status not in FINISHED
        return ending.status in FINISHED

    def interrupt_at_absorption(self, signum: signal.Signals, moment: str, at: int) -> bool:
        """Send a signal when the engine turns to its `at`-th launch; True when the program got through before."""
        num_before = self._num_lines()
        ending = self._run("--absorb", f"{signum.name}:{moment}:{at}")
        self.check(ending, num_before, {-signum, 128 + signum, *FINISHED})
        if ending.status in FINISHED:
            self.check_finished(ending)
            self._new_output()
            return True
        self.report[f"{signum.name} {moment}"] += 1
        return False

    @contextlib.contextmanager
    def _cause(self, kind: str) -> Iterator[tuple[subprocess.Popen[bytes], set[int]]]:
        """Start the program and see to its interruption; yields it with the exit statuses that are right for it."""
        if kind in ("kill-at-op", "fail-at-op"):
            action, at = kind.partition("-")[0], self.chooser.randrange(1, 60)
            process = self._start("--fault", f"{action}:{at}:{self.output.parent}")
            yield process, {-signal.SIGKILL} if action == "kill" else {1}
        elif kind == "file-size":
            limit = (self.journal.stat().st_size if self.journal.exists() else 0) + self.chooser.randrange(1, 20_000)
            process = self._start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            yield process, {1}
        elif kind == "full-disk":
            with small_disk(self.output.parent, self.chooser.randrange(16, 128)):
                yield self._start(), {1}
        elif kind == "closed-stderr":
            reader, writer = os.pipe()
            os.close(reader)
            process = self._start(stderr=writer)
            os.close(writer)
            yield process, set()
        else:
            process = self._start()
            self._wait_for_a_moment(process)
            yield process, self._signal(process, kind)

    def _wait_for_a_moment(self, process: subprocess.Popen[bytes]) -> None:
        """A random point of the run: seldom before its first record, else some records later."""
        is_early = self.chooser.random() < 0.2
        target = self._num_lines() + (0 if is_early else self.chooser.randrange(1, 40))
        wait_until(lambda: self._has_started(process), "the program did not start")
        wait_until(lambda: process.poll() is not None or self._num_lines() >= target, "no records came")
        time.sleep(self.chooser.random() * (0.5 if is_early else 0.02))

    def _has_started(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether signals are the program's to deal with; before that it is Python's start that they interrupt."""
        return self._count.exists() or process.poll() is not None

    def _signal(self, process: subprocess.Popen[bytes], kind: str) -> set[int]:
        if kind == "kill-group":
            if process.poll() is None:  # its number may be another's once it is reaped
                os.killpg(process.pid, signal.SIGKILL)
            return {-signal.SIGKILL}
        if kind == "stop-cont":
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)
            process.send_signal(signal.SIGCONT)
            time.sleep(self.chooser.random() * 0.1)
            kind = "term"
        signum, times = SIGNALS[kind]
        for _ in range(times):
            process.send_signal(signum)
            time.sleep(0.02 * self.chooser.random())
        return {-signum, 128 + signum}

    # -- what must hold ------------------------------------------------------------------------------

    def check(self, ending: Ending, num_before: int, statuses: set[int], *, is_disk_good: bool = True) -> None:
        """After any interruption. A disk that refuses to be written may cost more than a batch."""
        assert ending.status in statuses, ending
        assert "Traceback" not in ending.stderr, ending
        assert "unexpected" not in ending.stderr, ending
        if ending.status == 1:
            assert str(self.output.parent) in ending.stderr.splitlines()[-1], ending
        written = self.journal.read_bytes() if self.journal.exists() else b""
        lines = written[: written.rfind(b"\n") + 1].splitlines(keepends=True)
        assert len(lines) >= num_before, "records were lost"
        for number, line in enumerate(lines):
            assert is_same(line, self.expected[number]), f"record {number} differs: {line!r}"
        info = self.output.with_name(f"{self.output.name}.run.json")
        if info.exists():
            json.loads(info.read_bytes())
        assert self._document() in (None, self.expected_document), "half a document"
        num_safe_before, self._num_safe = self._num_safe, self._count_safe_answers()
        num_redone = ending.num_answered - (self._num_safe - num_safe_before)
        if is_disk_good:
            self.most_redone = max(self.most_redone, num_redone)
            assert num_redone <= BATCH_SIZE, f"{num_redone} answers were lost, the batch is {BATCH_SIZE}"

    def check_finished(self, ending: Ending) -> None:
        """After a run that got through."""
        assert ending.status == 3, ending
        assert self._num_lines() == len(self.expected)
        assert self._names() == self.expected_names, (self._names(), ending)
        assert self._document() == self.expected_document
        starts = json.loads(self.output.with_name(f"{self.output.name}.run.json").read_bytes())["starts"]
        assert starts[-1]["exit_status"] == 3

    def finish(self) -> None:
        """Resume what was interrupted last, to the end."""
        num_before = self._num_lines()
        ending = self._run()
        self.check(ending, num_before, set(FINISHED))
        self.check_finished(ending)


def run_chaos(chaos: Chaos, num_interruptions: int, kinds: tuple[str, ...]) -> None:
    """Interruptions of all `kinds` in turn, then to the end."""
    while sum(chaos.report[kind] for kind in kinds) < num_interruptions:
        fewest = min(chaos.report[kind] for kind in kinds)
        chaos.interrupt(chaos.chooser.choice([kind for kind in kinds if chaos.report[kind] == fewest]))
    chaos.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=("jsonl", "coco", "parquet"), default="jsonl")
    parser.add_argument("--model")
    arguments = parser.parse_args()
    kinds = KINDS if has_small_disks() else tuple(kind for kind in KINDS if kind != "full-disk")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), arguments.seed, arguments.format, arguments.model)
        run_chaos(chaos, arguments.interruptions, kinds)
    print(
        f"{sum(chaos.report[kind] for kind in kinds)} interruptions in {time.monotonic() - started:.0f} s, "
        f"most redone {chaos.most_redone} answers (batch {BATCH_SIZE}): {dict(sorted(chaos.report.items()))}"
    )


if __name__ == "__main__":
    main()
