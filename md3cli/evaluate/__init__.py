"""Records against ground truth: how good is a run, and what changed since another one.

`evaluate` reads both sides and returns a `Section` for each kind of answer that both have: boxes, masks, points,
captions of each length, answers. `compare_runs` sets two runs of the same questions side by side, with ground truth or
without. Knows no torch and opens no picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from md3cli.errors import InputError
from md3cli.evaluate.located import RequestKey, final_records, has_failed, request_key, under_names_of
from md3cli.evaluate.metrics import Metric, check_met, led_by
from md3cli.evaluate.scores import BestThresholds, Section, Verdict, without_infinite
from md3cli.evaluate.truth import Captions, Instances, Questions, Truth, read_document
from md3cli.records import RecordDict, printable
from md3cli.refine.collection import Collection, as_collection, read
from md3cli.refine.labels import Labels
from md3cli.refine.parts import is_of_part, part_name, says_of_part
from md3cli.refine.refinement import iou
from md3cli.refine.selection import Selection

__all__ = [
    "EVAL_SCHEMA",
    "Comparison",
    "Evaluation",
    "Metric",
    "Section",
    "Truth",
    "compare_runs",
    "evaluate",
    "load_truth",
]

EVAL_SCHEMA = "md3-eval/1"
YAML_SUFFIXES = (".yaml", ".yml")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
SCORE_TOLERANCE = 0.002  # what the same model, weights and picture promise
RESULT_KEYS = ("caption", "answer", "reasoning", "objects", "points", "segments")
TEXT_SHOWN = 200
SAME_PART_IOU = 0.5  # of the boxes that two runs call by one name
_CORNERS = ("x_min", "y_min", "x_max", "y_max")


@dataclass(frozen=True, slots=True)
class Change:
    """One request whose record differs.

    `kind`: count, scores, fixed, broken, error, ended, or the key of the result that differs.
    `verdict`: better or worse by the ground truth, where that is known.
    """

    image: str | None
    task: str
    prompt: str
    kind: str
    before: str
    after: str
    verdict: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The other run is `before`, this one `after`."""

    num_same: int
    num_only_before: int
    num_only_after: int
    changes: tuple[Change, ...]
    score_changes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # section -> score -> difference

    @property
    def kinds(self) -> dict[str, int]:
        """The number of changes by kind, the most frequent first."""
        return dict(Counter(change.kind for change in self.changes).most_common())

    @property
    def verdicts(self) -> dict[str, int]:
        """The number of changes for the better and for the worse."""
        return dict(Counter(change.verdict for change in self.changes if change.verdict))

    def to_json(self) -> dict[str, Any]:
        """Return all of the comparison in plain types."""
        document: dict[str, Any] = {"same": self.num_same, "changed": len(self.changes), "kinds": self.kinds}
        document |= {"only_before": self.num_only_before, "only_after": self.num_only_after}
        document |= {"verdicts": self.verdicts, "score_changes": {k: dict(v) for k, v in self.score_changes.items()}}
        return document | {"changes": [asdict(change) for change in self.changes]}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The score sheet of one run."""

    records: Path
    truths: tuple[Path, ...]
    sections: tuple[Section, ...]
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()  # what of the records files was left out
    best: BestThresholds | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the document of `md3 eval --json`; a figure that is not finite is null, as JSON has no other word."""
        document: dict[str, Any] = {"schema": EVAL_SCHEMA, "records": printable(str(self.records))}
        document["ground_truth"] = [printable(str(path)) for path in self.truths]
        document["sections"] = [section.to_json() for section in self.sections]
        if self.best is not None:
            document["best_thresholds"] = self.best.to_json()
        if self.comparison is not None:
            document["comparison"] = self.comparison.to_json()
        return dict(without_infinite(document))


def load_truth(path: Path) -> Truth:
    """Read a ground truth: a table, JSON, a YOLO data.yaml, or a folder of YOLO or labelme files.

    Raises:
        InputError: it cannot be read, or is of no known kind; the message says which kinds there are.
    """
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        from md3cli.evaluate.truth_rows import read_table  # which loads pyarrow's world

        return read_table(path)
    if suffix in YAML_SUFFIXES or path.is_dir():
        from md3cli.evaluate.truth_folders import read_folder

        return read_folder(path)
    return read_document(path, _labelme_of)


def _labelme_of(path: Path, document: Mapping[str, Any]) -> Instances:
    from md3cli.evaluate.truth_folders import labelme_of

    return labelme_of(path, document)


def evaluate(
    records: Path | Collection, truths: Sequence[Truth], metrics: Sequence[Metric] = (), *, answer: str | None = None
) -> Evaluation:
    """Score the records of a file, or those that are selected of a collection.

    A verdict is about all of a collection, selected or not: what another prompt of the name found is not missed.

    Args:
        metrics: what the sections that have them are led by, the first one mainly.
        answer: the column of the records' `meta` that holds true answers or captions.

    Raises:
        InputError: records and ground truth have nothing in common.
        UsageError: a metric has nothing here that it could be of, or no record has the column.
        MissingExtraError: objects are to be scored and faster-coco-eval is not installed.
    """
    records, notes = as_collection(records), list[str]()
    selected = final_records(read(records, notes))
    taken = _of_wholes(selected, notes)
    if selected and not taken:
        raise InputError(
            f"nothing to score: {printable(str(records.path))} holds only texts about parts of pictures, and what is "
            "known to be true is of whole pictures"
        )
    truths = [*truths, *_own_truths(taken, answer)]
    sections = _sections(taken, truths, records, metrics)
    if sections:
        check_met(metrics, sections, (str(record["task"]) for record in taken))
    else:
        notes.append("nothing is selected, so nothing is scored")
    is_shared = any(len(label.prompts) > 1 for label in records.refinement.labels.labels)
    if is_shared and not records.selection.takes_all:
        whole = replace(records, selection=Selection())
        verdicts = _verdicts(_sections(_of_wholes(final_records(read(whole))), truths, whole, metrics))
        sections = [
            replace(one, verdicts={key: verdicts.get(key, own) for key, own in one.verdicts.items()})
            for one in sections
        ]
    return Evaluation(records.path, tuple(truth.path for truth in truths), tuple(sections), notes=tuple(notes))


def compare_runs(
    records: Path | Collection,
    other: Path | Collection,
    truths: Sequence[Truth],
    metrics: Sequence[Metric] = (),
    *,
    answer: str | None = None,
) -> Evaluation:
    """Score the records of a file, and say what changed since the run `other`; without a truth say the changes alone.

    Where `records` are a selection, only their requests are looked at in `other`. True answers in a column of `meta`
    are those of `records`, for both.

    Raises:
        InputError, UsageError, MissingExtraError: as `evaluate` does.
    """
    records, other = as_collection(records), as_collection(other)
    notes, earlier_notes = list[str](), list[str]()
    after = final_records(read(records, notes))
    before = final_records(read(other, earlier_notes))
    scored = _of_wholes(after, notes if truths or answer is not None else [])
    truths = [*truths, *_own_truths(scored, answer)]
    notes += [f"{printable(str(other.path))}: {note}" for note in earlier_notes]
    if not records.selection.takes_all:  # what was not selected is no difference
        selected = set(map(request_key, after))
        before = [record for record in before if request_key(record) in selected]
    sections = _sections(scored, truths, records, metrics) if truths else []
    earlier = _sections(_of_wholes(before), truths, other, metrics) if truths else []
    if sections:
        check_met(metrics, sections, (str(record["task"]) for record in scored))
    comparison = compare(before, after, earlier, sections)
    return Evaluation(records.path, tuple(truth.path for truth in truths), tuple(sections), comparison, tuple(notes))


def _of_wholes(records: Sequence[RecordDict], notes: list[str] | None = None) -> list[RecordDict]:
    """Return the records without words about parts of pictures: what is known to be true is of whole pictures."""
    kept = [record for record in records if not says_of_part(record)]
    num_left_out = len(records) - len(kept)
    if num_left_out and notes is not None:
        texts = "1 text" if num_left_out == 1 else f"{num_left_out:,} texts"
        notes.append(f"{texts} about parts of pictures not scored: what is known to be true is of whole pictures")
    return kept


def _own_truths(records: Sequence[RecordDict], column: str | None) -> Sequence[Truth]:
    if column is None:
        return ()
    from md3cli.evaluate.truth_rows import truths_in_meta  # which brings readers of tables

    return truths_in_meta(records, column)


def _sections(
    records: Sequence[RecordDict], truths: Sequence[Truth], collection: Collection, metrics: Sequence[Metric]
) -> list[Section]:
    if not records:  # of an empty selection, or of its file
        return []
    labels = collection.refinement.labels
    sections = [
        led_by(section, metrics)
        for truth in truths
        for section in _score(under_names_of(truth.rows, truth.path.name, records), truth, labels, metrics)
    ]
    if not sections:
        tasks = ", ".join(dict.fromkeys(str(record["task"]) for record in records)) or "nothing"
        raise InputError(
            f"nothing to score: {printable(str(collection.path))} holds {tasks}; boxes and masks score detect, segment "
            "and point, captions score caption, questions score query"
        )
    return sections


def _score(records: Sequence[RecordDict], truth: Truth, labels: Labels, metrics: Sequence[Metric]) -> list[Section]:
    by_task: dict[str, list[RecordDict]] = {}
    for record in records:
        by_task.setdefault(str(record["task"]), []).append(record)
    match truth:
        case Instances():
            from md3cli.evaluate.boxes import score_boxes, score_masks, score_points

            sections = []
            if "detect" in by_task:
                sections.append(score_boxes(by_task["detect"], truth, labels, metrics))
            if "segment" in by_task:
                sections.append(score_masks(by_task["segment"], truth, labels, metrics))
            if "point" in by_task:
                sections.append(score_points(by_task["point"], truth, labels))
            return sections
        case Captions():
            from md3cli.evaluate.captions import score_captions

            return list(score_captions(by_task.get("caption", []), truth))
        case Questions():
            from md3cli.evaluate.answers import score_answers

            return [score_answers(by_task["query"], truth, metrics)] if "query" in by_task else []


# ---- two runs -------------------------------------------------------------------------------------


def compare(
    before: Sequence[RecordDict],
    after: Sequence[RecordDict],
    sections_before: Sequence[Section] = (),
    sections_after: Sequence[Section] = (),
) -> Comparison:
    """Compare the final records of two runs by request; the sections say what the ground truth holds of each record."""
    old, new = _by_request(before), _by_request(after)
    for key in [key for key in new if key in old and not _are_of_one_part(old[key], new[key])]:
        old[("another part", *key)] = old.pop(key)
    was_right, is_right = _rights(sections_before), _rights(sections_after)
    changes = []
    for key in (key for key in new if key in old):
        record = new[key]
        kind = kind_of_change(old[key], new[key])
        if kind is not None:
            verdict = _verdict(was_right.get(old[key]["id"]), is_right.get(new[key]["id"]))
            part = f"{part_name(record['region'])}: " if is_of_part(record) else ""
            asked = (record["image"], str(record["task"]), f"{part}{str(record.get('prompt') or '').strip()}")
            changes.append(Change(*asked, kind, summary(old[key]), summary(record), verdict))
    num_common = sum(key in old for key in new)
    return Comparison(
        num_common - len(changes),
        len(old) - num_common,
        len(new) - num_common,
        tuple(changes),
        _score_changes(sections_before, sections_after),
    )


def _by_request(records: Sequence[RecordDict]) -> dict[tuple[object, ...], RecordDict]:
    """Return records by what is asked; of several about parts of one name each has its number."""
    counts: Counter[RequestKey] = Counter()
    found: dict[tuple[object, ...], RecordDict] = {}
    for record in records:
        key = request_key(record)
        found[(key, counts[key] if is_of_part(record) else 0)] = record
        counts[key] += 1
    return found


def _are_of_one_part(one: RecordDict, other: RecordDict) -> bool:
    """Return whether two records of a name are about one thing: runs may find others, or in another order."""
    if not is_of_part(one):
        return True
    first, second = (tuple(record["region"][name] for name in _CORNERS) for record in (one, other))
    return first == second or iou(first, second) >= SAME_PART_IOU


def _verdicts(sections: Sequence[Section]) -> dict[str, Verdict]:
    return {record: verdict for section in sections for record, verdict in section.verdicts.items()}


def _rights(sections: Sequence[Section]) -> dict[str, bool]:
    return {record: verdict.is_right for record, verdict in _verdicts(sections).items()}


def _verdict(before: bool | None, after: bool | None) -> str | None:
    if before is None or after is None or before == after:
        return None
    return "better" if after else "worse"


def _score_changes(before: Sequence[Section], after: Sequence[Section]) -> dict[str, dict[str, float]]:
    old = {section.name: section.scores for section in before}
    changes: dict[str, dict[str, float]] = {}
    for section in after:
        for name, value in section.scores.items():
            earlier = old.get(section.name, {}).get(name)
            if value is not None and earlier is not None:
                changes.setdefault(section.name, {})[name] = value - earlier
    return changes


def kind_of_change(before: RecordDict, after: RecordDict) -> str | None:
    """Return how two records of one request differ; None where they are equal."""
    if has_failed(before) or has_failed(after):
        if has_failed(before) and has_failed(after):
            return None if before["error"].get("type") == after["error"].get("type") else "error"
        return "fixed" if has_failed(before) else "broken"
    for key in RESULT_KEYS:
        old, new = before.get(key), after.get(key)
        if is_equal(old, new):
            continue
        if isinstance(old, list) and isinstance(new, list):
            if len(old) != len(new):
                return "count"
            return "scores" if _without_scores(old) == _without_scores(new) else "objects"
        return key
    return None if before.get("finish_reason") == after.get("finish_reason") else "ended"


def is_equal(before: Any, after: Any) -> bool:
    """Return whether both are equal, but for scores that differ by the tolerance."""
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(
            is_equal(before[key], after[key]) or (key == "score" and _is_close(before[key], after[key]))
            for key in before
        )
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(is_equal, before, after))
    return bool(before == after)


def _is_close(before: Any, after: Any) -> bool:
    is_number = isinstance(before, (int, float)) and isinstance(after, (int, float))
    return is_number and abs(before - after) <= SCORE_TOLERANCE + 1e-9  # 0.931 - 0.929 is a little more than 0.002


def _without_scores(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in thing.items() if key != "score"} for thing in found]


def summary(record: RecordDict) -> str:
    """Return a record's result in a few words."""
    if has_failed(record):
        return f"failed: {record['error'].get('type')}"
    for key in ("answer", "caption"):
        if record.get(key) is not None:
            return str(record[key])[:TEXT_SHOWN]
    found: list[dict[str, Any]] = next((record[key] for key in ("objects", "points", "segments") if key in record), [])
    scores = ", ".join(f"{thing['score']:.3f}" for thing in found[:8] if thing.get("score") is not None)
    more = ", …" if len(found) > 8 else ""
    return f"{len(found)} found" + (f" ({scores}{more})" if scores else "")
