"""Ground truth made of rows: of a CSV, TSV or Parquet file, or of what the records' own rows brought (`--answer`).

Rows of a file are of one kind, which their columns say: `image, question, answer` (an empty image: a question without
one), `image, caption`, or `image, label, x, y, w, h` in pixels of the upright picture, as md3's own CSV has it; a row
that names a picture alone says that nothing is there, and `width` and `height` are the picture's. In a table that md3
wrote, the column `task` says the kind, and `prompt` is the question; its Parquet has lists of objects for boxes, and
what its rows say in words about parts of pictures is left out.
Several true answers are a list in the column, a JSON list as its text, or several rows.

Files are of strangers: they are read row by row as manifests are, within the limits of those, and what is kept of all
rows is bounded here. A row without an answer is counted and told. A row that makes no sense is an error that names it:
a ground truth that lacks rows would give other scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from md3cli.errors import InputError, NoImageColumnError, UsageError
from md3cli.evaluate.truth import (
    Captions,
    Instances,
    Questions,
    Truth,
    TruthImage,
    TruthObject,
    true_texts,
    truth_object,
)
from md3cli.exporters.table import without_guard
from md3cli.records import RecordDict, Task, printable
from md3cli.refine.parts import TEXTS
from md3cli.source.columns import near_miss
from md3cli.source.manifest import ManifestRow, manifest_rows
from md3cli.source.requests import EmbeddedImage

MOST_CHARS = 1 << 30  # of all rows of a table
ROW_CHARS = 100  # that a row counts for besides its texts
FARTHEST_PIXEL = 1e9
MOST_COLUMNS_KNOWN = 1000  # of meta, for a hint
_BOX = ("x", "y", "w", "h")
_OWN = {"id", "task", "error_type", "finish_reason"}  # columns of a table that md3 wrote
_KNOWN = "image, question, answer; image, caption; or image, label, x, y, w, h (in pixels)"

Columns = Mapping[str, Any]


def read_table(path: Path) -> Truth:
    """Read a ground truth from a table.

    Raises:
        InputError: it cannot be read, is of no known kind, or a row makes no sense; the message names the row.
    """
    name = printable(str(path))
    if not path.is_file():
        raise InputError(f"cannot read {name}: {'not a regular file' if path.exists() else 'no such file'}")
    rows: _Collected | None = None
    left, num_nameless, num_parts, names = MOST_CHARS, 0, 0, dict[str, str]()
    for row in _rows(path):
        try:
            columns = _plain(row)
            if _says_of_part(columns):
                num_parts += 1
                continue
            kind = _kind(columns)
            rows = rows or kind()
            if not isinstance(rows, kind):
                hint = " (md3 export --task TASK writes one)" if columns.keys() >= _OWN else ""
                raise ValueError(f"{kind.what} among {rows.what}; a ground truth is of one kind{hint}")
            left -= ROW_CHARS + sum(map(_num_chars, columns.values()))
            if left < 0:
                raise ValueError(f"more than {MOST_CHARS:,} characters until here, which is more than md3 reads")
            rows.add(columns)
            if isinstance(picture := (row.columns or {}).get("image"), EmbeddedImage):
                names[picture.name] = columns["image"]
        except _NamelessError:
            num_nameless += 1
        except ValueError as error:
            raise InputError(f"{name}, {row.where}: {printable(str(error))}") from error
    if rows is None:
        raise InputError(f"{name} has no rows")
    truth = replace(rows.truth(path), rows=names)
    counts = {"without their picture and its name": num_nameless, "with words about parts of pictures": num_parts}
    notes = (f"rows of {name} {what}, which are no truth: {count:,}" for what, count in counts.items() if count)
    return replace(truth, notes=(*truth.notes, *notes))


def _rows(path: Path) -> Iterator[ManifestRow]:
    try:
        yield from manifest_rows(str(path))
    except NoImageColumnError as error:
        there = printable(", ".join(error.columns))[:200]
        raise InputError(
            f"{printable(str(path))} is no ground truth that md3 knows: it has no column 'image' but {there}; a table "
            f"has the columns {_KNOWN}"
        ) from error


def _plain(row: ManifestRow) -> dict[str, Any]:
    """Return the columns of a row: a picture that stands in it by its name, cells without md3's guard of formulas."""
    if row.columns is None:
        raise ValueError(row.problem)
    is_text = row.unit == "line"  # of a CSV or TSV file
    columns = {name: without_guard(value) if is_text else value for name, value in row.columns.items()}
    if isinstance(picture := columns.get("image"), EmbeddedImage):
        is_own = columns.keys() >= _OWN and picture.path is not None
        columns["image"] = picture.path if is_own else picture.name  # another table is taken for the run's INPUT
    return columns


def _num_chars(value: Any) -> int:
    if isinstance(value, list | dict):
        return 1 + sum(map(_num_chars, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 1


def _text(columns: Columns, name: str) -> str:
    """Return the text in a column without blanks around it; empty where there is none."""
    value = columns.get(name)
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise ValueError(f"{name} holds {'a list' if isinstance(value, list) else 'an object'}, not a text")
    return str(value).strip()


def _says_of_part(columns: Columns) -> bool:
    """Return whether a row of md3's own table says in words what a part of a picture is: not the whole."""
    return _text(columns, "region.of") != "" and columns.keys() >= _OWN and _text(columns, "task") in TEXTS


class _NamelessError(ValueError):
    """A row of `md3 export --embed-images` whose picture could not be read: its name is null with it."""


def _image(columns: Columns) -> str:
    if not (image := _text(columns, "image")):
        raise _NamelessError if columns.keys() >= _OWN else ValueError("no image")
    return image


class _Texts:
    """True texts by what they are true of, each in the order of the rows; and what was not read as texts."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.by_key: dict[Any, list[str]] = {}
        self._num_added = self._num_missing = self._num_odd = 0

    def add(self, key: Any, value: Any) -> None:
        """Add what a cell says; raise ValueError where it says nothing that a text is."""
        texts = true_texts(value, reads_json=True)
        self._num_added += 1
        if not texts:
            self._num_missing += 1
            return
        self._num_odd += len(texts) == 1 and texts[0].startswith("[") and texts[0].endswith("]")
        self.by_key.setdefault(key, []).extend(texts)

    def found(self) -> dict[Any, tuple[str, ...]]:
        """Return the texts of each key."""
        return {key: tuple(texts) for key, texts in self.by_key.items()}

    def notes(self, what: str, where: str) -> Iterator[str]:
        """Yield in sentences what is missing or odd; `what` are the rows."""
        column = f"'{printable(self.column)}' in {where}"
        if self._num_missing:
            yield f"{self._num_missing:,} of {self._num_added:,} {what}: no {column}, so not scored"
        if self._num_odd:
            yield f"{self._num_odd:,} of {self._num_added:,} {what}: {column} looks like a list and is no JSON: a text"


class _QuestionRows:
    what = "answers"

    def __init__(self) -> None:
        self._answers = _Texts("answer")

    def add(self, columns: Columns) -> None:
        question = _text(columns, "question") or _text(columns, "prompt")
        if not question:
            raise ValueError("no question")
        self._answers.add((_text(columns, "image") or None, question), columns.get("answer"))

    def truth(self, path: Path) -> Truth:
        return Questions(path, self._answers.found(), tuple(self._answers.notes("rows", printable(str(path)))))


class _CaptionRows:
    what = "captions"

    def __init__(self) -> None:
        self._captions = _Texts("caption")

    def add(self, columns: Columns) -> None:
        self._captions.add(_image(columns), columns.get("caption"))

    def truth(self, path: Path) -> Truth:
        return Captions(path, self._captions.found(), tuple(self._captions.notes("rows", printable(str(path)))))


class _BoxRows:
    what = "boxes"

    def __init__(self) -> None:
        self._images: dict[str, TruthImage] = {}
        self._objects: dict[tuple[str, str], list[TruthObject]] = {}
        self._num_failed = 0

    def add(self, columns: Columns) -> None:
        """Take the box of a row, or its list of boxes; a row may say that nothing is there.

        Raises:
            ValueError: a box lacks its label or a side, or has no size.
        """
        if _text(columns, "error_type"):  # of md3's own table: nobody knows what is there
            self._num_failed += 1
            return
        image, label = _image(columns), _text(columns, "label")
        known = self._images.setdefault(image, TruthImage(image, _side(columns, "width"), _side(columns, "height")))
        if not {"label", *_BOX} <= columns.keys():
            for label, box in _boxes_in_lists(columns, known):
                self._add(image, label, box)
            return
        is_given = [columns.get(name) not in (None, "") for name in _BOX]
        if not label and not any(is_given):
            return  # a picture where nothing is
        if not label:
            raise ValueError("a box without a label")
        self._add(image, label, [_number(columns, name) for name in _BOX])

    def _add(self, image: str, label: str, box: Sequence[float]) -> None:
        width, height = box[2:]
        if width <= 0 or height <= 0:
            raise ValueError(f"a box of {width:g} x {height:g} pixels")
        self._objects.setdefault((image, label), []).append(truth_object({"bbox": box}))

    def truth(self, path: Path) -> Truth:
        categories = tuple(dict.fromkeys(label for _, label in self._objects))
        objects = {key: tuple(found) for key, found in self._objects.items()}
        failed = f"rows of {printable(str(path))} about requests that failed, which are no truth: {self._num_failed:,}"
        return Instances(path, self._images, categories, objects, (failed,) if self._num_failed else ())


_Collected = _QuestionRows | _CaptionRows | _BoxRows
_KIND_OF_TASK: Mapping[str, type[_Collected]] = {
    Task.QUERY: _QuestionRows,
    Task.CAPTION: _CaptionRows,
    Task.DETECT: _BoxRows,
    Task.SEGMENT: _BoxRows,
}


def _kind(columns: Columns) -> type[_Collected]:
    """Return what a row becomes; raise ValueError where its columns say nothing true, or may say several things."""
    if task := _text(columns, "task"):
        if task not in _KIND_OF_TASK:
            raise ValueError(f"a row of the task '{task[:40]}' says nothing that md3 scores by")
        return _KIND_OF_TASK[task]
    has = columns.keys()
    kinds: dict[type[_Collected], bool] = {
        _QuestionRows: "answer" in has and not {"question", "prompt"}.isdisjoint(has),
        _CaptionRows: "caption" in has,
        _BoxRows: {"label", *_BOX} <= has,
    }
    fitting = [kind for kind, fits in kinds.items() if fits]
    if len(fitting) == 1:
        return fitting[0]
    found = " and ".join(kind.what for kind in fitting) or f"the columns {', '.join(has)[:200]}"
    raise ValueError(f"it has {found}; a table has the columns {_KNOWN}")


def _boxes_in_lists(columns: Columns, image: TruthImage) -> Iterator[tuple[str, list[float]]]:
    """Yield (label, box in pixels) of a row of md3's own Parquet, where what was found is a list of shares."""
    if {"objects", "segments"}.isdisjoint(columns):
        raise ValueError(f"it has no boxes; a table has the columns {_KNOWN}")
    for thing in [*_things(columns, "objects"), *_things(columns, "segments")]:
        if not image.width or not image.height:
            raise ValueError("boxes as shares of a picture without width and height")
        box = thing.get("bbox", thing)
        if not isinstance(box, dict) or not (label := _text(thing, "label")):
            raise ValueError("what was found has no label or no box")
        left, right = (_number(box, name) * image.width for name in ("x_min", "x_max"))
        top, bottom = (_number(box, name) * image.height for name in ("y_min", "y_max"))
        yield label, [left, top, right - left, bottom - top]


def _things(columns: Columns, name: str) -> list[Columns]:
    things = columns.get(name) or []
    if not isinstance(things, list) or not all(isinstance(thing, dict) for thing in things):
        raise ValueError(f"{name} holds no list of what was found")
    return things


def _side(columns: Columns, name: str) -> int | None:
    """Return a side of the picture in pixels; None where the row does not say it."""
    if columns.get(name) in (None, ""):
        return None
    value = _number(columns, name)
    if value <= 0 or not value.is_integer():
        raise ValueError(f"{name} is {value:g}, not a number of pixels")
    return int(value)


def _number(columns: Columns, name: str) -> float:
    value = columns.get(name)
    try:
        number = math.nan if isinstance(value, bool | list | dict) or value is None else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= FARTHEST_PIXEL:
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a number of pixels")
    return number


# ---- what the records' own rows brought --------------------------------------------------------------


def truths_in_meta(records: Sequence[RecordDict], column: str) -> tuple[Truth, ...]:
    """Return the true answers that stand in `meta[column]` of query records; where there are none, the true captions.

    Raises:
        UsageError: no record has the column, all leave it empty, or none is of such a task.
        InputError: a record has there what is no answer.
    """
    task = Task.QUERY if any(record["task"] == Task.QUERY for record in records) else Task.CAPTION
    asked = [one for one in records if one["task"] == task and (task == Task.QUERY or one["image"] is not None)]
    if records and not asked:
        there = ", ".join(dict.fromkeys(str(record["task"]) for record in records))
        raise UsageError(f"--answer is about records of query and caption; here are records of {there}")
    texts, noun = _Texts(column), "queries" if task == Task.QUERY else "captions"
    for record in asked:
        key = (record["image"], str(record.get("prompt") or "").strip()) if task == Task.QUERY else record["image"]
        if key in texts.by_key:  # captions of several lengths have one row
            continue
        try:
            texts.add(key, record["meta"].get(column))
        except ValueError as error:
            where = f"meta.{printable(column)} of {printable(record['image'] or 'a query without a picture')}"
            raise InputError(f"{where}: {printable(str(error))}") from error
    if asked and not texts.by_key:
        raise UsageError(_no_column(column, asked, noun))
    path, notes = Path(f"meta.{column}"), list(texts.notes(noun, "meta"))
    if task == Task.CAPTION:
        return (Captions(path, texts.found(), tuple(notes)),) if asked else ()
    if any(record["task"] == Task.CAPTION for record in records):
        notes.append("--answer is about the queries here; --task caption has the captions compared with it")
    return (Questions(path, texts.found(), tuple(notes)),)


def _no_column(column: str, records: Sequence[RecordDict], noun: str) -> str:
    what = f"--answer {printable(column)[:100]}"
    if any(column in record["meta"] for record in records):
        return f"{what}: the column is empty in the meta of all {noun} ({len(records):,})"
    known: dict[str, None] = {}
    for record in records:
        known.update(dict.fromkeys(record["meta"]))
        if len(known) > MOST_COLUMNS_KNOWN:
            break
    near = near_miss(column.removeprefix("meta."), list(known))
    there = f"did you mean {printable(near)}?" if near else f"there are: {printable(', '.join(known))[:200] or 'none'}"
    return f"{what}: no record has this column in its meta; {there}"
