"""Checkpoints whose files are something else: pointers, web pages, links to nothing, unfinished downloads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from golden_cases import CASES
from typer.testing import CliRunner

from md3cli import Moondream
from md3cli.cli import app
from md3cli.errors import CheckpointError
from md3cli.model.weights.files import find_weight_files, misfit
from md3cli.model.weights.hub import model_path, repo_of, resolve_model

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
