"""A finished or an interrupted run read back: where its records are, what its run.json says, and whether to believe it.

The folder may come from a stranger, from an editor or from a failing disk: a value that is missing or of another type
is as good as absent, and nothing is read without a limit. run/run_info.py writes what is read here.

What the folder of the pictures opens, or writes, is the user's own disk. So a run seals that root with a key that never
leaves the user's cache folder, and a root without its seal is only a claim. What a claim may do is not known here.

The records' size and SHA-256 at the end of a run tell a change inside a value, which leaves a whole record. A start
that goes on appends: what was there when the run was finished before is still the beginning of the file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from md3cli.errors import InputError, OutputMismatchError
from md3cli.records import printable
from md3cli.settings import user_cache_dir

RECORDS_NAME, RUN_INFO_NAME = "records.jsonl", "run.json"  # in a run folder
SELECTION_SCHEMA = "md3-selection/1"  # of the run.json beside what `md3 select` wrote
SIZE_LIMIT_BYTES = 64 * 2**20  # of a run.json
KEY_NAME = "own-runs.key"
_KEY_BYTES = 32
_DEPTH_LIMIT = 20  # a manifest's requests are nested four deep
_STAGES_LIMIT = 100
_POINTS_LIMIT = 10_000
_ROOTS_LIMIT = 1000
_BLOCK_BYTES = 1 << 20
_FINISHED = (0, 3)


def seal_of(root: str) -> str | None:
    """Return the seal for a root, or for another text that is no root.

    None where this user's key can be neither read nor made (no home to write to).
    """
    key = _key(may_make=True)
    return None if key is None else _digest(key, root)


def is_own(root: str, seal: object) -> bool:
    """Return whether `seal` is this user's for `root`."""
    key = _key(may_make=False)
    if key is None or not isinstance(seal, str):
        return False
    return hmac.compare_digest(_digest(key, root).encode(), seal.encode("utf-8", "surrogatepass"))


def _digest(key: bytes, root: str) -> str:
    return hmac.new(key, root.encode("utf-8", "surrogatepass"), "sha256").hexdigest()


def _key(*, may_make: bool) -> bytes | None:
    try:
        path = user_cache_dir() / KEY_NAME
        if may_make and not path.exists():
            _make(path)
        key = path.read_bytes()
    except (OSError, RuntimeError):  # the latter: no home folder at all
        return None
    return key if len(key) == _KEY_BYTES else None


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # another run was faster
        return
    with open(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))


def read_facts(path: Path, schema: str) -> dict[str, Any]:
    """Return the document at `path`; empty where it is missing or not ours (then the records decide).

    Raises:
        OutputMismatchError: it is larger than any that md3 writes.
    """
    document = read_document(path)
    is_ours = document.get("schema") == schema and isinstance(document.get("identity"), dict)
    return document if is_ours and _is_flat(document["identity"]) else {}


def read_document(path: Path) -> dict[str, Any]:
    """Return the JSON object at `path`, whoever wrote it; empty where there is none.

    Raises:
        OutputMismatchError: it is larger than any that md3 writes.
    """
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > SIZE_LIMIT_BYTES:
            raise OutputMismatchError(
                f"{printable(str(path))} has more than {SIZE_LIMIT_BYTES >> 20} MiB, which no run writes; "
                "move it away, or choose another -o"
            )
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_flat(value: Any) -> bool:
    """Return whether lists and objects are nested no deeper than ours; level by level, so that nothing recurses."""
    level = [value]
    for _ in range(_DEPTH_LIMIT):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return True
    return False


def number_of(value: Any, most: float = math.inf) -> float | None:
    """Return a finite number from 0 to `most` that is no flag; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) and 0 <= value <= most else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def stages_of(document: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each stage."""
    stages = document.get("stages")
    found = {name: number_of(value) for name, value in stages.items()} if isinstance(stages, dict) else {}
    return {name: value for name, value in list(found.items())[:_STAGES_LIMIT] if value is not None}


def timeline_of(document: dict[str, Any]) -> list[tuple[float, int]]:
    """Return pairs of seconds and records done, as far as both are numbers."""
    timeline = document.get("timeline")
    pairs = timeline[-_POINTS_LIMIT:] if isinstance(timeline, list) else []
    numbers = [tuple(map(number_of, pair)) for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    return [(at_s, int(done)) for at_s, done in numbers if at_s is not None and done is not None]


def starts_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the notes of earlier starts: of each note what is a text, a number, null, or a list of such."""
    starts = document.get("starts")
    notes = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    return [{key: value for key, value in note.items() if _is_plain(value)} for note in notes]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(item is None or isinstance(item, str) or number_of(item) is not None for item in value)
    return value is None or isinstance(value, str) or number_of(value) is not None


def counts_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the requests by outcome; None where they are not counts."""
    counts = document.get("counts")
    if not isinstance(counts, dict) or not isinstance(counts.get("errors"), dict):
        return None
    values = [counts.get("ok"), counts.get("failed"), *counts["errors"].values()]
    return counts if all(number_of(value) is not None for value in values) else None


def find_records(path: Path) -> Path:
    """Return the records file that `path` names: itself, the one in a run folder, or the journal beside a document.

    Raises:
        InputError: there is none.
    """
    beside = path.with_name(f"{path.name}.{RECORDS_NAME}") if path.name else path
    found = path / RECORDS_NAME if path.is_dir() else beside if beside.is_file() else path
    if not found.is_file():
        raise InputError(f"no records at {printable(str(found))}; give the .jsonl file or the folder of a run")
    return found


class KnownRoot(NamedTuple):
    """The folder (or tar) that names of pictures which begin with `prefix` are relative to, behind it.

    `is_own`: this user's md3 wrote it; else it is only claimed, perhaps by a stranger.
    """

    path: Path
    is_own: bool
    prefix: str


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What stands in run.json; empty where there is none (records made elsewhere)."""

    document: dict[str, Any]

    @property
    def root(self) -> Path | None:
        """Return the folder (or tar) that record images are relative to; an address is none."""
        return next((root.path for root in self.roots), None)

    @property
    def is_own(self) -> bool:
        """Return whether this user's md3 wrote the root; else it is only claimed, perhaps by a stranger."""
        return all(root.is_own for root in self.roots)

    @property
    def roots(self) -> list[KnownRoot]:
        """Return where the pictures are; records that were selected from several runs have several roots."""
        entries = [entry for entry in self._list("roots")[:_ROOTS_LIMIT] if isinstance(entry, dict)]
        return [known for entry in [self.document, *entries] if (known := _known_root(entry)) is not None]

    @property
    def prefixes(self) -> list[str]:
        """Return what stands before the names of pictures; the empty text where nothing does."""
        return list(dict.fromkeys(root.prefix for root in self.roots)) or [""]

    @property
    def elapsed_s(self) -> float | None:
        """Return the seconds that all starts together took; None while they are not known.

        Of ranks that share a run, run.json tells only how long the last took to join their records.
        """
        timeline = self.timeline
        if timeline and not timeline[-1][1]:
            return None
        spans = [_whole_number(start.get("elapsed_s")) for start in self._list("starts") if isinstance(start, dict)]
        return sum(spans) or None

    @property
    def stages_s(self) -> dict[str, float]:
        """Return the seconds of each stage, all starts together."""
        stages = self.document.get("stages")
        return {str(stage): _whole_number(value) for stage, value in stages.items()} if isinstance(stages, dict) else {}

    @property
    def timeline(self) -> list[tuple[float, float]]:
        """Return (seconds since the start, records done) pairs in order; empty where the run kept none."""
        pairs = [pair for pair in self._list("timeline") if isinstance(pair, list) and len(pair) == 2]
        return [(_whole_number(seconds), _whole_number(done)) for seconds, done in pairs]

    def _list(self, key: str) -> list[Any]:
        value = self.document.get(key)
        return value if isinstance(value, list) else []


def _known_root(entry: dict[str, Any]) -> KnownRoot | None:
    root, prefix = entry.get("root"), entry.get("prefix", "")
    if not isinstance(root, str) or not root or "://" in root or "\0" in root or not isinstance(prefix, str):
        return None
    return KnownRoot(Path(root), is_own(root, entry.get("seal")), prefix)


def _whole_number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
    except OverflowError:  # an integer of hundreds of digits
        return 0.0


def load_run_info(records_path: Path) -> RunInfo:
    """Read run.json of the run that wrote `records_path`.

    Beside `records.jsonl` it is `run.json`; beside `OUT` it is `OUT.run.json`, and beside the
    journal `OUT.records.jsonl` as well.

    Raises:
        InputError: the file is there and is not JSON.
    """
    for path in run_info_paths(records_path):
        if path.is_file():
            try:
                with path.open("rb") as file:
                    document = json.loads(file.read(SIZE_LIMIT_BYTES))  # of a longer one half is no JSON
            except OSError as error:
                raise InputError(f"cannot read {printable(str(path))}: {error.strerror or error}") from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{printable(str(path))} is not JSON ({error}); remove it to go on without") from error
            return RunInfo(document if isinstance(document, dict) else {})
    return RunInfo({})


def has_run_info(records_path: Path) -> bool:
    """Return whether the records' own run.json stands beside them, as md3 writes it. Raises as `load_run_info`."""
    return str(load_run_info(records_path).document.get("schema", "")).startswith(("md3-run/", SELECTION_SCHEMA))


def run_info_paths(records_path: Path) -> Iterator[Path]:
    """Yield the places of the run.json of a records file, the likelier first."""
    name = records_path.name
    yield records_path.with_name(RUN_INFO_NAME if name == RECORDS_NAME else f"{name}.{RUN_INFO_NAME}")
    if name.endswith(f".{RECORDS_NAME}"):
        yield records_path.with_name(name.removesuffix(RECORDS_NAME) + RUN_INFO_NAME)


@dataclass(frozen=True, slots=True)
class RecordsDigest:
    """What a finished run left; `bytes` is the size of its records file."""

    bytes: int
    sha256: str


def digest_of_file(path: Path, limit: int | None = None) -> RecordsDigest:
    """Read a records file, or its first `limit` bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES if limit is None else min(_BLOCK_BYTES, limit - num_bytes)):
            digest.update(block)
            num_bytes += len(block)
    return RecordsDigest(num_bytes, digest.hexdigest())


def kept_digest(document: dict[str, Any]) -> RecordsDigest | None:
    """Return what run.json says; None where it says nothing, or nothing sensible."""
    kept = document.get("records")
    if not isinstance(kept, dict):
        return None
    size, sha256 = kept.get("bytes"), kept.get("sha256")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        return None
    if not isinstance(sha256, str) or re.fullmatch("[0-9a-f]{64}", sha256) is None:
        return None
    return RecordsDigest(size, sha256)


def is_finished(document: dict[str, Any]) -> bool:
    """Return whether the last start that run.json tells of came to the end of its work."""
    starts = document.get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else None
    status = last.get("exit_status") if isinstance(last, dict) else None
    return isinstance(status, int) and status in _FINISHED


def change_since(document: dict[str, Any], records: Path) -> str | None:
    """Return in words how a records file is not what its finished run left; None where nothing is known of a change.

    Raises:
        OSError: it cannot be read.
    """
    kept = kept_digest(document)
    if kept is None:
        return None
    size = os.stat(records).st_size
    if size < kept.bytes or (size > kept.bytes and is_finished(document)):
        return f"it had {kept.bytes:,} bytes when the run was finished and has {size:,}"
    if digest_of_file(records, kept.bytes) != kept:
        return "its bytes are not those of when the run was finished"
    return None
