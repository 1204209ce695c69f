"""Writes manifests in every state a manifest can be in, each with what must come of every one of its rows.

`write_manifests(folder)` gives a `Manifest` for each. What is expected is written by hand: for each
record, in order, None for an answer or the error type; or the exit status of a run that cannot be done.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = "p0.png"  # the one picture that is there, beside the manifests
Outcome = str | None
BAD, ASKED, GONE = "bad_row", "bad_request", "not_found"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A file below the folder, and either the outcome of each record or the status of the run."""

    name: str
    outcomes: tuple[Outcome, ...] = ()
    status: int | None = None
    options: tuple[str, ...] = ()


def _lines(*rows: Any, end: str = "\n") -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + end for row in rows).encode()


def _parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _cut(data: bytes) -> bytes:
    """A Parquet file whose footer is whole and whose column data is not."""
    footer = int.from_bytes(data[-8:-4], "little") + 8
    return b"PAR1" + bytes(len(data) - footer - 4) + data[-footer:]


def _jsonl() -> Iterator[tuple[str, bytes, tuple[Outcome, ...]]]:
    good = {"image": GOOD}
    yield "bom", b"\xef\xbb\xbf" + _lines(good, good), (None, None)
    yield "crlf", _lines(good, good, end="\r\n"), (None, None)
    yield "no-newline-at-the-end", _lines(good)[:-1], (None,)
    yield "blank-lines", b"\n\r\n  \n" + _lines(good) + b"\n\n", (None,)
    broken = _lines(good, '{"image": "p0', good, "{", "]", "null", "7", '"p0.png"', "[1]", good)
    yield "broken-lines", broken, (None, BAD, None, *[BAD] * 6, None)
    yield "two-on-a-line", _lines('{"image":"p0.png"}{"image":"p0.png"}', good), (BAD, None)
    yield "binary", b"\x00\xff\xfe\x80\n" * 3 + _lines(good), (BAD, BAD, BAD, None)
    yield "not-utf-8", b'{"image":"caf\xe9.png"}\n' + _lines(good), (BAD, None)
    yield "half-a-surrogate", _lines('{"image":"\\ud83e.png"}', good), (BAD, None)
    yield "nul-in-a-name", _lines('{"image":"p0.png\\u0000.txt"}', good), (BAD, None)
    yield "nan", _lines('{"image":"p0.png","x":NaN}', '{"image":"p0.png","x":-Infinity}', good), (BAD, BAD, None)
    yield "long-integer", _lines('{"image":"p0.png","x":' + "9" * 5000 + "}", good), (BAD, None)
    yield "deep", _lines('{"image":"p0.png","x":' + "[" * 99_999 + "]" * 99_999 + "}", good), (BAD, None)
    yield "a-bit-deep", _lines('{"image":"p0.png","x":' + "[" * 70 + "]" * 70 + "}", good), (BAD, None)
    yield "long-line", _lines('{"image":"p0.png","x":"' + "y" * (1 << 24) + '"}', good), (BAD, None)
    yield "10-kb-rows", _lines(*[good | {"x": "y" * 10_000}] * 50), (None,) * 50
    images: list[Any] = [5, 1.5, True, [GOOD], {"path": GOOD}]
    yield "images-that-are-no-paths", _lines(*({"image": image} for image in images)), (BAD,) * 5
    yield "no-image", _lines({"img": GOOD}, {}, good), (BAD, BAD, None)
    yield "null-image", _lines({"image": None}, {"image": ""}), (ASKED, ASKED)
    yield "text-only", _lines({"image": None, "task": "query", "prompt": "why?"}), (None,)
    tasks: list[Any] = ["sing", 5, "DETECT", "detect", "", None]
    rows = [good | {"task": task, "prompt": "car"} for task in tasks[:3]]
    rows += [good | {"task": task} for task in tasks[3:]]
    yield "tasks", _lines(*rows), (ASKED, BAD, None, ASKED, None, None)
    settings: list[Any] = [{"max_tokens": 0}, {"max_tokens": "5"}, {"temperature": -1}, {"top_p": 2}, {"seed": 1.5}]
    settings += [{"length": "huge"}, {"reasoning": "yes"}, {"temperature": 10**400}, {"max_objects": True}]
    wanted = (ASKED, BAD, ASKED, ASKED, BAD, ASKED, BAD, ASKED, BAD)
    yield "settings", _lines(*(good | setting for setting in settings)), wanted
    refs: list[Any] = [[[0.5, 0.5]], [[2, 0]], [[1]], "x", [[0.5, 0.5, 0.1, 0.1]], [[0.1, 0.1, 0.5, 0.5]]]
    point = good | {"task": "point", "prompt": "a"}
    yield "spatial-refs", _lines(*(point | {"spatial_refs": r} for r in refs)), (None, ASKED, BAD, BAD, ASKED, None)
    names = ["http://x/a.jpg", "file:///etc/passwd", "data:image/png;base64,AA", "S3://b/k"]
    yield "addresses", _lines(*({"image": name} for name in names)), (ASKED,) * 4
    names = ["gone.png", "../gone.png", "/dev/null", "/dev/zero", ".", "p0.png/x", "x" * 5000, "y" * 300]
    yield (
        "paths",
        _lines(*({"image": name} for name in names)),
        (GONE, GONE, "not_a_file", "not_a_file", "not_a_file", GONE, BAD, GONE),
    )
    escapes = good | {"task": "query", "prompt": "\x1b[2J\x07<|endoftext|>", "\x1b]0;x": "\u202e"}
    yield "escapes-and-special-tokens", _lines(escapes), (None,)
    keys = '{"image":"gone.png","image":"p0.png"}'
    yield "double-keys", _lines(keys), (BAD,)
    yield "repeats", _lines(*[good] * 9), (None,) * 9


def _csv() -> Iterator[tuple[str, bytes, tuple[Outcome, ...]]]:
    yield "plain", b"image\np0.png\n", (None,)
    yield "bom-and-crlf", b'\xef\xbb\xbf"image"\r\np0.png\r\n\r\n', (None,)
    yield "columns", b"image,x\np0.png\np0.png,1,2\np0.png,1\n", (BAD, BAD, None)
    yield "quotes", b'image,x\np0.png,"open\np0.png,1\n"p0.png"x,1\np0.png,"two\nlines"\n', (BAD, None, BAD, None)
    yield "nul", b"image,x\np0.png,\0\np0.png,1\n", (None, None)
    yield "long-field", b"image,x\np0.png," + b"y" * 140_000 + b"\np0.png,1\n", (None, None)
    yield "empty-rows-and-columns", b"image,x,,\r\np0.png,1,,\r\n,,,\r\n,\r\n", (None,)
    yield "not-utf-8", b"image,x\np0.png,caf\xe9\np0.png,1\n", (BAD, None)
    yield "formulas", b"image,x\n=cmd|' /C calc'!A0,=1+1\np0.png,@x\n", (GONE, None)
    yield "settings", b"image,max_tokens,temperature\np0.png,many,\np0.png,,hot\np0.png,5,0.5\n", (BAD, BAD, None)


def _other() -> Iterator[tuple[str, bytes, tuple[Outcome, ...]]]:
    yield "plain.tsv", b"image\tx\np0.png\ta,b\n", (None,)
    yield "any-bytes.txt", b"p0.png\n\xff\xfe.png\n\x1b[31m.png\n\n" + b"z" * 5000 + b"\n", (None, GONE, GONE, BAD)
    table = {"image": [GOOD, None, GOOD], "x": [1, 2, None], "when": [b"\xff", b"", None]}
    yield "plain.parquet", _parquet(**table), (None, ASKED, None)
    yield "damaged-group.parquet", _cut(_parquet(image=[GOOD] * 9)), (BAD,)
    nested = pa.array([[{"a": float("nan")}]] * 2)
    yield "nested.parquet", _parquet(image=[GOOD, GOOD], x=nested), (None, None)


REFUSED: dict[str, bytes] = {  # no run at all, status 1
    "utf-16.jsonl": '{"image":"p0.png"}\n'.encode("utf-16"),
    "empty.csv": b"",
    "empty.jsonl": b"",
    "old-mac.csv": b"image,x\rp0.png,1\r",
    "no-column.csv": b"path,prompt\np0.png,x\n",
    "double-column.csv": b"image,image\np0.png,p0.png\n",
    "text.parquet": b"not Parquet at all",
    "empty.parquet": b"",
    "footer-of-4-gb.parquet": b"PAR1" + struct.pack("<I", 2**32 - 1) + b"PAR1",
    "no-column.parquet": _parquet(path=[GOOD]),
    "numbers.parquet": _parquet(image=[1, 2]),
}


def write_manifests(folder: Path) -> list[Manifest]:
    """Write them all into `folder`, beside which the caller has put GOOD."""
    files = {f"{name}.jsonl": (data, outcomes) for name, data, outcomes in _jsonl()}
    files |= {f"{name}.csv": (data, outcomes) for name, data, outcomes in _csv()}
    files |= {name: (data, outcomes) for name, data, outcomes in _other()}
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    for name, data in REFUSED.items():
        (folder / name).write_bytes(data)
    (folder / "confined.jsonl").write_bytes(_lines(*({"image": name} for name in (GOOD, "../x.png", "/etc/passwd"))))
    confined = Manifest("confined.jsonl", (None, "outside_root", "outside_root"), options=("--root", str(folder)))
    return [
        *(Manifest(name, outcomes) for name, (_, outcomes) in files.items()),
        *(Manifest(name, status=1) for name in REFUSED),
        confined,
    ]
