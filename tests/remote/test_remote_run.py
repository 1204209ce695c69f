"""Whole runs on remote INPUT through `md3`, with a stub in the model's place."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_servers import WITHOUT_EXTRA, Fault, HubServer, StoreDoor, WebServer, picture, serving
from program import Program, clean_environment, records_of, start
from typer.testing import Result

from md3cli.remote.address import shown
from md3cli.scale.store import open_store

pytestmark = pytest.mark.process  # of whole runs over servers: long

Put = Callable[[str, bytes], None]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.remote.retry.Retries._wait_s", lambda self, num_failed, failure: 0.01)


def images(md3: Program, *arguments: object, status: int = 0) -> list[str]:
    result = md3("caption", *arguments, "--quiet")
    assert result.exit_code == status, result.stderr
    return [record["image"] for record in records_of(result.stdout)]


def errors(md3: Program, *arguments: object) -> dict[str, str | None]:
    result = md3("caption", *arguments, "--quiet")
    assert result.exit_code in (0, 3), result.stderr
    return {record["image"]: (record["error"] or {}).get("type") for record in records_of(result.stdout)}


def refusal(md3: Program, *arguments: object, status: int = 1) -> str:
    result = md3("caption", *arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


# -- folders, globs, files -----------------------------------------------------------------------


@pytest.fixture
def folder(store: StoreDoor, put: Put) -> str:
    for key in ("a10.png", "a9.png", "sub/b.JPG", "sub/.hidden.png", "notes.md", "sub/deep/c.webp", "sub2/"):
        put(f"set/{key}", picture(len(key)) if not key.endswith("/") else b"")
    put("settled/x.png", picture(1))
    return "s3://pictures/set"


@pytest.mark.process
def test_a_folder_in_natural_order(md3: Program, folder: str) -> None:
    names = [f"{folder}/{name}" for name in ("a9.png", "a10.png", "sub/b.JPG", "sub/deep/c.webp")]
    assert images(md3, folder) == images(md3, folder + "/") == names
    assert images(md3, folder, "--no-recursive") == names[:2]
    assert images(md3, folder, "--exclude", "sub/**", "--limit", "1") == names[:1]
    said = md3("caption", folder, "-o", "o.jsonl", "--no-progress").stderr
    assert "1 hidden" in said
    assert "1 other suffix" in said


@pytest.mark.process
def test_globs_and_single_files(md3: Program, folder: str) -> None:
    assert images(md3, f"{folder}/**/*.[Jw]*") == [f"{folder}/sub/b.JPG", f"{folder}/sub/deep/c.webp"]
    assert images(md3, f"{folder}/a?.png") == [f"{folder}/a9.png"]
    assert images(md3, f"{folder}/a9.png") == [f"{folder}/a9.png"]
    assert images(md3, "s3://pictures/settled") == ["s3://pictures/settled/x.png"]


def test_a_key_like_a_glob_is_that_key(md3: Program, folder: str, put: Put) -> None:
    put("set/x[1]?.png", picture(4))
    assert images(md3, f"{folder}/x[1]?.png") == [f"{folder}/x[1]?.png"]


def test_a_bucket(md3: Program, folder: str) -> None:
    assert images(md3, "s3://pictures", "--include", "x.png") == ["s3://pictures/settled/x.png"]


def test_several_inputs(md3: Program, folder: str, tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(picture(3))
    names = images(md3, "here.png", f"{folder}/a9.png", f"{folder}/gone.png", f"{folder}/sub", status=3)
    below = [f"{folder}/{name}" for name in ("a9.png", "gone.png", "sub/b.JPG", "sub/deep/c.webp")]
    assert names == ["here.png", *below]


@pytest.mark.process
def test_more_than_a_page_of_names(md3: Program, store: StoreDoor, put: Put) -> None:
    store.page_size = 3
    for i in range(8):
        put(f"many/{i}.png", picture(i))
        put(f"many/{i}.d/x.png", picture(i))
    assert len(images(md3, "s3://pictures/many")) == 16
    assert store.requests["/pictures"] > 8


@pytest.mark.process
def test_what_is_not_there(md3: Program, folder: str) -> None:
    for typed in ("s3://pictures/gone", "s3://pictures/gone.png", "s3://no-bucket/x", "s3://pictures/gone.csv"):
        assert refusal(md3, typed) == f"error: there is no {typed}; check the address\n"
    assert "names no host or bucket" in refusal(md3, "s3://*/x.png")
    assert "is compressed" in refusal(md3, f"{folder}/a.tar.gz")
    said = refusal(md3, "s3://key:secret@pictures/x.png")
    assert "credentials do not belong" in said
    assert "secret" not in said


def test_a_web_folder_is_its_page(md3: Program, web: WebServer) -> None:
    web.files |= {f"/set/{name}": picture(i) for i, name in enumerate(("a10.png", "a9.png", "s b/c.png", "notes.md"))}
    names = [f"{web.url}/set/{name}" for name in ("a9.png", "a10.png", "s b/c.png")]
    assert images(md3, f"{web.url}/set/") == images(md3, f"{web.url}/set/**/*.png") == names
    assert images(md3, f"{web.url}/set/a9.png?v=2#x") == [f"{web.url}/set/a9.png?v=2"]
    web.files["/unnamed"] = picture(1)
    assert images(md3, f"{web.url}/unnamed") == [f"{web.url}/unnamed"]
    assert "there is no" in refusal(md3, f"{web.url}/gone/*.png")


# -- manifests -----------------------------------------------------------------------------------


@pytest.mark.process
def test_a_remote_manifest_names_what_lies_beside_it(md3: Program, web: WebServer, folder: str, put: Put) -> None:
    web.files["/w.png"] = picture(5)
    rows = [
        "a9.png",
        "sub/../a10.png",
        "/settled/x.png",
        f"{web.url}/w.png",
        f"{folder}/sub/b.JPG",
        "../../../../etc/x",
    ]
    put("set/list.csv", ("image,note\n" + "".join(f"{row},n{i}\n" for i, row in enumerate(rows))).encode())
    found = errors(md3, f"{folder}/list.csv")
    assert list(found) == rows
    assert list(found.values()) == [None, None, None, "bad_request", None, "not_found"], "no private host unasked"
    assert errors(md3, f"{folder}/list.csv", "--remote")[f"{web.url}/w.png"] is None


@pytest.mark.process
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".tsv", ".parquet"])
def test_remote_manifests_of_each_kind(md3: Program, web: WebServer, folder: str, put: Put, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": ["a9.png", "sub/b.JPG"]}), buffer)
    content = {
        ".txt": b"a9.png\nsub/b.JPG\n",
        ".jsonl": b'{"image": "a9.png"}\n{"image": "sub/b.JPG"}\n',
        ".tsv": b"image\na9.png\nsub/b.JPG\n",
        ".parquet": buffer.getvalue(),
    }[suffix]
    put(f"set/list{suffix}", content)
    assert images(md3, f"{folder}/list{suffix}") == ["a9.png", "sub/b.JPG"]
    web.files |= {f"/d/list{suffix}": content, "/d/a9.png": picture(1), "/d/sub/b.JPG": picture(2)}
    assert images(md3, f"{web.url}/d/list{suffix}?sig=x") == ["a9.png", "sub/b.JPG"]
    web.has_ranges = False
    assert images(md3, f"{web.url}/d/list{suffix}") == ["a9.png", "sub/b.JPG"]


def test_a_remote_coco_file(md3: Program, web: WebServer, folder: str, put: Put, tmp_path: Path) -> None:
    web.files["/w.png"] = picture(5)
    entries = [
        {"id": 1, "file_name": "a9.png", "width": 8, "height": 8, "coco_url": f"{web.url}/w.png"},
        {"id": 2, "file_name": "sub/b.JPG", "width": 8, "height": 8},
    ]
    boxes = [{"id": 5, "image_id": 2, "category_id": 1, "bbox": [0, 0, 4, 4]}]
    categories = [{"id": 1, "name": "car"}]
    content = json.dumps({"images": entries, "annotations": boxes, "categories": categories}).encode()
    put("set/list.json", content)
    assert images(md3, f"{folder}/list.json") == ["a9.png", "sub/b.JPG"], "what lies beside it comes first"
    assert images(md3, f"{folder}/list.json", "--remote") == [f"{web.url}/w.png", "sub/b.JPG"]
    assert images(md3, f"{folder}/list.json", "--regions") == ["sub/b.JPG"]
    web.files |= {"/d/list.json": content, "/d/a9.png": picture(1), "/d/sub/b.JPG": picture(2)}
    assert images(md3, f"{web.url}/d/list.json?sig=x") == ["a9.png", "sub/b.JPG"]
    (tmp_path / "list.json").write_bytes(content)
    assert images(md3, "list.json", "--root", folder) == ["a9.png", "sub/b.JPG"]
    put("set/bad.json", b"[]")
    assert "bad.json is no COCO file" in refusal(md3, f"{folder}/bad.json")
    assert "gone.json" in refusal(md3, f"{folder}/gone.json")


def test_addresses_in_a_local_manifest_need_consent(md3: Program, web: WebServer, folder: str, tmp_path: Path) -> None:
    web.files["/w.png"] = picture(5)
    (tmp_path / "here.png").write_bytes(picture(3))
    lines = [
        "here.png",
        f"{web.url}/w.png?token=t0ps3cret",
        f"{folder}/a9.png",
        "file:///etc/passwd",
        "data:image/png;base64,A",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    result = md3("caption", "list.txt", "--quiet")
    found = records_of(result.stdout)
    assert [(r["error"] or {}).get("type") for r in found] == [None, *["bad_request"] * 4]
    assert "add --remote to fetch them" in found[1]["error"]["message"]
    assert not web.requests
    result = md3("caption", "list.txt", "--quiet", "--remote")
    found = records_of(result.stdout)
    assert [(r["error"] or {}).get("type") for r in found] == [None, None, None, "bad_request", "bad_request"]
    assert found[1]["image"] == shown(f"{web.url}/w.png?token=t0ps3cret")
    assert "t0ps3cret" not in result.output
    assert images(md3, "list.txt", "--remote", "--limit", "1", "--offline", status=2) == []


def test_root_confines_addresses(md3: Program, folder: str, tmp_path: Path) -> None:
    rows = [
        "a9.png",
        "../settled/x.png",
        "sub/../../settled/x.png",
        f"{folder}/sub/b.JPG",
        "s3://pictures/settled/x.png",
    ]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    found = errors(md3, "list.txt", "--root", folder, "--remote")
    assert list(found.values()) == [None, "outside_root", "outside_root", None, "outside_root"]
    assert errors(md3, "list.txt", "--root", tmp_path, "--remote")[rows[3]] == "outside_root"
    (tmp_path / "here.txt").write_text(str(tmp_path / "x.png"))
    assert list(errors(md3, "here.txt", "--root", folder).values()) == ["outside_root"]


def test_a_list_of_addresses_on_stdin(md3: Program, folder: str) -> None:
    result = md3("caption", "-", "--remote", "--quiet", stdin=f"{folder}/a9.png\n{folder}/gone.png\n")
    assert [(r["error"] or {}).get("type") for r in records_of(result.stdout)] == [None, "not_found"]


# -- tars, Parquet -------------------------------------------------------------------------------


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.process
def test_a_tar_is_read_by_ranges(md3: Program, store: StoreDoor, web: WebServer, put: Put) -> None:
    big = {"big.bin": os.urandom(3_000_000)}
    members = {"000.png": picture(0), "000.json": b"{}", **big, "d/001.png": picture(1), "002.png": b"broken"}
    web.files["/set.tar"] = tar_of(members)
    put("set.tar", tar_of(members))
    for address, server in (("s3://pictures/set.tar", store), (f"{web.url}/set.tar", web)):
        server.log.clear()
        assert errors(md3, address) == {"000.png": None, "d/001.png": None, "002.png": "not_an_image"}
        ranges = [headers["Range"] for path, headers in server.log if "Range" in headers]
        asked = [tuple(map(int, wanted.removeprefix("bytes=").split("-"))) for wanted in ranges]
        assert sum(last - first + 1 for first, last in asked) < 2_500_000, "the large member is jumped over"
    web.has_ranges = False
    assert set(errors(md3, f"{web.url}/set.tar").values()) == {"io"}, "the list can be had, the parts cannot"
    names = [f"s3://pictures/set.tar/{name}" for name in ("000.png", "d/001.png", "002.png")]
    assert images(md3, "s3://pictures/*.tar", status=3) == names


@pytest.mark.process
def test_remote_shards_by_folder_and_by_braces(md3: Program, store: StoreDoor, web: WebServer, put: Put) -> None:
    for number in (8, 9, 10):
        shard = tar_of({"x.png": picture(number), "x.json": b'{"number": %d}' % number, "y.txt": b"stray"})
        put(f"set/{number:02d}.tar", shard)
        web.files[f"/set/{number:02d}.tar"] = shard
    for folder in ("s3://pictures/set", f"{web.url}/set"):
        names = [f"{folder}/{number:02d}.tar/x.png" for number in (8, 9, 10)]
        assert images(md3, f"{folder}/{{08..10}}.tar") == names
        said = refusal(md3, f"{folder}/{{07..10}}.tar")
        assert f"there is no {folder}/07.tar: 1 of the 4 that {folder}/{{07..10}}.tar names are missing" in said
    result = md3("caption", "s3://pictures/set")
    assert [record["image"] for record in records_of(result.stdout)] == [
        name.replace(folder, "s3://pictures/set") for name in names
    ]
    assert [record["meta"] for record in records_of(result.stdout)] == [{"number": number} for number in (8, 9, 10)]
    assert "not taken: 3 sidecars without their picture beside them" in result.stderr


def embedded(pictures: list[bytes | None], group: int = 3) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [None if data is None else {"bytes": data, "path": f"p{i % 2}.png"} for i, data in enumerate(pictures)]
    table = pa.table({"image": pa.array(cells, kind), "label": list(range(len(cells)))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


@pytest.mark.process
def test_parquet_with_pictures_inside(md3: Program, store: StoreDoor, put: Put, tmp_path: Path) -> None:
    content = embedded([picture(i) if i != 5 else b"broken" for i in range(8)])
    put("data/train-0.parquet", content)
    (tmp_path / "here.parquet").write_bytes(content)
    names = [f"{i + 1:07d}-p{i % 2}.png" for i in range(8)]
    for typed in ("here.parquet", "s3://pictures/data/train-0.parquet"):
        result = md3("caption", typed, "--quiet")
        found = records_of(result.stdout)
        assert [record["image"] for record in found] == names
        assert [record["meta"] for record in found] == [{"label": i} for i in range(8)]
        assert [record["error"] is None for record in found] == [i != 5 for i in range(8)]
        assert len({record["sha256"] for record in found if not record["error"]}) == 7
    shards = [f"s3://pictures/data/train-0.parquet/{name}" for name in names]
    assert images(md3, "s3://pictures/data/*.parquet", status=3) == shards
    assert images(md3, "*.parquet", status=3) == [f"here.parquet/{name}" for name in names]


@pytest.mark.process
def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """As a process of its own: where the Hub is, is read when its library is imported."""
    pytest.importorskip("aiohttp", reason=WITHOUT_EXTRA)
    files = {"p10.png": picture(10), "p9.png": picture(9), "sub/c.png": picture(3), "README.md": b"#"}
    files |= {"t.tar": tar_of({"x.png": picture(1)}), "d.parquet": embedded([picture(5), picture(6)])}
    with serving(HubServer({f"set/{name}": data for name, data in files.items()})) as hub:
        settings = clean_environment(tmp_path / "home") | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        found = {
            name: images_of_process(f"hf://datasets/a/b/set{name}", cwd=tmp_path, env=settings)
            for name in ("", "/*.png", "/p9.png", "/t.tar", "/d.parquet", "/gone.png")
        }
    pictures = [f"hf://datasets/a/b/set/{name}" for name in ("p9.png", "p10.png", "sub/c.png")]
    parquet = ["0000001-p0.png", "0000002-p1.png"]
    assert found == {
        "": pictures,
        "/*.png": pictures[:2],
        "/p9.png": pictures[:1],
        "/t.tar": ["x.png"],
        "/d.parquet": parquet,
        "/gone.png": "error: there is no hf://datasets/a/b/set/gone.png; check the address\n",
    }


def images_of_process(typed: str, **settings: Any) -> list[str] | str:
    """The images of the records of a run, none of which may have failed; else what it says."""
    stdout, stderr = start("caption", typed, "--quiet", **settings).communicate(timeout=240)
    found = records_of(stdout)
    return [record["image"] for record in found if record["error"] is None] or stderr.decode()


# -- failures ------------------------------------------------------------------------------------


def order_failures(store: StoreDoor, paths: list[str]) -> dict[str, str | None]:
    """Faults for every tenth picture or so; what each picture's record should say."""
    kinds: list[tuple[Fault, str | None]] = [
        (Fault(404), "not_found"),
        (Fault(403), "permission"),
        (Fault(cut_at=20), "io"),
        (Fault(cut_at=20, times=1), None),
        (Fault(503, times=2), None),
        (Fault(500), "io"),
        (Fault(pause_s=0.2, drip=1), "timeout"),
        (Fault(pause_s=0.3, drip=10_000), None),
    ]
    wanted: dict[str, str | None] = dict.fromkeys(paths)
    for i, path in enumerate(paths[3::7]):
        store.faults[path], wanted[path] = kinds[i % len(kinds)]
    return wanted


@pytest.mark.process
@pytest.mark.parametrize(
    ("output", "num_pictures"),
    [
        ("o.jsonl", 100),
        ("s3://pictures/out/o.jsonl", 100),
        pytest.param("s3://pictures/out/o.jsonl", 1000, marks=pytest.mark.slow),
    ],
)
def test_failures_become_the_right_records(
    store: StoreDoor, put: Put, tmp_path: Path, output: str, num_pictures: int
) -> None:
    """The real program as a process of its own; then the same command for what failed, on a server that is well."""
    where, _, name = output.rpartition("/")
    written = open_store(where or str(tmp_path))
    paths = [f"/pictures/set/{i // 50}/p{i}.png" for i in range(num_pictures)]
    for i, path in enumerate(paths):
        put(path.removeprefix("/pictures/"), picture(i))
    wanted = order_failures(store, paths)
    command = ["caption", "s3://pictures/set", "-o", output, "--fetch-timeout", "3", "--no-progress"]
    settings: dict[str, Any] = {"cwd": tmp_path, "env": clean_environment(tmp_path / "home")}
    process = start(*command, **settings)
    _, said = process.communicate(timeout=250)
    assert process.returncode == 3, said.decode()
    found = records_of(written.read(name) or b"")
    assert [record["image"] for record in found] == [f"s3:/{path}" for path in paths]
    assert {r["image"][4:]: (r["error"] or {}).get("type") for r in found} == wanted
    assert all(r["error"]["retry"] is (r["error"]["type"] != "not_found") for r in found if r["error"])
    assert b"a-secret-of-tests" not in said
    store.faults.clear()
    process = start(*command, "--retry-failed", **settings)
    _, said = process.communicate(timeout=250)
    assert process.returncode == 0, said.decode()
    found = records_of(written.read(name) or b"")
    assert [record["image"] for record in found] == [f"s3:/{path}" for path in paths]
    assert Counter(record["width"] for record in found) == Counter(24 + i % 7 for i in range(num_pictures))


@pytest.mark.process
def test_a_folder_that_cannot_be_listed_ends_the_run(md3: Program, folder: str, store: StoreDoor) -> None:
    store.faults["/pictures"] = Fault(403)
    assert "credentials" in refusal(md3, folder)
    store.faults["/pictures"] = Fault(503, times=2)
    assert len(images(md3, folder)) == 4


@pytest.mark.process
def test_no_secret_is_left_anywhere(md3: Program, web: WebServer, tmp_path: Path) -> None:
    web.files["/d/x.png"] = picture(1)
    for name in ("x.png", "gone.png"):
        address = f"{web.url.replace('//', '//me:pa55word@')}/d/{name}?v=1&X-Amz-Signature=s1gnature"
        (tmp_path / "list.txt").write_text(f"{address}\n")
        for given in ([address], ["list.txt", "--remote", "--root", tmp_path], ["list.txt", "--remote", "-v"]):
            result = md3("caption", *given, "-o", "out/", "--overwrite", "--no-progress")
            written = "".join(path.read_text() for path in (tmp_path / "out").glob("*") if path.is_file())
            everything = result.output + result.stderr + written
            assert "pa55word" not in everything
            assert "s1gnature" not in everything


def test_no_secret_is_in_the_readable_files_of_a_run_folder(md3: Program, web: WebServer, tmp_path: Path) -> None:
    web.files["/d/x.png"] = picture(1)

    def run(signature: str) -> Result:
        address = f"{web.url.replace('//', '//me:pa55word@')}/d/x.png?X-Amz-Signature={signature}"
        return md3("caption", address, "-o", "out/", "--engine", "local", "--no-progress")

    said = run("s1gnature").stderr
    (tmp_path / "out/.md3run/exported.json").unlink()  # as if it were not finished
    refused = run("0ther")
    assert refused.exit_code == 2
    told = re.search(r"another run.*: INPUT (\S+), now (\S+)\. Repeat", refused.stderr)
    assert told, "the plan's rows have the old signature"
    assert all("X-Amz-Signature=~" in address for address in told.groups())
    assert told[1] != told[2]
    open_files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert any(path.name == "plan.json" for path in open_files)
    everything = b"".join(path.read_bytes() for path in open_files) + f"{said}{refused.stderr}".encode()
    assert not any(secret in everything for secret in (b"pa55word", b"s1gnature", b"0ther"))


@pytest.mark.process
def test_limits_hold_for_what_is_fetched(md3: Program, web: WebServer) -> None:
    web.files |= {
        "/d/big.png": b"x" * 20_000,
        "/d/many.png": picture(1, side=300),
        "/d/none.png": b"",
        "/d/x.png": b"x",
    }
    found = errors(md3, f"{web.url}/d/", "--max-file-size", "10K", "--max-pixels", "10000", "--workers", "2")
    kinds = {name.rpartition("/")[2]: kind for name, kind in found.items()}
    assert kinds == {"big.png": "too_large", "many.png": "too_large", "none.png": "empty", "x.png": "not_an_image"}


def test_addresses_that_differ_in_a_key_alone_are_two_pictures(md3: Program, web: WebServer, tmp_path: Path) -> None:
    web.files["/get.png"] = picture(1)
    first, second = (f"{web.url}/get.png?key={number}" for number in (101, 102))

    def run(*addresses: str) -> list[str]:
        (tmp_path / "list.txt").write_text("".join(f"{address}\n" for address in addresses))
        result = md3("detect", "list.txt", "car", "--remote", "-o", "out.jsonl", "--no-progress")
        assert result.exit_code == 0, result.stderr
        return [record["image"] for record in records_of(tmp_path / "out.jsonl")]

    (of_first,) = run(first)
    both = run(second)
    assert both[0] == of_first != both[1], "the second was asked, though the first is there"
    assert run(first, second) == both
    assert md3("export", "out.jsonl", "-f", "coco", "-o", "coco.json").exit_code == 0
    images = json.loads((tmp_path / "coco.json").read_bytes())["images"]
    assert [image["file_name"] for image in images] == both
