"""Records of a file as formats need them: surveyed, and gathered by image, in bounded memory.

The records of one image usually stand together, but a retried or merged file may scatter them. A first pass notes
where each stretch of lines about one image begins; SQLite holds the notes in a private temporary file and sorts them
there, so memory stays flat at any length. The second pass jumps from stretch to stretch. The first pass also takes
the survey: which labels and tasks occur, and in which order. Knows nothing of formats.

Pictures that are shown under one name (members of a tar, runs of two folders that were joined, bytes that are not
UTF-8) are told apart by their exact name and their `sha256`, and numbered: they are twins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from md3cli.errors import ExportError
from md3cli.exporters.objects import PixelBox, PixelPoint, PixelSegment, boxes, label_of, points, segments
from md3cli.exporters.parts import PartTexts, part_texts
from md3cli.finished.record_shape import LINE_LIMIT_BYTES
from md3cli.finished.records_file import disk_trouble_in_words, open_records
from md3cli.records import RecordDict, printable
from md3cli.refine.collection import RECORDS_TOLD, Collection, ShownRecords, read
from md3cli.refine.labels import Labels
from md3cli.refine.parts import is_of_part, part_label, part_text, says_of_part
from md3cli.refine.refinement import FOUND_BY_TASK, name_of

CHOICE_PREFIX = "choice_"  # of the columns that hold the scores of choices
PART_COLUMNS = tuple(f"region.{key}" for key in ("x_min", "y_min", "x_max", "y_max", "label", "of", "index"))
META_PREFIX = "meta."  # of the columns that hold what records carry along
META_COLUMNS_LIMIT = 1000  # each row has a cell in each column, so that keys of strangers would multiply
_KEY_LIMIT_CHARS = 200
_NO_META = b'"meta":{},"error":'  # as md3 writes it

# Answered stretches in the order of their image's first one, with its number among its twins from 0 and whether
# these have its exact name; the sorts spill to disk.
_IN_ORDER = """
SELECT start, count, first, twin, min(first) OVER same != max(first) OVER same FROM (
  SELECT *, dense_rank() OVER (PARTITION BY shown ORDER BY first) - 1 AS twin FROM (
    SELECT *, min(seq) OVER (PARTITION BY image) AS first FROM stretch
  )
) WINDOW same AS (PARTITION BY exact) ORDER BY first, seq
"""


@dataclass(slots=True)
class Survey:
    """What the records hold as a whole; labels in the order they were first asked for or seen.

    `named` are the labels whose names are known, of records that found nothing too; `classes` are always listed.
    """

    named: Labels = field(default=Labels())
    classes: tuple[str, ...] = ()
    is_listed: bool = False  # by a file, whose classes are all listed, whatever was asked
    labels: dict[str, None] = field(default_factory=dict)  # of boxes and masks
    point_labels: dict[str, None] = field(default_factory=dict)
    all_labels: dict[str, None] = field(default_factory=dict)  # of both
    part_labels: dict[str, None] = field(default_factory=dict)  # of parts of pictures that words are about
    tasks: set[str] = field(default_factory=set)  # but for words about parts, which are not of the pictures
    num_records: int = 0
    num_failures: int = 0
    num_without_image: int = 0
    num_part_texts: int = 0
    num_hidden_texts: int = 0  # about things that are not shown, of the pictures that were yielded
    num_own_parts: int = 0  # whose finder is not here, likewise
    has_meta: bool = False
    model: str = ""
    reading_notes: list[str] = field(default_factory=list)  # what of the file is no record of its own

    def add(self, record: RecordDict) -> None:
        """Count one record in. Failed ones give their label too: the order is the user's."""
        task = str(record.get("task"))
        self.num_records += 1
        self.num_failures += record.get("error") is not None
        self.num_without_image += record.get("error") is None and record.get("image") is None
        if not says_of_part(record):
            self.tasks.add(task)
        elif part_text(record) is not None:
            self.num_part_texts += 1
            self.part_labels[part_label(record["region"])] = None
        self.has_meta = self.has_meta or bool(record.get("meta"))
        self.model = self.model or str(record.get("model") or "")
        if task in FOUND_BY_TASK:
            labels = dict.fromkeys(asked_and_found(record, self.named))
            (self.point_labels if task == "point" else self.labels).update(labels)
            self.all_labels.update(labels)

    def categories(self) -> list[str]:
        """Return the labels of boxes and masks, those of `classes` before the others; but no label of points alone."""
        only_points = self.point_labels.keys() - self.labels.keys() - set(self.classes if self.is_listed else ())
        return [label for label in dict.fromkeys((*self.classes, *self.labels)) if label not in only_points]

    def in_order(self) -> list[str]:
        """Return all labels, points' too, those of `classes` before the others: the order of the palette."""
        return list(dict.fromkeys((*self.classes, *self.all_labels, *self.part_labels)))

    def part_notes(self, *, have_place: bool) -> Iterator[str]:
        """Yield what became of answers and captions about parts; without a place in the format all are left out."""
        if self.num_part_texts and not have_place:
            texts = _many(self.num_part_texts, "text")
            yield f"{texts} left out, being about parts of pictures; coco, csv and parquet have them"
        elif self.num_hidden_texts:
            yield f"{_many(self.num_hidden_texts, 'text')} left out: the objects that they are about are not shown"
        if have_place and self.num_own_parts:
            yield f"{_many(self.num_own_parts, 'box')} added for parts whose own records are not here"

    def notes(self) -> Iterator[str]:
        """Yield what was left out of the file, and what no format made of images can hold."""
        yield from self.reading_notes
        if self.num_without_image:
            yield f"{self.num_without_image} answers to questions without an image were left out"


def _many(number: int, noun: str) -> str:
    """Return `1 text was`, `2 texts were`, `2 boxes were`."""
    if number == 1:
        return f"1 {noun} was"
    return f"{number:,} {noun}{'es' if noun.endswith('x') else 's'} were"


class ImageGroup(NamedTuple):
    """One image and its answered records; at least one, and the size is known."""

    name: str
    name_b64: str | None
    width: int
    height: int
    records: list[RecordDict]
    twin: int = 0  # its number among the images that are shown under this name
    has_twins: bool = False  # others have the exact name, so the name alone does not find the picture

    @property
    def distinct_name(self) -> str:
        """Return the name, numbered from the second image of this name on: `a/b.png#2`."""
        return f"{self.name}#{self.twin + 1}" if self.twin else self.name

    @property
    def file_name(self) -> str:
        """Return what files about the image are named after: `a/b~2.png` for `a/b.png#2`."""
        stem, dot, suffix = self.name.rpartition(".")
        if not self.twin:
            return self.name
        return f"{stem}~{self.twin + 1}.{suffix}" if dot and "/" not in suffix else f"{self.name}~{self.twin + 1}"

    @property
    def picture_record(self) -> RecordDict:
        """Return the record to find the picture by: one with its digest, where there is one."""
        return next((record for record in self.records if record.get("sha256")), self.records[0])

    def part_texts(self) -> PartTexts:
        """Return what is said about parts of the image."""
        return part_texts(self.records, self.width, self.height)

    def boxes(self) -> Iterator[PixelBox]:
        """Yield the boxes of detect records, each with the texts about it."""
        texts = self.part_texts()
        for place, record in enumerate(self.records):
            yield from boxes(record, self.width, self.height, texts.of(place))

    def told_boxes(self) -> Iterator[PixelBox]:
        """Yield `boxes`, and those of parts that something is said about and whose finder is not here."""
        yield from self.boxes()
        yield from self.part_texts().own

    def segments(self) -> Iterator[PixelSegment]:
        """Yield the masks of segment records, each with the texts about it."""
        texts = self.part_texts()
        for place, record in enumerate(self.records):
            yield from segments(record, self.width, self.height, texts.of(place))

    def points(self) -> Iterator[PixelPoint]:
        for record in self.records:
            yield from points(record, self.width, self.height)

    def meta(self) -> dict[str, Any]:
        """Return what the records carry along; of one key the last record counts."""
        return {key: value for record in self.records for key, value in (record.get("meta") or {}).items()}

    def captions(self) -> list[str]:
        """Return the captions of the whole image."""
        captioned = (record for record in self.records if not is_of_part(record))
        return [str(record["caption"]) for record in captioned if record.get("caption") is not None]

    def answers(self) -> list[tuple[str, str]]:
        """Return (question, answer) pairs about the whole image."""
        asked = (record for record in self.records if not is_of_part(record))
        answered = (record for record in asked if record.get("answer") is not None)
        return [(str(record.get("prompt") or ""), str(record["answer"])) for record in answered]


class ImageIndex:
    """The records of a collection by image; made by one pass over them, which tells `watch` each. Close it."""

    def __init__(self, records: Collection, watch: Callable[[RecordDict], object] = lambda record: None) -> None:
        self.survey = Survey(records.refinement.labels, records.classes, records.refinement.has_file)
        self._records, self._watch = records, watch
        self._file = records.open()
        self._database = sqlite3.connect("")  # a temporary file that SQLite removes by itself
        self._database.execute(
            "CREATE TABLE stretch(seq INTEGER PRIMARY KEY, shown BLOB, exact BLOB, image BLOB, start INT, count INT)"
        )
        try:
            with disk_trouble_in_words():
                rows = self._stretches(self._file.placed())
                self._database.executemany("INSERT INTO stretch VALUES (NULL, ?, ?, ?, ?, ?)", rows)
        except BaseException:
            self.close()
            raise
        self.survey.reading_notes = self._file.notes

    def close(self) -> None:
        """Close the file and what was noted of it."""
        self._database.close()
        self._file.close()

    def images(self) -> Iterator[ImageGroup]:
        """Yield every image with an answered record, in the order of first appearance.

        Raises:
            ExportError: the file became shorter while it was read.
        """
        with disk_trouble_in_words():  # the first row comes once all are sorted
            stretches: Iterable[tuple[int, ...]] = self._database.execute(_IN_ORDER)
        (num_images,) = self._database.execute("SELECT count(DISTINCT image) FROM stretch").fetchone()
        reader = _Stretches(self._file)
        self.survey.num_hidden_texts = self.survey.num_own_parts = 0
        for number, ((_, twin, has_twins), parts) in enumerate(groupby(stretches, key=lambda row: row[2:])):
            self._records.told(number, num_images)
            answered: list[RecordDict] = []
            for start, count, *_ in parts:
                found = reader.read(start, count)
                if len(found) < count:
                    where = printable(str(self._records.path))
                    raise ExportError(
                        f"{where} became shorter while it was read; wait until the run that writes it is done"
                    )
                answered += [record for record in found if record.get("error") is None]
            sized = next((record for record in answered if "width" in record), None)
            if sized is not None:
                size = int(sized["width"]), int(sized["height"])
                group = ImageGroup(sized["image"], sized.get("image_b64"), *size, answered, twin, bool(has_twins))
                if self.survey.num_part_texts:
                    texts = group.part_texts()
                    self.survey.num_hidden_texts += texts.num_hidden
                    self.survey.num_own_parts += len(texts.own)
                yield group

    def _stretches(self, placed: Iterator[tuple[int, RecordDict]]) -> Iterator[tuple[bytes, bytes, bytes, int, int]]:
        """Yield (the three keys, place of the first record, number of records) for each run of those of one image."""
        for keys, records in groupby(placed, key=lambda placed_record: _keys(placed_record[1])):
            count, start = 0, -1
            for place, record in records:
                if self.survey.num_records % RECORDS_TOLD == 0:
                    self._records.told(self.survey.num_records, None)
                self.survey.add(record)
                self._watch(record)
                start = place if start < 0 else start
                count += 1
            if keys[0]:
                yield *keys, start, count


class _Stretches:
    """Reads stretches of records; where one follows the last, as most do, reading goes on without a new start."""

    def __init__(self, file: ShownRecords) -> None:
        self._file = file
        self._placed: Iterator[tuple[int, RecordDict]] = iter(())
        self._ahead: tuple[int, RecordDict] | None = None

    def read(self, start: int, count: int) -> list[RecordDict]:
        """Return `count` records from the place `start` on; fewer where the file ends."""
        if self._ahead is None or self._ahead[0] != start:
            self._placed = self._file.placed(start)
            self._ahead = next(self._placed, None)
        found: list[RecordDict] = []
        while self._ahead is not None and len(found) < count:
            found.append(self._ahead[1])
            self._ahead = next(self._placed, None)
        return found


def asked_and_found(record: RecordDict, named: Labels) -> Iterator[str]:
    """Yield the name that a record asked for, then those of what it found; nothing for captions and answers."""
    result = FOUND_BY_TASK.get(str(record.get("task")))
    if result is None:
        return
    if record.get("prompt"):
        yield str(name_of(record, named))
    for found in record.get(result) or ():
        yield label_of(found, record)


def _keys(record: RecordDict) -> tuple[bytes, bytes, bytes]:
    """Return keys of the shown name, the exact name and the picture; empty where there is no answer about a picture."""
    exact = image_key(record)
    if not exact or record.get("error") is not None:
        return b"", b"", b""
    content = str(record.get("sha256") or "").encode()
    return image_key({"image": record["image"]}), exact, hashlib.blake2b(exact + content, digest_size=16).digest()


def image_key(record: RecordDict) -> bytes:
    """Return 16 bytes that stand for the record's image; empty for a text-only query.

    A name that is not UTF-8 is told apart by its exact bytes, not by how it is shown.
    """
    name = record.get("image")
    if name is None:
        return b""
    exact = f"b64:{record['image_b64']}" if record.get("image_b64") else f"name:{name}"
    return hashlib.blake2b(exact.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class TableColumns(NamedTuple):
    """The columns of a table that depend on its records, in the order in which they first occur.

    `choices` are those of restricted answers (`md3 query --choices`), `meta` the keys of `meta`. `is_whole` False:
    `meta` has more keys, or longer ones, than a table takes. `has_parts`: a record is about a part of its picture;
    `has_tiles`: one was made of tiles.
    """

    choices: list[str]
    meta: list[str]
    is_whole: bool = True
    has_parts: bool = False
    has_tiles: bool = False

    def notes(self) -> Iterator[str]:
        """Yield what a reader of the table should know: of names in other cases, and of keys without a column."""
        columns = [*(META_PREFIX + key for key in self.meta), *(CHOICE_PREFIX + choice for choice in self.choices)]
        counts = Counter(column.casefold() for column in columns)
        if alike := [printable(column) for column in columns if counts[column.casefold()] > 1]:  # DuckDB, Spark
            yield f"columns that differ in case alone, which some readers take for one: {', '.join(alike)}"
        if not self.is_whole:
            yield (
                f"meta has more columns than a table takes; it has the first {len(self.meta):,} whose names are not "
                f"longer than {_KEY_LIMIT_CHARS} characters, jsonl and parquet have all"
            )


def find_columns(records: Collection, *, has_meta: bool) -> TableColumns:
    """Return the columns that the records add to a table; those of `meta` only if `has_meta`.

    They must be known before the first row: this cheap look parses only lines that may hold one.
    """
    choices, meta, is_whole = dict[str, None](), dict[str, None](), True
    has_parts = has_tiles = False
    for record in _records_with_columns(records, has_meta) if records.selection.takes_all else read(records):
        choices.update(dict.fromkeys(map(_shown, choice_scores(record))))
        has_parts = has_parts or _has(record, "region", "index")
        has_tiles = has_tiles or _has(record, "tiles", "size")
        carried = record.get("meta") if has_meta and isinstance(record, dict) else None
        for key in map(_shown, carried if isinstance(carried, dict) else ()):
            if key not in meta:
                is_taken = len(meta) < META_COLUMNS_LIMIT and len(key) <= _KEY_LIMIT_CHARS
                meta |= {key: None} if is_taken else {}
                is_whole = is_whole and is_taken
    return TableColumns(list(choices), list(meta), is_whole, has_parts, has_tiles)


def _has(record: RecordDict, key: str, inner: str) -> bool:
    """Return whether a record has a value of several parts; Arrow writes one full of nulls for none."""
    part = record.get(key) if isinstance(record, dict) else None
    return isinstance(part, dict) and part.get(inner) is not None


def _records_with_columns(records: Collection, has_meta: bool) -> Iterator[RecordDict]:
    for source in records.sources:
        with open_records(source.path) as file:
            while line := file.readline(LINE_LIMIT_BYTES):
                has_column = b'"choices"' in line or b'"region"' in line or b'"tiles"' in line
                if has_column or (has_meta and _NO_META not in line):
                    with contextlib.suppress(
                        ValueError, RecursionError
                    ):  # the pass that writes refuses it by its number
                        yield json.loads(line)


def part_columns(record: RecordDict) -> dict[str, Any]:
    """Return which part of its picture a record is about, under `PART_COLUMNS`; empty where it is about the whole."""
    return {f"region.{key}": value for key, value in (record.get("region") or {}).items()}


def _shown(key: str) -> str:
    """Return a key as a record that was read has it: half a surrogate pair became `?`."""
    return key.encode("utf-8", "replace").decode()


def choice_scores(record: RecordDict) -> dict[str, float]:
    """Return the record's score for each choice; empty where the answer was free."""
    choices = record.get("choices") if isinstance(record, dict) else None
    return choices if isinstance(choices, dict) else {}
