"""Of many ranks one makes the plan; the others wait for it, and take over where it has died.

`plan/planner.json` says who makes it, with a counter that a thread of the planner's raises every other second.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

from md3cli.errors import OutputError
from md3cli.progress import clock as duration
from md3cli.records import printable
from md3cli.scale.attempts import is_alive
from md3cli.scale.layout import RunFolder, host_name
from md3cli.scale.plan import Plan, read_plan
from md3cli.scale.waiting import Clock, Signs, Teller

PLANNER = "plan/planner.json"  # there while a rank makes the plan
BEAT_S = 2.0
NOBODY_PLANS_S, STANDSTILL_S = 10.0, 20.0  # without a planner, and without a beat of one, before another rank plans
POLL_S = 0.2
TURN_S, MOST_TURNS = 0.5, 40  # so that of many ranks that take over the first is seen by the others


class PlannerMark:
    """Tells the other ranks that this process makes the plan, and goes on to; a context manager."""

    def __init__(self, folder: RunFolder, rank: int) -> None:
        self._folder, self._rank, self._num_beats = folder, rank, 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> Self:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._folder.store.remove(PLANNER)

    def beat(self) -> None:
        """Give a sign of life.

        Raises:
            OutputError: the folder cannot be written.
        """
        mark = {"host": host_name(), "pid": os.getpid(), "rank": self._rank, "beat": self._num_beats}
        self._num_beats += 1
        self._folder.store.put(PLANNER, json.dumps(mark).encode())

    def _beat_on(self) -> None:
        while not self._is_over.wait(BEAT_S):
            with contextlib.suppress(OutputError):  # what is wrong will end the plan too, and be told there
                self.beat()


class Planner(NamedTuple):
    """Who makes the plan, as far as the mark can be read."""

    host: str
    pid: int
    rank: int | None

    @classmethod
    def of(cls, mark: bytes) -> Planner:
        """Read a mark, which anybody may have written."""
        try:
            document: Any = json.loads(mark)
        except (ValueError, RecursionError):
            document = None
        document = document if isinstance(document, dict) else {}
        pid, rank = document.get("pid"), document.get("rank")
        return cls(
            str(document.get("host", "an unknown host")),
            pid if type(pid) is int and 0 < pid < 2**31 else 0,
            rank if type(rank) is int else None,
        )

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone; of another machine's nobody knows."""
        return self.host == host_name() and self.pid > 0 and not is_alive(self.pid)

    def __str__(self) -> str:
        who = "a rank" if self.rank is None else f"rank {self.rank}"
        process = f", process {self.pid}" if self.pid else ""
        return printable(f"{who} (on {self.host}{process})")


def wait_for_plan(
    folder: RunFolder,
    rank: int,
    say: Callable[[str], None],
    *,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Plan | None:
    """Return what another rank plans, once it has; None where nobody does any more, and this rank is to.

    Says every 30 s who is waited for. A planner whose process on this machine is gone is given up at once, one
    elsewhere after 20 s without a beat, and nobody is waited for 10 s.
    """
    signs, teller = Signs(clock), Teller(say, clock=clock)
    turn_s = min(max(rank - 1, 0), MOST_TURNS) * TURN_S
    while (plan := read_plan(folder)) is None:
        mark = folder.store.read(PLANNER)
        still_s = signs.still_for(PLANNER, mark)
        planner = None if mark is None else Planner.of(mark)
        if planner is None:
            if still_s >= NOBODY_PLANS_S + turn_s:
                return None
            teller.tell("waiting for rank 0 to begin")
        elif planner.is_dead or still_s >= STANDSTILL_S + turn_s:
            why = "its process is gone" if planner.is_dead else f"no sign of life for {still_s:.0f} s"
            say(f"{planner} does not make the plan any more: {why}; rank {rank} makes it")
            return None
        else:
            teller.tell(f"waiting for {planner} to make the plan, {duration(teller.waited_s)} so far")
        sleep(POLL_S)
    return plan
