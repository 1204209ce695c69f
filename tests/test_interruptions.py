"""Runs interrupted in every way at random moments, then resumed: nothing lost, doubled, torn or different.

With the stub in the model's place. A slice of 12 interruptions runs always, 500 with `-m slow`.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from program import isolate, make_pictures, records_of, start

NUM_PICTURES = 240
BATCH_SIZE = 4
Process = subprocess.Popen[bytes]


def kill_the_group(process: Process) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_the_leader(process: Process) -> None:
    process.kill()


def send(*signals: signal.Signals, pause_s: float = 0.02) -> Callable[[Process], None]:
    def act(process: Process) -> None:
        for signum in signals:
            process.send_signal(signum)
            time.sleep(pause_s)

    return act


WAYS: dict[str, tuple[Callable[[Process], None], set[int]]] = {  # the act, and the statuses it may end with
    "kill the group": (kill_the_group, {-9}),
    "kill the leader": (kill_the_leader, {-9}),
    "INT": (send(signal.SIGINT), {130, -2}),  # negative: before the run had begun, as any program
    "INT twice": (send(signal.SIGINT, signal.SIGINT), {130, -2}),
    "TERM": (send(signal.SIGTERM), {143, -15}),
    "HUP": (send(signal.SIGHUP), {129, -1}),
    "STOP, CONT, TERM": (send(signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM, pause_s=0.2), {143, -15}),
    "no space": (lambda process: None, {1}),
}


def children_of(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for part in (text, *threads) for child in part.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Victim:
    """One output, run again and again; `reference` is what an undisturbed run writes."""

    def __init__(self, folder: Path) -> None:
        self.pictures = make_pictures(folder / "pictures", NUM_PICTURES)
        (self.pictures / "p7.png").write_bytes(b"broken")
        self.out = folder / "out.jsonl"
        self.command = ("detect", self.pictures, "a", "--batch-size", BATCH_SIZE, "--workers", 2, "--fail-on", "none")
        undisturbed = start(*self.command, "-o", folder / "reference.jsonl", stdout=subprocess.DEVNULL)
        assert undisturbed.wait(timeout=120) == 0
        self.reference = (folder / "reference.jsonl").read_bytes()
        self.num_finished = 0

    def interrupt(self, way: str, after_s: float) -> None:
        act, statuses = WAYS[way]
        limit = (self.out.stat().st_size if self.out.exists() else 0) + int(after_s * 20_000)
        preexec = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if way == "no space" else None
        process = start(*self.command, "-o", self.out, step_s=0.01, start_new_session=True, preexec_fn=preexec)
        children: list[int] = []
        if preexec is None:
            try:
                process.wait(timeout=after_s)
            except subprocess.TimeoutExpired:
                children = children_of(process.pid)
                act(process)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in statuses | {0}, (way, process.returncode, stderr)
        assert b"Traceback" not in stderr, (way, stderr)
        self.check(way)
        self.check_orphans(children, way)
        if process.returncode == 0:
            self.start_afresh()

    def check(self, way: str) -> None:
        """What stands in OUTPUT is the beginning of the reference, but for a torn end."""
        content = self.out.read_bytes() if self.out.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        assert self.reference.startswith(whole), way
        assert len(content) - len(whole) < 2000, way

    def check_orphans(self, children: list[int], way: str) -> None:
        deadline = time.monotonic() + 5
        while any(map(is_alive, children)):
            assert time.monotonic() < deadline, f"children outlive the run: {way}"
            time.sleep(0.05)

    def start_afresh(self) -> None:
        self.num_finished += 1
        assert self.out.read_bytes() == self.reference
        for path in self.out.parent.glob("out.jsonl*"):
            path.unlink()

    def finish(self) -> None:
        process = start(*self.command, "-o", self.out)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert self.out.read_bytes() == self.reference
        assert len(records_of(self.out)) == NUM_PICTURES


@pytest.mark.parametrize(
    ("num_interruptions", "seed"),
    [(12, 1), pytest.param(500, 2, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_interrupted_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_interruptions: int, seed: int
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    victim = Victim(tmp_path)
    chance = random.Random(seed)
    ways = list(WAYS)
    for number in range(num_interruptions):
        victim.interrupt(ways[number % len(ways)], chance.uniform(0.3, 1.6))
    victim.finish()
