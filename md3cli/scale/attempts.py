"""Journals of attempts at a shard: what was begun, what was finished, what may have killed its worker.

Every attempt appends to a file of its own, so that a torn end never glues two records together; a damaged line costs
itself only. The lines are `{"begin": ID}` before a request goes to the model, with `"alone":true` where nothing else is
under way, the request's record after that, and `{"stopped":true}` where the attempt was ended in order. Beside a
journal `ATTEMPT.died` says with which status its process ended, where somebody saw that. A killed process loses nothing
that was appended, a power cut takes at most 2 s or 64 records.

Other processes are waited for by signs of life. The clocks of two machines are never compared: a sign of life is a
value that changes, and all that counts is how long the value has stood still by the clock of the process that looks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from md3cli.files import translate_errors
from md3cli.finished.record_shape import read_record
from md3cli.records import compact_json, strict_json
from md3cli.run.log import AppendLog, DamagedLines, SyncAfter, repair_words
from md3cli.scale.folder import WIP, RunFolder, damaged_name, journal_name, new_attempt, shard_name
from md3cli.scale.store import LocalStore
from md3cli.system import KILL_SIGNAL, STOP_SIGNALS, is_alive

Clock = Callable[[], float]

TELL_INTERVAL_S = 30.0  # between two words on what is waited for
FIRST_WORD_AFTER_S = 5.0


class Signs:
    """The signs of life of others, each by its name, and how long they have stood still here."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        """Know nobody yet; `clock` gives seconds from any beginning."""
        self._clock = clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def still_for(self, name: str, sign: Any) -> float:
        """Return how many seconds `sign` has been as it is now; 0 where it is new."""
        now = self._clock()
        before, since = self._seen.get(name, (None, now))
        if name not in self._seen or before != sign:
            since = now
        self._seen[name] = (sign, since)
        return now - since


class Teller:
    """Tells a user what is waited for: after a little while, and then now and then; `forget` ends the wait."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        first_after_s: float = FIRST_WORD_AFTER_S,
        interval_s: float = TELL_INTERVAL_S,
        growth: float = 1.0,
        clock: Clock = time.monotonic,
    ) -> None:
        """Begin without a wait; `growth` is the factor from one interval to the next."""
        self._say, self._clock = say, clock
        self._first_after_s, self._interval_s, self._growth = first_after_s, interval_s, growth
        self._began: float | None = None
        self._due_s, self._step_s = first_after_s, interval_s

    @property
    def waited_s(self) -> float:
        """Return how long this wait has taken, in seconds; 0 before the first `tell`."""
        return 0.0 if self._began is None else self._clock() - self._began

    def tell(self, words: Callable[[], str] | str) -> None:
        """Note that the wait goes on; `words` say for what, and are asked only when it is time to tell."""
        if self._began is None:
            self._began = self._clock()
        if self.waited_s >= self._due_s:
            self._due_s = self.waited_s + self._step_s
            self._step_s *= self._growth
            self._say(words if isinstance(words, str) else words())

    def forget(self) -> None:
        """Begin anew: what was waited for has come."""
        self._began = None
        self._due_s, self._step_s = self._first_after_s, self._interval_s


SYNC_AFTER = SyncAfter(records=64, seconds=2.0)
ADOPTED = "adopted-"  # how the attempt of a journal is called that was none: its records were taken over
TOUCH_INTERVAL_S = 5.0  # how often a journal shows that its attempt is alive
STALE_AFTER_S = 60.0  # without such a sign
# A request is blamed for what happened to its workers after two crashes, the latest alone with it. A kill
# from outside (SIGKILL, power, the machine) leaves no trace of its cause and may hit anybody: then it takes
# four times alone.
CRASHES_TO_BLAME, DEATHS_ALONE_TO_BLAME = 2, 4
_STOP_STATUSES = frozenset(-number for number in (KILL_SIGNAL, *STOP_SIGNALS))


class AttemptJournal:
    """The journal of one attempt, open for appending; used by one thread."""

    def __init__(self, folder: RunFolder, shard: int, attempt: str) -> None:
        """Make the journal; raises OutputError where that is not possible."""
        self.attempt = attempt
        self._touched_at = time.monotonic()
        path = folder.wip.path(journal_name(shard, attempt))
        with translate_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._log = AppendLog(path, is_new=True, sync_after=SYNC_AFTER)

    def begin(self, record_id: str, *, is_alone: bool) -> None:
        """Note that a request goes to the model now."""
        note = {"begin": record_id, "alone": True} if is_alone else {"begin": record_id}
        self._log.append(compact_json(note) + b"\n")

    def finish(self, lines: Sequence[bytes]) -> None:
        """Append records, each with its newline."""
        self._log.append(b"".join(lines), len(lines))
        self._log.sync_in_time()

    def stop(self) -> None:
        """Note that the attempt ends here on purpose, so that what is under way has killed nobody."""
        self._log.append(compact_json({"stopped": True}) + b"\n")
        self._log.sync()

    def touch(self) -> None:
        """Show others that this attempt is alive; cheap to call often."""
        if time.monotonic() - self._touched_at >= TOUCH_INTERVAL_S:
            self._touched_at = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._log.path)

    def sync(self) -> None:
        """Make what was appended safe from a power cut; raises OutputError where the disk refuses."""
        self._log.sync()

    def close(self) -> None:
        """Sync what waits for it, and leave the file there; a second call does nothing."""
        self._log.close()


class Place(NamedTuple):
    """Where a line stands: the name of its file in the run folder, and its number there, from 1."""

    file: str
    number: int


@dataclass(slots=True)
class ShardHistory:
    """What all attempts at a shard have left.

    `records` holds finished lines by id, and `places` where these stand. `left_open` are the ids of requests that were
    under way when a process died; those that are also in `blamed` have killed it, and are not tried again. `damaged`
    are lines that say nothing. `unsure` are ids of records that may be of children whose parent's record is missing.
    """

    records: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    damaged: list[tuple[Place, bytes]] = field(default_factory=list)
    left_open: set[str] = field(default_factory=set)
    blamed: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)


def read_history(folder: RunFolder, shard: int) -> ShardHistory:
    """Read the journals of all attempts at `shard`, and say what they have left together."""
    history = ShardHistory()
    crashes, deaths_alone, crashes_alone = Counter[str](), Counter[str](), Counter[str]()
    for name in attempt_files(folder.wip, shard):
        if not name.endswith(".jsonl"):
            continue
        file = f"{WIP}/{name}"
        journal = read_journal(folder.wip.read(file) or b"")
        history.records |= journal.records
        history.places |= {record_id: Place(file, number) for record_id, number in journal.numbers.items()}
        history.damaged += [(Place(file, number), line) for number, line in journal.damaged.items()]
        if journal.was_stopped:
            continue
        is_crash = _is_crash(folder.wip.read(f"{WIP}/{name.removesuffix('.jsonl')}.died"))
        for record_id, is_alone in journal.begun.items():
            if record_id not in journal.records:
                history.left_open.add(record_id)
                crashes[record_id] += is_crash
                crashes_alone[record_id] += is_crash and is_alone
                deaths_alone[record_id] += is_alone
    history.left_open -= history.records.keys()
    history.blamed = {
        record_id
        for record_id in history.left_open
        if (crashes[record_id] >= CRASHES_TO_BLAME and crashes_alone[record_id])
        or deaths_alone[record_id] >= DEATHS_ALONE_TO_BLAME
    }
    return history


@dataclass(slots=True)
class JournalContent:
    """What the journal of one attempt says.

    `numbers` has the line of each record, from 1. `begun` says of each id whether its request was alone. `damaged` are
    the lines that say nothing, by number.
    """

    records: dict[str, bytes] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    begun: dict[str, bool] = field(default_factory=dict)
    was_stopped: bool = False
    damaged: dict[int, bytes] = field(default_factory=dict)


def read_journal(data: bytes) -> JournalContent:
    """Read a journal's whole lines; a torn end counts for nothing."""
    content = JournalContent()
    lines = data.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        if (record_id := _id_of(line)) is not None:
            content.records[record_id], content.numbers[record_id] = line + b"\n", number
        elif not _take_note(content, line) and number < len(lines):  # the last may be torn
            content.damaged[number] = line + b"\n"
    return content


def _id_of(line: bytes) -> str | None:
    """Return the id of a whole record; None for anything else."""
    record = read_record(line)
    return record["id"] if record is not None else None


def _take_note(content: JournalContent, line: bytes) -> bool:
    """Take note of a line that is no record; return False where the line says nothing."""
    try:
        value = strict_json(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("begin"), str):
        content.begun[value["begin"]] = bool(value.get("alone"))
        return True
    content.was_stopped |= value.get("stopped") is True
    return value.get("stopped") is True


def keep_lines(folder: RunFolder, shard: int, lines: list[bytes]) -> None:
    """Leave records as the journal of an attempt at `shard`, so that they are not done again."""
    folder.wip.put(journal_name(shard, f"{ADOPTED}{new_attempt()}"), b"".join(lines))


def keep_damaged_lines(folder: RunFolder, shard: int, lines: Sequence[bytes]) -> None:
    """Copy damaged lines to a file of the shard that outlives its journals; each once, however often it is found.

    Raises:
        OutputError: it cannot be written.
    """
    name = damaged_name(shard)
    kept = (folder.wip.read(name) or b"").splitlines(keepends=True)
    if new := [line for line in dict.fromkeys(lines) if line not in set(kept)]:
        folder.wip.put(name, b"".join([*kept, *new]))


def damage_of(folder: RunFolder, shard: int, damaged: Sequence[tuple[Place, bytes]]) -> list[str]:
    """Return what a user should know of a shard's damaged lines: a text a file, with the first few lines by number."""
    numbers: dict[str, list[DamagedLines]] = {}
    for (file, number), _ in damaged:
        numbers.setdefault(file, []).append(DamagedLines(number, number, 0, 0, False))
    copies = f"{folder.wip.uri}/{damaged_name(shard)}"
    return [repair_words(f"{folder.wip.uri}/{file}", lines, copies) for file, lines in numbers.items()]


def _is_crash(died: bytes | None) -> bool:
    """Return whether a process ended by its own doing, as far as somebody saw it end."""
    try:
        status: Any = json.loads(died or b"null")
    except ValueError:
        return False
    return isinstance(status, int) and status not in _STOP_STATUSES


def note_death(folder: RunFolder, shard: int, attempt: str, status: int) -> None:
    """Leave a note of how the process of an attempt ended; `status` is as `subprocess` gives it."""
    folder.wip.put(journal_name(shard, attempt).removesuffix(".jsonl") + ".died", json.dumps(status).encode())


def attempt_files(wip: LocalStore, shard: int) -> list[str]:
    """Return the names of the files that attempts at `shard` left in the folder of journals."""
    prefix = f"{shard_name(shard)}."
    return [name for name in wip.names(WIP) if name.startswith(prefix)]


def forget_attempts(folder: RunFolder, shard: int) -> None:
    """Remove the files that attempts at a committed shard left."""
    for name in attempt_files(folder.wip, shard):
        folder.wip.remove(f"{WIP}/{name}")


def who_runs(folder: RunFolder, shard: int, own_host: str, signs: Signs) -> str | None:
    """Return whose attempt seems to work on `shard`: its journal has changed lately, and it is not known to be dead.

    A journal that `signs` see for the first time counts as changed, so they must have been asked some time before.
    """
    for name in attempt_files(folder.wip, shard):
        owner = re.fullmatch(r"\d+\.(.+)-(\d+)-[0-9a-f]+\.jsonl", name)
        if owner is None or owner[1].startswith(ADOPTED) or (owner[1] == own_host and not is_alive(int(owner[2]))):
            continue
        sign = folder.wip.sign_of(f"{WIP}/{name}")
        if sign is not None and signs.still_for(name, sign) < STALE_AFTER_S:
            return f"{owner[1]} (process {owner[2]})"
    return None
