"""Manifests in any state: each bad line is one bad row, the rest is read, memory stays bounded."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program import Program, isolate, make_pictures, records_of, start

from md3cli.config import SourceSpec
from md3cli.errors import InputError
from md3cli.records import ImageItem, Request, Task
from md3cli.source.manifest import ROW_LIMIT_BYTES, LiveLines, ManifestRow, manifest_rows, open_input, path_rows
from md3cli.source.parquet import CellReader
from md3cli.source.source import open_source

some_examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def rows(tmp_path: Path, suffix: str, data: bytes) -> list[ManifestRow]:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(data)
    return list(manifest_rows(str(path)))


def columns(found: list[ManifestRow]) -> list[Any]:
    return [row.columns if row.columns is not None else f"{row.where}: {row.problem}" for row in found]


# -- CSV ---------------------------------------------------------------------------------------------


def test_csv_with_bom_and_crlf(tmp_path: Path) -> None:
    lines = [
        "\ufeffimage, task,max_tokens,top_p,reasoning,spatial_refs,note",
        'a.jpg,query,5,.5,No,"[[0.1,0.2]]",',
        "",
        "b.jpg,,,,,,x y ",
    ]
    first, second = columns(rows(tmp_path, ".CSV", "\r\n".join(lines).encode()))
    assert list(first.values()) == ["a.jpg", "query", 5, 0.5, False, [[0.1, 0.2]], ""]
    assert list(second.values()) == ["b.jpg", "", None, None, None, None, "x y "]
    assert list(first) == ["image", "task", "max_tokens", "top_p", "reasoning", "spatial_refs", "note"]


def test_tsv(tmp_path: Path) -> None:
    assert columns(rows(tmp_path, ".tsv", b"image\tprompt\na,b.jpg\twhy, so?\n")) == [
        {"image": "a,b.jpg", "prompt": "why, so?"}
    ]


def test_each_bad_csv_line_is_one_row_with_its_number(tmp_path: Path) -> None:
    lines = [
        b"image,prompt",
        b"1.jpg,ok",
        b'2.jpg,"never closed',
        b"3.jpg,ok",
        b'"4.jpg"x,bad quote',
        b"5.jpg",
        b"6.jpg,too,many",
        b"7.jpg,caf\xe9",
        b"8.jpg," + b"x" * 200_000,
        b'9.jpg,"two',
        b'lines"',
        b"12.jpg," + b"x" * ROW_LIMIT_BYTES,
        b"13.jpg,ok",
    ]
    assert columns(rows(tmp_path, ".csv", b"\n".join(lines) + b"\n")) == [
        {"image": "1.jpg", "prompt": "ok"},
        "line 3: ',' expected after '\"'",
        {"image": "3.jpg", "prompt": "ok"},
        "line 5: ',' expected after '\"'",
        "line 6: 1 columns where the header has 2",
        "line 7: 3 columns where the header has 2",
        "line 8: not valid UTF-8",
        {"image": "8.jpg", "prompt": "x" * 200_000},
        {"image": "9.jpg", "prompt": "two\nlines"},
        "line 12: longer than 16 MiB",
        {"image": "13.jpg", "prompt": "ok"},
    ]


def test_a_quote_open_at_the_end_costs_its_own_line_only(tmp_path: Path) -> None:
    assert columns(rows(tmp_path, ".csv", b'image\n"a\nb\nc\n')) == [
        "line 2: unexpected end of data",
        {"image": "b"},
        {"image": "c"},
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"a.jpg,b\nc.jpg,d\n", "no column 'image' .its first line is: a.jpg, b"),
        (b'image,"x\n', "no column 'image'"),
        (b"image,x,x\n", "names the column 'x' twice"),
        ("image\na.jpg".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_csv_without_a_usable_header_is_an_input_error(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows(tmp_path, ".csv", data)


csv_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@some_examples
@given(st.lists(st.lists(csv_text, min_size=2, max_size=2), max_size=8), st.sampled_from([",", "\t"]))
def test_what_a_csv_writer_writes_is_read_back(tmp_path: Path, table: list[list[str]], delimiter: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["image", "note"], *table])
    found = rows(tmp_path, ".csv" if delimiter == "," else ".tsv", out.getvalue().encode())
    # a bare CR inside a cell is kept; CRLF inside one becomes LF, as line ends are cut off by line
    wanted = [{"image": a.replace("\r\n", "\n"), "note": b.replace("\r\n", "\n")} for a, b in table]
    assert columns(found) == [row for row in wanted if row["image"].strip() or row["note"].strip()]


def test_what_spreadsheets_leave_behind_a_table_is_dropped(tmp_path: Path) -> None:
    wanted = [{"image": "a.png", "prompt": "circle"}, {"image": "b.png", "prompt": ""}]
    for data in (
        b"image,prompt,,\r\na.png,circle,,\r\nb.png,,,\r\n,,,\r\n,\r\n",
        b"image,,prompt\na.png,,circle\n,,\nb.png, ,\n , , \n",
        b"image,prompt\na.png,circle,,\nb.png,,\n",
        b"image;prompt\r\na.png;circle\r\nb.png;\r\n;\r\n",
        b"image\tprompt\na.png\tcircle\nb.png\t\n",
        b"\xef\xbb\xbfsep=;\r\nimage;prompt\r\na.png;circle\r\nb.png;\r\n",
    ):
        assert columns(rows(tmp_path, ".csv", data)) == wanted, data


def test_what_a_nameless_column_holds_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column 1 has no name and holds '0'; name it"):
        rows(tmp_path, ".csv", b",image\n0,a.png\n1,b.png\n")
    assert columns(rows(tmp_path, ".csv", b"image,\na.png,\nb.png,x\nc.png,\n")) == [
        {"image": "a.png"},
        "line 3: column 2 has no name and holds 'x'",
        {"image": "c.png"},
    ]


def test_semicolons_are_cells_only_where_the_header_says_so(tmp_path: Path) -> None:
    assert columns(rows(tmp_path, ".csv", b"image,a;b\nx;y.png,1;2\n")) == [{"image": "x;y.png", "a;b": "1;2"}]


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        (".csv", b"PK\x03\x04rest", "a spreadsheet or an archive"),
        (".csv", b"\xd0\xcf\x11\xe0rest", "an old spreadsheet"),
        (".txt", b"\x1f\x8brest", "compressed"),
        (".jsonl", b"PAR1rest", "call it .parquet"),
        (".txt", "a.png\nb.png\n".encode("utf-16"), "UTF-16"),
        (".csv", "image\na.png\n".encode("utf-16-le"), "UTF-16"),
        (".csv", b"image,x\ra.png,1\r", "old Macs"),
        (".txt", b"a.png\rb.png\r", "old Macs"),
    ],
)
def test_a_list_in_another_guise_is_refused_in_words(tmp_path: Path, suffix: str, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows(tmp_path, suffix, data)


def test_open_quotes_cost_a_bounded_time_and_memory(tmp_path: Path) -> None:
    data = b'image,x\na,"open\n' + b"b,1\n" * 1000 + b'c,"open again'
    found = rows(tmp_path, ".csv", data)
    assert [row.columns is None for row in found] == [True, *[False] * 1000, True]


def test_a_parquet_column_twice_is_refused_by_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["image", "m", "m"])
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(InputError, match="names the column 'm' twice"):
        list(manifest_rows(str(tmp_path / "m.parquet")))


@pytest.mark.parametrize("order", [("image.bytes", "image", "n"), ("n", "image", "image.bytes")])
def test_a_flat_column_called_like_the_pictures_is_a_column(tmp_path: Path, order: tuple[str, ...]) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": b"1", "path": "p.png"}, {"bytes": b"2", "path": None}], kind)
    table = {"image.bytes": [b"flat", b"flat"], "image": pictures, "n": [1, 2]}
    path = str(tmp_path / "m.parquet")
    pq.write_table(pa.table({name: table[name] for name in order}), path)
    found = [row.columns for row in manifest_rows(path)]
    assert [row and (row["n"], row["image.bytes"]) for row in found] == [(1, "ZmxhdA=="), (2, "ZmxhdA==")]
    places = [row["image"] for row in found if row]
    assert [place.name for place in places] == ["0000001-p.png", "0000002"]
    reader = CellReader(open_input)
    items = [ImageItem(place.name, path, offset=place.offset, row_group=place.row_group) for place in places]
    assert [reader.read(item, 100) for item in items] == [b"1", b"2"]
    reader.close()


@some_examples
@given(st.binary(max_size=300))
def test_any_bytes_give_rows_and_never_more_than_lines(tmp_path: Path, data: bytes) -> None:
    found = rows(tmp_path, ".csv", b"image,prompt\n" + data)
    assert len(found) <= data.count(b"\n") + 1
    for suffix in (".jsonl", ".txt"):
        found = rows(tmp_path, suffix, b"\n" + data)  # a first line of its own: no byte order mark
        assert len(found) <= data.count(b"\n") + 1


# -- JSON Lines ----------------------------------------------------------------------------------------


def test_each_bad_json_line_is_one_row_with_its_number(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"image":"1.jpg"}\r',
        b"",
        b'{"image":"3.jpg"',
        b'["4.jpg"]',
        b'{"image":"caf\xe9"}',
        b'{"image":"6.jpg","meta":' + b"[" * 100_000,
        b'{"image":"7.jpg","meta":' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"image":"8.jpg","meta":' + b"1" * 5000 + b"}",
        b'{"image":"9.jpg","meta":NaN}',
        b'{"image":"10.jpg","meta":1e999}',
        b'{"image":"11.jpg","meta":"\\ud83e"}',
        b'{"image":"12.jpg","meta":{"deep":[1,{"x":null}]}}',
        b"\0\0\0",
        b'{"image":"14.jpg","prompt":"a","image":"b.jpg"}',
        b'{"image":"15.jpg","meta":{"k":1,"k":1}}',
    ]
    found = columns(rows(tmp_path, ".jsonl", b"\n".join(lines)))
    assert found[0] == {"image": "1.jpg"}
    assert found[1].startswith("line 3: Expecting ',' delimiter")
    assert found[2:4] == ["line 4: not a JSON object", "line 5: not valid UTF-8"]
    assert found[4:6] == [f"line {number}: nested deeper than 64 levels" for number in (6, 7)]
    assert found[6].startswith("line 8: Exceeds the limit")
    assert found[7] == "line 9: NaN is not JSON"
    assert found[8].startswith("line 10: Out of range float values")
    assert found[9] == "line 11: holds half of a surrogate pair, which is no character"
    assert found[10] == {"image": "12.jpg", "meta": {"deep": [1, {"x": None}]}}
    assert found[11].startswith("line 13: Expecting value")
    assert found[12:] == ["line 14: the key 'image' comes twice", "line 15: the key 'k' comes twice"]


@pytest.mark.process
@some_examples
@given(st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), max_size=6))
def test_any_json_object_is_read_back(tmp_path: Path, objects: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(item) + "\n" for item in objects)
    if "\\ud" not in data:  # a pair of halves is a character, one half is refused
        assert columns(rows(tmp_path, ".jsonl", data.encode())) == objects


@pytest.mark.process
def test_rows_of_10_kb_stream(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    line = json.dumps({"image": "a.jpg", "note": "x" * 10_000}).encode() + b"\n"
    path.write_bytes(line * 3000)
    tracemalloc.start()
    try:
        assert sum(row.columns is not None for row in manifest_rows(str(path))) == 3000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# -- lists of paths ----------------------------------------------------------------------------------------


def test_a_list_of_paths_keeps_every_byte(tmp_path: Path) -> None:
    found = rows(tmp_path, ".txt", b'a b .jpg\r\n\n{"x"}.jpg\n\xff\n')
    assert [os.fsencode(row.columns["image"]) for row in found if row.columns] == [b"a b .jpg", b'{"x"}.jpg', b"\xff"]
    assert [row.where for row in found] == ["line 1", "line 3", "line 4"]


def test_stdin_takes_paths_and_objects() -> None:
    found = path_rows(io.BytesIO(b'a.jpg\n{"image":"b\\n.jpg","task":"caption"}\n{broken\n'), has_json=True)
    assert columns(list(found)) == [
        {"image": "a.jpg"},
        {"image": "b\n.jpg", "task": "caption"},
        "line 3: Expecting property name enclosed in double quotes at column 2",
    ]


# -- Parquet ------------------------------------------------------------------------------------------------


def test_parquet_values_become_json(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": pa.array(["a.jpg", None]).dictionary_encode(),
            "max_tokens": pa.array([5.0, None]),
            "spatial_refs": [[[0.1, 0.2]], None],
            "when": [datetime(2026, 11, 21), None],
            "price": [Decimal("1.50"), None],
            "raw": [b"\xff", None],
            "score": [float("nan"), 0.5],
            "box": [{"x": 1, "y": float("inf")}, None],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    found = columns(list(manifest_rows(str(tmp_path / "m.parquet"))))
    assert found[0] == {
        "image": "a.jpg",
        "max_tokens": 5.0,
        "spatial_refs": [[0.1, 0.2]],
        "when": "2026-11-21T00:00:00",
        "price": "1.50",
        "raw": "/w==",
        "score": None,
        "box": {"x": 1, "y": None},
    }
    assert found[1] == dict.fromkeys(found[0]) | {"score": 0.5}
    json.dumps(found, allow_nan=False)


def test_a_value_that_cannot_be_read_costs_its_row(tmp_path: Path) -> None:
    bad_text = pa.array([b"ok", b"\xff", b"ok"]).cast(pa.binary()).view(pa.string())
    table = pa.table({"image": ["a", "b", "c"], "note": bad_text, "when": pa.array([0, 0, 2**62], pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "m.parquet")
    found = list(manifest_rows(str(tmp_path / "m.parquet")))
    assert [row.columns is None for row in found] == [False, True, True]
    assert [row.where for row in found] == ["row 1", "row 2", "row 3"]


def test_a_damaged_row_group_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = pa.table({"image": [f"{i}.jpg" for i in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(data)
    found = list(manifest_rows(str(path)))
    good = [row.columns["image"] for row in found if row.columns]
    assert good == [f"{i}.jpg" for i in [*range(10), *range(20, 30)]]
    assert [row.problem[:41] for row in found if row.columns is None] == ["row group 2 cannot be read from here on: "]


@pytest.mark.process
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()], ids=str)
def test_a_text_that_comes_again_and_again_takes_its_memory_once(tmp_path: Path, kind: pa.DataType) -> None:
    text, num_rows = "y" * (2 << 20), 600  # 600 bytes on disk, 1.2 GB when written out
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([text.encode()]).cast(kind))
    table = pa.table({"image": ["a.jpg"] * num_rows, "note": cells})
    pq.write_table(table, tmp_path / "m.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "m.parquet").stat().st_size < 200_000
    with arrow_memory() as pool:
        found = [(row.problem, len((row.columns or {})["note"])) for row in manifest_rows(str(tmp_path / "m.parquet"))]
    length = len(base64.b64encode(text.encode())) if kind == pa.binary() else len(text)
    assert found == [("", length)] * num_rows
    assert pool.max_memory() < 64 << 20


@pytest.mark.process
def test_rows_of_a_mebibyte_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    texts = [f"{number}{os.urandom(1 << 19).hex()}" for number in range(100)]
    table = pa.table({"image": ["a.jpg"] * 100, "note": texts})
    pq.write_table(table, tmp_path / "m.parquet", use_dictionary=False, write_batch_size=1, compression="none")
    with arrow_memory() as pool:
        assert [row.columns for row in manifest_rows(str(tmp_path / "m.parquet"))] == table.to_pylist()
    assert pool.max_memory() < 192 << 20  # a batch of 64 MiB, while its buffers grow


@pytest.mark.process
def test_a_column_that_unpacks_a_thousandfold_costs_one_row_and_nothing_behind_it(tmp_path: Path) -> None:
    groups = [["y" * (4 << 20)] * 80, ["short"]]
    path = tmp_path / "m.parquet"
    with pq.ParquetWriter(
        path, pa.schema({"image": pa.string(), "note": pa.string()}), compression="zstd", use_dictionary=False
    ) as writer:
        for texts in groups:
            writer.write_table(pa.table({"image": ["a.jpg"] * len(texts), "note": texts}))
    assert path.stat().st_size < 200_000
    with arrow_memory() as pool:
        bomb, good = columns(list(manifest_rows(str(path))))
    assert bomb.startswith("row 1: row group 1 cannot be read from here on: column 'note' would unpack ")
    assert good == {"image": "a.jpg", "note": "short"}
    assert pool.max_memory() < 16 << 20


def test_a_cell_longer_than_a_line_may_be_costs_its_row(tmp_path: Path) -> None:
    table = pa.table({"image": ["a.jpg", "b.jpg"], "note": ["y" * ((1 << 24) + 1), "short"]})
    pq.write_table(table, tmp_path / "m.parquet")
    found = columns(list(manifest_rows(str(tmp_path / "m.parquet"))))
    assert found == ["row 1: column 'note' is longer than 16 Mi characters", {"image": "b.jpg", "note": "short"}]


@contextlib.contextmanager
def arrow_memory() -> Iterator[pa.MemoryPool]:
    """What pyarrow allocates inside."""
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(usual)


def test_a_footer_that_claims_a_trillion_rows_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    num_rows = 20_011  # a number whose bytes stand nowhere else
    pq.write_table(pa.table({"image": pa.array(["a.jpg"] * num_rows)}), path)
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    claimed, real = _varint(10**12), _varint(num_rows)
    changed = data[:footer] + data[footer:-8].replace(real, claimed)
    path.write_bytes(changed + (len(changed) - footer).to_bytes(4, "little") + b"PAR1")
    assert pq.ParquetFile(path).metadata.num_rows == 10**12
    found = list(manifest_rows(str(path)))
    assert columns(found) == [{"image": "a.jpg"}] * num_rows


def _varint(number: int) -> bytes:
    """As Thrift's compact protocol writes it: zigzag, 7 bits a byte."""
    number, out = number << 1, bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"image\na.jpg\n"])
def test_what_is_no_parquet_is_an_input_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match="as Parquet"):
        rows(tmp_path, ".parquet", data)


@pytest.mark.parametrize(
    "table", [pa.table({"picture": ["a"]}), pa.table({"image": [[b"\x89PNG"]]}), pa.table({"image": [{"path": "a"}]})]
)
def test_parquet_without_a_text_column_image_is_an_input_error(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(InputError, match="column 'image'"):
        list(manifest_rows(str(tmp_path / "m.parquet")))


def test_a_manifest_that_would_block_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        list(manifest_rows(str(tmp_path / "m.jsonl")))
    with pytest.raises(InputError, match="cannot open"):
        list(manifest_rows(str(tmp_path / "none.jsonl")))


# ---- stdin that stays open: nothing waits for the next line --------------------------------------


SOON_S = 60  # of a process that starts meanwhile; the machine may be busy


@pytest.fixture
def pipe() -> Iterator[tuple[LiveLines, int]]:
    """Lines that are not waited for, and where to write them."""
    out, into = os.pipe()
    with open(out, "rb") as file:
        yield LiveLines(file, may_wait=False), into


def test_what_has_not_come_is_not_waited_for(pipe: tuple[LiveLines, int]) -> None:
    lines, into = pipe
    assert lines.readline(99) is None
    os.write(into, b"a\nb\nhal")
    assert [lines.readline(99) for _ in range(4)] == [b"a\n", b"b\n", None, None]
    assert not lines.wait(0)
    os.write(into, b"f\nend")
    os.close(into)
    assert lines.wait(0)
    assert [lines.readline(99) for _ in range(4)] == [b"half\n", b"end", b"", b""]


@given(st.lists(st.sampled_from([b"", b"x", b"\n", b"yy\n", b"z\r\n\n"]) | st.binary(max_size=9)), st.integers(1, 9))
def test_the_lines_are_those_of_a_file(written: list[bytes], limit: int) -> None:
    out, into = os.pipe()
    found = []
    with open(out, "rb") as file:
        lines = LiveLines(file, may_wait=False)
        for part in written:
            os.write(into, part)
            while line := lines.readline(limit):
                found.append(line)
        os.close(into)
        while line := lines.readline(limit):
            found.append(line)
    plain = io.BytesIO(b"".join(written))
    assert found == list(iter(lambda: plain.readline(limit), b""))
    in_memory = LiveLines(io.BytesIO(b"".join(written)), may_wait=False)
    assert found == list(iter(lambda: in_memory.readline(limit), b""))


@pytest.mark.parametrize(("limit", "shard"), [(None, None), (3, None), (None, (0, 1))])
def test_rows_so_far(limit: int | None, shard: tuple[int, int] | None) -> None:
    out, into = os.pipe()
    with open(out, "rb") as file:
        source = open_source(SourceSpec(("-",), limit=limit, shard=shard), (Request(Task.CAPTION),), stdin=file)
        rows = source.rows_so_far()
        assert next(rows) is None
        os.write(into, b'a.jpg\n\n{"image":"b.jpg"}\n' + b"x" * 20)
        found = [next(rows) for _ in range(4)]
        assert [row and row.image and row.image.name for row in found] == ["a.jpg", "b.jpg", None, None]
        os.write(into, b".jpg\nlast.jpg")
        os.close(into)
        rest = [row and row.image and row.image.name for row in rows]
        assert rest == ["x" * 20 + ".jpg", "last.jpg"][: None if limit is None else limit - 2]


def wait_for_lines(path: Path, count: int) -> None:
    started = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() - started < SOON_S, f"{count} records did not come"
        time.sleep(0.02)


@pytest.mark.process
def test_each_line_of_an_open_pipe_becomes_a_record_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    pictures, out = make_pictures(tmp_path / "pictures", 9), tmp_path / "out.jsonl"
    process = start("caption", "-", "-o", out, "--root", pictures, "--workers", 1, stdin=subprocess.PIPE)
    assert process.stdin is not None
    parts = ["p0.png\n", "p1.png\np2.png\n", "\n\np3.png\nha", 'lf.png\n{"image":"p4.png"}\n']
    for text, count in zip(parts, [1, 3, 4, 6], strict=True):
        process.stdin.write(text.encode())
        process.stdin.flush()
        wait_for_lines(out, count)
    process.stdin.write(b"p5.png")
    process.stdin.close()
    assert process.wait(SOON_S) == 3
    images = [record["image"] for record in records_of(out)]
    assert images == ["p0.png", "p1.png", "p2.png", "p3.png", "half.png", "p4.png", "p5.png"]


@pytest.mark.process
def test_a_signal_while_nothing_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path / "home")
    pictures, out = make_pictures(tmp_path / "pictures", 1), tmp_path / "out.jsonl"
    process = start("caption", "-", "-o", out, "--root", pictures, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"p0.png\n")
    process.stdin.flush()
    wait_for_lines(out, 1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON_S) == 130
    _, stderr = process.communicate()
    assert b"stopped by SIGINT: 1 new records are in" in stderr
    assert b"Traceback" not in stderr


# ---- a row that has been mended ------------------------------------------------------------------


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    make_pictures(tmp_path / "pictures", 4)
    return md3


def rows_with_broken(*broken: int) -> str:
    names = [f'{{"image":"pictures/p{i}.png"' for i in range(4)]
    return "".join(name + ("\n" if number in broken else "}\n") for number, name in enumerate(names, start=1))


COMMAND = ("run", "m.jsonl", "--task", "caption:short", "-o", "r.jsonl", "--no-progress")


def test_only_the_failure_of_a_mended_row_goes(md3: Program) -> None:
    Path("m.jsonl").write_text(rows_with_broken(2, 4))
    assert md3(*COMMAND).exit_code == 3
    Path("m.jsonl").write_text(rows_with_broken(4))
    assert md3(*COMMAND).exit_code == 3, "one is still broken"
    records = records_of(Path("r.jsonl"))
    assert [record["image"] for record in records] == [f"pictures/p{i}.png" for i in range(3)] + [None]
    assert records[3]["error"]["message"].startswith("line 4: ")
    Path("m.jsonl").write_text(rows_with_broken())
    assert md3(*COMMAND).exit_code == 0
    assert [record["error"] for record in records_of(Path("r.jsonl"))] == [None] * 4


def test_a_broken_row_that_is_gone_keeps_its_failure(md3: Program) -> None:
    Path("m.jsonl").write_text(rows_with_broken(4))
    assert md3(*COMMAND).exit_code == 3
    Path("m.jsonl").write_text("".join(rows_with_broken().splitlines(keepends=True)[:2]))
    assert md3(*COMMAND).exit_code == 3
    assert len(records_of(Path("r.jsonl"))) == 4
