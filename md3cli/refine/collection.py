"""Records as commands show them: of one run or of several, selected, in order, under their names and thresholds.

A `Collection` says which; `read` and `open` give its records. What a run chose stands in its run.json, and what is
typed later wins over it. Where boxes of a picture are compared, its records are read together wherever they stand;
memory holds those of one picture, and SQLite's private file on disk notes where each record is.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from md3cli.errors import UsageError
from md3cli.finished.record_shape import LINE_LIMIT_BYTES
from md3cli.finished.records_file import NamedRecords, RecordsFiles, disk_trouble_in_words, open_records
from md3cli.finished.run_json import RunInfo, find_records, load_run_info
from md3cli.records import RecordDict, printable
from md3cli.refine.labels import Label, Labels, shown_text
from md3cli.refine.refinement import FOUND_BY_TASK, Refinement, named, numbered, refined
from md3cli.refine.selection import Selection

_TEXT = rb'"((?:[^"\\]|\\.)*+)"'
# A prompt and the name under which something was found for it, as md3 writes them.
_NAMED = re.compile(rb'"prompt":' + _TEXT + rb',"(?:objects|points|segments)":\[\{"label":' + _TEXT)
_SETTINGS = ("model", "dtype", "quant", "adapter", "background")
RECORDS_TOLD = 1000  # between two words on how many were read
_MOST_NAMES = 100_000  # of prompts with other names that are looked for
_CHOSEN = "SELECT rank, place FROM chosen WHERE rank >= ? ORDER BY rank"


@dataclass(frozen=True)
class Collection:
    """Records files read as one, and what of them is shown, how. `notes` are sentences about how the runs differ."""

    sources: tuple[NamedRecords, ...]
    refinement: Refinement = field(default=Refinement())
    selection: Selection = field(default=Selection())
    notes: tuple[str, ...] = ()
    is_order_known: bool = True  # else classes come as they are first seen
    is_numbered: bool = False  # what was found tells its `index` in the record as it is written
    # Told how far reading is: records, or pictures of how many.
    told: Callable[[int, int | None], object] = field(default=lambda done, total: None, compare=False)

    @classmethod
    def of(
        cls,
        records: Iterable[Path],
        named: Iterable[tuple[str, Path]] = (),
        *,
        chosen: Refinement | None = None,
        selection: Selection | None = None,
    ) -> Collection:
        """Find the records of files, run folders and documents, and what their runs chose to show of them.

        Args:
            named: records whose pictures get `NAME/` in front; a path that is among `records` too is read once.
            chosen: what was typed; it wins over what the runs chose.

        Raises:
            InputError: a path has no records, or a run.json is not JSON.
            UsageError: none is given, or one gets two names.
        """
        prefixes: dict[Path, str] = {}
        for name, path in named:
            if prefixes.setdefault(find_records(path).resolve(), f"{name}/") != f"{name}/":
                raise UsageError(f"{printable(str(path))} has two names by --as; records are read once")
        paths = [find_records(path) for path in (*records, *(path for _, path in named))]
        sources = {path.resolve(): NamedRecords(path, prefixes.get(path.resolve(), "")) for path in paths}
        if not sources:
            raise UsageError("no RECORDS; give the .jsonl file or the folder of a run")
        infos = [load_run_info(source.path) for source in sources.values()]
        kept = [Refinement.from_json(info.document.get("refinement")) for info in infos]
        refinement, notes = _chosen_by(infos, kept, chosen or Refinement())
        is_order_known = bool(refinement.labels.labels)
        nameless = [source for source, one in zip(sources.values(), kept, strict=True) if not one.labels.labels]
        refinement = replace(refinement, labels=refinement.labels.followed_by(_labels_in(nameless)))
        return cls(tuple(sources.values()), refinement, selection or Selection(), notes, is_order_known)

    @property
    def path(self) -> Path:
        """The first records file, after which things are called."""
        return self.sources[0].path

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that every export lists, in order; others follow as they are first seen."""
        return self.refinement.labels.names if self.is_order_known else ()

    def infos(self) -> list[RunInfo]:
        """Return what stands in the run.json of each source."""
        return [load_run_info(source.path) for source in self.sources]

    def open(self) -> ShownRecords:
        """Open the records; close what is returned.

        Raises:
            InputError: as `RecordsFiles`.
        """
        return ShownRecords(self)


def as_collection(records: Path | Collection) -> Collection:
    """Return a collection as it is, and that of the run whose records file or folder a path names."""
    return records if isinstance(records, Collection) else Collection.of([records])


def read(collection: Collection, notes: list[str] | None = None) -> Iterator[RecordDict]:
    """Yield the records of a collection; add to `notes` what a user should know of how they were read."""
    with closing(collection.open()) as shown:
        if notes is not None:
            notes += shown.notes
        for number, (_, record) in enumerate(shown.placed()):
            if number % RECORDS_TOLD == 0:
                collection.told(number, None)
            yield record


class ShownRecords:
    """The records of a collection, opened and chosen."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._refinement, self._selection = collection.refinement, collection.selection
        self._is_chosen, self._is_compared = not self._selection.takes_all, self._refinement.may_compare
        self._files = RecordsFiles(collection.sources, keeps_lines=self._is_chosen or self._is_compared)
        self._picture: dict[int, RecordDict] = {}  # by place: the records of the picture that was read last
        self._database = sqlite3.connect("")  # a temporary file that SQLite removes by itself
        try:
            if self._is_chosen:
                with disk_trouble_in_words():
                    self._choose()
        except BaseException:
            self.close()
            raise

    @property
    def notes(self) -> list[str]:
        """Sentences about how the runs differ and what of the files was left out."""
        return [*self.collection.notes, *self._files.notes]

    def close(self) -> None:
        """Close the files and what was noted of them."""
        self._database.close()
        self._files.close()

    def placed(self, start: int = 0, *, is_raw: bool = False) -> Iterator[tuple[int, RecordDict]]:
        """Yield the records from the place `start` on, each with a place from which reading can go on.

        `is_raw`: as they stand in their files, without names and thresholds.
        """
        if self._is_chosen:
            for rank, place in self._database.execute(_CHOSEN, (start,)):
                yield rank, self._files.record_at(place) if is_raw else self._shown_at(place)
            return
        if self._is_compared and not is_raw:
            for place in self._files.places(start):
                yield place, self._shown_at(place)
            return
        is_as_it_is = is_raw or (self._refinement.changes_nothing and not self.collection.is_numbered)
        for place, record in self._files.placed(start):
            yield place, record if is_as_it_is else self._refined([record])[0]

    def _shown_at(self, place: int) -> RecordDict:
        """Return the record at a place as it is shown; a picture's records are read once, where they are compared."""
        if not self._is_compared:
            return self._refined([self._files.record_at(place)])[0]
        if place not in self._picture:
            records = self._files.of_picture(place)
            self._picture = dict(zip(records, self._refined([*records.values()]), strict=True))
        return self._picture[place]

    def _refined(self, records: Sequence[RecordDict]) -> list[RecordDict]:
        if self.collection.is_numbered:
            records = [numbered(record) for record in records]
        return refined(records, self._refinement)

    def _choose(self) -> None:
        """Note the places of the records that are taken, in order."""
        selection = self._selection
        self._database.execute("CREATE TABLE taken(place INTEGER PRIMARY KEY, draw INT, first REAL, second REAL)")
        self._database.executemany("INSERT INTO taken VALUES (?, ?, ?, ?)", self._taken())
        if selection.sample is not None:
            drawn = "SELECT place FROM taken ORDER BY draw, place LIMIT ?"
            self._database.execute(f"DELETE FROM taken WHERE place NOT IN ({drawn})", (selection.sample,))
        self._database.execute("CREATE TABLE chosen(rank INTEGER PRIMARY KEY, place INT)")
        ordered = "SELECT place FROM taken ORDER BY first, second, place LIMIT ?"
        limit = -1 if selection.limit is None else selection.limit
        self._database.execute(f"INSERT INTO chosen(place) {ordered}", (limit,))

    def _taken(self) -> Iterator[tuple[int, int, float, float]]:
        selection, labels = self._selection, self._refinement.labels
        for place, record in self._files.placed():
            if selection.takes(named(record, labels), labels):
                is_ranked = selection.sort != "input"
                rank = selection.rank_of(self._shown_at(place)) if is_ranked else ()
                first, second = (*rank, 0.0, 0.0)[:2]
                yield place, selection.draw_of(record), first, second


def _chosen_by(
    infos: Sequence[RunInfo], kept: Sequence[Refinement], typed: Refinement
) -> tuple[Refinement, tuple[str, ...]]:
    """Return what is shown of several runs together, and sentences about where they differ."""
    notes = []
    for name in ("min_score", "nms"):
        values = [getattr(refinement, name) for refinement in kept]
        if getattr(typed, name) is None and len(set(values)) > 1:
            option = name.replace("_", "-")
            shown = ", ".join("none" if value is None else f"{value:g}" for value in values)
            notes.append(f"the runs chose --{option} {shown}; the first counts, type --{option} to say otherwise")
    notes += _other_names(kept, typed.labels)
    identities = [info.document["identity"] for info in infos if isinstance(info.document.get("identity"), dict)]
    for name in _SETTINGS:
        found = list(dict.fromkeys(str(identity.get(name)) for identity in identities))
        if len(found) > 1:
            notes.append(f"the runs differ in {name}: {', '.join(map(printable, found))}")
    refinement = typed
    for earlier in kept:
        refinement = refinement.over(earlier)
    first = kept[0]
    min_score = first.min_score if typed.min_score is None else typed.min_score
    nms = first.nms if typed.nms is None else typed.nms
    return replace(refinement, min_score=min_score, nms=nms), tuple(notes)


def _other_names(kept: Sequence[Refinement], typed: Labels) -> Iterator[str]:
    """Yield a sentence where runs call what one prompt found by other names, and nothing typed says which."""
    first: dict[str, str] = {}
    others: dict[str, str] = {}
    for prompt, label in ((prompt, label) for one in kept for prompt, label in one.labels.by_prompt.items()):
        if first.setdefault(prompt, label.name) != label.name and prompt not in typed.by_prompt:
            others.setdefault(prompt, label.name)
    for prompt, name in list(others.items())[:1]:
        more = f" (and {len(others) - 1:,} more)" if len(others) > 1 else ""
        yield (
            f"the runs call {shown_text(prompt)!r} {shown_text(first[prompt])!r} and {shown_text(name)!r}{more}; "
            "the first counts, --labels FILE says otherwise"
        )


def _labels_in(sources: Iterable[NamedRecords]) -> Labels:
    """Return the names that records themselves give prompts, for those that no run.json tells of."""
    name_of: dict[str, str] = {}  # of prompts with a name of their own
    themselves: set[str] = set()  # prompts that are their own name; one that is asked shares it with others
    for source in sources:
        with open_records(source.path) as file:
            while (line := file.readline(LINE_LIMIT_BYTES)) and len(name_of) < _MOST_NAMES:
                name, prompt = _name_in(line) if b'"label"' in line else (None, None)
                if name is None or prompt is None:
                    continue
                if name != prompt:
                    name_of.setdefault(prompt, name)
                elif len(themselves) < _MOST_NAMES:
                    themselves.add(name)
    themselves -= name_of.keys()
    prompts: dict[str, list[str]] = {}
    for prompt, name in name_of.items():
        prompts.setdefault(name, [name] if name in themselves else []).append(prompt)
    return Labels(tuple(Label(name=name, prompts=tuple(asked)) for name, asked in prompts.items()))


@lru_cache(maxsize=1024)  # a run has few prompts, and each stands in many lines
def _text_of(inside: bytes) -> str:
    """Return the text of what stands between the quotes of a JSON string."""
    return str(json.loads(b'"' + inside + b'"'))


def _name_in(line: bytes) -> tuple[str | None, str | None]:
    """Return the name and the prompt of the record of a line, where both are there."""
    try:
        if (found := _NAMED.search(line)) is not None:
            prompt, name = found.groups()
            return _text_of(name), _text_of(prompt)
        record = json.loads(line)
        key = FOUND_BY_TASK.get(record.get("task"), "")
        return (str(record[key][0]["label"]), str(record["prompt"]))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return (None, None)  # the pass that reads it refuses what is damaged, by its number
