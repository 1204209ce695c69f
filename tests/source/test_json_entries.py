"""Large JSON files, entry by entry: the same as when they are read at once, whatever a piece is."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md3cli.source import json_entries
from md3cli.source.json_entries import list_entries

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
documents = st.dictionaries(st.sampled_from(["images", "annotations", "info", "x"]), st.lists(values, max_size=5))


def entries(text: str | bytes) -> list[tuple[str, Any]]:
    data = text.encode() if isinstance(text, str) else text
    return list(list_entries(io.BytesIO(data), ("images", "annotations"), set()))


@settings(max_examples=200)
@given(documents, st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_entries_are_those_of_the_whole_file(
    document: dict[str, Any], piece: int, indent: int | None, is_ascii: bool
) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=is_ascii)
    wanted = [(key, item) for key in document if key in ("images", "annotations") for item in document[key]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_entries, "_CHUNK_BYTES", piece)
        assert entries(text) == wanted
    assert entries("\ufeff" + text) == wanted
    for end in {1, len(text) // 2, len(text) - 1} if len(text) > 1 else ():
        with pytest.raises(ValueError, match=r"end|xpect|escape"):
            entries(text[:end])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its end where { is expected"),
        ("[]", "'[' where { is expected"),
        ('{"images": {}}', "'{' where [ is expected"),
        ('{"images": [1 2]}', "'2' where , or ] is expected"),
        ('{"images": [1,]}', "Expecting value"),
        ('{"images": [{"a": 1 "b": 2}' + " " * 99 + "]}", "Expecting ',' delimiter, behind"),
        ('{"images": [{"id": 1, "id": 2}]}', "the key 'id' comes twice"),
        ('{"images": [], "images": []}', "comes twice: 'images'"),
        ("{1: []}", "a key that is no text"),
        ('{"a" 1}', "'1' where : is expected"),
        ('{"images": []} {}', "more follows behind its end"),
        ("{" + ",".join(f'"{i}": 0' for i in range(2000)) + "}", "more than 1,000 keys"),
    ],
)
def test_what_is_no_such_file(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        entries(text)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UnicodeDecodeError):
        entries(b'{"images": ["\xff"]}')


def test_nested_too_deep() -> None:
    with pytest.raises(RecursionError):
        entries('{"images": [' + "[" * 100_000 + "]" * 100_000 + "]}")


def test_no_value_is_longer_than_memory_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_entries, "ENTRY_LIMIT_CHARS", 1000)
    monkeypatch.setattr(json_entries, "_CHUNK_BYTES", 100)
    assert entries('{"info": ["' + '", "'.join(["x" * 99] * 99) + '"]}') == [], "a list that is not asked for"
    with pytest.raises(ValueError, match="something in it is longer"):
        entries('{"images": ["' + "x" * 10_000 + '"]}')
    with pytest.raises(ValueError, match="something in it is longer"):
        entries('{"info": {"' + '": 1, "'.join(map(str, range(10_000))) + '": 1}}')


def test_numbers_that_json_does_not_have() -> None:
    ((_, found),) = entries('{"images": [[NaN, Infinity, 1e999]]}')
    assert found[0] != found[0]
    assert found[1:] == [float("inf")] * 2
