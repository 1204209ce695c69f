"""What `--map`, `--const`, `--template`, `--regions` make of a row: columns renamed, constants, prompts filled. Pure.

A template is what the user typed. It is taken apart once, before anything slow, and filled for each row; what a column
holds is put in as it is and never looked at for placeholders, nor is a prompt that a row brings itself. A placeholder
is the plain name of a column: nothing is evaluated. Knows nothing of files and formats.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from md3cli.config import ColumnOptions
from md3cli.errors import RequestError, RowError, UsageError
from md3cli.records import ImageItem, Request, Task, printable
from md3cli.refine.template import SHOWN_CHARS, Template, quoted
from md3cli.remote.address import is_address
from md3cli.source.requests import ROW_COLUMNS, EmbeddedImage, check_value, is_given, typed_cell
from md3cli.source.specs import LABEL, label_template

OF_THE_PICTURE = ("stem", "name", "folder")  # placeholders that are no columns
_NAMED_TASKS = frozenset({Task.DETECT, Task.POINT, Task.SEGMENT})  # whose answers have labels
MOST_LOOKED_AT, MOST_SHOWN = 1000, 4  # columns
_OF_IMAGES = re.compile(
    r"(?<![a-z])(ima?ge?|img|photo|pic|picture|file_?(name|path)|path|jpe?g|png|webp|ur[il])s?(?![a-z])", re.IGNORECASE
)
LONGEST_MISSPELT_CHARS = 40  # difflib takes seconds for a name of megabytes
NEAR_MISS = 0.8  # of difflib: `promt`, `lenght` and `tasks` are near, `score` and `class` are not


def near_miss(name: str, known: Sequence[str]) -> str | None:
    """Return the one of `known` that `name` is most likely a misspelling of; None where it resembles none."""
    if len(name) > LONGEST_MISSPELT_CHARS:
        return None
    name = name.strip().lower()
    if found := get_close_matches(name, known, n=1, cutoff=NEAR_MISS):
        return found[0]
    letters = sorted(name)  # of `taks` difflib makes no more than of `mask`
    return next((other for other in known if len(other) == len(name) and sorted(other) == letters), None)


class Filled(NamedTuple):
    """What a row asks.

    `typed` has the template of each filled prompt of a task that names what it finds. `refused` says of each template
    that the row cannot fill why; its request keeps the template. `then` is asked about each object that is found.
    """

    requests: tuple[Request, ...]
    typed: Mapping[str, str] | None = None
    refused: Mapping[str, str] | None = None
    then: tuple[Request, ...] = ()


class ColumnRules:
    """What one run makes of the columns of its rows.

    Attributes:
        renamed: NAME in a manifest -> COLUMN that it stands for.
        constants: COLUMN -> value for rows that leave it empty.
        named: what templates name, each once; `placeholders` are those that are columns.
        region_pad: the room around each box that is asked about; None where pictures are asked about.
    """

    def __init__(self, options: ColumnOptions, requests: Sequence[Request]) -> None:
        """Raises UsageError: an option contradicts itself, or a prompt is no template."""
        self.renamed = _by_name(options.renamed)
        self.constants = {column: _constant(column, value) for column, value in options.constants}
        if len(self.constants) < len(options.constants):
            raise UsageError("--const sets a column twice; give each column one value")
        self.is_template, self.region_pad = options.is_template, options.region_pad
        prompts = {request.prompt for request in requests if request.prompt is not None}
        self._templates = {prompt: self._parsed(prompt) for prompt in prompts if options.fills_prompts}
        self.named = tuple({name: None for template in self._templates.values() for name in template.names})
        not_columns = OF_THE_PICTURE if self.region_pad is None else (*OF_THE_PICTURE, LABEL)
        self.placeholders = tuple(name for name in self.named if name not in not_columns)

    def _parsed(self, prompt: str) -> Template:
        try:
            return Template.parse(prompt) if self.is_template else label_template(prompt)
        except ValueError as error:
            raise UsageError(str(error)) from error

    @property
    def changes_pictures(self) -> bool:
        """Whether a row that is no more than a picture is asked otherwise than the command alone says."""
        return bool(self.constants or self._templates)

    def with_constants(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return `columns` with constants where they are missing or empty."""
        if not self.constants:
            return columns
        return columns | {name: value for name, value in self.constants.items() if not is_given(columns, name)}

    def of_sidecars(self, columns: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Return the known columns that a picture's sidecars bring, all others, and what is wrong with their names.

        Known are those that --map names, and constants.
        """
        try:
            found = renamed_columns(dict(columns), self.renamed)
        except ValueError as error:
            return {}, dict(columns), str(error)
        mapped = ROW_COLUMNS.intersection(self.renamed.values())
        known = {name: value for name, value in found.items() if name in mapped}
        others = {name: value for name, value in found.items() if name not in mapped}
        for name, value in self.constants.items():
            part = known if name in ROW_COLUMNS else others
            if not is_given(part, name):
                part[name] = value
        return known, others, ""

    def filled(self, requests: tuple[Request, ...], columns: Mapping[str, Any], image: ImageItem | None) -> Filled:
        """Return the command's `requests` as they are asked of a row, filled from `columns`."""
        if not self._templates:
            return Filled(requests)
        asked, typed, refused = [], dict[str, str](), dict[str, str]()
        for request in requests:
            template = self._templates.get(request.prompt or "")
            if template is None:
                asked.append(request)
                continue
            try:
                prompt = template.filled({name: _value(name, columns, image) for name in template.names})
            except RequestError as error:
                refused[str(request.prompt)] = str(error)
                asked.append(request)
                continue
            if template.names and request.task in _NAMED_TASKS:
                typed[prompt] = str(request.prompt)
            asked.append(replace(request, prompt=prompt))
        return Filled(tuple(asked), typed or None, refused or None)


def _by_name(renamed: Sequence[tuple[str, str]]) -> dict[str, str]:
    names = {name: column for column, name in renamed}
    if len(names) < len(renamed) or len(set(names.values())) < len(renamed):
        raise UsageError("--map names a column twice; each column has one other name")
    return names


def _constant(column: str, text: str) -> Any:
    """Return the value of a --const as that of a cell, checked as a row's would be."""
    value = typed_cell(column, text)
    if not is_given({column: value}, column):
        raise UsageError(f"--const {printable(column)}= has no value")
    try:
        check_value(column, value)
    except RowError as error:
        raise UsageError(f"--const {printable(column)}={printable(text)[:SHOWN_CHARS]}: {error}") from error
    return value


def image_column(renamed: Mapping[str, str]) -> str:
    """Return what the manifest calls its column `image`."""
    return next((name for name, column in renamed.items() if column == "image"), "image")


def likely_images(columns: Sequence[str], known: Sequence[str] = ()) -> str:
    """Return a hint in brackets: which columns have the images, as `known` or by their names; empty where none does.

    Datasets call them `img`, `photo`, `file_name`, `jpg`, `image_path`, `url`.
    """
    likely = known or [name for name in columns[:MOST_LOOKED_AT] if _OF_IMAGES.search(name[:LONGEST_MISSPELT_CHARS])]
    if not likely:
        return ""
    shown = ", ".join(quoted(name) for name in likely[:MOST_SHOWN])
    return f" (by its look {shown}: --map image={printable(likely[0])[:LONGEST_MISSPELT_CHARS]})"


def renamed_columns(columns: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return a row under the names that `renamed` (NAME -> COLUMN) gives its columns.

    Raises:
        ValueError: it has a column of such a name already.
    """
    if not renamed:
        return columns
    if clash := clash_of(columns, renamed):
        raise ValueError(clash)
    return {renamed.get(name, name): value for name, value in columns.items()}


def clash_of(columns: Sequence[str] | Mapping[str, Any], renamed: Mapping[str, str]) -> str:
    """Return what is wrong where a column is called as another one is to be; empty where none is."""
    for name, column in renamed.items():
        if column in columns and column not in renamed:
            what = f"--map {printable(column)}={printable(name)}, and there is a column {quoted(column)}, too"
            return f"{what}; give that one another name: --map other={printable(column)}"
    return ""


def _value(name: str, columns: Mapping[str, Any], image: ImageItem | None) -> str:
    """Return what is put in for a placeholder."""
    if name in OF_THE_PICTURE:
        text = _of_picture(name, image)
    elif name not in columns:
        raise RequestError(f"no column {quoted(name)} for {{{printable(name)[:SHOWN_CHARS]}}}")
    else:
        text = _text_of(name, columns[name])
    if not text.strip():
        what = "the picture has none" if name in OF_THE_PICTURE else f"the column {quoted(name)} is empty"
        raise RequestError(f"{{{printable(name)[:SHOWN_CHARS]}}} has no value: {what}")
    return text


def _text_of(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, EmbeddedImage):
        return value.name
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "an object"
        raise RequestError(f"the column {quoted(name)} holds {kind}, which fills no prompt")
    return json.dumps(value)


def _of_picture(name: str, image: ImageItem | None) -> str:
    """Return a picture's file name, its stem, or the folder it lies in; empty where there is none."""
    if image is None:
        return ""
    folder, _, base = image.name.rpartition("/")
    if name != "folder":
        return base if name == "name" else os.path.splitext(base)[0]
    last = folder.rpartition("/")[2]
    is_inside_file = image.size is not None or image.row_group is not None  # of a tar, or a cell
    if last in ("", ".", "..") and not (is_inside_file or is_address(image.path)):
        above = os.path.basename(os.path.dirname(os.path.abspath(image.path)))
        return os.fsencode(above).decode("utf-8", "backslashreplace")
    return last
