"""stdin that stays open: each line is processed as it comes, and nothing waits for the next."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from program import isolate, make_pictures, records_of, start

from md3cli.config import SourceSpec
from md3cli.records import Request, Task
from md3cli.source.manifest import LiveLines
from md3cli.source.source import open_source

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
