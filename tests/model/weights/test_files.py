"""Which files make a checkpoint; headers cut short, false or hostile; files that are something else."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from golden_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from md3cli import Moondream
from md3cli.cli import app
from md3cli.errors import CheckpointError
from md3cli.model.weights.files import (
    HEADER_LIMIT_BYTES,
    checkpoint_revision,
    find_weight_files,
    misfit,
    read_header,
    read_json,
)
from md3cli.model.weights.hub import model_path, repo_of, resolve_model

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
        (b'{"a": {}, "a": {}}', b"", "the key 'a' comes twice"),
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


@pytest.mark.process
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


# -- files that are something else: pointers, web pages, links to nothing, unfinished downloads ------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 18529384704\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html><html>404</html>"
NAMES = ("model.safetensors", "config.json", "tokenizer.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(model_path("tiny") / name, folder / name)
    return folder


CONTENTS = [
    (POINTER, "is a Git LFS pointer, .*git lfs pull.*hf download"),
    (PAGE, "is a web page"),
    (b"<html>", "is a web page"),
    (b"", r"is empty \(0 bytes\)"),
    (b"Entry not found", "holds nothing but the text 'Entry not found'"),
    (b"PK\x03\x04" + b"\0" * 20, "is a ZIP archive, as pickled weights"),
    (b"../../blobs/4d4d", "is a link that was copied as text"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "is a pickle"),
    (b"GGUF" + b"\0" * 20, "is a GGUF file"),
    (b"\x1f\x8b\x08" + b"\0" * 20, "compressed with gzip"),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "is a picture"),
    (b"/annex/objects/MD5-s1--0", "is a git-annex pointer"),
]


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("content", "message"), CONTENTS)
def test_what_lies_in_place_of_a_file_is_said(checkpoint: Path, name: str, content: bytes, message: str) -> None:
    (checkpoint / name).write_bytes(content)
    load(checkpoint, f"{name}.* {message}")


@pytest.mark.parametrize("name", NAMES)
def test_a_link_to_nothing_is_said(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("../../blobs/4d4d")
    load(checkpoint, f"{name} is a link to ../../blobs/4d4d, where nothing is .*cp -rL")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_file_is_not_opened(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    load(checkpoint, f"{name} is no regular file")


def test_a_shard_that_is_a_link_to_nothing_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model-1.safetensors").symlink_to("../blobs/x")
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    load(checkpoint, r"model-1\.safetensors is a link to")
    (checkpoint / "model.safetensors.index.json").write_bytes(POINTER)
    load(checkpoint, "is a Git LFS pointer")


def load(checkpoint: Path, message: str) -> None:
    """Expect that loading the checkpoint fails with `message`."""
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        Moondream.load(str(checkpoint), device="cpu")


def test_folders_without_weights_tell_why(tmp_path: Path) -> None:
    for name, inside, message in (
        ("models--a--b", "snapshots/0123/config.json", "a repository's folder in a hub cache, .*snapshots.0123"),
        ("broken off", ".cache/huggingface/download/x.incomplete", "download that is not finished"),
        ("llama", "w.gguf", "of another format"),
        ("above", "inner/model.safetensors", "did you mean .*inner"),
    ):
        file = tmp_path / name / inside
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        with pytest.raises(CheckpointError, match=message):
            resolve_model(str(tmp_path / name))


def test_what_a_mac_leaves_beside_files_is_no_checkpoint(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CASES["a"][0], tmp_path / "sharded"))
    for name in [file.name for file in folder.iterdir()]:
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7")
    assert len(find_weight_files(folder).files) == 2


def test_names_that_can_be_no_path_are_refused_in_words(tmp_path: Path) -> None:
    for name in ("x\0y", "a" * 5000, "~nobody-of-this-name/x", "http://example.org/model"):
        with pytest.raises(CheckpointError, match="neither an alias"):
            repo_of(name)
        with pytest.raises(CheckpointError, match=r"no such tokenizer\.json"):
            resolve_model("tiny", tokenizer=name)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is a link to nowhere"):
        repo_of(str(tmp_path / "link"))


def test_sound_files_are_no_misfits(checkpoint: Path) -> None:
    assert [misfit(checkpoint / name) for name in NAMES] == [None] * 3


def test_the_command_ends_with_one_line(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(POINTER)
    done = CliRunner().invoke(app, ["query", "-q", "why?", "--model", str(checkpoint), "--device", "cpu"])
    assert done.exit_code == 1
    assert "git lfs pull" in done.stderr
    assert done.stderr.count("error:") == 1
