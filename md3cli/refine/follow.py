"""What is asked next of a record that is finished: questions about each object found, or for each name it lists.

A record that asks more is a parent, what it asks are its children: requests like any other, about a part of the
picture or about all of it. Which they are follows from the parent's record, its row and what the run was told, and from
nothing else; so a start that finds the record in OUTPUT asks what is left, and a shard can be counted after the fact.
Children have no children. Source: product contract, section 9.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from md3cli.config import Everything, RunConfig
from md3cli.records import Box, RecordDict, Region, Request, RunIdentity, SourceRow, request_id
from md3cli.refine.everything import Vocabulary, listed_in
from md3cli.refine.refinement import FOUND_BY_TASK, Refinement, numbered, refined
from md3cli.refine.template import Template
from md3cli.source.specs import FOLLOWED_TASKS, LABEL

if TYPE_CHECKING:
    from md3cli.source.source import Source


def may_follow(config: RunConfig, source: Source) -> bool:
    """Return whether records of a run may have children."""
    return bool(config.then) or config.everything is not None or source.may_ask_then


@dataclass(frozen=True, slots=True)
class FollowUps:
    """Which children a record has. `pad` is the room around a region; what `refinement` hides is not asked about.

    With `everything` the records of its lists ask for each name in them.
    """

    pad: float = 0.0
    refinement: Refinement = field(default=Refinement())
    everything: Everything | None = None

    @classmethod
    def of(cls, config: RunConfig) -> FollowUps:
        """Return what the records of a run ask."""
        return cls(config.pad, config.refinement, config.everything)

    def may_follow(self, row: SourceRow, request: Request) -> bool:
        """Return whether the record of a request of `row` may have children."""
        if row.image is None or request.region is not None:
            return False
        return self._is_list(request) or (bool(row.then) and request.task in FOLLOWED_TASKS)

    def _is_list(self, request: Request) -> bool:
        return self.everything is not None and request.task is self.everything.listing.task

    def id_of(self, parent_id: str, parent: Request, child: Request, image: str | None, run: RunIdentity) -> str:
        """Return the id of a child (`child_id`)."""
        has_own_id = self.everything is not None and self.everything.may_rows_ask
        return child_id(parent_id, parent, child, image, run, has_own_id=has_own_id)

    def needs_all(self, row: SourceRow) -> bool:
        """Return whether what a record hides depends on the other records of its row."""
        return self.refinement.may_compare and len(row.requests) > 1

    def children_of(self, row: SourceRow, records: Mapping[int, RecordDict]) -> dict[int, tuple[Request, ...]]:
        """Return the children of each of a row's records, in order; a record that failed has none.

        Args:
            records: by the place of the request in the row. They are looked at together: where `needs_all`, all are
                given.
        """
        places = [place for place in sorted(records) if self.may_follow(row, row.requests[place])]
        lists = [place for place in places if self._is_list(row.requests[place])]
        if self.everything is not None and lists:
            listed = {place: tuple(_of_names(self.everything, records[place])) for place in lists}
            others = {place: record for place, record in records.items() if place not in listed}
            return self.children_of(row, others) | listed
        shown = refined([numbered(records[place]) for place in places], self.refinement)
        asked = (dict.fromkeys(_about_objects(row.then, record, self.pad)) for record in shown)  # one question once
        return dict.fromkeys(records, ()) | dict(zip(places, map(tuple, asked), strict=True))


def _about_objects(templates: Sequence[Request], record: RecordDict, pad: float) -> Iterator[Request]:
    """Yield what is asked about each object of a record, by object, then in the order of the templates."""
    key = FOUND_BY_TASK[record["task"]]
    for thing in record.get(key) or ():
        corners = thing.get("bbox", thing)
        box = Box(*(corners[name] for name in Box._fields))
        region = Region(box, thing["label"], record["id"], thing["index"], pad)
        for template in templates:
            yield about(template, region)


def _of_names(everything: Everything, record: RecordDict) -> Iterator[Request]:
    """Yield a request for each name in the list that a record is."""
    vocabulary = None if everything.vocabulary is None else Vocabulary.of(everything.vocabulary)
    return map(everything.asking, listed_in(record, vocabulary, everything.most_names))


def about(template: Request, region: Region) -> Request:
    """Return a request about a region, with the region's label in the prompt."""
    if template.prompt is None:
        return replace(template, region=region)
    return replace(template, prompt=Template.parse(template.prompt).filled({LABEL: region.label}), region=region)


def child_id(
    parent_id: str, parent: Request, child: Request, image: str | None, run: RunIdentity, *, has_own_id: bool = False
) -> str:
    """Return the id of a child; one about the whole picture is the same repeat of its request as the parent is.

    With `has_own_id` that one depends on its parent's id instead, as that about a region always does.
    """
    if child.region is not None:
        return request_id(image, child, run)
    if has_own_id:
        return request_id(image, child, run, parent_id)
    repeat = 0
    while request_id(image, parent, run, repeat) != parent_id:
        repeat += 1
    return request_id(image, child, run, repeat)
