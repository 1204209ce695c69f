"""What must be covered on pictures before they are shown, and which pictures have an answer to all of it.

A label is answered on a picture if everything that is asked for it, anywhere in the collection, was asked of the
picture and answered: by detect and by segment where both were used, each prompt of its name, each template. What a
run was to ask counts although no record came of it: an interrupted run proves nothing, and one that rows of a manifest
ask is refused. Answers that were cut off, and those about a part of a picture, are none. When in doubt a picture is not
complete. Opens no picture.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from md3cli.errors import UsageError
from md3cli.exporters import ExportOptions
from md3cli.exporters.grouping import ImageGroup, image_key
from md3cli.exporters.svg_path import segment_polygons
from md3cli.finished.records_file import disk_trouble_in_words
from md3cli.finished.run_json import is_finished
from md3cli.records import RecordDict, Task
from md3cli.refine.collection import Collection, read
from md3cli.refine.labels import Labels, shown_text
from md3cli.refine.parts import is_of_part
from md3cli.refine.refinement import FOUND_BY_TASK, name_of
from md3cli.refine.template import Template

COVERING = (Task.DETECT, Task.SEGMENT)  # tasks whose answers have an extent
NOT_ASKED, FAILED, CUT_OFF, DAMAGED = "a label was not asked", "a request failed", "an answer was cut off", "damaged"
ROWS_MAY_ASK = "rows_may_ask"  # in the run.json of records that were selected
_MOST_TOLD = 3  # of the reasons of a picture, and of names in a message

Box = Mapping[str, float]


class Gap(NamedTuple):
    """Why a picture is not complete: one of few kinds, and the words for it."""

    kind: str
    reason: str


class Question(NamedTuple):
    """What is asked for a label: the task, and the prompt or the template that it was filled from."""

    task: str
    asked: str


class Questions:
    """All that a collection asks, by the name under which it is asked."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._by_name: dict[str, dict[Question, None]] = {}

    def of(self, record: Mapping[str, Any]) -> tuple[str, Question] | None:
        """Return the name and the question of a record or a request; None where it looks for nothing."""
        name, task, prompt = name_of(dict(record), self._labels), str(record.get("task")), record.get("prompt")
        if name is None or not prompt:
            return None
        return name, Question(task, self._as_asked(str(prompt)))

    def _as_asked(self, prompt: str) -> str:
        """Return the template that a prompt can have come of, else the prompt."""
        label = None if prompt in self._labels.by_prompt else self._labels.may_be_of(prompt)
        if label is None:
            return prompt
        return next(text for text in label.templates if Template.parse(text).may_be(prompt))

    def add(self, record: Mapping[str, Any]) -> None:
        """Note what a record or a request asks."""
        if (found := self.of(record)) is not None:
            self._by_name.setdefault(found[0], {})[found[1]] = None

    def required(self, typed: Sequence[str], listed: Sequence[str] = ()) -> dict[str, tuple[Question, ...]]:
        """Return the names that are chosen, each with all questions that must be answered for it.

        Args:
            typed: names, or prompts of them; none are all names that are asked, and those that are `listed`.

        Raises:
            UsageError: one is not asked at all, or only with point; or nothing is asked that has an extent.
        """
        chosen = {name: self._all_of(name) for name in map(self._name_of, typed)} if typed else {}
        if not typed:
            if unasked := [shown_text(name) for name in listed if name not in self._by_name]:
                raise UsageError(
                    f"no record asks for {unasked[0]}, which the labels file has, so it would stay visible; ask md3 "
                    "detect for it, or say with --label what must be covered"
                )
            chosen = {name: self._all_of(name) for name in self._by_name}
        if not chosen:
            raise UsageError("nothing is asked here that could be covered; ask with md3 detect or md3 segment")
        return chosen

    def _name_of(self, typed: str) -> str:
        if typed in self._by_name:
            return typed
        label = self._labels.by_prompt.get(typed)
        if label is None or label.name not in self._by_name:
            names = ", ".join(map(shown_text, list(self._by_name)[:_MOST_TOLD])) or "nothing"
            more = ", ..." if len(self._by_name) > _MOST_TOLD else ""
            raise UsageError(f"--label {shown_text(typed)}: no record asks for it; they ask for {names}{more}")
        return label.name

    def _all_of(self, name: str) -> tuple[Question, ...]:
        asked, label = self._by_name[name], self._labels.by_name.get(name)
        covering = {question for question in asked if question.task in COVERING}
        prompts = dict.fromkeys(question.asked for question in asked)
        for prompt in (*prompts, *(() if label is None else (*label.prompts, *label.templates))):
            if any(question.asked == prompt for question in covering):
                continue
            if prompt in prompts:
                raise UsageError(
                    f"{shown_text(prompt)!r} is asked with md3 point alone, and a point has no extent that could be "
                    "covered; ask md3 detect for it, or name with md3 export --label what can be"
                )
            covering.add(Question(Task.DETECT, prompt))
        return tuple(sorted(covering))

    def segmented_only(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are asked with segment alone, which finds one object a picture at most."""
        return [name for name in names if {question.task for question in self._by_name[name]} <= {Task.SEGMENT}]


class Coverage:
    """What of each picture of a collection is to be covered, and what is missing; close it.

    First each record is noted (`note`), then `choose` settles the labels. What failed is kept in SQLite's private
    file, so that memory grows with the questions only.
    """

    def __init__(self, records: Collection, options: ExportOptions) -> None:
        """Begin.

        Raises:
            UsageError: what thresholds hide is not in the records.
        """
        if any(info.document.get("is_thinned") for info in records.infos()):
            raise UsageError(
                "md3 select --refined wrote these records without what thresholds hide, so that could not be covered; "
                "export from the run itself, or select without --refined"
            )
        self._records, self._labels = records, records.refinement.labels
        self._least = (records.refinement.min_score or 0.0) if options.hides_unsure else 0.0
        self.questions = Questions(self._labels)
        self._known = set[tuple[Any, Any]]()
        for request in asked_by_runs(records):
            self.questions.add(request)
            self._known.add((request["task"], request["prompt"]))
        self._unfinished = [] if options.is_run_done else list(_unfinished(records))
        self._rows_ask = any(_is_asked_by_rows(run) for run in self._unfinished)
        self._listed = self._labels.names if options.has_typed_labels else ()
        self.chosen: dict[str, tuple[Question, ...]] = {}
        self._covers_all = not records.selection.labels
        self._has_failed = False
        pictures = replace(records.selection, labels=())  # `--label` chooses what is covered, other words pictures
        self._is_picked = not pictures.takes_all
        self._database = sqlite3.connect("")  # a temporary file that SQLite removes by itself
        self._database.execute("CREATE TABLE failed(key BLOB, image TEXT, task TEXT, prompt TEXT, why TEXT)")
        self._database.execute("CREATE TABLE met(key BLOB PRIMARY KEY)")
        self._database.execute("CREATE TABLE picked(key BLOB PRIMARY KEY)")
        if self._is_picked:
            keys = ((image_key(record),) for record in read(replace(records, selection=pictures)))
            with disk_trouble_in_words():
                self._database.executemany("INSERT OR IGNORE INTO picked VALUES (?)", keys)

    def close(self) -> None:
        """Forget what was noted."""
        self._database.close()

    def note(self, record: RecordDict) -> None:
        """Note what a record asks, and whether it failed."""
        if record.get("image") is None:
            return
        self.questions.add(record)
        if record.get("task") in COVERING and (record["task"], record.get("prompt")) not in self._known:
            self._rows_ask = True
        if (error := record.get("error")) is not None:
            why = f"{error.get('type')}: {error.get('message')}"
            row = (image_key(record), record["image"], record.get("task"), record.get("prompt"), why)
            self._database.execute("INSERT INTO failed VALUES (?, ?, ?, ?, ?)", row)
            self._has_failed = True

    def choose(self) -> None:
        """Settle which labels must be covered, once all records are noted.

        Raises:
            UsageError: as `Questions.required`; or rows of a manifest ask, and more of them may come.
        """
        is_filled = any(_identity(run).get("template") for run in self._unfinished)
        if self._unfinished and (is_filled or (self._rows_ask and self._covers_all)):
            label = "" if is_filled else ", or say with --label what must be covered"
            raise UsageError(
                "the run is not finished, and the rows of its manifest say what is asked, so more may be asked of a "
                f"picture than its records tell; finish it with the same command{label}"
            )
        self.chosen = self.questions.required(self._records.selection.labels, self._listed)
        self._database.execute("CREATE INDEX of_picture ON failed(key)")

    def is_picked(self, group: ImageGroup) -> bool:
        """Return whether a picture is to be looked at; each is asked about."""
        key = (image_key(group.records[0]),)
        if self._has_failed:
            self._database.execute("INSERT OR IGNORE INTO met VALUES (?)", key)
        query = "SELECT 1 FROM picked WHERE key = ?"
        return not self._is_picked or self._database.execute(query, key).fetchone() is not None

    def unanswered(self) -> Iterator[tuple[str, Gap]]:
        """Yield the pictures about which nothing was answered, once all others were asked about."""
        picked = "AND key IN picked" if self._is_picked else ""
        query = f"SELECT image, why FROM failed WHERE key NOT IN met {picked} GROUP BY key ORDER BY min(rowid)"
        yield from ((image, Gap(FAILED, why)) for image, why in self._database.execute(query))

    def gap(self, group: ImageGroup) -> Gap | None:
        """Return what is missing before a picture can be shown; None where every chosen label is answered."""
        answered, exact, cut = set[Question](), set[tuple[Any, Any]](), dict[tuple[Any, Any], Gap]()
        of_parts = set[Question]()
        for record in group.records:
            found = self.questions.of(record)
            if found is None or found[0] not in self.chosen:
                continue
            if is_of_part(record):
                of_parts.add(found[1])
                continue
            asked = (record["task"], record["prompt"])
            if is_cut_off(record):
                limit = "--max-objects" if record["task"] == Task.DETECT else "--max-tokens"
                words = f"{_told(*asked)} was cut off, so more may be there; ask again with a greater {limit}"
                cut[asked] = Gap(CUT_OFF, words)
            else:
                answered.add(found[1])
                exact.add(asked)
        gaps: dict[tuple[Any, Any] | None, Gap] = {
            asked: gap for asked, gap in (self._failed_on(group) | cut).items() if asked not in exact
        }
        required = (question for questions in self.chosen.values() for question in questions)
        lacking = (question for question in required if question not in answered)
        for question in islice(lacking, len(gaps) + _MOST_TOLD):
            how = "asked about parts of it only" if question in of_parts else "not asked"
            gaps.setdefault(question, Gap(NOT_ASKED, f"{_told(*question)} was {how}"))
        for box, _ in self.boxes(group):
            if not (box["x_min"] < box["x_max"] and box["y_min"] < box["y_max"]):
                gaps[None] = Gap(DAMAGED, "a box has no extent, so what it stands for cannot be covered")
        told = [*gaps.values()][:_MOST_TOLD]
        return None if not told else Gap(told[0].kind, "; ".join(gap.reason for gap in told))

    def _failed_on(self, group: ImageGroup) -> dict[tuple[Any, Any], Gap]:
        """Return what failed of what is chosen, about pictures of this exact name."""
        if not self._has_failed:
            return {}
        query = "SELECT task, prompt, why FROM failed WHERE key = ?"
        rows = self._database.execute(query, (image_key(group.records[0]),)).fetchall()
        return {
            (task, prompt): Gap(FAILED, f"{_told(task, prompt)} failed ({why})")
            for task, prompt, why in rows
            if task in COVERING
            and (found := self.questions.of({"task": task, "prompt": prompt})) is not None
            and found[0] in self.chosen
        }

    def boxes(self, group: ImageGroup) -> Iterator[tuple[Box, Box | None]]:
        """Yield (box, extent of its mask) of all that is to be covered on a picture."""
        for record in group.records:
            found = self.questions.of(record)
            name = None if found is None else found[0]
            for thing in (*(record.get("objects") or ()), *(record.get("segments") or ())):
                label = str(thing.get("label"))
                is_chosen = self._covers_all or name in self.chosen or label in self.chosen
                if not is_chosen or self._is_bare(thing, name or label):
                    continue
                yield (thing["bbox"], _extent(thing)) if "bbox" in thing else (thing, None)

    def _is_bare(self, thing: Mapping[str, Any], name: str) -> bool:
        """Return whether the typed least score leaves something bare; a label's own, if lower, leaves less so."""
        label, score = self._labels.by_name.get(name), thing.get("score")
        own = None if label is None else label.min_score
        return score is not None and score < (self._least if own is None else min(own, self._least))


def _unfinished(records: Collection) -> Iterator[dict[str, Any]]:
    """Yield the run.json of each run that tells of its starts and that they did not come to the end."""
    for document in (info.document for info in records.infos()):
        if isinstance(document.get("starts"), list) and (not is_finished(document) or document.get(ROWS_MAY_ASK)):
            yield document


def rows_may_ask(records: Collection) -> bool:
    """Return whether rows of a manifest that were not read yet may ask more of the pictures."""
    return any(map(_is_asked_by_rows, _unfinished(records)))


def _identity(document: Mapping[str, Any]) -> Mapping[str, Any]:
    identity = document.get("identity")
    return identity if isinstance(identity, dict) else {}


def _is_asked_by_rows(document: Mapping[str, Any]) -> bool:
    return bool(_identity(document).get("template")) or not _identity(document).get("requests")


def asked_by_runs(records: Collection) -> Iterator[RecordDict]:
    """Yield what runs were to ask of every picture, as run.json says; not prompts that are filled from rows."""
    for document in (info.document for info in records.infos()):
        identity, selected = _identity(document), document.get("asked")  # the latter: `md3 select` wrote it
        requests = selected if identity.get("template") or not identity else identity.get("requests")
        for request in requests if isinstance(requests, list) else ():
            asked = (request.get("task"), request.get("prompt")) if isinstance(request, dict) else (None, None)
            if all(isinstance(text, str) for text in asked) and asked[0] in FOUND_BY_TASK:
                yield {"task": asked[0], "prompt": asked[1]}


def is_cut_off(record: RecordDict) -> bool:
    """Return whether there may be more than a record found; segment looks for one object, so one that it has is all."""
    return record.get("finish_reason") == "length" and not (record["task"] == Task.SEGMENT and record["segments"])


def _told(task: object, prompt: object) -> str:
    return f"{task} {shown_text(str(prompt))!r}"


def _extent(segment: Mapping[str, Any]) -> Box | None:
    """Return the box around a segment's mask; None where it has none."""
    corners = [corner for polygon in segment_polygons(segment) for corner in polygon]
    if not corners:
        return None
    columns, rows = zip(*corners, strict=True)
    return {"x_min": min(columns), "y_min": min(rows), "x_max": max(columns), "y_max": max(rows)}
