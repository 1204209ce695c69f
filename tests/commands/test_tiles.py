"""`--tile` and `--overlap` by the real command: what is asked, what a record says, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from program import Program, records_of

from md3cli.records import RecordDict


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (1000, 700), (40, 90, 9)).save(tmp_path / "pictures" / "large.png")
    Image.new("RGB", (300, 200), (9, 40, 90)).save(tmp_path / "pictures" / "small.png")
    return md3


def asked(md3: Program, *words: str) -> list[RecordDict]:
    result = md3(*words, "-f", "jsonl")
    assert result.exit_code == 0, result.stderr
    return records_of(result.stdout)


def test_a_record_says_how_many_tiles_there_were_and_what_they_took(md3: Program) -> None:
    large, small = asked(md3, "detect", "pictures", "dot", "--tile", "400")
    assert large["tiles"] == {"size": 400, "overlap": 0.2, "count": 6}
    assert large["tokens"] == {"prompt": 70, "output": 21}
    assert small["tiles"] == {"size": 400, "overlap": 0.2, "count": 1}
    assert small["tokens"] == {"prompt": 10, "output": 3}
    assert list(large)[-4:] == ["tiles", "model", "meta", "error"]
    assert [request.tiles for _, request in md3.models[-1].engine.seen] == [None] * 8


def test_auto_stays_auto_in_the_record(md3: Program) -> None:
    large, small = asked(md3, "point", "pictures", "dot", "--tile", "auto", "--overlap", "0.5")
    assert large["tiles"] == {"size": "auto", "overlap": 0.5, "count": 15}  # of 378 pixels for a model of small crops
    assert small["tiles"]["count"] == 1


def test_tiles_and_overlap_as_typed_are_part_of_the_id(md3: Program) -> None:
    words = ("detect", "pictures/large.png", "dot")
    ways = [(), ("--tile", "auto"), ("--tile", "400"), ("--tile", "401"), ("--tile", "400", "--overlap", "0.21")]
    ids = [asked(md3, *words, *way)[0]["id"] for way in ways]
    assert len(set(ids)) == len(ways)
    assert asked(md3, *words, "--tile", "400", "--overlap", "0.2")[0]["id"] == ids[2]


def test_a_dry_run_counts_tiles_once_whatever_is_asked_of_them(md3: Program) -> None:
    counts = json.loads(md3("detect", "pictures", "dot", "ring", "--tile", "400", "-m", "tiny", "--dry-run").stdout)
    assert (counts["requests"], counts["tiles"]) == (4, 6)  # the small picture is its own tile
    assert "tiles" not in json.loads(md3("detect", "pictures", "dot", "-m", "tiny", "--dry-run").stdout)
    words = ("--tile", "400", "--overlap", "0.9999", "-m", "tiny", "--dry-run")
    assert json.loads(md3("detect", "pictures", "dot", *words).stdout)["bad"] == {"bad_request": 1}


def test_a_tile_that_fails_fails_the_record(md3: Program) -> None:
    result = md3("detect", "pictures/large.png", "fail me", "--tile", "400", "-f", "jsonl")
    assert result.exit_code == 3
    (record,) = records_of(result.stdout)
    assert record["error"]["type"] == "model"
    assert "tiles" not in record


def test_in_a_run_only_detect_and_point_take_tiles(md3: Program) -> None:
    tasks = ("--task", "caption:short", "--task", "detect:dot", "--task", "point:dot", "--task", "segment:dot")
    records = asked(md3, "run", "pictures/large.png", *tasks, "--tile", "400")
    assert [record.get("tiles", {}).get("count") for record in records] == [None, 6, 6, None]


def test_rows_of_a_manifest_take_them_where_they_detect_or_point(md3: Program, tmp_path: Path) -> None:
    rows = [{"task": "point", "prompt": "dot"}, {"task": "caption"}, {"prompt": "ring"}, {}]
    lines = [json.dumps({"image": "pictures/large.png"} | row) for row in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    records = asked(md3, "detect", "m.jsonl", "dot", "--tile", "400")
    assert [(r["task"], "tiles" in r) for r in records] == [
        ("point", True),
        ("caption", False),
        ("detect", True),
        ("detect", True),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines[:2]))
    records = asked(md3, "run", "m.jsonl", "--tile", "400")
    assert ["tiles" in record for record in records] == [True, False]


def test_a_run_with_other_tiles_is_another_run(md3: Program) -> None:
    words = ("detect", "pictures", "dot", "-o", "out.jsonl")
    assert md3(*words, "--tile", "400").exit_code == 0
    before = Path("out.jsonl").read_bytes()
    for other in ((), ("--tile", "500"), ("--tile", "400", "--overlap", "0.3")):
        result = md3(*words, *other)
        assert result.exit_code == 2
        assert 'tiles {"size": 400, "overlap": 0.2}, now ' in result.stderr
    assert Path("out.jsonl").read_bytes() == before
    assert "nothing to do" in md3(*words, "--tile", "400").stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("detect", "pictures", "dot", "--tile", "377"), "377 is no tile; write auto, or its side in pixels, at least"),
        (("detect", "pictures", "dot", "--tile", "big"), "'big' is no tile"),
        (("detect", "pictures", "dot", "--tile", "9" * 30), "is no tile"),
        (("detect", "pictures", "dot", "--tile", "400", "--overlap", "1"), "'1' is no overlap; it is a number from 0"),
        (("detect", "pictures", "dot", "--tile", "400", "--overlap", "nan"), "'nan' is no overlap"),
        (("detect", "pictures", "dot", "--tile", "400", "--overlap", "-0.1"), "'-0.1' is no overlap"),
        (("point", "pictures", "dot", "--overlap", "0.3"), "--overlap is about tiles, and there are none; add --tile"),
        (("point", "pictures", "dot", "--tile", "auto", "--spatial-ref", "0.1,0.1"), "leave --tile out"),
        (("run", "pictures", "--task", "caption", "--tile", "auto"), "--tile is about what detect and point find"),
        (("segment", "pictures", "dot", "--tile", "auto"), "No such option: --tile"),
        (("caption", "pictures", "--tile", "auto"), "No such option: --tile"),
        (("query", "pictures", "-q", "Why?", "--tile", "auto"), "No such option: --tile"),
    ],
)
def test_what_makes_no_sense_is_refused(md3: Program, words: tuple[str, ...], complaint: str) -> None:
    result = md3(*words)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert not md3.models


def test_a_place_in_the_whole_picture_and_tiles_are_a_bad_row(md3: Program, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image": "pictures/large.png", "spatial_refs": [[0.5, 0.5]]}\n')
    (record,) = records_of(md3("point", "m.jsonl", "dot", "--tile", "400", "-f", "jsonl").stdout)
    assert record["error"]["type"] == "bad_request"


def test_too_many_tiles_are_a_bad_request(md3: Program) -> None:
    result = md3("detect", "pictures/large.png", "dot", "--tile", "378", "--overlap", "0.9999", "-f", "jsonl")
    (record,) = records_of(result.stdout)
    assert record["error"]["message"].startswith("1000 x 700 pixels make 201,229 tiles of 378 pixels, more than 10,000")


def test_settings_wait_for_a_command_that_has_a_use_for_them(md3: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD3_OVERLAP", "0.5")
    assert "tiles" not in asked(md3, "detect", "pictures", "dot")[0]
    assert asked(md3, "detect", "pictures", "dot", "--tile", "auto")[0]["tiles"]["overlap"] == 0.5
    monkeypatch.setenv("MD3_TILE", "400")
    monkeypatch.setenv("MD3_THEN", "caption:short")
    assert [r["task"] for r in asked(md3, "run", "pictures", "--task", "caption")] == ["caption"] * 2
    assert "tiles" not in asked(md3, "point", "pictures", "dot", "--spatial-ref", "0.1,0.1")[0]
    assert asked(md3, "point", "pictures", "dot")[0]["tiles"]["size"] == 400
