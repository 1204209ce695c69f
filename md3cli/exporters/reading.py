"""Records from a JSON Lines file, one at a time, whatever its length: the one reader of all commands.

Knows the file's shape (one object a line, perhaps a torn tail, perhaps a request twice) and nothing of
formats. In: the path of `records.jsonl`. Out: record dicts as in the product's section on the
record, every string valid UTF-8. A file that holds no record is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, TypeVar

from md3cli.errors import InputError
from md3cli.exporters.doubled import Doubled, Line, key_of
from md3cli.exporters.record_shape import NotJson, parse_record
from md3cli.finished_run import has_run_info
from md3cli.records import RecordDict, printable

LINE_LIMIT_BYTES = 64 * 2**20  # a line is read whole: this bounds it
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_Parsed = TypeVar("_Parsed")


class PlacedRecord(NamedTuple):
    """A record and the offset in bytes of the line it stands for: of its request's first line."""

    offset: int
    record: RecordDict


def read_records(path: Path, notes: list[str] | None = None) -> Iterator[RecordDict]:
    """Yield the records of `path` in order, each request once; add to `notes` what a user should know.

    Raises:
        InputError: the file cannot be read, holds no record, a line is none, or two pictures share a name.
    """
    with RecordsFile(path) as file:
        if notes is not None:
            notes += file.notes
        for _, record in file.placed():
            yield record


def open_records(path: Path) -> BinaryIO:
    """Open `path` for reading."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read the records {printable(str(path))}: {error.strerror or error}") from error


class RecordsFile:
    """A records file whose lines were looked through once: none is foreign, and which count is known.

    `notes` are sentences about what was left out. Use it in `with`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._file = open_records(path)
        self._doubled = Doubled()
        try:
            self._doubled.note(self._keys())
            self._doubled.settle(path, self._record_at)
        except BaseException:
            self.close()
            raise
        if repeats := self._doubled.num_repeats:
            what = "1 line repeats" if repeats == 1 else f"{repeats:,} lines repeat"
            self.notes.append(f"{what} a request that is there already; of each request the last line counts")

    def __enter__(self) -> RecordsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and what was noted of it."""
        self._doubled.close()
        self._file.close()

    def placed(self, offset: int = 0) -> Iterator[PlacedRecord]:
        """Yield the records from the line at `offset` on; a doubled request once, at its first place."""
        moves = iter(self._doubled.starting_at(offset))
        move = next(moves, None)
        for line, record in self._parsed(parse_record, offset):
            if move is None or move[0] != line.offset:
                yield PlacedRecord(line.offset, record)
                continue
            if move[1] is not None:
                back = self._file.tell()
                yield PlacedRecord(line.offset, self._record_at(Line(line.number, move[1])))
                self._file.seek(back)
            move = next(moves, None)

    def _keys(self) -> Iterator[tuple[int, int, int]]:
        num_records = 0
        for line, key in self._parsed(lambda text: key_of(text, parse_record)):
            num_records += 1
            if key is not None:
                yield line.number, key, line.offset
        if not num_records and not (self._file.tell() == 0 and has_run_info(self.path)):
            raise InputError(
                f"{printable(str(self.path))} holds no records of md3; give the records.jsonl of a run, or its folder"
            )

    def _record_at(self, line: Line) -> RecordDict:
        self._file.seek(line.offset)
        text = _without_mark(self._file.readline(LINE_LIMIT_BYTES), line.offset)
        try:
            return parse_record(text)
        except ValueError as error:
            raise self._refusal(line.number, error) from error

    def _parsed(self, parse: Callable[[bytes], _Parsed], offset: int = 0) -> Iterator[tuple[Line, _Parsed]]:
        """Yield each line from `offset` on and what `parse` makes of it; a torn last line is left out.

        Torn is what comes after a record, begins like one and is cut off; all else that is no record is foreign.
        """
        number, has_record = 0, offset > 0
        self._file.seek(offset)
        while text := self._file.readline(LINE_LIMIT_BYTES):
            number += 1
            bare, is_last = _without_mark(text, offset).strip(), not text.endswith(b"\n")
            if bare:
                try:
                    parsed = parse(_without_mark(text, offset))
                except ValueError as error:
                    if has_record and is_last and isinstance(error, NotJson) and bare.startswith(b"{"):
                        self._note_torn(number)
                        return
                    raise self._refusal(number, error, has_record=has_record) from error
                has_record = True
                yield Line(number, offset), parsed
            offset += len(text)

    def _note_torn(self, number: int) -> None:
        note = f"line {number:,}, the last, is cut off and was left out; the run that wrote it can be continued"
        if note not in self.notes:  # each pass over the file meets it
            self.notes.append(note)

    def _refusal(self, number: int, error: ValueError, *, has_record: bool = True) -> InputError:
        advice = "mend or remove the line, or run the command again"
        if not has_record:
            advice = "give the records.jsonl of a run, or its folder; of such a file, mend or remove the line"
        return InputError(f"{printable(str(self.path))}, line {number}: {error}; {advice}")


def _without_mark(text: bytes, offset: int) -> bytes:
    """A line without the byte order mark that Windows programs put at the beginning of a file."""
    return text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text
