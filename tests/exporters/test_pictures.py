"""Which file an export opens: never one that a stranger's records or run.json lead to, under any spelling of a name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_runs import CAR, HEIGHT, WIDTH, Record, Run, draw_pictures, record, write_records
from PIL import Image
from typer.testing import CliRunner, Result

from md3cli.cli import app
from md3cli.exporters import ExportOptions
from md3cli.exporters.pictures import Pictures
from md3cli.finished.run_json import seal_of
from md3cli.refine.collection import as_collection

SECRET = b"-----BEGIN PRIVATE KEY-----"
CARRYING = ["hf", "yolo", "overlay", "crops", "redacted", "parquet", "html"]


def export(folder: Path, format: str, *options: object) -> Result:
    embed = ["--embed-images"] if format == "parquet" else []
    arguments = ["export", str(folder), "-f", format, *embed, *map(str, options)]
    return CliRunner().invoke(app, arguments)


def bytes_under(out: Path) -> bytes:
    paths = out.rglob("*") if out.is_dir() else [out] if out.exists() else []
    return b"".join(path.read_bytes() for path in paths if path.is_file())


def of(path: Path, image: str, task: str = "detect") -> Record:
    """A record about `path` under the name `image`, with the digest of what is there."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    result = {"objects": [CAR]} if task == "detect" else {"caption": "a stranger's", "length": "short"}
    return record(image, task, "car", sha256=digest, **result)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a private key, one that is called a picture, and two pictures."""
    made = tmp_path / "home"
    draw_pictures(made, ["p.png", "q.png"])
    (made / "id_rsa").write_bytes(SECRET)
    (made / "key.png").write_bytes(SECRET)
    return made


def strangers_run(tmp_path: Path, root: object, lines: list[Record], **keys: object) -> Path:
    folder = tmp_path / "stranger"
    write_records(folder / "records.jsonl", lines)
    (folder / "run.json").write_text(json.dumps({"schema": "md3-run/1", "root": root} | keys))
    return folder


@pytest.mark.process
@pytest.mark.parametrize("format", CARRYING)
@pytest.mark.parametrize("name", ["id_rsa", "key.png"])
@pytest.mark.parametrize("root", ["/", "home"])
@pytest.mark.parametrize("is_typed", [False, True])
def test_what_is_no_picture_is_never_carried(
    tmp_path: Path, home: Path, format: str, name: str, root: str, is_typed: bool
) -> None:
    claimed = Path("/") if root == "/" else home
    image = (home / name).relative_to(claimed).as_posix()
    folder = strangers_run(tmp_path, str(claimed), [of(home / name, image), of(home / "p.png", image + ".png")])
    options = ["--root", claimed] if is_typed else []
    result = export(folder, format, "-o", tmp_path / "out", *options)
    assert "unexpected" not in result.output
    assert SECRET not in bytes_under(tmp_path / "out")


@pytest.mark.parametrize("format", CARRYING)
def test_below_a_claimed_root_only_the_record_s_own_picture_is_taken(tmp_path: Path, home: Path, format: str) -> None:
    ours, wrong = of(home / "p.png", "p.png"), of(home / "p.png", "q.png")
    folder = strangers_run(tmp_path, str(home), [ours, wrong])
    result = export(folder, format, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = Pictures(as_collection(folder / "records.jsonl"), ExportOptions())
    assert not found.is_trusted
    carried = bytes_under(tmp_path / "out")
    if format in ("hf", "yolo"):
        assert (home / "p.png").read_bytes() in carried
        assert not list((tmp_path / "out").rglob("q.png"))
    assert (home / "q.png").read_bytes() not in carried


@pytest.mark.parametrize("root", ["x" * 5000, "\ud800", "\0", "nowhere/" * 600, "http://h.example/x", 7, ["/"], None])
def test_a_root_that_no_folder_can_have_is_none(tmp_path: Path, home: Path, root: object) -> None:
    folder = strangers_run(tmp_path, root, [of(home / "p.png", "p.png")], seal="\ud800")
    assert Pictures(as_collection(folder / "records.jsonl"), ExportOptions()).root is None
    result = export(folder, "hf", "-o", tmp_path / "out")
    assert (result.exit_code, "add --root DIR" in result.stderr) == (2, True)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\ud800", "{}" + " " * 10 + "x"])
def test_a_run_json_that_is_none_is_named(tmp_path: Path, home: Path, text: str) -> None:
    folder = strangers_run(tmp_path, "/", [of(home / "p.png", "p.png")])
    (folder / "run.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    result = export(folder, "hf", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "run.json is not JSON" in result.stderr


@pytest.mark.parametrize("seal", [None, 7, "", "0" * 64, "ü"])
def test_a_seal_cannot_be_guessed(tmp_path: Path, home: Path, seal: object) -> None:
    folder = strangers_run(tmp_path, str(home), [of(home / "p.png", "p.png")], seal=seal)
    assert not Pictures(as_collection(folder / "records.jsonl"), ExportOptions()).is_trusted


def test_a_seal_is_of_one_root(tmp_path: Path, home: Path) -> None:
    folder = strangers_run(tmp_path, str(home), [of(home / "p.png", "p.png")], seal=seal_of(str(tmp_path)))
    assert not Pictures(as_collection(folder / "records.jsonl"), ExportOptions()).is_trusted


@pytest.mark.parametrize("root", ["home", "/", ".", ".."])
def test_nothing_is_written_beside_pictures_that_only_a_stranger_names(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    monkeypatch.chdir(home)
    claimed = home if root == "home" else Path(root)
    image = os.path.relpath(home / "p.png", claimed.resolve())
    folder = strangers_run(tmp_path, str(claimed), [of(home / "p.png", image, "caption")])
    result = export(folder, "txt", "--beside")
    assert result.exit_code == 2
    assert "--root DIR" in result.stderr
    assert not list(tmp_path.rglob("*.txt"))
    assert export(folder, "txt", "--beside", "--root", claimed.resolve()).exit_code == 0
    assert (home / "p.txt").read_text() == "a stranger's"


def test_own_runs_need_no_root(tmp_path: Path, home: Path) -> None:
    """As the command's own run.json has it; also when the picture was changed since."""
    folder = strangers_run(tmp_path, str(home), [of(home / "p.png", "p.png", "caption")], seal=seal_of(str(home)))
    draw_pictures(home, ["q.png", "p.png"])
    assert export(folder, "hf", "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out/train/p.png").read_bytes() == (home / "p.png").read_bytes()
    assert export(folder, "txt", "--beside").exit_code == 0
    assert (home / "p.txt").read_text() == "a stranger's"


def test_an_address_is_no_folder(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "http:/h.example", ["p.png"])
    folder = strangers_run(tmp_path, "http://h.example", [of(home / "p.png", "p.png")])
    assert Pictures(as_collection(folder / "records.jsonl"), ExportOptions()).root is None


# --- tars ----------------------------------------------------------------------------------------------


def write_tar(
    path: Path, members: Mapping[str, tuple[int, int, int]], size_wh: tuple[int, int] = (WIDTH, HEIGHT)
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, colour in members.items():
            content = io.BytesIO()
            Image.new("RGB", size_wh, colour).save(content, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)


@pytest.mark.parametrize("is_confined", [True, False])
@pytest.mark.parametrize("tar", ["a.tar", "sub/B.TAR"])
def test_a_member_is_found_in_its_tar_only(run: Run, is_confined: bool, tar: str) -> None:
    secret = run.root / "empty.png"
    outside = f"../{secret.parent.name}/empty.png"
    members = {"n/x.png": (1, 2, 3), str(secret): (4, 5, 6), "./d.png": (7, 8, 9), outside: (9, 9, 9)}
    write_tar(run.root / tar, members)
    run.write([record("x", "caption", caption="x")])
    pictures = Pictures(as_collection(run.records), ExportOptions(root=run.root, is_confined=is_confined))
    for name, colour in members.items():
        found = pictures.find({"image": f"{tar}/{name.removeprefix('./')}"})
        assert found is not None
        assert pictures.read(found).getpixel((0, 0)) == colour
    for name in ("link.png", "gone.png", "../a/photo.png", "../../pictures/empty.png", "/etc/hostname", ""):
        assert pictures.find({"image": f"{tar}/{name}"}) is None


def test_a_folder_that_is_called_a_tar_is_a_folder(run: Run) -> None:
    draw_pictures(run.root, ["a.tar/b.png"])
    run.write([record("a.tar/b.png", "caption", caption="x")])
    found = Pictures(as_collection(run.records), ExportOptions()).find({"image": "a.tar/b.png"})
    assert found is not None
    assert found.path == str(run.root.resolve() / "a.tar/b.png")


def test_of_two_members_of_one_name_the_record_s_is_taken(run: Run) -> None:
    contents = []
    with tarfile.open(run.root / "a.tar", "w") as tar:
        for colour in ("red", "blue"):
            content = io.BytesIO()
            Image.new("RGB", (WIDTH, HEIGHT), colour).save(content, "PNG")
            contents.append(content.getvalue())
            info = tarfile.TarInfo("x.png")
            info.size = len(contents[-1])
            tar.addfile(info, io.BytesIO(contents[-1]))
    run.write([record("x", "caption", caption="x")])
    pictures = Pictures(as_collection(run.records), ExportOptions())
    for content in contents:
        found = pictures.find({"image": "a.tar/x.png", "sha256": hashlib.sha256(content).hexdigest()})
        assert found is not None
        assert pictures.read_bytes(found) == content
    assert pictures.find({"image": "a.tar/x.png", "sha256": "0" * 64}) is None


# ---- names as lists from elsewhere spell them ----------------------------------------------------


def test_an_export_finds_what_a_list_spelled_otherwise(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "m\u00fc.png")
    for name in ("sub/a.png", decomposed):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "r.jsonl").touch()
    pictures = Pictures(as_collection(tmp_path / "r.jsonl"), ExportOptions(root=tmp_path))
    for name, path in (("sub\\a.png", "sub/a.png"), (unicodedata.normalize("NFC", decomposed), decomposed)):
        found = pictures.find({"image": name, "sha256": None})
        assert found is not None
        assert found.path == str(tmp_path / path)
    assert pictures.find({"image": "..\\sub\\gone.png"}) is None


# --- pictures that were exchanged ------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "yolo", "voc", "overlay", "crops", "parquet", "labelme", "cvat", "html"])
@pytest.mark.parametrize("kind", ["file", "tar", "parquet"])
def test_a_picture_of_another_size_than_the_record_says_is_told(
    run: Run, tmp_path: Path, kind: str, format: str
) -> None:
    place = {"file": "a.png", "tar": "s.tar/a.png", "parquet": "s.parquet/0000001-a.png"}[kind]
    content = io.BytesIO()
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(content, "PNG")
    draw_pictures(run.root, ["same.png"])
    if kind == "file":
        (run.root / "a.png").write_bytes(content.getvalue())
    elif kind == "tar":
        write_tar(run.root / "s.tar", {"a.png": (0, 0, 0)}, (WIDTH + 1, HEIGHT))
    else:
        pq.write_table(pa.table({"image": [{"bytes": content.getvalue(), "path": "a.png"}]}), run.root / "s.parquet")
    asked = [(place, "car"), (place, "dog"), ("same.png", "car")]
    run.write([record(name, "detect", prompt, objects=[CAR]) for name, prompt in asked])
    suffix = {"html": ".html", "parquet": ".parquet"}.get(format, "")
    result = export(run.records, format, "-o", tmp_path / f"out{suffix}", "--root", run.root)
    assert result.exit_code == 0, result.output
    assert result.output.count("1 picture has another size in pixels now than the records say") == 1
