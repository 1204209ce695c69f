"""The members of a tar as byte ranges; damage anywhere ends in an error, never in silence or a loop."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md3cli.errors import InputError, RowError
from md3cli.source.tar import tar_members


def tar_of(contents: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


CONTENTS = {"a.jpg": b"picture a", "deep/" * 60 + "b.jpg": b"b" * 2000, "ü.jpg": b""}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_ranges_hold_the_members(format: int) -> None:
    data = tar_of(CONTENTS, format)
    found = {m.name: data[m.offset_data : m.offset_data + m.size] for m in tar_members(io.BytesIO(data), "t.tar")}
    assert found == CONTENTS


def test_an_empty_tar_has_no_members() -> None:
    assert list(tar_members(io.BytesIO(tar_of({})), "t.tar")) == []


@pytest.mark.parametrize("data", [b"", b"no tar", b"x" * 1024, b"\x1f\x8b" + b"\0" * 600])
def test_what_is_no_tar_is_an_input_error(data: bytes) -> None:
    with pytest.raises(InputError, match=r"t\.tar as a tar"):
        list(tar_members(io.BytesIO(data), "t.tar"))


@pytest.mark.parametrize(("pack", "command"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_compressed_tar_is_told_from_a_damaged_one(pack: Callable[[bytes], bytes], command: str) -> None:
    message = rf"cannot read t\.tar as a tar: it is compressed; unpack it: {command} -dc OLD\.tar > NEW\.tar"
    with pytest.raises(InputError, match=message):
        list(tar_members(io.BytesIO(pack(tar_of(CONTENTS))), "t.tar"))


def test_a_zip_archive_is_told_as_one() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.jpg", b"a")
    with pytest.raises(InputError, match=r"t\.tar as a tar: it is a zip archive; unpack it, and give the folder"):
        list(tar_members(io.BytesIO(data.getvalue()), "t.tar"))


def test_a_damaged_header_is_not_the_end() -> None:
    data = bytearray(tar_of({"a.jpg": b"a", "b.jpg": b"b", "c.jpg": b"c"}))
    data[1024 + 150] ^= 0xFF  # the checksum of b.jpg
    members = tar_members(io.BytesIO(bytes(data)), "t.tar")
    assert next(members).name == "a.jpg"
    with pytest.raises(RowError, match="damaged at byte 1024: no valid header"):
        next(members)


def test_a_cut_tar_without_end_marks_keeps_its_whole_members(tmp_path: Path) -> None:
    data = tar_of({"a.jpg": b"a" * 512, "b.jpg": b"b" * 512})
    assert [member.name for member in tar_members(io.BytesIO(data[:2048]), "t.tar")] == ["a.jpg", "b.jpg"]
    members = tar_members(io.BytesIO(data[:1800]), "t.tar")
    assert [next(members).name, next(members).name] == ["a.jpg", "b.jpg"]
    with pytest.raises(RowError, match="damaged at byte"):
        next(members)


def header(kind: bytes, size: int) -> bytes:
    """The header of a block of kind `kind` that claims `size` bytes."""
    member = tarfile.TarInfo("block")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


class CountingFile(io.BytesIO):
    """A file that knows how much was asked of it at a time."""

    most = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.most = max(self.most, size if size is not None and size >= 0 else 1 << 62)
        return super().read(size)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
@pytest.mark.parametrize("size", [6 << 30, 1 << 80, -(1 << 20), (1 << 20) + 1])
def test_a_header_that_claims_gigabytes_is_not_read(kind: bytes, size: int) -> None:
    file = CountingFile(tar_of({"a.jpg": b"a"})[:1024] + header(kind, size) + tar_of({"b.jpg": b"b"}))
    members = tar_members(file, "t.tar")
    assert next(members).name == "a.jpg"
    with pytest.raises(RowError, match="damaged at byte 1024: a header that claims"):
        list(members)
    assert file.most <= 1 << 20
    with pytest.raises(InputError, match=r"t\.tar as a tar: a header that claims"):
        list(tar_members(io.BytesIO(header(kind, size) + bytes(1024)), "t.tar"))


@pytest.mark.process
def test_headers_without_end_are_not_read() -> None:
    sparse = bytearray(header(b"S", 0))
    sparse[482] = 1  # more of the map follows
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148]) + 8 * 32 + sum(sparse[156:]))
    more = bytes(504) + b"\1" + bytes(7)
    for data in (bytes(sparse) + more * 5000, _global_headers(5000)):
        with pytest.raises((InputError, RowError), match=r"more than 1 MiB|without end"):
            list(tar_members(io.BytesIO(data), "t.tar"))


def test_a_chain_of_headers_is_told_in_words() -> None:
    block = b"13 path=x.jp\n"
    chain = (header(b"x", len(block)) + block.ljust(512, b"\0")) * 990  # below the limit of bytes
    with pytest.raises(RowError, match="damaged at byte 1024: hundreds of headers for one member"):
        list(tar_members(io.BytesIO(tar_of({"a.jpg": b"a"})[:1024] + chain), "t.tar"))


def _global_headers(count: int) -> bytes:
    out = []
    for i in range(count):
        line = f"520 k{i:05d}=".encode()
        out += [
            header(b"g", 520),
            (line + b"v" * (519 - len(line)) + b"\n").ljust(1024, b"\0"),
            tar_of({"a": b""})[:512],
        ]
    return b"".join(out)


def test_a_member_of_a_size_that_no_file_has_ends_the_tar() -> None:
    data = tar_of({"a.jpg": b"a"})[:1024] + header(b"0", 1 << 80) + tar_of({"b.jpg": b"b"})
    members = tar_members(io.BytesIO(data), "t.tar")
    assert [next(members).name, next(members).name] == ["a.jpg", "block"]
    with pytest.raises(RowError, match="damaged at byte"):
        list(members)


@pytest.mark.process
@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 8191), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_damage_ends(changes: list[tuple[int, int]]) -> None:
    data = bytearray(tar_of(CONTENTS))
    for place, value in changes:
        data[place % len(data)] = value
    with contextlib.suppress(InputError, RowError):
        assert sum(1 for _ in tar_members(io.BytesIO(bytes(data)), "t.tar")) < 20
