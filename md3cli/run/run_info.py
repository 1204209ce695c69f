"""run.json: what a run was asked, with what, how it went; and whether OUTPUT is this run's to resume.

The document's keys: `schema`, `identity` (what must be equal for a resume), `versions`, `model`, `refinement` (names
and thresholds, which later commands use), `root` (the folder that record images are relative to), `seal` (that this
user's md3 wrote the root), `arguments` of the last start, `requests` (how many INPUT has for this command, where it was
counted), `counts`, `stages` (seconds by stage, of all starts), `records` (size and SHA-256 of the records file when the
run was last finished), `timeline` (seconds and records done, of all starts), `starts` (when, where, how it ended) and,
where requests were added to the first ones, `grown`. It is written whole by rename, so a reader never sees half of it.
This file knows nothing of how records are made.

A timeline has a few hundred points at most, about evenly spaced: when there are too many, every second one goes and the
spacing doubles.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from md3cli.config import DEFAULT_PAD
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
from md3cli.records import (
    ID_SCHEME,
    RecordDict,
    Request,
    RunIdentity,
    id_name,
    printable,
    request_fields,
    request_id,
)
from md3cli.refine.refinement import Refinement
from md3cli.run.asked import asked_otherwise, change, differences, is_grown, name_of, way_on, with_asked_of

RUN_FOLDER, FORMER = ".md3run", "-former"
MAX_POINTS, FIRST_SPACING_S = 240, 0.5  # of a timeline
RUN_SCHEMA = "md3-run/1"
_DEFAULTS = "defaults"  # in an identity: settings of rows that bring all that is asked
STARTS_KEPT = 1000
_PACKAGES = ("md3cli", "torch", "tokenizers", "safetensors", "numpy", "pillow", "pyarrow")


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
    requests: Sequence[Request],
    run: RunIdentity,
    root: str,
    columns: Mapping[str, Any] | None = None,
    defaults: Request | None = None,
) -> dict[str, Any]:
    """Return what two runs must share for the second to resume the first, as JSON.

    `columns` is what is made of the rows' columns (`ColumnOptions.identity`). `defaults` has the settings of rows that
    bring all that is asked; they count where the command makes no request.
    """
    asked = [request_fields(request) for request in requests]
    settings = {} if requests or defaults is None else {_DEFAULTS: request_fields(defaults)}
    of_rows = {**(columns or {}), **settings}
    return _as_json({"ids": ID_SCHEME, "requests": asked, **asdict(run), "root": _exact(root), **of_rows})


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
        self._added: dict[str, Any] | None = None  # the identity with what is added, until that is noted
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
        may_add: bool = False,
        is_planned: bool = False,
        is_shared: bool = False,
        may_ask_then: bool = False,
        refinement: Refinement | None = None,
    ) -> RunDocument:
        """Note a start in `path`, on top of what an earlier start left there; a user knows it as `shown`.

        `is_held`: nothing is written before `release`. `may_add`: requests may have come behind those of the earlier
        run, as --add asks. `is_planned`: a plan asks just these, and run.json may say more of what never came about.
        `is_shared`: many processes share the run, and plans cannot be added to in what is asked about objects.
        `may_ask_then`: rows may say themselves what is asked about objects, so that there is room around those.
        `refinement`: what was chosen now; what it leaves open stays as an earlier start chose it.

        Raises:
            OutputMismatchError: `is_resume`, and the earlier run was another; names the differences.
            OutputError: it cannot be written.
        """
        earlier = read_facts(path, RUN_SCHEMA) if is_resume else {}
        old, new = earlier.get("identity"), _as_json(identity)
        has_grown = old is not None and may_add and is_grown(old, new)
        if old is not None:
            before, now = (_with_pad(old), _with_pad(new)) if may_ask_then else (old, new)
            was = {**before, "requests": new["requests"]} if is_planned else before
            was = with_asked_of(before, now, is_pad_kept=True) if has_grown else was
            _refuse_other(shown or str(path), *_with_defaults_of_both(was, now), arguments, is_shared=is_shared)
        start = _start_of(arguments, num_records_found)
        document = {
            "schema": RUN_SCHEMA,
            "identity": with_asked_of(new, old) if old is not None and has_grown else new,
            "versions": _versions(),
            "model": identity.get("model"),
            "refinement": (refinement or Refinement()).over(Refinement.from_json(earlier.get("refinement"))).to_json(),
            "root": _exact(root),
            "seal": seal_of(_exact(root)),
            "arguments": start["arguments"],
            "counts": counts_of(earlier),
            "stages": stages_of(earlier),
            "timeline": timeline_of(earlier),
            "starts": [*starts_of(earlier), start][-STARTS_KEPT:],
        }
        if earlier.get("grown") is True:
            document["grown"] = True
        if (records := kept_digest(earlier)) is not None:
            document["records"] = asdict(records)
        run = cls(path, document)
        run.is_held = is_held
        run._added = new if has_grown else None
        run._write()
        return run

    @property
    def timeline(self) -> list[tuple[float, int]]:
        """Points of earlier starts: seconds and records done."""
        return timeline_of({"timeline": [list(point) for point in self._document["timeline"]]})

    def note_added(self) -> None:
        """Write, before the first record of this start, that what --add adds is asked; a second call does nothing.

        Not sooner, so that what was misspelled is forgotten where the run is stopped while the model is loaded.
        """
        if self._added is not None:
            self._document |= {"identity": self._added, "grown": True}
            self._added = None
            self._write()

    def note_requests(self, total: int | None) -> None:
        """Write how many requests INPUT has for this command, for those who ask how the run is; None: not known."""
        if total is None:
            self._document.pop("requests", None)
        else:
            self._document["requests"] = total
        self._write()

    def note_records(self, digest: RecordsDigest) -> None:
        """Keep the digest that the records file has at the end of a run; `finish` writes it."""
        self._document["records"] = asdict(digest)

    @property
    def has_records(self) -> bool:
        """Whether a digest of the records file is kept, of when the run was last finished."""
        return "records" in self._document

    @property
    def has_grown(self) -> bool:
        """Whether requests were added to those that the run began with."""
        return bool(self._document.get("grown"))

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
        if not self.is_held:
            _write(self._path, self._document)


def note_grown(path: Path, requests: Sequence[Request]) -> None:
    """Note in a run.json that is there, before the first new record, that `requests` are asked now: old ones first.

    Raises:
        OutputError: it cannot be written.
    """
    document = read_facts(path, RUN_SCHEMA)
    asked = _as_json({"requests": [request_fields(request) for request in requests]})
    if document and is_grown(document["identity"], document["identity"] | asked):
        document["identity"] |= asked
        document["grown"] = True
        _write(path, document)


def _start_of(arguments: Sequence[str], num_records_found: int) -> dict[str, Any]:
    """Return the note of a start that has just begun."""
    return {
        "started": utc_now(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "arguments": [printable(argument) for argument in arguments],
        "records_found": num_records_found,
        "ended": None,
        "elapsed_s": None,
        "exit_status": None,
    }


def _write(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, ensure_ascii=False, indent=1)
    with atomic_publish(path) as temp:
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


def _refuse_other(
    shown: str, old: dict[str, Any], new: dict[str, Any], argv: Sequence[str], *, is_shared: bool
) -> None:
    if found := differences(old, new):
        hint = _rename_hint(str(old.get("model")), str(new.get("model")))
        on = way_on(old, new, argv, _output_of(shown), may_add_then=not is_shared)
        raise OutputMismatchError(
            f"OUTPUT was begun by another run ({printable(shown)}): {'; '.join(found)}. {hint}{on}"
            f"{'Or choose' if on else 'Choose'} another -o, repeat the earlier command, or --overwrite to start over"
        )


def _with_pad(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity with the room around objects, which is not written where it is the usual one."""
    return identity | {"pad": identity.get("pad", DEFAULT_PAD)}


def _with_defaults_of_both(old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both without the settings of rows where one has none: it is older, or makes requests itself."""
    if _DEFAULTS in old and _DEFAULTS in new:
        return old, new
    return {k: v for k, v in old.items() if k != _DEFAULTS}, {k: v for k, v in new.items() if k != _DEFAULTS}


def _output_of(run_info: str) -> str:
    """Return how OUTPUT is called beside which a run.json stands, or inside which."""
    folder, name = os.path.split(run_info)
    return folder or "." if name == RUN_INFO_NAME else run_info.removesuffix(f".{RUN_INFO_NAME}")


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
    asked, found = [name_of(request_fields(request)) for request in requests], name_of(record)
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
