"""What the records answer, beside what the ground truth knows of the same question; objects are pairs in pixels.

Only what was asked is scored: an image or a category that no record asks about is no miss. A request that failed is
one. Several prompts of one name ask one question, so their records are one pair. `md3cli.finished.names` says which
names are the same. Knows no scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from md3cli.errors import InputError
from md3cli.evaluate.truth import Instances, TruthObject
from md3cli.finished.names import Matches, ambiguity_notes, match_images, match_labels, some_of
from md3cli.finished.records_file import record_identity
from md3cli.records import RecordDict, counted
from md3cli.refine.labels import Labels
from md3cli.refine.parts import is_of_part, part_name
from md3cli.refine.refinement import name_of
from md3cli.source.walk import PARQUET

NO_SIZE = (1, 1)
RequestKey = tuple[str | None, str, str, str, str]  # image, task, prompt, length, part of the picture


def request_key(record: RecordDict) -> RequestKey:
    """Return what a record answers: image, task, prompt, caption length, and the name of the part it is about."""
    prompt, part = str(record.get("prompt") or "").strip(), part_name(record["region"]) if is_of_part(record) else ""
    return record["image"], str(record["task"]), prompt, record.get("length") or "", part


def _key_in_run(record: RecordDict) -> tuple[RequestKey, str | None]:
    """Return what tells requests of one run apart: two prompts of one name may each have found a `car 1`."""
    return request_key(record), record["region"]["of"] if is_of_part(record) else None


def final_records(records: Iterable[RecordDict]) -> list[RecordDict]:
    """Return one record for each request: of one id and image the last, of repeats with other ids the first.

    Raises:
        InputError: a record has no id, image or task.
    """
    by_id: dict[str, RecordDict] = {}
    for number, record in enumerate(records, start=1):
        if not {"id", "image", "task"} <= record.keys():
            raise InputError(f"record {number:,} is damaged: it has no id, no image or no task")
        by_id[record_identity(record)] = record
    first: dict[tuple[RequestKey, str | None], RecordDict] = {}
    for record in by_id.values():
        first.setdefault(_key_in_run(record), record)
    return list(first.values())


def under_names_of(rows: Mapping[str, str], file: str, records: Sequence[RecordDict]) -> Sequence[RecordDict]:
    """Return the records under the ground truth's own names, where they are of a run over that very file.

    Such a run calls a picture after its row, and a table has a row for each record: of several that ask the same of
    one picture the first counts. `rows` are the ground truth's names by those of the rows, and `file` is its file's
    name. Rows of other Parquet files, of one folder or of several INPUTs, may be called the same, and stay as they are.
    """
    names = set(rows.values())

    def own(name: str | None) -> str | None:
        if name is None or name in names:
            return name
        folder, _, row = name.rpartition("/")
        inside = folder.rpartition("/")[2]
        return None if inside.lower().endswith(PARQUET) and inside != file else rows.get(row)

    if not any(own(record["image"]) not in (None, record["image"]) for record in records):
        return records
    first: dict[tuple[RequestKey, str | None], RecordDict] = {}
    for record in records:
        named = {**record, "image": own(record["image"]) or record["image"]}
        first.setdefault(_key_in_run(named), named)
    return list(first.values())


def coverage_notes(what: str, asked: Iterable[str], known: Iterable[str], matches: Matches) -> Iterator[str]:
    """Yield sentences about names that are on one side only, or not clear; `what` is the noun ("image")."""
    yield from ambiguity_notes(what, matches)
    unknown = [name for name in dict.fromkeys(asked) if name not in matches.found and name not in matches.ambiguous]
    found = set(matches.found.values())
    unasked = [name for name in dict.fromkeys(known) if name not in found]
    if unknown:
        who, be = _many(unknown, what)
        yield f"{who} of the records {be} not in the ground truth and not scored: {some_of(unknown)}"
    if unasked:
        who, be = _many(unasked, what, is_past=True)
        yield f"{who} of the ground truth {be} not asked about: {some_of(unasked)}"


def _many(names: list[str], what: str, *, is_past: bool = False) -> tuple[str, str]:
    if len(names) == 1:
        return f"1 {what}", "was" if is_past else "is"
    return f"{len(names):,} {what}s", "were" if is_past else "are"


def has_failed(record: Mapping[str, Any]) -> bool:
    """Return whether the request failed; its answer counts as empty."""
    return record.get("error") is not None


@dataclass(frozen=True, slots=True)
class Pair:
    """One question "where is CATEGORY in IMAGE?": the records of one name that answer it, and what is there."""

    records: tuple[RecordDict, ...]
    name: str
    image: str
    category: str
    size_wh: tuple[int, int]
    objects: tuple[TruthObject, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """All pairs that are scored; `notes` say in sentences what is not."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    @property
    def images(self) -> list[str]:
        """The ground truth's names of the images, in order."""
        return list(dict.fromkeys(pair.image for pair in self.pairs))

    @property
    def categories(self) -> list[str]:
        """The names of the categories, in the order in which they were asked for."""
        return list(dict.fromkeys(pair.category for pair in self.pairs))


def locate(records: Sequence[RecordDict], truth: Instances, labels: Labels) -> Located:
    """Match records of one task to the ground truth, by the names that `labels` give their prompts.

    Of two names that match one category the first asked of a picture counts. The ground truth's image size counts where
    it says one, because its boxes are in those pixels; record coordinates are 0-1 and fit any size.

    Raises:
        InputError: not one image of the records is in the ground truth.
    """
    pictured = [record for record in records if record["image"] is not None]
    names = [record["image"] for record in pictured]
    asked = [name_of(record, labels) or "" for record in pictured]
    matches, named = match_images(names, truth.images), match_labels(asked, truth.categories)
    images, categories = matches.found, named.found
    answers: dict[tuple[str, str], tuple[str, list[RecordDict]]] = {}
    for record, image, name in zip(pictured, names, asked, strict=True):
        if image in images and name in categories:
            first, found = answers.setdefault((images[image], categories[name]), (name, []))
            if name == first:
                found.append(record)
    sizes = dict(_sizes(pictured, images, truth))

    def pair_of(image: str, category: str, name: str, found: list[RecordDict]) -> Pair:
        size, objects = sizes.get(image, NO_SIZE), truth.objects.get((image, category), ())
        if truth.are_shares:
            objects = tuple(thing.in_pixels(size) for thing in objects)
        return Pair(tuple(found), name, image, category, size, objects)

    pairs = (pair_of(*key, *answer) for key, answer in answers.items())
    notes = (
        *_part_notes(pictured),
        *coverage_notes("image", names, truth.images, matches),
        *coverage_notes("label", asked, truth.categories, named),
        *_size_notes(pictured, images, truth),
        *truth.notes,
    )
    return Located(tuple(pairs), notes)


def _part_notes(records: Sequence[RecordDict]) -> Iterator[str]:
    """Yield a note about records that looked at parts of pictures: the ground truth has what lies elsewhere, too."""
    if num := sum(map(is_of_part, records)):
        labels = some_of(list(dict.fromkeys(str(record.get("prompt")) for record in records if is_of_part(record))))
        yield f"{num:,} records looked at parts of pictures alone; what lies elsewhere counts as missed: {labels}"


def _sizes(
    records: Sequence[RecordDict], images: Mapping[str, str], truth: Instances
) -> Iterator[tuple[str, tuple[int, int]]]:
    for record in records:
        if record["image"] in images:
            known = truth.images[images[record["image"]]]
            width, height = known.width or record.get("width"), known.height or record.get("height")
            if width and height:
                yield known.name, (width, height)


def _size_notes(records: Sequence[RecordDict], images: Mapping[str, str], truth: Instances) -> Iterator[str]:
    """Yield a note about ground truth that was drawn on another raster than the upright picture: boxes do not fit."""
    different = set()
    for record in records:
        known = truth.images.get(images.get(record["image"], ""))
        if known is None or not (known.width and known.height and record.get("width") and record.get("height")):
            continue
        if abs(known.width / known.height - record["width"] / record["height"]) > 0.01 * known.width / known.height:
            different.add(known.name)
    if different:
        have = counted(len(different), "image has", "images have")
        yield f"{have} another shape in the ground truth than the files (turned by EXIF?)"
