"""Pictures of a tar with their sidecars: grouped as WebDataset groups them, bounded, and never lost in silence."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
import tracemalloc
import unittest.mock
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.config import ColumnOptions, SourceSpec
from md3cli.errors import RowError, UsageError
from md3cli.records import Request, SourceRow, Task
from md3cli.source.source import Source, open_source
from md3cli.source.webdataset import DAMAGED, DOUBLE, ERRORS, MOST_OF_A_KEY, STRAY, TarPicture, tar_pictures

Members = list[tuple[str, bytes]]
ANY, U = unittest.mock.ANY, "not valid UTF-8"
CAPTION = (Request(Task.CAPTION),)


def tar_of(members: Members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def pictures_of(data: bytes) -> tuple[list[TarPicture], Counter[str]]:
    skipped = Counter[str]()
    return list(tar_pictures(io.BytesIO(data), "t.tar", lambda member, name: "", skipped)), skipped


def columns_of(*members: tuple[str, bytes]) -> tuple[dict[str, Mapping[str, Any]], Counter[str]]:
    found, skipped = pictures_of(tar_of(list(members)))
    return {picture.name: picture.columns for picture in found}, skipped


FACTS = {"url": "https://x.org/a.jpg", "caption": "a dog", "width": 640, "NSFW": None, "exif": {"a": [1]}, "key": "000"}
SIDECARS = [("000.json", json.dumps(FACTS).encode()), ("000.txt", "ein Hünd\n".encode()), ("000.CLS", b"7\n")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_sidecars_before_and_behind_their_picture(order: tuple[int, ...]) -> None:
    members = [("a/000.jpg", b"x"), *((f"a/{name}", data) for name, data in SIDECARS)]
    found, skipped = columns_of(*(members[i] for i in order), ("a/001.jpg", b"y"), ("b/000.jpg", b"z"))
    assert found == {"a/000.jpg": FACTS | {"txt": "ein Hünd", "cls": 7}, "a/001.jpg": {}, "b/000.jpg": {}}
    assert not skipped


def test_every_picture_of_a_key_has_its_sidecars() -> None:
    found, skipped = columns_of(("k.jpg", b"x"), ("k.txt", b"both"), ("k.seg.png", b"y"), ("k.x.jpg.txt", b"no"))
    assert found == {"k.jpg": {"txt": "both"}, "k.seg.png": {"txt": "both"}, "k.x.jpg.txt": {"txt": "both"}}
    assert not skipped  # the last one is no sidecar; who takes pictures alone leaves it out


def test_what_stands_elsewhere_is_counted_and_belongs_to_nobody() -> None:
    members = [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.json", b"{}"), ("b.json", b"{}"), ("b.txt", b"t"), ("c.npy", b"")]
    skipped = Counter[str]()
    found = list(tar_pictures(io.BytesIO(tar_of(members)), "t", lambda member, name: "n" * (name[0] == "c"), skipped))
    assert [(picture.name, dict(picture.columns)) for picture in found] == [("a.jpg", {}), ("b.jpg", {})]
    assert skipped == {STRAY: 3, "n": 1}


def test_sidecars_of_a_picture_that_is_left_out_are_not_strays() -> None:
    skipped = Counter[str]()
    data = tar_of([("a.txt", b"x"), ("a.jpg", b"x"), ("a.json", b"{}")])
    assert not list(tar_pictures(io.BytesIO(data), "t", lambda member, name: "excluded", skipped))
    assert skipped == {"excluded": 1}


@pytest.mark.parametrize(
    ("sidecars", "columns", "num_damaged"),
    [
        ({"json": b"[1, 2]"}, {"json": [1, 2]}, 0),
        ({"json": b"\xef\xbb\xbf null "}, {"json": None}, 0),
        ({"json": b'{"x": NaN, "y": [-Infinity]}'}, {"x": None, "y": [None]}, 0),
        ({"json": b'{"txt": "theirs"}', "txt": b"file"}, {"json": {"txt": "theirs"}, "txt": "file"}, 0),
        ({"json": b'{"cls": 1}', "txt": b"file"}, {"cls": 1, "txt": "file"}, 0),
        ({"json": b'{"json": 1}'}, {"json": 1}, 0),
        ({"cls": b"dog"}, {"cls": "dog"}, 0),
        ({"cls": b"9" * 6000}, {"cls": "9" * 6000}, 0),
        ({"cls": "٣".encode()}, {"cls": "٣"}, 0),
        ({"txt": b"a\r\n\r\n"}, {"txt": "a\r\n"}, 0),
        ({"txt": b"\x1b[31m\0"}, {"txt": "\x1b[31m\0"}, 0),
        ({"json": b"{broken", "txt": b"t"}, {"txt": "t", ERRORS: {"json": ANY}}, 1),
        ({"json": b""}, {ERRORS: {"json": "Expecting value at line 1, column 1"}}, 1),
        ({"json": b'{"a": 1, "a": 2}'}, {ERRORS: {"json": "the key 'a' comes twice"}}, 1),
        ({"json": b'{"a": 1e999}'}, {ERRORS: {"json": ANY}}, 1),
        ({"json": b'{"a": ' + b"9" * 6000 + b"}"}, {ERRORS: {"json": ANY}}, 1),
        ({"json": b'"\\ud800"'}, {ERRORS: {"json": ANY}}, 1),
        ({"json": b"[" * 100_000}, {ERRORS: {"json": "nested deeper than 64 levels"}}, 1),
        ({"json": b"[" * 100 + b"]" * 100}, {ERRORS: {"json": "nested deeper than 64 levels"}}, 1),
        ({"json": b'"\xff"', "txt": b"\xff\xfe", "cls": b"1"}, {"cls": 1, ERRORS: {"json": U, "txt": U}}, 2),
        ({"json": b'{"sidecar_errors": 5}', "txt": b"\xff"}, {"json": {ERRORS: 5}, ERRORS: {"txt": U}}, 1),
    ],
)
def test_what_sidecars_hold(sidecars: dict[str, bytes], columns: dict[str, Any], num_damaged: int) -> None:
    found, skipped = columns_of(*((f"k.{kind}", data) for kind, data in sidecars.items()), ("k.jpg", b"x"))
    assert found["k.jpg"] == columns
    assert skipped == ({DAMAGED: num_damaged} if num_damaged else {})
    json.dumps(found["k.jpg"], allow_nan=False, ensure_ascii=False).encode()  # a record can hold it


def test_the_first_of_doubles_counts() -> None:
    found, skipped = columns_of(("k.txt", b"1"), ("k.jpg", b"x"), ("k.txt", b"2"), ("k.TXT", b"3"))
    assert (found, skipped) == ({"k.jpg": {"txt": "1"}}, {DOUBLE: 2})


def test_hidden_members_stand_between_nothing() -> None:
    mac = [("./._k.jpg", b"m"), ("./k.jpg", b"x"), ("./._k.json", b"m"), ("./k.json", b'{"a":1}'), (".git/x.jpg", b"")]
    found, skipped = columns_of(*mac, ("k.txt", b"t"))
    assert (found, skipped) == ({"k.jpg": {"a": 1, "txt": "t"}}, {"hidden": 3})


def test_links_and_folders_are_no_sidecars() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (("k.jpg", tarfile.REGTYPE), ("k.json", tarfile.SYMTYPE), ("k.txt", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    skipped = Counter[str]()
    why_not = {"k.json": "links"}
    found = list(tar_pictures(io.BytesIO(out.getvalue()), "t", lambda member, name: why_not.get(name, ""), skipped))
    assert ([dict(picture.columns) for picture in found], skipped) == ([{}], {"links": 1})


def header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def test_a_sidecar_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with path.open("wb") as file:
        file.write(tar_of([("k.jpg", b"x")])[:1024] + header("k.json", 4 << 30))
        file.seek(4 << 30, io.SEEK_CUR)
        file.write(tar_of([("k.txt", b"t"), ("l.jpg", b"x")]))
    tracemalloc.start()
    with path.open("rb") as file:
        skipped = Counter[str]()
        found = list(tar_pictures(file, "t.tar", lambda member, name: "", skipped))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    columns = [dict(picture.columns) for picture in found]
    assert columns == [{"txt": "t", ERRORS: {"json": "longer than 16 MiB"}}, {}]
    assert skipped == {DAMAGED: 1}


def test_a_tar_that_ends_in_a_sidecar_keeps_its_picture() -> None:
    whole = tar_of([("k.jpg", b"x"), ("k.json", b'{"a":1}' + b" " * 1000)])
    with pytest.raises(RowError, match="damaged"):
        pictures_of(whole[:2048])
    skipped, found = Counter[str](), list[TarPicture]()
    with pytest.raises(RowError):
        found.extend(tar_pictures(io.BytesIO(whole[:2048]), "t", lambda member, name: "", skipped))
    assert [(picture.name, list(picture.columns)) for picture in found] == [("k.jpg", [ERRORS])]


def test_a_key_of_a_million_pictures_is_bounded() -> None:
    members = [("k.txt", b"t"), *((f"k.{i}.jpg", b"") for i in range(3 * MOST_OF_A_KEY))]
    data, skipped = tar_of([*members, ("k.json", b"{}")]), Counter[str]()
    rows = tar_pictures(io.BytesIO(data), "t", lambda member, name: "", skipped)
    assert next(rows).columns == {"txt": "t"}  # long before the end of the key
    assert all(row.columns == {"txt": "t"} for row in rows)
    assert skipped == {STRAY: 1}  # too late


class BadDisk(io.BytesIO):
    """A file of which 100 bytes at a time cannot be read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size == 100:
            raise OSError(5, "Input/output error")
        return super().read(size)


def test_a_sidecar_that_the_disk_does_not_give() -> None:
    skipped, file = Counter[str](), BadDisk(tar_of([("k.txt", b"x" * 100), ("k.jpg", b"x"), ("l.jpg", b"x")]))
    found = list(tar_pictures(file, "t", lambda member, name: "", skipped))
    assert [dict(picture.columns) for picture in found] == [{ERRORS: {"txt": "Input/output error"}}, {}]
    assert skipped == {DAMAGED: 1}


KEYS = st.sampled_from(["a", "b", "d/a", "d.e/a", "ü", "-"])
MEMBERS = st.lists(st.tuples(KEYS, st.sampled_from(["jpg", "PNG", "json", "txt", "cls", "seg.png"])), max_size=12)


@given(MEMBERS)
def test_groups_are_those_of_webdataset(parts: list[tuple[str, str]]) -> None:
    """The second way: names taken apart with WebDataset's own expression, and members grouped as a list."""
    grouped = [list(dict.fromkeys(group)) for _, group in itertools.groupby(parts, key=lambda part: part[0])]
    names = [f"{key}.{extension}" for group in grouped for key, extension in group]
    taken_apart = [re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name) for name in names]
    expected, num_stray = list[tuple[str, set[str]]](), 0
    for _, matches in itertools.groupby(taken_apart, key=lambda match: match and match[1]):
        group = [match[0] for match in matches if match]
        sidecars = {name.rpartition(".")[2] for name in group if not name.lower().endswith(("jpg", "png"))}
        pictures = [name for name in group if name.lower().endswith(("jpg", "png"))]
        expected += [(name, sidecars) for name in pictures]
        num_stray += 0 if pictures else len(sidecars)
    found, skipped = pictures_of(tar_of([(name, b"1") for name in names]))
    assert [(name, set(columns)) for name, _, _, columns in found] == expected
    assert skipped[STRAY] == num_stray


# -- rows ------------------------------------------------------------------------------------------------


GENERATED = [
    ("0.png", b""),
    ("0.json", b'{"prompt": "a red fox", "seed": -5, "task": "t2i", "question": "Is it red?", "answers": ["yes"]}'),
    ("1.png", b""),
    ("1.json", b"{"),
    ("2.png", b""),
]


@pytest.fixture
def tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("t.tar").write_bytes(tar_of(GENERATED))
    return tmp_path


def source(asked: tuple[Request, ...] = CAPTION, typed: str = "t.tar", **columns: Any) -> Source:
    return open_source(SourceSpec((typed,), columns=ColumnOptions(**columns)), asked)


def prompts(rows: Source | list[SourceRow]) -> list[Any]:
    return [[request.prompt for request in row.requests] for row in rows]


def test_columns_of_sidecars_mean_nothing_by_their_names(tar: Path) -> None:
    rows = source()
    found = list(rows)
    assert found[0].meta == json.loads(GENERATED[1][1])  # unchanged, and no caption of a prompt is refused
    assert list(found[1].meta) == [ERRORS]
    assert not found[2].meta
    assert all(row.requests is CAPTION and row.failure is None for row in found)
    assert rows.skipped == {DAMAGED: 1}
    assert rows.first_look() == []
    assert rows.asks_nothing_else


def test_map_makes_them_ask(tar: Path) -> None:
    asked = (Request(Task.QUERY, "What is it?"),)
    rows = source(asked, renamed=(("prompt", "question"),))
    with pytest.raises(UsageError, match="there is a column 'prompt', too; give that one another name: --map other"):
        rows.first_look()
    rows = source(asked, renamed=(("prompt", "question"), ("made_from", "prompt")))
    assert rows.first_look() == []
    assert not rows.asks_nothing_else
    found = list(rows)
    assert prompts(found) == [["Is it red?"], ["What is it?"], ["What is it?"]]
    assert found[0].meta == {"made_from": "a red fox", "seed": -5, "task": "t2i", "answers": ["yes"]}
    itself = list(source(asked, renamed=(("prompt", "prompt"),)))
    assert prompts(itself)[0] == ["a red fox"]
    (bad, *_) = source(asked, renamed=(("seed", "seed"),))
    assert bad.failure is not None
    assert bad.failure.type == "bad_request"


def test_templates_are_filled_from_sidecars(tar: Path) -> None:
    asked = (Request(Task.QUERY, "Does it show {prompt} as {stem}?"), Request(Task.CAPTION))
    rows = source(asked, is_template=True)
    assert rows.first_look() == []
    found = list(rows)
    assert prompts(found)[0] == ["Does it show a red fox as 0?", None]
    assert found[0].meta == json.loads(GENERATED[1][1])
    assert [list(row.refused or ()) for row in found[1:]] == [[asked[0].prompt]] * 2
    assert [[request.task for request in row.fit_requests] for row in found[1:]] == [[Task.CAPTION]] * 2
    constants = list(source(asked, is_template=True, constants=(("prompt", "x"), ("split", "val"))))
    assert constants[0].meta == json.loads(GENERATED[1][1]) | {"split": "val"}


@pytest.mark.parametrize("typed", ["t.tar", "*.tar", ".", "{t,t}.tar"])
def test_what_no_sidecar_has_is_told_first(tar: Path, typed: str) -> None:
    with pytest.raises(UsageError, match=r"no column 'promt'; did you mean 'prompt'\?"):
        source((Request(Task.QUERY, "{promt}?"),), typed, is_template=True).first_look()
    with pytest.raises(UsageError, match="no column 'ask'"):
        source(typed=typed, renamed=(("length", "ask"),)).first_look()
    with pytest.raises(UsageError, match="--map image=png: INPUT says itself what its pictures are"):
        source(typed=typed, renamed=(("image", "png"),)).first_look()
