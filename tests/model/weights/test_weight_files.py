"""Which files make a checkpoint, and headers that are cut short, false or hostile."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md3cli.errors import CheckpointError
from md3cli.model.weights.files import (
    HEADER_LIMIT_BYTES,
    checkpoint_revision,
    find_weight_files,
    read_header,
    read_json,
)

GOLDEN = Path(__file__).parents[2] / "golden"
SHARDED = GOLDEN / "case-c" / "checkpoint"
SINGLE = GOLDEN / "case-c-formats" / "int4"
INDEX = "model.safetensors.index.json"
F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHARDED, tmp_path / "checkpoint"))


def test_shards_are_found_by_their_index() -> None:
    files = find_weight_files(SHARDED)
    assert [file.name for file in files.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert files.num_bytes == sum(file.stat().st_size for file in files.files)
    assert len(files.entries) == 149
    assert files.entries["text.wte"].shape == (448, 64)


def test_a_file_brings_its_folders_config_and_tokenizer() -> None:
    files = find_weight_files(SINGLE / "model.safetensors")
    assert (files.config_file, files.tokenizer_file) == (SINGLE / "config.json", SINGLE / "tokenizer.json")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        find_weight_files(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_weight_files(tmp_path / "missing")


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=r"is a pickle.*save_file.*weights_only=True"):
            find_weight_files(path)


def test_several_files_without_an_index_are_ambiguous(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files .* no single index"):
        find_weight_files(sharded)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        find_weight_files(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\\b", "..", "", 7, ["x"]])
def test_index_cannot_lead_elsewhere(sharded: Path, name: Any) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.text.wte": name}}))
    with pytest.raises(CheckpointError, match="no plain file name"):
        find_weight_files(sharded)


def test_index_must_agree_with_its_files(sharded: Path) -> None:
    document = json.loads((sharded / INDEX).read_text())
    document["weight_map"]["model.text.wte"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"disagree about model\.text\.wte"):
        find_weight_files(sharded)


def test_a_tensor_under_two_spellings_is_refused(tmp_path: Path) -> None:
    second = F32_PAIR | {"data_offsets": [8, 16]}
    write_raw(tmp_path / "model.safetensors", {"model.text.wte": F32_PAIR, "text.wte": second}, bytes(16))
    with pytest.raises(CheckpointError, match=r"text\.wte is there twice"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "no valid JSON"),
        (b"\xff\xfe{}", b"", "no valid JSON"),
        (b"[" * 100_000, b"", "no valid JSON"),
        (b"[]", b"", "no JSON object"),
        (b'{"a": {}, "a": {}}', b"", "a name appears twice"),
        ({"a": 3}, b"", "entry for 'a' is damaged"),
        ({"a": F32_PAIR | {"shape": [-2]}}, bytes(8), "entry for 'a' is damaged"),
        ({"a": F32_PAIR | {"shape": [True, 2]}}, bytes(8), "entry for 'a' is damaged"),
        ({"a": F32_PAIR | {"shape": [3]}}, bytes(8), "entry for 'a' is damaged"),
        ({"a": F32_PAIR | {"shape": [2**62, 2**62]}}, bytes(8), "entry for 'a' is damaged"),
        ({"a": F32_PAIR | {"dtype": "F99"}}, bytes(8), "dtype 'F99'"),
        ({"a": F32_PAIR, "b": F32_PAIR}, bytes(8), "overlap or leave holes"),
        ({"a": F32_PAIR | {"data_offsets": [8, 16]}}, bytes(16), "overlap or leave holes"),
        ({"a": F32_PAIR}, bytes(7), "cut short: 7 of 8 bytes"),
        ({"a": F32_PAIR}, bytes(9), "1 bytes behind its last tensor"),
    ],
)
def test_false_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write_raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"1234", "cut short: 4 bytes"),
        (struct.pack("<Q", 50) + b"{}", "ends inside its header"),
        (struct.pack("<Q", HEADER_LIMIT_BYTES + 1), "claims 10,000,001 bytes"),
        (struct.pack("<Q", 2**63), "claims 9,223,372,036,854,775,808 bytes"),
    ],
)
def test_false_lengths(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_a_hundred_megabyte_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_000))
        stream.truncate(8 + 100_000_000)  # sparse
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="claims 100,000,000 bytes"):
        read_header(file)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        find_weight_files(tmp_path)


_PRISTINE = (SINGLE / "model.safetensors").read_bytes()


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=4),
    st.integers(0, len(_PRISTINE)) | st.just(len(_PRISTINE)),
)
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
) -> None:
    """Flipped bytes in the header and a cut anywhere: entries that fit the file, or one clear error."""
    content = bytearray(_PRISTINE[:length])
    for at, value in changes:
        if at < len(content):
            content[at] = value
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    file.write_bytes(content)
    try:
        entries = read_header(file)
    except CheckpointError:
        return
    assert sum(entry.num_bytes for entry in entries) < len(content)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": ' + b"1" * 5000 + b"}", b"[" * 100_000, b"\xff"])
def test_damaged_json_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(file)


def test_revision_follows_content_not_place(sharded: Path) -> None:
    original = checkpoint_revision(find_weight_files(SHARDED))
    assert checkpoint_revision(find_weight_files(sharded)) == original
    with (sharded / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    changed = checkpoint_revision(find_weight_files(sharded))
    assert changed != original
    assert checkpoint_revision(find_weight_files(sharded), SHARDED / "tokenizer.json") == original
