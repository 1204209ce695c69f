"""Pictures inside Parquet files are found again, and no other file's picture is taken for them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_runs import CAR, Record, Run, record, run
from PIL import Image

from md3cli.errors import ExportError
from md3cli.exporters.cells import MOST_TRIES, Cells

__all__ = ["run"]
WIDTHS = (50, 60, 70, 80, 90)


def png(width: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, 40), (width, 0, 9)).save(out, "PNG")
    return out.getvalue()


def struct_of(contents: list[bytes | None]) -> pa.Array:
    return pa.array([None if content is None else {"bytes": content, "path": "p.png"} for content in contents])


def write(path: Path, columns: dict[str, Any], group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)


def records_of(prefix: str = "", widths: tuple[int, ...] = WIDTHS) -> list[Record]:
    """A record of each row: what a run over the file `prefix` wrote; two of the second."""
    rows = [*enumerate(widths, start=1), (2, widths[1])]
    return [
        record(
            f"{prefix}{row:07d}-p.png", "detect", str(number), id=str(number), objects=[CAR], width=width, height=40,
            sha256=hashlib.sha256(png(width)).hexdigest(),
        )
        for number, (row, width) in enumerate(rows)
    ]  # fmt: skip


def widths_in(folder: Path) -> list[int]:
    return sorted(Image.open(path).width for path in folder.rglob("*.png"))


@pytest.mark.parametrize("kind", ["struct", "bytes"])
@pytest.mark.parametrize(("file", "prefix"), [("data.parquet", ""), ("sub/d.PARQUET", "sub/d.PARQUET/")])
def test_every_format_has_its_pictures(run: Run, kind: str, file: str, prefix: str) -> None:
    contents = list(map(png, WIDTHS))
    write(run.root / file, {"img": struct_of([*contents]) if kind == "struct" else contents, "label": [0] * 5})
    write(run.root / "another.parquet", {"image": struct_of([png(99)] * 5)})
    run.write(records_of(prefix))
    for format, folder in (("overlay", ""), ("hf", "train"), ("yolo", "images")):
        report, out = run.export(format, format)
        assert report.num_images == 5
        assert widths_in(out / folder) == list(WIDTHS)
    report, out = run.export("parquet", "out.parquet", embed_images=True)
    stored = [cell["bytes"] for cell in pq.read_table(out).column("image").to_pylist()]
    assert stored == [*contents, contents[1]]


def test_a_file_that_is_typed_as_the_root(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/x.parquet", {"img": struct_of(list(map(png, WIDTHS)))})
    run.write(records_of())
    _, out = run.export("yolo", "yolo", root=tmp_path / "elsewhere/x.parquet")
    assert widths_in(out / "images") == list(WIDTHS)


def test_of_several_columns_the_one_with_the_digest(run: Run) -> None:
    masks = [png(width + 1) for width in WIDTHS]
    write(run.root / "d.parquet", {"mask": struct_of([*masks]), "img": struct_of(list(map(png, WIDTHS)))})
    run.write(records_of("d.parquet/"))
    _, out = run.export("yolo", "yolo")
    assert widths_in(out / "images") == list(WIDTHS)


def test_another_files_rows_are_not_the_records(run: Run) -> None:
    write(run.root / "d.parquet", {"img": struct_of([png(99)] * 5)})
    (run.root / "no.parquet").write_bytes(b"PAR1 no parquet")
    run.write(records_of())
    with pytest.raises(ExportError, match="none of 5 pictures"):
        run.export("hf", "hf")


@pytest.mark.parametrize(
    "name", ["0000000-p.png", "0000006-p.png", "9" * 18, "00000001"[:6], "x", "0000003-p.png", "-000001", "٣٣٣٣٣٣٣"]
)
def test_rows_that_are_not_there(tmp_path: Path, name: str) -> None:
    write(tmp_path / "d.parquet", {"img": struct_of([png(1), png(2), None, png(4), png(5)])})
    cells = Cells(1 << 20)
    assert cells.read(str(tmp_path / "d.parquet"), name, None) is None
    assert cells.read(str(tmp_path / "d.parquet"), "0000002-other.png", None) == png(2)
    assert cells.read(str(tmp_path / "gone.parquet"), "0000002", None) is None
    assert Cells(10).read(str(tmp_path / "d.parquet"), "0000002", None) is None  # larger than the limit


def test_a_folder_is_not_looked_through_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d.parquet", {"img": struct_of([png(1)])})
    cells, opened = Cells(1 << 20), list[str]()
    read = cells.read
    monkeypatch.setattr(cells, "read", lambda path, *rest: opened.append(path) or read(path, *rest))
    for _ in range(9):
        assert cells.lone(tmp_path, "0000001", "00") is None
    assert len(opened) == MOST_TRIES
