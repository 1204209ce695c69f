"""run.json: what a run was asked, with what, how it went; and whether OUTPUT is this run's to resume.

The document's keys: `schema`, `identity` (what must be equal for a resume), `versions`, `model`, `root` (the folder
that record images are relative to), `seal` (that this user's md3 wrote the root), `arguments` of the last start,
`counts`, `stages` (seconds by stage, of all starts), `records` (size and SHA-256 of the records file when the run was
last finished), `timeline` (seconds and records done, of all starts) and `starts` (when, where, how it ended). It is
written whole by rename, so a reader never sees half of it. This file knows nothing of how records are made.

An earlier run.json may have been written by anybody: whatever is not of the form that a run writes is compared leaf by
leaf, and the difference is told in words. A timeline has a few hundred points at most, about evenly spaced: when there
are too many, every second one goes and the spacing doubles.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

from md3cli.errors import OutputMismatchError
from md3cli.files import atomic_publish
from md3cli.finished.run_json import (
    RECORDS_NAME,
    RUN_INFO_NAME,
    RecordsDigest,
    counts_of,
    kept_digest,
    read_facts,
    seal_of,
    stages_of,
    starts_of,
    timeline_of,
)
from md3cli.records import ID_SCHEME, RecordDict, Request, RunIdentity, Task, id_name, printable, request_id

SHOWN_LIMIT_CHARS = 60
SHOWN_BEFORE_CHARS = 20  # of a long text, before the first character in which it differs from another
MOST_REQUESTS_SHOWN = 6  # in one message
RUN_FOLDER, FORMER = ".md3run", "-former"
_WHAT_IS_ASKED = frozenset({"task", "prompt"})
_NAMES = {"ids": "the way in which ids are made", "root": "the folder of INPUT", "inputs": "INPUT"}
MAX_POINTS, FIRST_SPACING_S = 240, 0.5  # of a timeline
RUN_SCHEMA = "md3-run/1"
STARTS_KEPT = 1000
_PACKAGES = ("md3cli", "torch", "tokenizers", "safetensors", "numpy", "pillow", "pyarrow")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return how two runs differ, a phrase each: `temperature 0, now 0.3`; empty where they do not.

    `old` and `new` are identities (run_info.py) or configurations of plans (scale/plan.py), which hold one.
    """
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if key == "requests" and _are_requests(before) and _are_requests(now):
            found += _of_requests(before, now)
        elif isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now)
        else:
            found.append(f"{_NAMES.get(key, _option(key))} {change(before, now)}")
    return found


def change(before: Any, now: Any) -> str:
    """Return `0, now 0.3`; of long texts only the places in which they differ."""
    before, now = _text(before), _text(now)
    return f"{_cut(before, [now])}, now {_cut(now, [before])}"


def asked_otherwise(before: Sequence[str], now: Sequence[str]) -> str:
    """Return `it has detect circle; you now ask detect star as well`, of the names of requests, which differ."""
    more, less = list((Counter(now) - Counter(before)).elements()), list((Counter(before) - Counter(now)).elements())
    has = f"it has {_listed(before, now)}"
    if not more and not less:
        return f"{has}; you now ask the same in another order: {_listed(now, before)}"
    if before and not less:
        return f"{has}; you now ask {_listed(more, before)} as well"
    if not more:
        return f"{has}; you now ask {'only ' if now else ''}{_listed(now, before)}"
    return f"{has}; you now ask {_listed(now, before)}"


def name_of(request: Mapping[str, Any]) -> str:
    """Return how a request is called: `detect circle`, `caption short`, `query "How many?"`."""
    task, prompt = _text(request.get("task")), request.get("prompt")
    if task == Task.CAPTION:
        return f"{task} {_text(request.get('length'))}"
    return f'{task} "{_text(prompt)}"' if task == Task.QUERY else f"{task} {_text(prompt)}"


def _are_requests(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(request, dict) for request in value)


def _of_requests(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    names_before, names_now = [name_of(request) for request in before], [name_of(request) for request in now]
    found = [] if names_before == names_now else [asked_otherwise(names_before, names_now)]
    earlier = dict(zip(names_before, before, strict=True))
    settings: dict[str, list[str]] = {}
    for name, request in zip(names_now, now, strict=True):
        for phrase in _of_settings(earlier.get(name, request), request):
            settings.setdefault(phrase, []).append(name)
    for phrase, names in settings.items():
        is_of_all = len(names) == len(names_now)
        found.append(phrase if is_of_all else f"{phrase} for {_listed(names, names)}")
    return found


def _of_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in now if key not in _WHAT_IS_ASKED and before.get(key) != now[key]]
    if str(now.get("task")) == Task.CAPTION:
        keys = [key for key in keys if key != "length"]  # it is in the name
    return [f"{_option(key)} {change(before.get(key), now[key])}" for key in keys]


def _option(key: str) -> str:
    return printable(key.replace("_", "-"))


def _text(value: Any) -> str:
    """Return a value as a person would write it."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cut(text: str, others: Sequence[str]) -> str:
    """Return `text`, or of a long one the part that tells it from `others`."""
    if len(text) <= SHOWN_LIMIT_CHARS:
        return text
    start = max((_same_chars(text, other) for other in others if other != text), default=0) - SHOWN_BEFORE_CHARS
    start = start if start + SHOWN_BEFORE_CHARS >= SHOWN_LIMIT_CHARS - 1 else 0
    part = text[start : start + SHOWN_LIMIT_CHARS]
    return f"{'…' if start else ''}{part}{'…' if start + SHOWN_LIMIT_CHARS < len(text) else ''}"


def _same_chars(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    """Return `a, b and c`; of many the first few. Each is cut so that it differs from `others` and its neighbours."""
    if not names:
        return "what the rows of a manifest say"
    unlike = [*others[: 2 * MOST_REQUESTS_SHOWN], *names[: 2 * MOST_REQUESTS_SHOWN]]
    shown = [_cut(name, unlike) for name in names[:MOST_REQUESTS_SHOWN]]
    if len(names) > MOST_REQUESTS_SHOWN:
        return f"{', '.join(shown)} and {len(names) - MOST_REQUESTS_SHOWN:,} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


class Timeline:
    """Points (seconds since the run began, records done); those of later starts stand behind those of earlier ones."""

    def __init__(self, earlier: Sequence[tuple[float, int]] = ()) -> None:
        self._points = list(earlier)
        self._start_s, self._start_done = self._points[-1] if self._points else (0.0, 0)
        self._spacing_s = FIRST_SPACING_S

    @property
    def points(self) -> list[tuple[float, int]]:
        """A copy of all points, the latest last."""
        return list(self._points)

    def note(self, elapsed_s: float, num_done: int, *, is_last: bool = False) -> None:
        """Note that this start has done `num_done` records after `elapsed_s` seconds; cheap to call often.

        `is_last`: nothing more will be done, so the point counts however near it is; writing the outputs
        afterwards is no part of the throughput.
        """
        point = (round(self._start_s + elapsed_s, 3), self._start_done + num_done)
        if self._points:
            last_s, last_done = self._points[-1]
            if point[1] == last_done if is_last else point[0] < last_s + self._spacing_s:
                return
        self._points.append(point)
        while len(self._points) > MAX_POINTS:
            last = self._points[-1]
            self._points = [*self._points[:-1:2], last]
            self._spacing_s = max(2 * self._spacing_s, last[0] / MAX_POINTS)


@dataclass(frozen=True, slots=True)
class OutputPaths:
    """The files of a run beside (or inside) OUTPUT; `run_folder` is what many processes share."""

    journal: Path
    run_info: Path
    lock: Path
    run_folder: Path

    @property
    def has_run_folder(self) -> bool:
        """Whether many processes have shared a run into OUTPUT, also one that a start over has set aside."""
        former = self.run_folder.with_name(self.run_folder.name + FORMER)
        return os.path.lexists(self.run_folder) or os.path.lexists(former)


def output_paths(output: Path, *, is_folder: bool, is_journal: bool) -> OutputPaths:
    """Return where a run's own files stand for OUTPUT.

    `is_folder`: OUTPUT is a run folder. `is_journal`: OUTPUT is the records file itself.
    """
    if is_folder:
        lock = output / f"{RECORDS_NAME}.lock"
        return OutputPaths(output / RECORDS_NAME, output / RUN_INFO_NAME, lock, output / RUN_FOLDER)
    names = (RECORDS_NAME, RUN_INFO_NAME, "lock")
    beside, run_info, lock = (output.with_name(f"{output.name}.{name}") for name in names)
    run_folder = output.with_name(output.name + RUN_FOLDER)
    return OutputPaths(output if is_journal else beside, run_info, lock, run_folder)


def identity_of(
    requests: Sequence[Request], run: RunIdentity, root: str, columns: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what two runs must share for the second to resume the first, as JSON.

    `columns` is what is made of the rows' columns (`ColumnOptions.identity`).
    """
    asked = [asdict(request) for request in requests]
    return _as_json({"ids": ID_SCHEME, "requests": asked, **asdict(run), "root": _exact(root), **(columns or {})})


def _exact(path: str) -> str:
    """Return a path that still opens when it is read back; only bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` as it comes back from a file: tuples are lists, task names are strings."""
    document: dict[str, Any] = json.loads(json.dumps(value))
    return document


@dataclass(slots=True)
class RunCounts:
    """Requests by outcome, over all starts."""

    ok: int = 0
    failed: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)


class RunDocument:
    """run.json of the run under way; held by the process that holds the output's lock."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self._path = path
        self._document = document
        self._started_at = time.monotonic()
        self.is_held = False
        self._stages_before: dict[str, float] = dict(document["stages"])

    @classmethod
    def begin(
        cls,
        path: Path,
        *,
        identity: Mapping[str, Any],
        arguments: Sequence[str],
        root: str,
        is_resume: bool,
        num_records_found: int = 0,
        shown: str | None = None,
        is_held: bool = False,
    ) -> RunDocument:
        """Note a start in `path`, on top of what an earlier start left there; a user knows it as `shown`.

        `is_held`: nothing is written before `release`.

        Raises:
            OutputMismatchError: `is_resume`, and the earlier run was another; names the differences.
            OutputError: it cannot be written.
        """
        earlier = read_facts(path, RUN_SCHEMA) if is_resume else {}
        if "identity" in earlier:
            _refuse_other(shown or str(path), earlier["identity"], _as_json(identity))
        start = {
            "started": utc_now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "arguments": [printable(argument) for argument in arguments],
            "records_found": num_records_found,
            "ended": None,
            "elapsed_s": None,
            "exit_status": None,
        }
        document = {
            "schema": RUN_SCHEMA,
            "identity": _as_json(identity),
            "versions": _versions(),
            "model": identity.get("model"),
            "root": _exact(root),
            "seal": seal_of(_exact(root)),
            "arguments": start["arguments"],
            "counts": counts_of(earlier),
            "stages": stages_of(earlier),
            "timeline": timeline_of(earlier),
            "starts": [*starts_of(earlier), start][-STARTS_KEPT:],
        }
        if (records := kept_digest(earlier)) is not None:
            document["records"] = asdict(records)
        run = cls(path, document)
        run.is_held = is_held
        run._write()
        return run

    @property
    def timeline(self) -> list[tuple[float, int]]:
        """Points of earlier starts: seconds and records done."""
        return timeline_of({"timeline": [list(point) for point in self._document["timeline"]]})

    def note_records(self, digest: RecordsDigest) -> None:
        """Keep the digest that the records file has at the end of a run; `finish` writes it."""
        self._document["records"] = asdict(digest)

    @property
    def has_records(self) -> bool:
        """Whether a digest of the records file is kept, of when the run was last finished."""
        return "records" in self._document

    def forget_records(self) -> None:
        """Write, before the records file is replaced, that nothing is known of it.

        Raises:
            OutputError: it cannot be written.
        """
        if self._document.pop("records", None) is not None:
            self._write()

    def finish(
        self,
        counts: RunCounts,
        stages_s: Mapping[str, float],
        exit_status: int | None,
        timeline: Sequence[tuple[float, int]] = (),
        batch_sizes: Sequence[int] = (),
    ) -> None:
        """Note how this start ended; seconds by stage are added to those of earlier starts.

        `exit_status` None: all records are there, files are still to be made of them. `timeline` replaces
        what earlier starts left, which it begins with. `batch_sizes`: the planned one, and each smaller one
        after the device ran out of memory.

        Raises:
            OutputError: it cannot be written.
        """
        stages = dict(self._stages_before)
        for stage, seconds in stages_s.items():
            stages[stage] = round(stages.get(stage, 0.0) + seconds, 3)
        self._document["counts"] = asdict(counts)
        self._document["stages"] = stages
        self._document["timeline"] = [list(point) for point in timeline]
        elapsed_s = round(time.monotonic() - self._started_at, 3)
        ending = {"ended": utc_now(), "elapsed_s": elapsed_s, "exit_status": exit_status}
        self._document["starts"][-1] |= {**ending, "batch_sizes": list(batch_sizes)}
        self._write()

    def release(self) -> None:
        """Write what was held back, and hold back nothing more.

        Raises:
            OutputError: it cannot be written.
        """
        self.is_held = False
        self._write()

    def _write(self) -> None:
        if self.is_held:
            return
        text = json.dumps(self._document, ensure_ascii=False, indent=1)
        with atomic_publish(self._path) as temp:
            temp.write_text(text + "\n", encoding="utf-8")


def utc_now() -> str:
    """Return the time as 2026-11-27T07:49:51+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _refuse_other(shown: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if found := differences(old, new):
        hint = _rename_hint(str(old.get("model")), str(new.get("model")))
        raise OutputMismatchError(
            f"OUTPUT was begun by another run ({printable(shown)}): {'; '.join(found)}. {hint}"
            "Choose another -o, repeat the earlier command, or --overwrite to start over"
        )


def _rename_hint(old: str, new: str) -> str:
    """Return what to do about a checkpoint that may only have been renamed."""
    # A name must count: the revision is of headers and sizes, so that two steps of one training share it.
    if old == new or old.rpartition("@")[2] != new.rpartition("@")[2]:
        return ""
    return f"If it is the same checkpoint, give it its earlier name, {printable(old.rpartition('@')[0])}. "


def check_first_record(record: RecordDict, requests: Sequence[Request], run: RunIdentity) -> None:
    """Refuse records without a run.json that cannot come from this command; `record` is any first one of them.

    Compares the model; then task and prompt, unless `requests` is empty because a manifest names them; then all
    settings, by the record's id.

    Raises:
        OutputMismatchError: they cannot; names the difference.
    """
    if record.get("model") != run.model:
        _refuse_record(f"model {change(record.get('model'), run.model)}")
    if not requests:
        return
    asked, found = [name_of(asdict(request)) for request in requests], name_of(record)
    if found not in asked:
        _refuse_record(asked_otherwise([found], asked))
    image = record.get("image")
    image = id_name(image, record.get("image_b64")) if image is not None else None
    if record["id"] not in {request_id(image, request, run) for request in requests}:
        _refuse_record(f"the settings of {found}, such as --temperature or --dtype")


def _refuse_record(difference: str) -> None:
    raise OutputMismatchError(
        f"OUTPUT was begun by another run: {difference}. "
        "Choose another -o, repeat the earlier command, or --overwrite to start over"
    )
