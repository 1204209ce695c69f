"""Rows and records of a plan to which requests were added: as one run that had asked all of it from the beginning.

Every plan of a run has the same rows in the same shards, so what was asked first and what was added are put together
row by row. INPUT is read anew for what is added, for only INPUT knows what a row of a manifest makes of a new request;
where it has other rows by now, nothing can be added to the frozen ones. Memory is a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, zip_longest

from md3cli.records import Request, SourceRow
from md3cli.scale.folder import RunFolder
from md3cli.scale.make_plan import Fingerprint
from md3cli.scale.plan import Plan, PlanReader, columns_of
from md3cli.source.specs import are_followed

_ROWS_AT_A_TIME = 1024


class RowsDifferError(Exception):
    """INPUT has not the rows of the plan any more; caught where plans are made. `number` is of the row, from 1."""

    def __init__(self, number: int) -> None:
        super().__init__(f"row {number}")
        self.number = number


def whole_rows(folder: RunFolder, plan: Plan) -> Iterator[SourceRow]:
    """Yield the rows of a plan, each with all that is asked of it."""
    reader, num_shards = PlanReader(folder, plan), plan.shards_of_rows
    for shard in range(num_shards):
        each = [reader.rows(shard + number * num_shards) for number in range(len(plan.each))]
        for row, *added in zip(*each, strict=True):
            yield _joined([row, *added]) if added else row


def _joined(rows: Sequence[SourceRow]) -> SourceRow:
    requests = tuple(chain.from_iterable(row.requests for row in rows))
    return replace(rows[-1], requests=requests)  # the last one was read when all of it was asked


def fingerprint_of(folder: RunFolder, plan: Plan) -> str:
    """Return the fingerprint of a plan that asks at once what `plan` came to ask."""
    if not plan.parts:
        return plan.fingerprint
    fingerprint, asked, rows = Fingerprint(), plan.asked, whole_rows(folder, plan)
    while some := [columns_of(row, asked, plan.then) for row in islice(rows, _ROWS_AT_A_TIME)]:
        fingerprint.note(some)
    return fingerprint.hexdigest()


def added_rows(now: Iterable[SourceRow], before: Iterable[SourceRow], new: tuple[Request, ...]) -> Iterator[SourceRow]:
    """Yield the rows `now`, each with what was not asked of it `before`; `new` is what most are asked.

    Raises:
        RowsDifferError: they are not the rows that there were before.
    """
    for number, (row, old) in enumerate(zip_longest(now, before), start=1):
        if row is None or old is None or not _is_same(row, old):
            raise RowsDifferError(number)
        added = row.requests[len(old.requests) :]
        yield replace(row, requests=new if added == new else added)


def _is_same(row: SourceRow, old: SourceRow) -> bool:
    """Return whether a row is what it was, but for what is asked behind what was asked."""
    asked = row.requests[: len(old.requests)]
    if asked != old.requests or (are_followed(asked) and row.then != old.then):
        return False
    if (row.image, row.meta, row.failure) == (old.image, old.meta, old.failure):
        return True
    # A value may come back from the manifest in another form: a tuple as a list, a NaN as another one.
    same = replace(row, requests=asked, typed=old.typed, refused=old.refused, then=old.then)
    return columns_of(same, ()) == columns_of(old, ())


def merged(parts: Sequence[bytes], counts: Sequence[Sequence[int]]) -> Iterator[bytes]:
    """Yield the records of a shard row by row: those of the first part, then those of the next.

    `counts` [parts][rows] says how many records each part has of each row. Lines that are too many come last.
    """
    streams = [iter(part.splitlines(keepends=True)) for part in parts]
    for of_row in zip(*counts, strict=True):
        for stream, count in zip(streams, of_row, strict=True):
            yield from islice(stream, count)
    yield from chain.from_iterable(streams)
