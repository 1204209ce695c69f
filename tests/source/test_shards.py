"""Runs over shards as typed: by folder, pattern and braces, resumed, in parts, exported with their pictures."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from program import Program, records_of

TYPED = ("shards", "shards/", "shards/*.tar", "shards/{00000..00002}.tar")
NAMES = [f"{shard:05d}.tar/{number}.png" for shard in range(3) for number in range(4)]


@pytest.fixture
def md3(md3: Program) -> Program:
    """The program beside `shards`: three tars of four pictures with sidecars, one of them damaged."""
    Path("shards").mkdir()
    for shard in range(3):
        make_shard(Path(f"shards/{shard:05d}.tar"), shard)
    return md3


def make_shard(path: Path, shard: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            content = io.BytesIO()
            Image.new("RGB", (40 + number, 30 + shard), (9 * number, 99 * shard, 0)).save(content, "PNG")
            facts = b"{" if (shard, number) == (1, 1) else json.dumps({"caption": f"thing {number}"}).encode()
            for kind, data in (("json", facts), ("png", content.getvalue()), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_every_way_to_type_them_gives_the_same_records(md3: Program) -> None:
    found = []
    for typed in TYPED:
        result = md3("detect", typed, "car")
        assert result.exit_code == 0
        assert "not taken: 1 damaged sidecars" in result.stderr
        found.append(result.stdout)
    assert found == [found[0]] * len(TYPED)
    records = records_of(found[0])
    assert [record["image"] for record in records] == NAMES
    assert [record["meta"]["cls"] for record in records] == [0, 1, 2, 3] * 3
    damaged = records[5]["meta"]
    assert list(damaged) == ["cls", "sidecar_errors"]
    assert [record["meta"]["caption"] for record in records if record["meta"] is not damaged] == [
        f"thing {number}" for shard in range(3) for number in range(4) if (shard, number) != (1, 1)
    ]


@pytest.mark.parametrize("typed", ["data", "data/*.parquet", "data/train-{00000..00002}-of-00003.parquet"])
def test_a_run_over_parquet_goes_on_and_finds_its_pictures(md3: Program, typed: str) -> None:
    Path("data").mkdir()
    for shard in range(3):
        with tarfile.open(f"shards/{shard:05d}.tar") as tar:
            images = [tar.extractfile(f"{number}.png").read() for number in range(4)]  # type: ignore[union-attr]
        table = pa.table({"image": [{"bytes": image, "path": "x.png"} for image in images], "text": list("abcd")})
        pq.write_table(table, f"data/train-{shard:05d}-of-00003.parquet", row_group_size=3)
    names = [f"train-{shard:05d}-of-00003.parquet/{row:07d}-x.png" for shard in range(3) for row in range(1, 5)]
    assert md3("detect", typed, "car", "--dry-run").stdout.startswith('{"images": 12, "requests": 12')
    assert md3("detect", typed, "car", "-o", "run", "--limit", 5).exit_code == 0
    result = md3("detect", typed, "car", "-o", "run")
    assert (result.exit_code, md3.num_answered) == (0, 7)
    records = records_of(Path("run/records.jsonl"))
    assert [record["image"] for record in records] == names
    assert [record["meta"] for record in records] == [{"text": letter} for letter in "abcd"] * 3
    assert md3("export", "run", "--format", "yolo", "-o", "yolo").exit_code == 0
    sizes = [Image.open(Path("yolo/images", name)).size for name in names]
    assert sizes == [(40 + number, 30 + shard) for shard in range(3) for number in range(4)]


@pytest.mark.parametrize("typed", TYPED)
def test_a_run_goes_on_and_its_pictures_are_found_again(md3: Program, typed: str) -> None:
    assert md3("detect", typed, "car", "-o", "run", "-f", "overlay", "--limit", 5).exit_code == 0
    result = md3("detect", typed, "car", "-o", "run", "-f", "overlay")
    assert (result.exit_code, md3.num_answered) == (0, 7)
    assert [record["image"] for record in records_of(Path("run/records.jsonl"))] == NAMES
    assert files_below("run/overlay") == NAMES
    for format in ("yolo", "hf", "voc"):
        assert md3("export", "run", "--format", format, "-o", format).exit_code == 0
    assert files_below("yolo/images") == NAMES
    assert files_below("hf/train")[:-1] == NAMES
    sizes = [Image.open(Path("hf/train", name)).size for name in NAMES]
    assert sizes == [(40 + number, 30 + shard) for shard in range(3) for number in range(4)]
    assert md3("report", "run", "-o", "report.html").exit_code == 0


def files_below(folder: str) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith("."))


def test_parts_of_shards_make_one_whole(md3: Program) -> None:
    for i in range(2):
        typed = ("shards/{00000..00002}.tar", "shards")[i]
        assert md3("caption", typed, "--shard", f"{i}/2", "-o", f"part{i}.jsonl").exit_code == 0
    assert md3("caption", "shards", "-o", "whole.jsonl").exit_code == 0
    parts = [record for i in range(2) for record in records_of(Path(f"part{i}.jsonl"))]
    whole = records_of(Path("whole.jsonl"))
    assert sorted(record["id"] for record in parts) == sorted(record["id"] for record in whole)
    assert 0 < len(records_of(Path("part0.jsonl"))) < len(NAMES)


def test_what_is_not_there_is_told_before_the_model(md3: Program) -> None:
    result = md3("caption", "shards/{00000..00003}.tar")
    assert (result.exit_code, md3.models) == (1, [])
    assert "there is no shards/00003.tar: 1 of the 4 that" in result.stderr
    result = md3("caption", "shards/{0..99999999999}.tar")
    assert (result.exit_code, md3.models) == (1, [])
    assert "more than 262,144" in result.stderr
    result = md3("query", "shards/{00000..00002}.tar", "-q", "Is it {capton}?", "--template")
    assert (result.exit_code, md3.models) == (2, [])
    assert "did you mean 'caption'?" in result.stderr


def test_an_output_that_braces_name_is_refused(md3: Program) -> None:
    Path("a.jsonl").write_text('{"image":"x.png"}\n')
    Path("b.jsonl").write_text('{"image":"x.png"}\n')
    result = md3("caption", "{a,b}.jsonl", "-o", "b.jsonl")
    assert result.exit_code == 2
    assert "b.jsonl is an input of this command" in result.stderr


def test_a_prompt_of_each_sample(md3: Program) -> None:
    result = md3("query", "shards", "-q", "Is it {caption}?", "--template")
    assert result.exit_code == 3  # one sidecar is damaged
    records = records_of(result.stdout)
    assert [record["prompt"] for record in records[:2]] == ["Is it thing 0?", "Is it thing 1?"]
    assert [record["image"] for record in records if record["error"]] == [NAMES[5]]
    result = md3("query", "shards/00000.tar", "--map", "prompt=caption", "-q", "What?")
    assert [record["prompt"] for record in records_of(result.stdout)] == [f"thing {number}" for number in range(4)]
    for command in (("query", "shards"), ("detect", "shards/*.tar"), ("run", "shards", "--const", "task=query")):
        result = md3(*command, "--map", "prompt=caption", "--exclude", "00001.tar")
        assert [record["prompt"] for record in records_of(result.stdout)] == [f"thing {n}" for n in range(4)] * 2
        result = md3(*command, "--map", "prompt=capton")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "has no column 'capton'; did you mean 'caption'?" in result.stderr
