"""The one reader of records: what is no records file, what other tools make of one, requests that stand there twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CAR, Run, failure, read_records, record, write_records
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.errors import InputError
from md3cli.evaluate.located import final_records

FORMATS = ["coco", "csv", "jsonl", "parquet", "yolo", "voc", "labelstudio", "hf", "overlay", "txt", "html"]


def box_record(image: str = "a.png", **fields: Any) -> dict[str, Any]:
    return record(image, "detect", "car", objects=[CAR]) | fields


def read(path: Path, content: bytes) -> list[dict[str, Any]]:
    path.write_bytes(content)
    return list(read_records(path))


def as_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


FOREIGN = {
    "an array": json.dumps([box_record()]).encode(),
    "an array over lines": json.dumps([box_record()], indent=1).encode(),
    "a COCO document": b'{"images": [], "annotations": [], "categories": []}',
    "text": b"a.png circle",
    "a page": b"<!doctype html>\n<p>records</p>\n",
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "zeros": b"\0" * 512,
    "empty lines": b"\n\n  \r\n",
    "nothing": b"",
    "a byte order mark": b"\xef\xbb\xbf",
    "a beginning": as_line(box_record())[:50],
    "UTF-16": as_line(box_record()).decode().encode("utf-16"),
    "other JSON Lines": b'{"image": "a.png", "text": "x"}\n' * 3,
    "a record after them": b'{"image": "a.png"}\n' + as_line(box_record()),
    "them after a record": as_line(box_record()) + b'{"image": "a.png"}',
    "an array after a record": as_line(box_record()) + b"[1, 2",
}


@pytest.mark.process
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("format", ["yolo", "csv"])
def test_a_file_without_records_replaces_nothing(run: Run, kind: str, format: str) -> None:
    good, bad = run.write([box_record("a/photo.jpg")]), run.folder / "bad.jsonl"
    bad.write_bytes(FOREIGN[kind])
    out = run.folder / "out"
    arguments = ["--format", format, "--root", str(run.root), "-o", str(out), "--overwrite"]
    assert CliRunner().invoke(app, ["export", str(good), *arguments]).exit_code == 0
    before = {path: path.read_bytes() for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file()}
    result = CliRunner().invoke(app, ["export", str(bad), *arguments])
    assert result.exit_code == 1
    assert str(bad) in result.stderr
    assert "unexpected" not in result.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("command", [["report", "-o", "x.html"], ["eval", "--compare", "good.jsonl"]])
@pytest.mark.parametrize("kind", FOREIGN)
def test_no_other_command_takes_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(Path("good.jsonl"), [box_record()])
    Path("bad.jsonl").write_bytes(FOREIGN[kind])
    result = CliRunner().invoke(app, [command[0], "bad.jsonl", *command[1:]])
    assert result.exit_code == 1
    assert "bad.jsonl" in result.stderr
    assert not Path("x.html").exists()


def test_an_empty_file_is_a_run_only_with_its_own_run_json(tmp_path: Path) -> None:
    for claim in ("{}", '{"root": "/"}', "[]"):
        with pytest.raises(InputError, match="holds no records"):
            read(tmp_path / "records.jsonl", b"")
        (tmp_path / "run.json").write_text(claim)
    (tmp_path / "run.json").write_text('{"schema": "md3-run/1", "root": "/"}')
    assert read(tmp_path / "records.jsonl", b"") == []
    with pytest.raises(InputError, match="holds no records"):
        read(tmp_path / "records.jsonl", b"\n")


def test_what_pandas_makes_of_records_is_read(tmp_path: Path) -> None:
    """As `to_json(orient="records", lines=True)` writes it: each line has all keys."""
    lines = [
        failure("bad.png", "detect", "car"),
        box_record(),
        record("b.png", "query", "How many?", answer="3", reasoning={"text": "x", "grounding": []}),
        record("b.png", "segment", "car", segments=[{"label": "car", "svg_path": "M 0 0", "bbox": CAR, "score": 0.5}]),
    ]
    keys = sorted({key for line in lines for key in line})
    sizes = {"width": 120.0, "height": 80.0, "answer": 3.0}
    through = [{key: line.get(key) for key in keys} for line in lines]
    through = [line | {key: value for key, value in sizes.items() if line[key] is not None} for line in through]
    found = read(tmp_path / "pandas.jsonl", b"".join(map(as_line, through)))
    lines[3]["segments"][0]["bbox"] = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    assert found == lines
    assert [type(line.get("width")) for line in found] == [type(None), int, int, int]


@pytest.mark.parametrize(
    "change",
    [
        {"width": 120.0, "height": 80.0},
        {"tokens": {"prompt": 738.0, "output": 31.0}},
        {"meta": None},
        {"meta": math.nan, "error": math.nan},
        {"caption": None, "answer": math.nan, "points": None, "reasoning": None, "choices": None, "region": None},
        {"error": {"type": None, "message": None, "retry": None}},
        {"reasoning": {"text": None, "grounding": None}},
        {"choices": {"yes": None}},
        {"objects": [{**CAR, "parse_error": None}]},
    ],
)
def test_what_a_tool_changes_is_put_back(tmp_path: Path, change: dict[str, Any]) -> None:
    found = read(tmp_path / "records.jsonl", as_line(box_record() | change))
    assert found == [box_record()]
    assert [type(found[0]["width"]), type(found[0]["tokens"]["prompt"])] == [int, int]


def test_what_has_no_label_is_called_as_it_was_asked(run: Run) -> None:
    """Absent or null; a page needs a name as any other format does."""
    bare = {key: value for key, value in CAR.items() if key != "label"}
    lines = [record("a/photo.jpg", "detect", "car", objects=[bare, bare | {"label": None}, CAR | {"label": "auto"}])]
    (found,) = read_records(write_records(run.records, lines))
    assert [thing["label"] for thing in found["objects"]] == ["car", "car", "auto"]
    assert CliRunner().invoke(app, ["report", str(run.records), "-o", str(run.folder / "page.html")]).exit_code == 0


@pytest.mark.parametrize("absent", ["meta", "error"])
def test_keys_that_were_absent_stand_where_they_belong(tmp_path: Path, absent: str) -> None:
    line = {key: value for key, value in box_record().items() if key != absent}
    (found,) = read(tmp_path / "records.jsonl", as_line(line))
    assert [*found][-2:] == ["meta", "error"]


def test_texts_that_became_numbers_are_texts_again(tmp_path: Path) -> None:
    """A column of digits alone is one of numbers for pandas; a digest cannot be turned back and is left out."""
    change = {"id": 12.0, "prompt": 7, "sha256": 0.0, "objects": [{**CAR, "label": 7.0}]}
    (found,) = read(tmp_path / "records.jsonl", as_line(box_record() | change))
    assert (found["id"], found["prompt"], found["objects"][0]["label"]) == ("12", "7", "7")
    assert "sha256" not in found


@pytest.mark.parametrize("number", [10**400, -(10**400), 2**63, 1e308, True, math.inf])
@pytest.mark.parametrize("key", ["id", "prompt", "sha256", "width", "image", "model", "caption"])
def test_a_number_of_any_size_is_a_text_or_named(tmp_path: Path, key: str, number: float) -> None:
    try:
        (found,) = read(tmp_path / "records.jsonl", as_line(box_record() | {key: number}))
    except InputError as error:
        assert "line 1: a damaged record" in str(error)  # noqa: PT017 - either is right, nothing else is
    else:
        assert isinstance(found.get(key), str | None)


def test_what_arrow_makes_of_records_is_read(tmp_path: Path) -> None:
    pyarrow_json = pytest.importorskip("pyarrow.json")
    lines = [
        failure("bad.png", "detect", "car"),
        box_record(),
        record("b.png", "query", "Is it?", answer="yes", choices={"yes": 0.9, "no": 0.1}),
        record("c.png", "query", "Or?", answer="a", choices={"a": 1.0}, reasoning={"text": "x", "grounding": []}),
    ]
    path = write_records(tmp_path / "records.jsonl", lines)
    through = pyarrow_json.read_json(path).to_pylist()
    assert list(read_records(write_records(path, through))) == lines


def test_marks_line_ends_and_order_do_not_matter(tmp_path: Path) -> None:
    lines = [box_record("b.png"), box_record("a.png")]
    turned = [dict(reversed(line.items())) for line in lines]
    content = b"\xef\xbb\xbf" + b"\r\n".join(as_line(line).strip() for line in turned) + b"\r\n\r\n"
    assert read(tmp_path / "records.jsonl", content) == lines


@pytest.mark.parametrize("format", ["coco", "csv", "jsonl", "parquet", "voc", "labelstudio", "txt"])
def test_a_torn_last_line_is_told(run: Run, format: str) -> None:
    run.write([box_record(), record("a.png", "caption", caption="x", length="short")])
    with run.records.open("ab") as file:
        file.write(as_line(box_record("b.png"))[:-7])
    report, _ = run.export(format, "out")
    assert any(note.startswith("line 3, the last, is cut off") for note in report.notes)
    assert report.num_records == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"objects": [{**CAR, "score": math.nan}]},
        {"objects": [{**CAR, "score": math.inf}]},
        {"objects": [{**CAR, "x_min": -math.inf}]},
        {"objects": [{**CAR, "x_min": 10**400}]},
        {"objects": [{**CAR, "x_min": None}]},
        {"objects": [{**CAR, "x_min": True}]},
        {"objects": [{**CAR, "label": ["car"]}]},
        {"objects": None},
        {"objects": ["car"]},
        {"width": 0},
        {"width": -5},
        {"width": 10**12},
        {"width": 120.5},
        {"width": None},
        {"width": None, "height": None},
        {"tokens": {"prompt": "many"}},
        {"tokens": {"prompt": -1}},
        {"task": "paint"},
        {"task": None},
        {"error": {"message": "no type"}},
        {"error": {"type": 7}},
        {"reasoning": {"grounding": [{"start_idx": 0, "end_idx": 1, "points": [[0]]}]}},
        {"reasoning": {"grounding": [{"start_idx": "a", "end_idx": 1, "points": []}]}},
        {"choices": {"yes": "high"}},
        {"choices": {"yes": math.nan}},
        {"image": 7},
        {"image_b64": "not base64"},
        {"objects": [{**CAR, "x_min": 1e300}]},
        {"id": ["x"]},
        {"sha256": ["x"]},
        {"task": "segment", "segments": [{"bbox": {**CAR, "x_max": 10**400}, "svg_path": "M 0 0"}]},
        {"task": "point", "points": [{"x": math.nan, "y": 0}]},
    ],
)
@pytest.mark.parametrize("format", ["coco", "parquet"])
def test_a_value_that_cannot_be_used_is_named(run: Run, damage: dict[str, Any], format: str) -> None:
    run.write([box_record(), box_record("b.png") | damage])
    with pytest.raises(InputError, match=r"records\.jsonl, line 2: a damaged record"):
        run.export(format, "out.x")
    assert not (run.folder / "out.x").exists()


def test_meta_never_holds_what_json_lacks(tmp_path: Path) -> None:
    line = as_line(box_record(meta={"a": math.nan, "b": [math.inf, 1.5], "c": 0})).replace(b'"c": 0', b'"c": 1e999')
    assert read(tmp_path / "records.jsonl", line)[0]["meta"] == {"a": None, "b": [None, 1.5], "c": None}


@pytest.mark.parametrize("depth", [100, 900, 100_000])
@pytest.mark.parametrize("format", FORMATS)
def test_deep_nesting_is_named(run: Run, depth: int, format: str) -> None:
    deep = as_line(box_record("a/photo.jpg", meta={"deep": 0})).replace(b"0}", b"[" * depth + b"]" * depth + b"}")
    run.records.write_bytes(deep)
    result = CliRunner().invoke(app, ["export", str(run.folder), "-f", format, "-o", str(run.folder / "out")])
    assert result.exit_code == 1
    assert "line 1" in result.stderr
    assert "unexpected" not in result.stderr


# --- a request that stands there twice ---------------------------------------------------------------


def test_the_last_of_a_request_counts_at_the_place_of_the_first(tmp_path: Path) -> None:
    first, other = box_record(), box_record("b.png")
    again = box_record(objects=[])
    path = write_records(tmp_path / "records.jsonl", [first, other, again])
    notes: list[str] = []
    assert list(read_records(path, notes)) == [again, other]
    assert notes == ["1 line repeats a request that is there already; of each request the last line counts"]


@pytest.mark.parametrize("is_as_written", [True, False])
def test_joined_files_count_once_whatever_writes_them(tmp_path: Path, is_as_written: bool) -> None:
    lines = [box_record(f"{n} ü.png") for n in range(20)]
    separators = (",", ":") if is_as_written else None
    texts = [json.dumps(line, ensure_ascii=False, separators=separators) + "\n" for line in lines]
    turned = [json.dumps(dict(reversed(line.items()))) + "\n" for line in reversed(lines)]
    (tmp_path / "records.jsonl").write_text("".join([*texts, *turned, *texts]), encoding="utf-8")
    assert list(read_records(tmp_path / "records.jsonl")) == lines


@pytest.mark.parametrize("format", ["coco", "csv", "jsonl", "parquet", "yolo", "voc", "labelstudio", "hf", "txt"])
def test_every_format_counts_a_request_once(run: Run, format: str) -> None:
    one, other = box_record("a/photo.jpg"), box_record("b/photo.jpg")
    caption = record("a/photo.jpg", "caption", caption="x", length="short")
    run.write([one, other, caption])
    once, expected = run.export(format, "once")
    run.write([one, other, caption, one, caption])
    twice, found = run.export(format, "twice")
    files = [sorted(out.rglob("*")) if out.is_dir() else [out] for out in (expected, found)]
    contents = [[path.read_bytes() for path in paths if path.is_file()] for paths in files]
    assert contents[0] == contents[1]
    assert twice.num_records == once.num_records == 3
    assert any("repeat a request" in note for note in twice.notes)


@pytest.mark.parametrize("format", FORMATS)
def test_two_pictures_of_one_name_are_an_error_that_names_both_lines(run: Run, format: str) -> None:
    run.write([box_record("a.png", sha256="1" * 64), box_record("b.png"), box_record("a.png", sha256="2" * 64)])
    result = CliRunner().invoke(app, ["export", str(run.folder), "-f", format, "-o", str(run.folder / "out")])
    assert result.exit_code == 1
    assert f"{run.records}, line 1 and {run.records}, line 3: two pictures share the name a.png" in result.stderr
    assert not (run.folder / "out").exists()


def test_a_failure_that_was_mended_later_agrees(tmp_path: Path) -> None:
    failed, mended = failure("a.png", "detect", "car"), box_record(sha256="1" * 64)
    del failed["sha256"]
    path = write_records(tmp_path / "records.jsonl", [failed, mended])
    assert list(read_records(path)) == [mended]


def test_the_torn_copy_of_a_whole_line_does_not_count(tmp_path: Path) -> None:
    whole = json.dumps(box_record(), separators=(",", ":")).encode() + b"\n"
    assert read(tmp_path / "records.jsonl", whole + whole[:-20]) == [box_record()]


def test_other_pictures_with_the_same_id_stay(tmp_path: Path) -> None:
    lines = [box_record("a.png", id="x"), box_record("b.png", id="x"), box_record("a.png", id="x", image_b64="YQ==")]
    path = write_records(tmp_path / "records.jsonl", lines)
    assert list(read_records(path)) == lines
    assert final_records(read_records(path)) == lines[:2]  # eval goes by names as they are shown


def test_records_without_an_id_all_count(tmp_path: Path) -> None:
    lines = [{key: value for key, value in box_record().items() if key != "id"}] * 2
    assert list(read_records(write_records(tmp_path / "records.jsonl", lines))) == lines


@pytest.mark.parametrize("command", [["report", "-o", "x.html"], ["eval", "--compare", "other.jsonl"]])
def test_what_is_left_out_is_told_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records(Path("other.jsonl"), [box_record()])
    Path("twice.jsonl").write_bytes(as_line(box_record()) * 2 + as_line(box_record("b.png"))[:-9])
    result = CliRunner().invoke(app, [command[0], "twice.jsonl", *command[1:]])
    assert result.exit_code == 0, result.output
    assert "note: 1 line repeats a request" in result.stderr
    assert "note: line 3, the last, is cut off" in result.stderr
