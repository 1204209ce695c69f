"""One run of the check: children one after the other within the budget, their findings into results.json."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .children import Child, Line
from .options import Options, leave
from .parts import FACTS, STEP_MS, TILES, WARM_UP, Part
from .results import FAILED, NOT_MEASURED, OK, Results

RESERVE_S = 2.0  # of the budget, to kill what runs and to write
FACTS_LEAST_S = 10.0  # what this machine is, is asked however small the budget
WARM_UP_CHILDREN = 12
BYTES_PER_WARM_UP = 5e9  # of the card: a context, a layer and the largest pass
BYTES_PER_CHECK = 12e9  # of the card: a kernel's largest case, and its twin's numbers in float64
FAILED_KERNELS = "failed kernels"
# Where graphs were captured a profiler that lets go of the device and comes back may crash (CUDA 12).
PROFILER_ENVIRONMENT = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
CUDA_SIGNS = ("CUDA error", "illegal memory access", "device-side assert", "misaligned address", "cudaError")


@dataclass(frozen=True)
class Unit:
    """One process of a part; `argument` is its share of it."""

    part: Part
    argument: str = ""

    @property
    def label(self) -> str:
        """What its files are called."""
        return "-".join(filter(None, [self.part.name, self.argument])).replace(" ", "_")


class Ahead:
    """Starts each child while the one before it measures: importing torch takes seconds, and no device."""

    def __init__(self, units: Iterator[Unit], start: Callable[[Unit], Child]) -> None:
        self._units, self._start = units, start
        self._next: Child | None = None

    def start_next(self) -> None:
        """Start the next unit's child, where there is one and it is not started."""
        if self._next is None and (unit := next(self._units, None)) is not None:
            self._next = self._start(unit)

    def take(self) -> Child:
        """The next unit's child, which waits for its line."""
        self.start_next()
        assert self._next is not None
        child, self._next = self._next, None
        return child

    def skip(self) -> None:
        """Pass the next unit over."""
        if self._next is not None:
            self.take().kill()
        else:
            next(self._units)


class Check:
    """Runs the parts that were asked for; the process that does this never touches the device."""

    def __init__(self, options: Options, parts: Sequence[Part]) -> None:
        self.options, self.parts = options, parts
        self.results = Results(options, [part.name for part in parts])
        self._ends_at = time.monotonic() + options.budget_s
        self._children: list[Child] = []
        self._folder = options.out / "children"

    @property
    def _is_cuda(self) -> bool:
        return self.options.device == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds of the budget that may still be spent."""
        return self._ends_at - RESERVE_S - time.monotonic()

    def run(self) -> int:
        """All parts; 0 where none failed, else 1."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.results.write()
        except OSError as error:
            leave(f"--out {self.options.out}: {error.strerror}; choose another folder")
        try:
            self._ask_facts()
            self._warm_up()
            self._run_parts()
        finally:
            for child in self._children:
                child.kill()
            self.results.write()
        return int(any(part["status"] == FAILED for part in self.results.parts.values()))

    # -- before the parts -------------------------------------------------------------------------

    def _ask_facts(self) -> None:
        """What this machine is; ends the program where the check makes no sense on it."""
        child = self._start(Unit(FACTS))
        child.go({})
        ending = child.wait(time.monotonic() + max(self.left_s, FACTS_LEAST_S), self.results.take_fact)
        if ending.error:
            self.results.data.setdefault("problem", ending.error.splitlines()[0])
        if problem := self.results.data.get("problem"):
            leave(problem)
        self.results.expect()

    def _warm_up(self) -> None:
        """Compile every kernel, several at a time, so that no part waits for it and no time counts it."""
        is_wanted = any(part.runs_kernels and part.name in self.options.names for part in self.parts)
        if not self._is_cuda or not is_wanted or self.left_s < WARM_UP.least_s:
            return
        started = time.monotonic()
        children = self._start_warm_up()
        errors: list[str] = []
        deadline = started + min(self.left_s, WARM_UP.most_s)
        for child in children:
            ending = child.wait(deadline, functools.partial(_keep_failure, errors))
            errors += filter(None, [ending.error, "a process was not done in time" if ending.is_late else ""])
        seconds = time.monotonic() - started
        self.results.data["compiling"] = {"seconds": round(seconds, 1), "errors": errors}
        print(f"{'compiling':10} {seconds:6.1f} s  {len(children)} processes, {len(errors)} errors", flush=True)

    def _start_warm_up(self) -> list[Child]:
        """As many processes as cores and the card's memory have room for."""
        fitting = int(self.results.data.get("free_bytes", 0) / BYTES_PER_WARM_UP)
        count = max(1, min(WARM_UP_CHILDREN, os.cpu_count() or 1, fitting))
        also = f"-{TILES}" if TILES in self.options.names else ""
        children = [self._start(Unit(WARM_UP, f"{number}-{count}{also}")) for number in range(count)]
        for child in children:
            child.go({})
        return children

    # -- the parts --------------------------------------------------------------------------------

    def _run_parts(self) -> None:
        units = {part: self._units_of(part) for part in self.parts if part.name in self.options.names}
        ahead = Ahead(itertools.chain.from_iterable(units.values()), self._start)
        for part, of_part in units.items():
            if part.needs_cuda and not self._is_cuda:
                self.results.add_error(part.name, "needs CUDA")
                self.results.end(part.name, NOT_MEASURED, 0.0)
                continue
            started = time.monotonic()
            run = self._run_together if self._at_once(part) > 1 else self._run_in_turn
            statuses = run(of_part, ahead, started) or [self._without_kernels(part)]
            status = next((status for status in (FAILED, NOT_MEASURED) if status in statuses), OK)
            self.results.end(part.name, status, time.monotonic() - started)
            print(f"{part.name:10} {time.monotonic() - started:6.1f} s  {status}", flush=True)

    def _run_in_turn(self, units: Sequence[Unit], ahead: Ahead, started: float) -> list[str]:
        return [self._run_unit(unit, ahead, started) for unit in units]

    def _run_together(self, units: Sequence[Unit], ahead: Ahead, started: float) -> list[str]:
        """Let several processes of one part share the device, all started at once; their statuses."""
        if not units:
            return []
        part = units[0].part
        if self._may_take(part, started) < part.least(self.options.device):
            for _ in units:
                ahead.skip()
            return [NOT_MEASURED] * len(units)
        waiting = [(unit, ahead.take()) for unit in units]
        ahead.start_next()
        at_once, statuses = self._at_once(part), []
        for first in range(0, len(waiting), at_once):
            some = waiting[first : first + at_once]
            for _, child in some:
                child.go(self._known())
            may_take_s = self._may_take(part, started)
            deadline = time.monotonic() + may_take_s
            statuses += [self._ended(unit, child, deadline, may_take_s) for unit, child in some]
        return statuses

    def _at_once(self, part: Part) -> int:
        """How many processes of a part run together: on a card as many as its memory has room for."""
        if not self._is_cuda:
            return 1
        return max(1, min(part.at_once, int(self.results.data.get("free_bytes", 0) / BYTES_PER_CHECK)))

    def _may_take(self, part: Part, part_started: float) -> float:
        device = self.options.device
        own_s = part.most(device)
        spent_s = time.monotonic() - part_started
        of_part_s = part.most_all(device) - spent_s if part.is_by_kernel else own_s
        return min(own_s, of_part_s, self.left_s)

    def _without_kernels(self, part: Part) -> str:
        """The status of a part that found no kernels: a CPU may be without triton, but not with one that fails."""
        problem = self.results.data.get("kernels_problem")
        self.results.add_error(part.name, problem or "no kernels were listed; is triton installed?")
        return FAILED if problem else NOT_MEASURED

    def _units_of(self, part: Part) -> list[Unit]:
        """One process of a part, or one for each kernel; none where there are no kernels here, or no card."""
        if part.needs_cuda and not self._is_cuda:
            return []
        if not part.is_by_kernel:
            return [Unit(part)]
        kernels = list(self.results.data.get("kernels", ()))
        return [Unit(part, name) for name in (*kernels, *(part.also if kernels else ()))]

    def _run_unit(self, unit: Unit, ahead: Ahead, part_started: float) -> str:
        """Let a child measure; its status. What the budget's end cuts off has not failed."""
        may_take_s = self._may_take(unit.part, part_started)
        if may_take_s < unit.part.least(self.options.device):
            ahead.skip()
            return NOT_MEASURED
        child = ahead.take()
        child.go(self._known())
        ahead.start_next()
        return self._ended(unit, child, time.monotonic() + may_take_s, may_take_s)

    def _ended(self, unit: Unit, child: Child, deadline: float, may_take_s: float) -> str:
        """Hear a child until it has ended or must; its status."""
        errors: list[str] = []
        ending = child.wait(deadline, functools.partial(self._take, unit.part, errors))
        own_s = unit.part.most(self.options.device)
        if ending.is_late and may_take_s == own_s:
            errors.append(f"{unit.label}: not done within {own_s:.0f} s")
        elif ending.error:
            errors.append(f"{unit.label}: {ending.error}")
        if errors:
            self._fail(unit, errors)
            return FAILED
        return NOT_MEASURED if ending.is_late else OK

    def _fail(self, unit: Unit, errors: list[str]) -> None:
        for error in errors:
            self.results.add_error(unit.part.name, error)
        if unit.part.is_by_kernel:
            self.results.parts[unit.part.name].setdefault(FAILED_KERNELS, []).append(unit.argument)
        self._name_the_kernel(unit, "\n".join(errors))

    def _take(self, part: Part, errors: list[str], line: Line) -> None:
        _keep_failure(errors, line)
        self.results.take(part.name, line)

    def _name_the_kernel(self, unit: Unit, error: str) -> None:
        """Once more, kernel by kernel, after a CUDA error: they are reported late, at whatever comes next."""
        note = "with CUDA_LAUNCH_BLOCKING=1"
        is_cuda_error = any(sign in error for sign in CUDA_SIGNS) or "died of signal" in error
        if not self._is_cuda or not is_cuda_error or note in self.results.parts[unit.part.name]:
            return
        if self.left_s < 2 * unit.part.least_s:
            return
        said: list[str] = []
        child = self._start(unit, "-blocking", {"CUDA_LAUNCH_BLOCKING": "1"})
        child.go(self._known())
        deadline = time.monotonic() + min(self.left_s, unit.part.most_s)
        ending = child.wait(deadline, functools.partial(_keep_failure, said))
        self.results.parts[unit.part.name][note] = "\n".join(filter(None, [*said, ending.error])) or "no error"

    def _known(self) -> dict[str, Any]:
        """What a child should know of those before it."""
        parts = self.results.parts
        limits = parts.get("limits", {})
        known = {name: limits[name] for name in ("product_rate", "copy_rate") if name in limits}
        if STEP_MS in parts.get("stages", {}):
            known[STEP_MS] = parts["stages"][STEP_MS]
        return known | {"twins": parts.get("kernels", {}).get(FAILED_KERNELS, [])}

    def _start(self, unit: Unit, suffix: str = "", extra: dict[str, str] | None = None) -> Child:
        options, environment = self.options, dict(extra or {})
        if self._is_cuda:
            environment["TRITON_CACHE_DIR"] = str((options.out / "triton_cache").resolve())
            environment["TRITON_INTERPRET"] = "0"  # whatever the shell says: a card runs what was compiled
            environment |= PROFILER_ENVIRONMENT
        elif unit.part.is_by_kernel or unit.part is FACTS:
            environment["TRITON_INTERPRET"] = "1"
        child = Child(
            unit.part.module,
            folder=self._folder,
            label=unit.label + suffix,
            arguments=[options.device, options.config, unit.argument],
            environment=environment,
        )
        self._children.append(child)
        return child


def _keep_failure(failures: list[str], line: Line) -> None:
    if "fail" in line:
        failures.append(line["fail"])
