"""A large JSON file, entry by entry: members of chosen lists of its one object. Strict; holds a chunk, or one value.

Knows nothing of what the entries mean.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator
from typing import IO, Any

from md3cli.records import printable, unique_keys

ENTRY_LIMIT_CHARS, MOST_KEYS = 1 << 24, 1000
_CHUNK_BYTES = 1 << 20
_LONGEST_WORD_CHARS = 16  # that is an error where it is cut: -Infinity, an escape
_BLANKS = " \t\r\n"
_JSON = json.JSONDecoder(object_pairs_hook=unique_keys)


def list_entries(file: IO[bytes], lists: Collection[str], found: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield (list, entry) of those `lists` that the object in `file` has, in its order; note their names in `found`.

    Numbers that JSON does not have (NaN, infinities) are read, because many programs write them.

    Raises:
        ValueError: it is no JSON object in UTF-8, has a key twice, or something in it is too long.
        RecursionError: it is nested too deep.
    """
    text, keys = _Text(file), set[str]()
    for _ in text.members("{", "}"):
        key = text.value()
        if not isinstance(key, str) or key in keys:
            raise ValueError(f"a key that is no text or comes twice: {shown_value(key)}")
        keys.add(key)
        if len(keys) > MOST_KEYS:
            raise ValueError(f"it has more than {MOST_KEYS:,} keys")
        text.take(":")
        if key not in lists:
            text.skip()
            continue
        found.add(key)
        for _ in text.members("[", "]"):
            yield key, text.value()
    if text.peek():
        raise ValueError("more follows behind its end")


def shown_value(value: Any) -> str:
    """Return a value of anybody's for a message."""
    return printable(repr(value)[:200])[:60]


class _Text:
    """The text of a JSON file from where it has been read to; holds a chunk, or one value."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._text, self._at, self._is_ended = file, "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def peek(self) -> str:
        """Return the next character that is no blank; nothing at the end."""
        while True:
            while self._at < len(self._text):
                if (char := self._text[self._at]) not in _BLANKS:
                    return char
                self._at += 1
            if self._is_ended:
                return ""
            self._read()

    def take(self, wanted: str) -> str:
        """Go on behind the next character, one of `wanted`; raises ValueError where another one stands there."""
        char = self.peek()
        if not char or char not in wanted:
            raise ValueError(f"{shown_value(char) if char else 'its end'} where {' or '.join(wanted)} is expected")
        self._at += 1
        return char

    def members(self, start: str, end: str) -> Iterator[None]:
        """Stand before each member of a list or an object in turn; the caller reads it."""
        self.take(start)
        if self.peek() == end:
            self._at += 1
            return
        yield
        while self.take("," + end) != end:
            yield

    def value(self) -> Any:
        """Return the next value; raises ValueError where it is none, or longer than ENTRY_LIMIT_CHARS."""
        self.peek()
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                may_go_on = error.pos > len(self._text) - _LONGEST_WORD_CHARS or error.msg.startswith("Unterminated")
                if self._is_ended or not may_go_on:
                    is_cut = error.pos >= len(self._text.rstrip()) or error.msg.startswith("Unterminated")
                    what = "its end comes too early" if is_cut else error.msg
                    before = self._text[max(0, error.pos - 40) : error.pos]
                    raise ValueError(f"{what}, behind {shown_value(before)}") from error
            else:
                if end + 2 < len(self._text) or self._is_ended:  # else a number may go on: 1 of 1e+5
                    self._at = end
                    return value
            if len(self._text) - self._at > ENTRY_LIMIT_CHARS:
                raise ValueError(f"something in it is longer than {ENTRY_LIMIT_CHARS >> 20} Mi characters")
            self._read()

    def skip(self) -> None:
        """Read over the next value; of a list over its members."""
        if self.peek() != "[":
            self.value()
            return
        for _ in self.members("[", "]"):
            self.value()

    def _read(self) -> None:
        """Read as much again as is held, at least a chunk."""
        held = self._text[self._at :]
        data = self._file.read(max(_CHUNK_BYTES, len(held)))
        self._is_ended = not data
        self._text, self._at = held + self._decoder.decode(data, final=not data), 0
