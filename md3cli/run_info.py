"""run.json: what a run was asked, with what, how it went; and whether OUTPUT is this run's to resume.

Knows nothing of how records are made. The document's keys: `schema`, `identity` (what must be equal
for a resume), `versions`, `model`, `root` (the folder that record images are relative to), `seal`
(that this user's md3 wrote the root, see own_runs.py), `arguments` of the last start, `counts`, `stages`
(seconds by stage, of all starts), `records` (size and SHA-256 of the records file when the run was last
finished), `timeline` (seconds and records done, of all starts) and `starts` (when, where, how it ended).
Written whole by rename, so a reader never sees half of it.
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

from md3cli.errors import OutputMismatchError
from md3cli.own_runs import seal_of
from md3cli.publish import atomic_publish
from md3cli.records import ID_SCHEME, RecordDict, Request, RunIdentity, id_name, printable, request_id
from md3cli.records_digest import RecordsDigest, kept_digest
from md3cli.run_differences import asked_otherwise, change, differences, name_of
from md3cli.run_facts import counts_of, read_facts, stages_of, starts_of, timeline_of

RUN_SCHEMA = "md3-run/1"
STARTS_KEPT = 1000
RECORDS_NAME = "records.jsonl"
_PACKAGES = ("md3cli", "torch", "tokenizers", "safetensors", "numpy", "pillow", "pyarrow")


@dataclass(frozen=True, slots=True)
class OutputPaths:
    """The files of a run beside (or inside) OUTPUT."""

    journal: Path
    run_info: Path
    lock: Path


def output_paths(output: Path, *, is_folder: bool, is_journal: bool) -> OutputPaths:
    """Where a run's own files stand for OUTPUT.

    `is_folder`: OUTPUT is a run folder. `is_journal`: OUTPUT is the records file itself.
    """
    if is_folder:
        return OutputPaths(output / RECORDS_NAME, output / "run.json", output / f"{RECORDS_NAME}.lock")
    journal = output if is_journal else output.with_name(f"{output.name}.{RECORDS_NAME}")
    return OutputPaths(journal, output.with_name(f"{output.name}.run.json"), output.with_name(f"{output.name}.lock"))


def identity_of(requests: Sequence[Request], run: RunIdentity, root: str) -> dict[str, Any]:
    """What two runs must share for the second to resume the first, as JSON."""
    asked = [asdict(request) for request in requests]
    return _as_json({"ids": ID_SCHEME, "requests": asked, **asdict(run), "root": _exact(root)})


def _exact(path: str) -> str:
    """A path that must still open when it is read back; only bytes that are not UTF-8 are shown as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from a file: tuples are lists, task names are strings."""
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
            "started": _now(),
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
        """What earlier starts left: seconds and records done."""
        return timeline_of({"timeline": [list(point) for point in self._document["timeline"]]})

    def note_records(self, digest: RecordsDigest) -> None:
        """Keep what the records file is at the end of a run; `finish` writes it."""
        self._document["records"] = asdict(digest)

    @property
    def has_records(self) -> bool:
        """Whether it is kept what the records file was when the run was last finished."""
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
        ending = {"ended": _now(), "elapsed_s": elapsed_s, "exit_status": exit_status}
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


def _now() -> str:
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
    """For a checkpoint that may only have been renamed.

    Its name must count: the revision is of headers and sizes, so that two steps of one training share it.
    """
    if old == new or old.rpartition("@")[2] != new.rpartition("@")[2]:
        return ""
    return f"If it is the same checkpoint, give it its earlier name, {printable(old.rpartition('@')[0])}. "


def check_first_record(record: RecordDict, requests: Sequence[Request], run: RunIdentity) -> None:
    """Whether records without a run.json can come from this command; `record` is any first one of them.

    Compared: the model, then for a command that names its requests (`requests` empty: a manifest
    does) task and prompt, then all settings by the record's id.

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
