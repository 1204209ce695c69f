"""INPUT of every kind as rows: names, order, shards, confinement, and the exact bytes of every name."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.config import ColumnOptions, SourceSpec
from md3cli.errors import InputError, MissingExtraError, NoImageColumnError, UsageError
from md3cli.records import Request, SourceRow, Task
from md3cli.source.source import Source, image_item, open_source

ASKED = (Request(Task.QUERY, "why?"), Request(Task.CAPTION))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`photos` with three pictures, and the working folder above it."""
    for name in ("photos/a10.jpg", "photos/a9.jpg", "photos/sub/b.png", "photos/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(*inputs: str, asked: tuple[Request, ...] = ASKED, stdin: bytes = b"", **options: Any) -> Source:
    return open_source(SourceSpec(inputs, **options), asked, stdin=io.BytesIO(stdin))


def names(rows: Source) -> list[str | None]:
    return [row.image and row.image.name for row in rows]


def failures(rows: Source) -> list[tuple[str, str] | None]:
    return [row.failure and (row.failure.type, row.failure.message) for row in rows]


def test_what_is_remote_needs_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.remote.hosts.is_installed", lambda module: False)
    monkeypatch.setattr("md3cli.source.source.is_installed", lambda module: False)
    for address in ("https://x.org/a.jpg", "S3://bucket/x", "gs://bucket/x", "hf://datasets/a"):
        with pytest.raises(MissingExtraError, match=r"pip install 'md3cli\[remote\]'"):
            source(address)
        with pytest.raises(MissingExtraError, match=r"pip install 'md3cli\[remote\]'"):
            source("photos", root=address)
    with pytest.raises(MissingExtraError, match="--remote needs"):
        source("photos", remote=True)


def test_offline_means_nothing_remote(folder: Path) -> None:
    with pytest.raises(UsageError, match="s3://bucket/x and --offline exclude each other"):
        source("s3://bucket/x", offline=True)
    with pytest.raises(UsageError, match="--remote and --offline exclude each other"):
        source("photos", remote=True, offline=True)


# -- kinds ---------------------------------------------------------------------------------------------


def test_a_folder(folder: Path) -> None:
    rows = source("photos")
    found = list(rows)
    assert [row.image.name for row in found if row.image] == ["a9.jpg", "a10.jpg", "sub/b.png"]
    assert [row.image.path for row in found if row.image] == ["photos/a9.jpg", "photos/a10.jpg", "photos/sub/b.png"]
    assert all(row.requests == ASKED and not row.meta and row.failure is None for row in found)
    assert rows.skipped == {"other suffix": 1}
    assert rows.root == str(folder / "photos")
    assert rows.count() == (3, 6)
    assert list(rows) == found  # again, with counts from the start
    assert rows.skipped == {"other suffix": 1}


def test_a_file_whatever_its_suffix(folder: Path) -> None:
    rows = source("photos/notes.md")
    assert [row.image.path for row in rows if row.image] == ["photos/notes.md"]
    assert (names(rows), rows.root) == (["notes.md"], str(folder / "photos"))


def test_a_glob(folder: Path) -> None:
    rows = source("photos/**/*.jpg")
    assert (names(rows), rows.root) == (["a9.jpg", "a10.jpg"], str(folder / "photos"))
    assert names(source("*/*.jpg")) == ["photos/a9.jpg", "photos/a10.jpg"]
    assert names(source("photos/*.zzz")) == []


def test_a_file_called_like_a_glob_is_that_file(folder: Path) -> None:
    (folder / "x[1].jpg").touch()
    (folder / "x1.jpg").touch()
    assert names(source("x[1].jpg")) == ["x[1].jpg"]


def test_several_inputs_start_with_the_input_as_typed(folder: Path) -> None:
    (folder / "list.txt").write_text("sub/b.png\n")
    (folder / "list.txt").rename(folder / "photos" / "list.txt")
    rows = source("./photos/", "photos/sub/b.png", "photos/*9.jpg", "photos/list.txt", "gone.jpg")
    assert names(rows) == [
        "./photos/a9.jpg",
        "./photos/a10.jpg",
        "./photos/sub/b.png",
        "photos/sub/b.png",
        "photos/a9.jpg",
        "photos/sub/b.png",
        "gone.jpg",
    ]
    assert rows.root == os.getcwd()
    paths = [row.image.path for row in rows if row.image]
    assert [os.path.exists(path) for path in paths] == [True] * 6 + [False]


def test_no_input_is_a_question_alone() -> None:
    assert list(source(asked=ASKED[:1])) == [SourceRow(None, ASKED[:1])]


def test_a_folder_of_pictures_says_how_its_tars_are_read(tmp_path: Path) -> None:
    for name in ("00000.tar", "00001.TAR", "00000.parquet", "00000_stats.json", "deep/down/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    rows = source(str(tmp_path))
    assert names(rows) == ["deep/down/x.jpg"]
    assert rows.skipped == {
        "tars beside pictures (give 'FOLDER/*.tar' to read them)": 2,
        "Parquet files beside pictures or tars (give 'FOLDER/*.parquet' to read them)": 1,
        "other suffix": 1,
    }


def tar_up(path: Path, *members: str) -> None:
    """Write a tar of members that hold their own names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in members:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            tar.addfile(member, io.BytesIO(name.encode()))


@pytest.fixture
def shards(folder: Path) -> Path:
    for number in (2, 10):
        tar_up(folder / "shards" / f"{number}.tar", f"{number}.jpg", f"{number}.txt", f"in/{number}.png")
    tar_up(folder / "shards/sub/3.TAR", "3.jpg")
    (folder / "shards/2_stats.json").touch()
    return folder / "shards"


def test_a_folder_of_tars_is_its_pictures(shards: Path) -> None:
    rows = source("shards")
    members = ["2.tar/2.jpg", "2.tar/in/2.png", "10.tar/10.jpg", "10.tar/in/10.png", "sub/3.TAR/3.jpg"]
    assert names(rows) == members
    assert rows.root == str(shards)
    assert rows.skipped == {"other suffix": 1}
    assert rows.count() == (5, 10)
    assert names(source("shards", recursive=False)) == members[:4]
    assert names(source("shards", "photos/sub"))[:2] == ["shards/2.tar/2.jpg", "shards/2.tar/in/2.png"]
    assert names(source("shards", include=("*.png",))) == [members[1], members[3]]
    assert names(source("shards", exclude=("10.*", "sub"))) == members[:2]
    parts = [names(source("shards", shard=(i, 3))) for i in range(3)]
    assert sorted(name or "" for part in parts for name in part) == sorted(members)


def test_a_tar_that_is_none_is_one_row_of_its_folder(shards: Path) -> None:
    (shards / "2.tar").write_bytes(b"")
    rows = list(source("shards"))
    assert [row.image and row.image.name for row in rows][:2] == ["2.tar", "10.tar/10.jpg"]
    assert rows[0].failure is not None
    assert rows[0].failure.type == "decode"


def parquet(path: Path, *images: str) -> None:
    """Write a Parquet file of pictures that hold their own names, as `datasets` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": name.encode(), "path": name} for name in images]}), path)


def test_a_folder_of_parquet_files_is_their_pictures(folder: Path) -> None:
    parquet(folder / "data/train-00002.parquet", "a.jpg", "b.png")
    parquet(folder / "data/train-00010.parquet", "a.jpg")
    parquet(folder / "data/valid/x.PARQUET", "c.png")
    (folder / "data/dataset_info.json").touch()
    rows = source("data")
    pictures = [
        "train-00002.parquet/0000001-a.jpg",
        "train-00002.parquet/0000002-b.png",
        "train-00010.parquet/0000001-a.jpg",
        "valid/x.PARQUET/0000001-c.png",
    ]
    assert names(rows) == pictures
    assert (rows.root, rows.skipped, rows.count()) == (str(folder / "data"), {"other suffix": 1}, (4, 8))
    assert names(source("data", recursive=False)) == names(source("data/*.parquet")) == pictures[:3]
    assert names(source("data/train-{00002..00010..8}.parquet")) == pictures[:3]
    for typed in ("data", "data/**/*.[pP]*"):
        assert names(source(typed, include=("*.png",))) == [pictures[1], pictures[3]]
        assert names(source(typed, exclude=("train-00002.*", "valid"))) == pictures[2:3]
        parts = [names(source(typed, shard=(i, 3))) for i in range(3)]
        assert sorted(name or "" for part in parts for name in part) == sorted(pictures)
    assert not rows.asks_nothing_else, "rows may ask what they like"
    tar_up(folder / "data/00000.tar", "0.jpg")  # as img2dataset writes them: the Parquet files are about the tars
    assert names(source("data")) == ["00000.tar/0.jpg"]


def test_parquet_that_nobody_named_names_no_picture_outside_of_its_folder(folder: Path) -> None:
    (folder / "data/in").mkdir(parents=True)
    (folder / "data/in/a.jpeg2").write_bytes(b"")  # by its suffix no picture, which would leave the Parquet file out
    (folder / "private.jpg").write_bytes(b"")
    table = pa.table({"image": ["in/a.jpeg2", "../private.jpg", str(folder / "private.jpg")]})
    pq.write_table(table, folder / "data/0.parquet")
    outside = ("outside_root", "outside of data; set --root, or name the Parquet file to trust its paths")
    assert failures(source("data")) == [None, outside, outside]
    assert failures(source("data/*.parquet")) == failures(source("data/0.parquet")) == [None] * 3
    assert failures(source("data", root=folder))[2] is None


def test_a_damaged_parquet_file_is_one_row_of_its_folder(folder: Path) -> None:
    for number in range(3):
        parquet(folder / f"data/{number}.parquet", "a.jpg")
    (folder / "data/1.parquet").write_bytes(b"PAR1 no parquet")
    for typed in ("data", "data/*.parquet"):
        rows = source(typed)
        assert names(rows) == ["0.parquet/0000001-a.jpg", "1.parquet", "2.parquet/0000001-a.jpg"]
        ((kind, message),) = filter(None, failures(rows))
        assert kind == "decode"
        assert message.startswith("cannot read the manifest data/1.parquet as Parquet")
    pq.write_table(pa.table({"jpg": [b"x"]}), folder / "data/0.parquet")
    with pytest.raises(NoImageColumnError, match="--map image=NAME says which"):
        names(source("data"))
    pq.write_table(pa.table({"jpg": [b"x"]}), folder / "data/9.parquet")
    parquet(folder / "data/0.parquet", "a.jpg")
    rows = source("data")
    assert rows.count() == (4, 8)
    assert names(rows)[-1] == "9.parquet"
    assert "--map image=NAME says which" in str(failures(rows)[-1])


def test_parquet_in_a_folder_may_be_a_link(folder: Path) -> None:
    parquet(folder / "blobs/0", "a.jpg")
    (folder / "snapshot").mkdir()
    (folder / "snapshot/0.parquet").symlink_to("../blobs/0")  # as Hugging Face's cache has them
    assert names(source("snapshot")) == ["0.parquet/0000001-a.jpg"]
    assert failures(source("snapshot")) == [None]


def test_parquet_in_a_folder_names_addresses_where_the_user_allows_them(folder: Path) -> None:
    (folder / "data").mkdir()
    pq.write_table(pa.table({"image": ["https://example.org/a.jpg"]}), folder / "data/0.parquet")
    ((kind, message),) = filter(None, failures(source("data")))
    assert (kind, "add --remote" in message) == ("bad_request", True)
    assert failures(source("data", remote=True)) == [None]


@pytest.mark.parametrize("typed", ["data", "data/", "data/**/*.parquet", "data/{0,sub/1}.parquet"])
def test_names_in_parquet_of_a_folder_are_relative_to_it(folder: Path, typed: str) -> None:
    for place in ("data", "data/sub"):
        (folder / place / "in").mkdir(parents=True)
        (folder / place / "in/a").write_bytes(b"")
    pq.write_table(pa.table({"image": ["in/a"]}), folder / "data/0.parquet")
    pq.write_table(pa.table({"image": ["in/a", "../in/a"]}), folder / "data/sub/1.parquet")
    rows = source(typed)
    assert names(rows) == ["in/a", "sub/in/a", "sub/../in/a"]
    assert all(os.path.samefile(Path(rows.root, row.image.name), row.image.path) for row in rows if row.image)
    assert failures(rows) == [None] * 3


def test_a_damaged_parquet_file_of_a_folder_stops_no_look_at_columns(folder: Path) -> None:
    (folder / "data").mkdir()
    pq.write_table(pa.table({"img": ["a.jpeg2"], "text": ["x"]}), folder / "data/1.parquet")
    (folder / "data/0.parquet").write_bytes(b"PAR1 no parquet")
    renamed = ColumnOptions(renamed=(("image", "img"),))
    rows = source("data", columns=renamed)
    rows.first_look()
    assert names(rows) == ["0.parquet", "a.jpeg2"]
    with pytest.raises(InputError):
        source("data/0.parquet", columns=renamed)


def test_a_table_that_a_run_wrote_is_not_its_input(folder: Path) -> None:
    parquet(folder / "data/0.parquet", "a.jpg")
    parquet(folder / "data/cars.parquet", "a.jpg")
    (folder / "data/cars.parquet.run.json").write_text('{"schema":"md3-run/1"}')
    rows = source("data")
    assert (names(rows), rows.skipped["of md3's own files"]) == (["0.parquet/0000001-a.jpg"], 1)
    assert names(source("data/cars.parquet")) == ["0000001-a.jpg"]


def test_the_table_of_a_run_is_not_its_input(folder: Path) -> None:
    parquet(folder / "run/records.parquet", "a.jpg")
    (folder / "run/run.json").write_text('{"schema":"md3-run/1"}')
    rows = source("run")
    assert names(rows) == []
    assert rows.skipped["of md3's own files"] == 1
    assert names(source("run/*.parquet")) == ["records.parquet/0000001-a.jpg"]


# -- braces ----------------------------------------------------------------------------------------------


def test_braces_name_tars_as_a_pattern_does(shards: Path) -> None:
    rows = source("shards/{2,10}.tar")
    assert names(rows) == names(source("shards/*.tar")) == names(source("shards"))[:4]
    assert rows.root == source("shards/*.tar").root == str(shards)
    (shards / "2.tar").rename(shards / "0009.tar")
    (shards / "10.tar").rename(shards / "0010.tar")
    assert names(source(f"{shards}/{{0009..0010}}.tar"))[::2] == ["0009.tar/2.jpg", "0010.tar/10.jpg"]
    assert names(source("{shards,photos}/**/*.{tar,TAR,png}")) == [
        "shards/0009.tar/2.jpg",
        "shards/0009.tar/in/2.png",
        "shards/0010.tar/10.jpg",
        "shards/0010.tar/in/10.png",
        "shards/sub/3.TAR/3.jpg",
        "photos/sub/b.png",
    ]
    assert names(source("shards/{0009..0010}.tar", "photos/sub"))[0] == "shards/0009.tar/2.jpg"


def test_braces_name_pictures_folders_and_manifests(folder: Path) -> None:
    for kind in ("cats", "dogs"):
        (folder / "photos" / kind).mkdir()
        (folder / "photos" / kind / "x.jpg").touch()
        (folder / "photos" / kind / "m.jsonl").write_text('{"image":"x.jpg"}\n')
    pictures = ["cats/x.jpg", "dogs/x.jpg"]
    for typed in ("photos/{cats,dogs}", "photos/{cats,dogs}/", "photos/{cats,dogs}/m.jsonl", "photos/{ca,do}*s/*.jpg"):
        rows = source(typed)
        assert (names(rows), rows.root) == (pictures, str(folder / "photos"))
        assert [os.path.exists(row.image.path) for row in rows if row.image] == [True, True]
    assert names(source("photos/a{9..10}.jpg")) == ["a9.jpg", "a10.jpg"]
    assert names(source("photos/{cats,dogs}/m.jsonl", root=folder / "photos/sub")) == ["x.jpg", "x.jpg"]
    (folder / "x{1,2}.jpg").touch()
    assert names(source("x{1,2}.jpg")) == ["x{1,2}.jpg"]


def test_what_braces_name_and_is_not_there(shards: Path) -> None:
    missing = r"there is no shards/3\.tar: 8 of the 10 that shards/\{1\.\.10\}\.tar names are missing; a pattern"
    with pytest.raises(InputError, match=missing.replace("/3", "/1")):
        source("shards/{1..10}.tar")
    with pytest.raises(InputError, match="paths, more than 262,144"):
        source("shards/{0..99999999999}.tar")
    (shards / "{3..4}.tar").write_bytes((shards / "2.tar").read_bytes())
    assert names(source("shards/{3..4}.tar"))[0] == "2.jpg"  # what is there under this name is that file


def test_an_empty_folder_gives_nothing(tmp_path: Path) -> None:
    assert list(source(str(tmp_path))) == []
    assert source(str(tmp_path)).count() == (0, 0)


def test_a_tar(folder: Path) -> None:
    with tarfile.open("p.tar", "w") as tar:
        tar.add("photos", "./photos")
        tar.add("photos/a9.jpg", ".hidden.jpg")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a9.jpg"
        tar.addfile(link)
    rows = source("p.tar")
    content = {}
    for row in rows:
        assert row.image is not None
        with open(row.image.path, "rb") as file:
            file.seek(row.image.offset)
            content[row.image.name] = file.read(row.image.size)
    assert content == {name: name.encode() for name in ("photos/a10.jpg", "photos/a9.jpg", "photos/sub/b.png")}
    assert rows.skipped == {"hidden": 1, "other suffix": 1, "links inside a tar": 1}
    assert rows.root == str(folder / "p.tar")
    assert set(names(source("*.tar"))) == {f"p.tar/{name}" for name in content}
    assert set(names(source("p.tar", "photos/sub"))) >= {"p.tar/photos/a9.jpg", "photos/sub/b.png"}


def test_a_damaged_tar_is_one_more_row(folder: Path) -> None:
    with tarfile.open("p.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add("photos/a9.jpg")
        tar.add("photos/a10.jpg")
    data = bytearray(Path("p.tar").read_bytes())
    data[1024 + 150] ^= 0xFF
    Path("p.tar").write_bytes(data)
    rows = list(source("p.tar"))
    assert [row.image.name for row in rows if row.image] == ["photos/a9.jpg", "p.tar"]
    assert rows[1].failure is not None
    assert rows[1].failure.type == "decode"
    Path("q.tar").write_bytes(b"no tar")  # among others it is one row; alone it is an InputError, see below
    assert [row.image.name for row in source("*.tar") if row.image] == ["p.tar/photos/a9.jpg", "p.tar", "q.tar"]
    assert names(source("q.tar", "photos/sub")) == ["q.tar", "photos/sub/b.png"]


# -- what is no INPUT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["gone.jpg", "gone", "gone.csv", "", "photos/gone/"])
def test_a_lone_input_that_does_not_exist(folder: Path, typed: str) -> None:
    with pytest.raises(InputError, match=f"there is no {typed}; check the path"):
        source(typed)


def test_braces_and_spreadsheets_are_explained(folder: Path) -> None:
    with pytest.raises(InputError, match=r"there is no photos/00000\.tar: 2 of the 2 .* are there: 'photos/\*\.tar'"):
        source("photos/{00000..00001}.tar")
    (folder / "x{1,2}.jpg").touch()
    assert names(source("x{1,2}.jpg")) == ["x{1,2}.jpg"]
    (folder / "t.xlsx").touch()
    with pytest.raises(InputError, match="save it as CSV UTF-8"):
        source("t.xlsx")


def test_inputs_that_are_not_read(folder: Path) -> None:
    (folder / "a.tar.gz").touch()
    with pytest.raises(InputError, match="is compressed; unpack it"):
        source("a.tar.gz")
    with pytest.raises(InputError, match=r"gone\.csv"):
        source("photos", "gone.csv")
    with pytest.raises(UsageError, match="--root gone is not a folder"):
        source("photos", root=Path("gone"))
    with pytest.raises(InputError, match="cannot read the folder gone"):
        source("gone/*.jpg")
    os.mkfifo("fifo.tar")
    with pytest.raises(InputError, match="not a regular file"):
        source("fifo.tar")
    (folder / "not.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="as a tar"):
        source("not.tar")


# -- manifests --------------------------------------------------------------------------------------------


def test_a_manifest(folder: Path) -> None:
    manifest = folder / "photos" / "m.csv"
    manifest.write_text(
        "image,task,prompt,max_tokens,who\na9.jpg,,,5,me\n,query,how?,,\nsub/b.png,detect,,,\n../x,,,x,you\n"
    )
    rows = source("photos/m.csv")
    found = list(rows)
    assert names(rows) == ["a9.jpg", None, "sub/b.png", "../x"]
    assert found[0].image is not None
    assert found[0].image.path == "photos/a9.jpg"
    assert [request.max_tokens for request in found[0].requests] == [5, 5]
    assert found[0].meta == {"who": "me"}
    assert [request.prompt for request in found[1].requests] == ["how?"]
    assert failures(rows) == [
        None,
        None,
        ("bad_request", "line 4: detect needs a prompt"),
        ("bad_row", "line 5: max_tokens is 'x', not a whole number"),
    ]
    assert found[3].meta == {"who": "you"}
    assert [(request.task, request.prompt) for request in found[2].requests] == [(Task.DETECT, None)]
    assert all(row.requests for row in found)
    assert rows.root == str(folder / "photos")


def test_rows_may_bring_all_tasks_themselves(folder: Path) -> None:
    (folder / "m.jsonl").write_text('{"image":"a.jpg","task":"caption"}\n{"image":"b.jpg"}\n{broken\n')
    spec = SourceSpec(("m.jsonl",))
    rows = list(open_source(spec, (), defaults=Request(Task.QUERY, max_tokens=9)))
    assert rows[0].requests == (Request(Task.CAPTION, max_tokens=9),)
    assert [row.failure and row.failure.type for row in rows] == [None, "bad_request", "bad_row"]
    assert all(len(row.requests) == 1 for row in rows)


def test_rows_of_one_column(folder: Path) -> None:
    (folder / "m.jsonl").write_text('{"image":"a.jpg"}\n{"image":null}\n{"who":"me"}\n{"image":"http://x/a.jpg"}\n')
    rows = list(source("m.jsonl", asked=(Request(Task.QUERY, "?"),)))
    assert [row.failure and row.failure.type for row in rows] == [None, None, "bad_row", "bad_request"]
    assert [dict(row.meta) for row in rows] == [{}, {}, {"who": "me"}, {}]
    rows = list(source("m.jsonl", asked=(Request(Task.DETECT, " "),)))
    assert [row.failure and row.failure.type for row in rows] == [
        "bad_request",
        "bad_request",
        "bad_row",
        "bad_request",
    ]


def test_stdin_is_paths_and_objects(folder: Path) -> None:
    rows = source("-", stdin=b'photos/a9.jpg\n{"image":"photos/a10.jpg","note":1}\n')
    assert rows.count() is None
    assert [(row.image and row.image.path, dict(row.meta)) for row in rows] == [
        ("photos/a9.jpg", {}),
        ("photos/a10.jpg", {"note": 1}),
    ]
    assert rows.root == os.getcwd()


def test_a_closed_stdin_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="stdin is closed"):
        open_source(SourceSpec(("-",)), ASKED)


def test_addresses_in_a_manifest_are_rows_of_their_own(folder: Path) -> None:
    (folder / "m.txt").write_text("http://x/a.jpg\nfile:///etc/passwd\nphotos/a9.jpg\n")
    found = failures(source("m.txt"))
    assert [failure and failure[0] for failure in found] == ["bad_request", "bad_request", None]
    assert names(source("m.txt"))[0] == "http://x/a.jpg"


def test_an_unreadable_manifest_is_an_input_error(folder: Path) -> None:
    (folder / "m.csv").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(InputError, match="no column 'image'"):
        source("photos", "m.csv")  # at once, not when its turn comes


# -- names -------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_can_be_mapped_back(tmp_path: Path) -> None:
    raw = b"caf\xe9 \x1b[31m\n.jpg"
    fd = os.open(os.fsencode(tmp_path) + b"/" + raw, os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"here")
    os.close(fd)
    (row,) = source(str(tmp_path))
    assert row.image is not None
    assert row.image.name == "caf\\xe9 \x1b[31m\n.jpg"
    assert base64.b64decode(row.image.name_b64 or "") == raw
    assert Path(row.image.path).read_bytes() == b"here"


@given(st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name))
def test_any_bytes_are_a_name(raw: bytes) -> None:
    image = image_item(os.fsdecode(raw), os.fsdecode(b"d/" + raw))
    image.name.encode()
    assert os.fsencode(image.path) == b"d/" + raw
    assert (image.name.encode() if image.name_b64 is None else base64.b64decode(image.name_b64)) == raw


# -- what narrows ------------------------------------------------------------------------------------------


def test_include_exclude_and_limit(folder: Path) -> None:
    assert names(source("photos", include=("*.jpg",))) == ["a9.jpg", "a10.jpg"]
    assert names(source("photos", exclude=("sub", "a10*"))) == ["a9.jpg"]
    assert names(source("photos", limit=2)) == ["a9.jpg", "a10.jpg"]
    assert source("photos", limit=2).count() == (2, 4)
    assert names(source("photos", limit=0)) == []
    rows = source("-", stdin=b"x/a.jpg\nx/b.png\n", exclude=("*.png",))
    assert names(rows) == ["x/a.jpg"]
    assert rows.skipped == {"excluded": 1}


path_text = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1, max_size=6)


@pytest.mark.process
@given(st.lists(path_text), st.integers(1, 5))
def test_shards_part_the_rows(listed: list[str], count: int) -> None:
    text = "\n".join(f"n{name}" for name in listed).encode()
    parts = [list(source("-", stdin=text, shard=(i, count))) for i in range(count)]
    whole = list(source("-", stdin=text))
    assert sorted(repr(row) for part in parts for row in part) == sorted(map(repr, whole))
    for i, part in enumerate(parts):
        for row in part:
            assert row.image is not None
            digest = hashlib.sha256(row.image.name.encode()).digest()
            assert int.from_bytes(digest[:8], "big") % count == i  # by name alone: the same in every run


def test_rows_without_a_name_have_a_shard_too(folder: Path) -> None:
    (folder / "m.jsonl").write_text('{"image":null}\n{broken\n' * 20)
    parts = [source("m.jsonl", asked=ASKED[:1], shard=(i, 3)) for i in range(3)]
    sizes = [len(list(part)) for part in parts]
    assert sum(sizes) == 40
    assert max(sizes) < 40
    assert sum(part.skipped["other shards"] for part in parts) == 80


# -- confinement ---------------------------------------------------------------------------------------------


def test_root_confines_rows_and_links(folder: Path) -> None:
    (folder / "secret.jpg").touch()
    (folder / "photos2").mkdir()
    (folder / "photos2" / "x.jpg").touch()
    (folder / "photos" / "out.jpg").symlink_to("../secret.jpg")
    (folder / "photos" / "in.jpg").symlink_to("a9.jpg")
    listed = [
        "a9.jpg",
        "sub/../a9.jpg",
        "../secret.jpg",
        "../photos2/x.jpg",
        str(folder / "secret.jpg"),
        "out.jpg",
        "in.jpg",
    ]
    (folder / "m.txt").write_text("\n".join([*listed, str(folder / "photos" / "a9.jpg")]))
    inside = [failure is None for failure in failures(source("m.txt", root=Path("photos")))]
    assert inside == [True, True, False, False, False, False, True, True]
    outside = [failure for failure in failures(source("m.txt", root=Path("photos"))) if failure]
    assert {kind for kind, _ in outside} == {"outside_root"}
    assert source("m.txt", root=Path("photos")).root == str(folder / "photos")
    walked = dict(zip(names(source("photos")), failures(source("photos", root=Path("photos"))), strict=True))
    assert [name for name, failure in walked.items() if failure] == ["out.jpg"]


# -- memory ----------------------------------------------------------------------------------------------------


def test_a_large_folder_is_walked_in_bounded_memory(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"d{i}").mkdir()
        for j in range(150):
            os.close(os.open(tmp_path / f"d{i}" / f"{j}.jpg", os.O_CREAT | os.O_WRONLY))
    rows = iter(source(str(tmp_path)))
    next(rows)
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows) == 1499
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_counting_gives_up_in_time(folder: Path) -> None:
    (folder / "m.txt").write_text("a.jpg\n" * 20_000)
    assert source("m.txt").count(budget_s=0.0) is None
    assert source("m.txt").count(budget_s=60) == (20_000, 40_000)


def test_an_absolute_name_in_a_tar_stays_inside_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("/etc/x.png", "x.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert names(source(str(tmp_path / "*.tar"))) == ["a.tar//etc/x.png", "a.tar/x.png"]


# -- lists from elsewhere ------------------------------------------------------------------------------------


def paths(rows: Source) -> list[str | None]:
    return [row.image and row.image.path for row in rows]


def test_names_as_other_systems_spell_them_find_their_file(folder: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "m\u00fc/k\u00e9.png") for form in ("NFC", "NFD"))
    (folder / decomposed).parent.mkdir()
    (folder / decomposed).touch()
    (folder / "b\\c.jpg").touch()
    (folder / "blank.jpg ").touch()
    spelled = {
        "photos\\a9.jpg": "photos/a9.jpg",
        "photos\\sub/b.png": "photos/sub/b.png",
        "b\\c.jpg": "b\\c.jpg",  # there is a file of this very name
        composed: decomposed,
        composed.replace("/", "\\"): decomposed,
        decomposed: decomposed,
        "photos/a9.jpg ": "photos/a9.jpg",
        '"photos/a9.jpg"': "photos/a9.jpg",
        '"photos\\a9.jpg" ': "photos/a9.jpg",
        "blank.jpg ": "blank.jpg ",
        "gone\\x.jpg": "gone\\x.jpg",
    }
    (folder / "m.txt").write_text("\n".join(spelled), encoding="utf-8")
    rows = source("m.txt")
    assert names(rows) == list(spelled)  # as named: two names of one file are two
    assert paths(rows) == list(spelled.values())
    assert failures(rows) == [None] * len(spelled)


def test_a_name_spelled_otherwise_does_not_leave_the_root(folder: Path) -> None:
    (folder / "secret.jpg").touch()
    (folder / "m.txt").write_text("..\\secret.jpg\nsub\\..\\..\\secret.jpg\nsub\\b.png\n'../secret.jpg'\n")
    found = failures(source("m.txt", root=Path("photos")))
    assert [failure and failure[0] for failure in found] == ["outside_root", "outside_root", None, "outside_root"]


def test_the_home_folder_and_drives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "photos"))
    (folder / "m.txt").write_text("~/a9.jpg\nC:\\photos\\a9.jpg\n\\\\server\\a9.jpg\nC:/a9.jpg\n")
    rows = source("m.txt")
    assert paths(rows)[0] == str(folder / "photos" / "a9.jpg")
    found = [failure and (failure[0], "Windows" in failure[1]) for failure in failures(rows)]
    assert found == [None, *[("not_found", True)] * 3]


def test_remarks_in_a_list_are_counted_and_files_of_such_names_are_files(folder: Path) -> None:
    (folder / "#1.jpg").touch()
    (folder / "m.txt").write_text("# pictures\nphotos/a9.jpg\n#1.jpg\n#gone.jpg\n   \n")
    rows = source("m.txt")
    assert names(rows) == ["photos/a9.jpg", "#1.jpg"]
    assert rows.skipped == {"comments": 2}


COLOR = Request(Task.QUERY, "What colour is the {label}?")
CAR = Request(Task.DETECT, "car")


def test_pictures_are_asked_about_their_objects_where_the_command_finds_any(folder: Path) -> None:
    spec = SourceSpec(("photos",))
    assert {row.then for row in open_source(spec, (CAR, *ASKED), then=(COLOR,))} == {(COLOR,)}
    assert {row.then for row in open_source(spec, ASKED, then=(COLOR,))} == {()}
    Path("list.txt").write_text("photos/a9.jpg\n")
    assert [row.then for row in open_source(SourceSpec(("list.txt",)), (CAR,), then=(COLOR,))] == [(COLOR,)]


def test_rows_of_every_format_bring_their_own_questions_about_objects(folder: Path) -> None:
    rows = [
        {"image": "a.jpg", "then": None, "task": None},
        {"image": "b.jpg", "then": "query:Which shape is the {label}?"},
        {"image": "c.jpg", "then": "query:What?", "task": "caption"},
        {"image": "d.jpg", "then": "query:What is {this}?"},
    ]
    shape = Request(Task.QUERY, "Which shape is the {label}?")
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("a.csv").write_text(
        "image,then,task\n" + "".join(f"{r['image']},{r['then'] or ''},{r.get('task') or ''}\n" for r in rows)
    )
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        found = list(open_source(SourceSpec((name,)), (CAR,), then=(COLOR,)))
        assert [row.then for row in found] == [(COLOR,), (shape,), (), ()]
        assert [row.failure and row.failure.type for row in found] == [None, None, "bad_request", "bad_request"]
        assert not any(row.meta for row in found)


def test_a_list_of_questions_about_objects(folder: Path) -> None:
    both = (Request(Task.CAPTION, length="short"), Request(Task.SEGMENT, "{label} door"))
    specs = ["caption:short", "segment:{label} door"]
    Path("a.jsonl").write_text(json.dumps({"image": "a.jpg", "then": specs}))
    Path("a.tsv").write_text(
        f"image\tthen\na.jpg\t{json.dumps(specs)}\n".replace('"', '""').replace("[", '"[').replace("]", ']"')
    )
    pq.write_table(pa.table({"image": ["a.jpg"], "then": [specs]}), "a.parquet")
    for name in ("a.jsonl", "a.tsv", "a.parquet"):
        assert [row.then for row in open_source(SourceSpec((name,)), (CAR,))] == [both]


def test_a_constant_asks_about_the_objects_of_rows_that_ask_nothing(folder: Path) -> None:
    constants = ColumnOptions(constants=(("then", "query:What?"),))
    rows = open_source(SourceSpec(("photos",), columns=constants), (CAR,))
    assert {row.then for row in rows} == {(Request(Task.QUERY, "What?"),)}
    with pytest.raises(UsageError, match=r"--const then=query:\{x\}: then: .*filled by nothing"):
        open_source(SourceSpec(("photos",), columns=ColumnOptions(constants=(("then", "query:{x}"),))), (CAR,))
