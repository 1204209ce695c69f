"""What the records of a shard's requests ask next, found again from those records, the plan and the run's options.

Nothing of it is frozen in a plan or noted beside a record, so any process tells of any lines which belong to the shard:
the records of its requests (parents), and those of their children, whatever kind these are of. Of a child that
thresholds hide now, and that an earlier start asked with others, the record stays: so a child is one that a parent may
have, and one that is wanted is to be asked. Memory is a shard. Knows no files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from md3cli.errors import InputError
from md3cli.finished.record_shape import is_record_of
from md3cli.records import RecordDict, Request, RunIdentity, SourceRow
from md3cli.refine.follow import FollowUps
from md3cli.refine.labels import Labels
from md3cli.refine.refinement import Refinement
from md3cli.scale.folder import RunFolder
from md3cli.scale.markers import RunOptions, read_run_options
from md3cli.scale.plan import Plan, PlannedRow

ALL_SHOWN = "all"


class Asked(NamedTuple):
    """A request with its id and its row."""

    record_id: str
    row: SourceRow
    request: Request


@dataclass(frozen=True, slots=True)
class OneChild(FollowUps):
    """Of a record asks this one child and nothing else."""

    child: tuple[Request, ...] = ()

    def may_follow(self, row: SourceRow, request: Request) -> bool:
        """Return True: it is given a row of the parent alone."""
        return True

    def needs_all(self, row: SourceRow) -> bool:
        """Return False: nothing is hidden."""
        return False

    def children_of(self, row: SourceRow, records: Mapping[int, RecordDict]) -> dict[int, tuple[Request, ...]]:
        """Return the child for each record."""
        return dict.fromkeys(records, self.child)


class Alone(NamedTuple):
    """One request of a shard to be asked by itself: a row of it, or of its parent and how to ask it of that one."""

    record_id: str
    row: PlannedRow
    ups: FollowUps | None


def asked(rows: Sequence[PlannedRow]) -> Iterator[Asked]:
    """Yield each request of `rows` with its id and its row."""
    for row in rows:
        yield from (Asked(*one) for one in zip(row.ids, [row.row] * len(row.ids), row.row.requests, strict=True))


def is_line_of(line: bytes, record_id: str, row: SourceRow, request: Request) -> bool:
    """Return whether a whole line is the record of a request of `row`."""
    return is_record_of(line, record_id, row.image.name if row.image is not None else None, request)


@dataclass(frozen=True)
class Families:
    """Tells the children of a plan's records; `ups` says what is asked of them now."""

    ups: FollowUps
    run: RunIdentity

    @classmethod
    def of(cls, plan: Plan, options: RunOptions | None) -> Families:
        """Return the families of a plan's records as `options` ask; None: nobody has begun, and nothing is hidden."""
        ups = FollowUps(plan.pad) if options is None else FollowUps(plan.pad, options.refinement, options.everything)
        return cls(ups, plan.identity)

    @cached_property
    def _any(self) -> FollowUps:
        """What may have been asked with any thresholds."""
        labels = (replace(label, min_score=None, nms=1.0) for label in self.ups.refinement.labels.labels)
        return replace(self.ups, refinement=Refinement(Labels(tuple(labels))))

    @cached_property
    def digest(self) -> str:
        """What tells apart two starts that ask other children of the same records; never empty."""
        refinement = self.ups.refinement
        named = [
            label.to_json() | {"id": None, "max_objects": None}
            for label in refinement.labels.labels
            if label.prompts != (label.name,) or label.templates or (label.min_score, label.nms) != (None, None)
        ]
        if not named and not refinement.has_thresholds and refinement.nms is None:
            return ALL_SHOWN
        chosen = [refinement.min_score, refinement.nms, sorted(json.dumps(table, sort_keys=True) for table in named)]
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]

    def have_parents(self, rows: Sequence[PlannedRow]) -> bool:
        """Return whether a record of `rows` may have children."""
        return any(row.row.then or self.ups.may_follow(row.row, one) for row in rows for one in row.row.requests)

    def lack_parents(self, rows: Sequence[PlannedRow], found: Container[str]) -> bool:
        """Return whether a record that may have children is not among those `found`."""
        return any(one.record_id not in found and self.ups.may_follow(one.row, one.request) for one in asked(rows))

    def children(self, rows: Sequence[PlannedRow], lines: Mapping[str, bytes]) -> Iterator[Asked]:
        """Yield all children that the records of `rows` in `lines` (by id) may have."""
        for row in rows:
            for children in self._of_each(row, lines).values():
                yield from children

    def asked(self, rows: Sequence[PlannedRow], lines: Mapping[str, bytes]) -> Iterator[Asked]:
        """Yield each request of `rows`, and behind it all children that its record in `lines` may have."""
        for row in rows:
            of_each = self._of_each(row, lines)
            for place, one in enumerate(asked([row])):
                yield one
                yield from of_each.get(place, ())

    def ids_of(self, row: PlannedRow, lines: Mapping[str, bytes]) -> list[str]:
        """Return the ids of a row's requests, and behind each those of its children that have a line, in order."""
        if not self.have_parents([row]):
            return list(row.ids)
        planned = set(row.ids)
        return [one.record_id for one in self.asked([row], lines) if one.record_id in planned or one.record_id in lines]

    def known_ids(self, rows: Sequence[PlannedRow], lines: Mapping[str, bytes]) -> list[str]:
        """Return the same for all rows, with the children that are wanted and have no line."""
        found: list[str] = []
        for row in rows:
            if not self.have_parents([row]):
                found += row.ids
                continue
            known = {*row.ids, *lines, *self._wanted(row, lines)}
            found += [one.record_id for one in self.asked([row], lines) if one.record_id in known]
        return found

    def counts_of(self, rows: Sequence[PlannedRow], part: bytes) -> list[int]:
        """Return how many records of each row there are in a part, which is in order."""
        if not self.have_parents(rows):
            return [len(row.ids) for row in rows]
        lines = {json.loads(line)["id"]: line for line in part.splitlines(keepends=True)}
        return [len(self.ids_of(row, lines)) for row in rows]

    def alone(self, rows: Sequence[PlannedRow], lines: Mapping[str, bytes], wanted: Container[str]) -> Iterator[Alone]:
        """Yield the `wanted` ones of the requests of `rows` and of all children that their records may have."""
        for row in rows:
            of_each = self._of_each(row, lines)
            for place, one in enumerate(asked([row])):
                single = PlannedRow(replace(row.row, requests=(one.request,)), (one.record_id,))
                if one.record_id in wanted:
                    yield Alone(one.record_id, single._replace(row=replace(single.row, then=())), None)
                for child in of_each.get(place, ()):
                    if child.record_id in wanted:
                        yield Alone(
                            child.record_id, single, OneChild(everything=self.ups.everything, child=(child.request,))
                        )

    def _records(self, row: PlannedRow, lines: Mapping[str, bytes]) -> dict[int, RecordDict]:
        """Return the records of a row that may have children, by place."""
        found: dict[int, RecordDict] = {}
        for place, one in enumerate(asked([row])):
            if self.ups.may_follow(one.row, one.request):
                line = lines.get(one.record_id)
                if line is not None and is_line_of(line, *one):
                    found[place] = json.loads(line)
        return found

    def _of_each(self, row: PlannedRow, lines: Mapping[str, bytes]) -> dict[int, list[Asked]]:
        """Return all children that each of a row's records may have, by place."""
        return {
            place: self._with_ids(row, place, self._any.children_of(row.row, {place: record})[place])
            for place, record in self._records(row, lines).items()
        }

    def _wanted(self, row: PlannedRow, lines: Mapping[str, bytes]) -> Iterator[str]:
        """Yield the ids of the children that are asked of a row's records now."""
        records = self._records(row, lines)
        if self.ups.needs_all(row.row) and self.lack_parents([row], lines):
            return
        for place, children in self.ups.children_of(row.row, records).items():
            yield from (one.record_id for one in self._with_ids(row, place, children))

    def _with_ids(self, row: PlannedRow, place: int, children: Sequence[Request]) -> list[Asked]:
        parent_id, parent, name = row.ids[place], row.row.requests[place], row.row.id_name
        return [Asked(self.ups.id_of(parent_id, parent, child, name, self.run), row.row, child) for child in children]


def families_of(folder: RunFolder, plan: Plan) -> Families:
    """Return the families of a plan's records, as the latest start asks; of all objects where none has begun."""
    options = None
    with contextlib.suppress(InputError):
        options = read_run_options(folder)
    return Families.of(plan, options)
