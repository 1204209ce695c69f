"""Parquet read back by pyarrow and `datasets`."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import Image, load_dataset
from finished_runs import CAR, DOG, HEIGHT, NAMES, ODD_EXIF, WIDTH, Run, detect_records, record

from md3cli.errors import InputError, UsageError
from md3cli.exporters import parquet

SEGMENT = {
    "label": "ring",
    "svg_path": "M 0 0 L 1 0 Z",
    "bbox": {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")},
    "score": 0.7,
}
REASONING = {
    "text": "there it is",
    "grounding": [{"start_idx": 0, "end_idx": 5, "points": [[0.1, 0.2], [0.3, 0.4]]}],
    "finish_reason": "stop",
}


@pytest.fixture
def mixed_run(run: Run) -> Run:
    """A record of every task, a failure, and a query without an image."""
    run.write([
        *detect_records(),
        record(NAMES[0], "segment", "ring", segments=[SEGMENT]),
        record(NAMES[0], "point", "nose", points=[{"label": "nose", "x": 0.123456789, "y": 0.25, "score": 0.8}]),
        record(NAMES[0], "caption", length="short", caption="=1+1", meta={"split": "val", "n": [1]}),
        record(None, "query", "Why?", answer="because", reasoning=REASONING),
    ])  # fmt: skip
    return run


def load(path: Path, cache: Path) -> Any:
    return load_dataset("parquet", data_files=str(path), cache_dir=str(cache), split="train")


def test_one_row_for_each_record_exactly(mixed_run: Run) -> None:
    report, out = mixed_run.export("parquet", "out.parquet")
    rows = pq.read_table(out).to_pylist()
    lines = [json.loads(line) for line in mixed_run.records.read_bytes().splitlines()]
    assert len(rows) == report.num_records == len(lines)
    for row, line in zip(rows, lines, strict=True):
        for key in ("id", "image", "task", "prompt", "caption", "answer", "finish_reason", "width"):
            assert row[key] == line.get(key)
        assert json.loads(row["meta"]) == line["meta"]
    dog = rows[2]["objects"][0]
    assert {key: dog[key] for key in DOG if key != "score"} == {key: DOG[key] for key in DOG if key != "score"}
    assert dog["score"] == pytest.approx(0.4)
    assert rows[0]["error_type"] == "decode"
    assert rows[0]["objects"] is None
    assert rows[-1]["reasoning"] == REASONING
    assert rows[-4]["segments"][0]["svg_path"] == "M 0 0 L 1 0 Z"
    assert rows[-3]["points"][0]["x"] == 0.123456789


def test_datasets_knows_every_feature(mixed_run: Run, tmp_path: Path) -> None:
    _, out = mixed_run.export("parquet", "out.parquet")
    rows = load(out, tmp_path)
    declared = json.loads(pq.read_schema(out).metadata[b"huggingface"])["info"]["features"]
    assert rows.features.to_dict() == declared
    assert rows[2]["objects"][0]["x_max"] == 1.2


def test_embedded_pictures_are_decoded_by_datasets(mixed_run: Run, tmp_path: Path) -> None:
    _, out = mixed_run.export("parquet", "out.parquet", embed_images=True)
    rows = load(out, tmp_path)
    assert rows.features["image"] == Image()
    assert rows[2]["image"].size == (WIDTH, HEIGHT)
    stored = pq.read_table(out).column("image").to_pylist()
    assert stored[2]["path"] == NAMES[0]
    picture = (mixed_run.root / NAMES[0]).read_bytes()
    assert hashlib.sha256(stored[2]["bytes"]).digest() == hashlib.sha256(picture).digest()
    assert stored[0] is None
    assert stored[-1] is None


def test_a_picture_that_cannot_be_decoded_does_not_stop_the_reader(run: Run, tmp_path: Path) -> None:
    whole = (run.root / NAMES[0]).read_bytes()
    (run.root / "text.jpg").write_bytes(b"no picture")
    (run.root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (run.root / "nothing.jpg").write_bytes(b"")
    names = [NAMES[0], "text.jpg", "cut.jpg", "nothing.jpg", "gone.jpg", NAMES[0]]
    run.write([record(name, "caption", str(n), caption="x") for n, name in enumerate(names)])
    report, out = run.export("parquet", "out.parquet", embed_images=True)
    assert [row["image"] is None for row in load(out, tmp_path)] == [False, True, True, True, True, False]
    assert report.notes == ("4 pictures could not be read; their `image` is null",)


def test_what_only_md3_reads_is_embedded_as_png(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    PIL.Image.new("RGB", (WIDTH, HEIGHT), "red").save(content, "JPEG")
    (run.root / "no_end.jpg").write_bytes(content.getvalue()[:-2])
    (run.root / "whole.jpg").write_bytes(content.getvalue())
    PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(run.root / "odd.jpg", exif=ODD_EXIF)
    run.write([record(name, "caption", caption="x") for name in ("no_end.jpg", "odd.jpg", "whole.jpg")])
    report, out = run.export("parquet", "out.parquet", embed_images=True)
    assert [row["image"].size for row in load(out, tmp_path)] == [(WIDTH, HEIGHT)] * 3
    stored = pq.read_table(out).column("image").to_pylist()
    assert [cell["bytes"][:4] for cell in stored] == [b"\x89PNG", b"\x89PNG", content.getvalue()[:4]]
    assert report.notes == ()
    monkeypatch.setattr("md3cli.exporters.parquet._FORMATS", ("PNG",))  # as for HEIC, which needs a plugin of ours
    _, out = run.export("parquet", "again.parquet", embed_images=True)
    assert [cell["bytes"][:4] for cell in pq.read_table(out).column("image").to_pylist()] == [b"\x89PNG"] * 3


def test_embedding_needs_the_pictures(detect_run: Run) -> None:
    (detect_run.folder / "run.json").unlink()
    with pytest.raises(UsageError, match="--root"):
        detect_run.export("parquet", "out.parquet", embed_images=True)


def test_choices_become_columns(run: Run, tmp_path: Path) -> None:
    run.write([
        record("a", "query", "Open?", answer="yes", choices={"yes": 0.9, "no": 0.1}),
        record("a", "query", "Sure?", answer="unsure", choices={"yes": 0.2, "unsure": 0.8}),
        record("a", "caption", length="short", caption="no choice"),
    ])  # fmt: skip
    _, out = run.export("parquet", "out.parquet")
    rows = load(out, tmp_path)
    assert rows["answer"][:2] == ["yes", "unsure"]
    assert rows["choice_yes"] == pytest.approx([0.9, 0.2, None])
    assert rows["choice_unsure"] == pytest.approx([None, 0.8, None])


def test_row_groups_are_bounded_in_rows_and_bytes(mixed_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 4)
    _, out = mixed_run.export("parquet", "out.parquet")
    file = pq.ParquetFile(out)
    assert max(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)) == 4
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    _, out = mixed_run.export("parquet", "embedded.parquet", embed_images=True)
    assert pq.ParquetFile(out).num_row_groups >= 2 * (len(NAMES) - 1)


def test_no_records_still_have_the_schema(run: Run) -> None:
    run.write([])
    _, out = run.export("parquet", "out.parquet")
    table = pq.read_table(out)
    assert (table.num_rows, table.schema.names[:3]) == (0, ["id", "image", "image_b64"])


@pytest.mark.parametrize("damage", [{"tokens": {"prompt": "many"}}, {"tokens": {"output": 2**40}}])
def test_a_value_of_another_kind_is_named(run: Run, damage: dict[str, Any]) -> None:
    run.write([record("a", "caption", caption="x"), record("b", "caption", caption="x", **damage)])
    with pytest.raises(InputError, match=r"line 2: a damaged record: its (prompt|output) is"):
        run.export("parquet", "out.parquet")
    assert not (run.folder / "out.parquet").exists()
