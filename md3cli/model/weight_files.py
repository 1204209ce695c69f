"""Weights as files: which ones make up a checkpoint, and the revision they stand for.

Safetensors only, and only files that lie where the checkpoint lies. No torch; no judgement about
which tensors a model needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from md3cli.errors import CheckpointError
from md3cli.model.formats import JsonObject, plain_name
from md3cli.model.misfits import lost_link, misfit
from md3cli.model.safetensors_header import TensorEntry, first_line, read_header, read_header_bytes

CONFIG_LIMIT_BYTES = 10_000_000
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
CHECKSUMS_NAME = "SHA256SUMS"  # as `sha256sum` writes it
_UNFINISHED = ("*.incomplete", ".cache/huggingface/download/*.incomplete", "*.part", "*.crdownload", "*.aria2")
_FOREIGN = ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.npz", "*.zip", "*.tar", "*.tar.gz")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A checkpoint on disk: `config_file` None where there is none; `entries` by plain name."""

    folder: Path
    files: tuple[Path, ...]
    config_file: Path | None
    tokenizer_file: Path | None
    entries: Mapping[str, TensorEntry]

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find_weight_files(path: Path) -> WeightFiles:
    """The checkpoint at `path`: a folder, or a .safetensors file with its config.json beside it.

    Raises:
        CheckpointError: nothing there, pickled weights, several candidates, or a damaged file.
    """
    try:
        return _find_weight_files(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _find_weight_files(path: Path) -> WeightFiles:
    if path.suffix.lower() in PICKLE_SUFFIXES and path.is_file():
        raise CheckpointError(_pickle_message(path))
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder; give a checkpoint folder or a .safetensors file")
    folder = path if path.is_dir() else path.parent
    index = None
    files: tuple[Path, ...] = (path,)
    if path.is_dir():
        weights = _weights_of_folder(path)
        index = weights if weights.name.endswith(INDEX_SUFFIX) else None
        files = _files_of_index(weights) if index is not None else (weights,)
    entries = _read_entries(files)
    if index is not None:
        _check_index(index, entries)
    return WeightFiles(
        folder=folder,
        files=files,
        config_file=file_beside(folder, CONFIG_NAME),
        tokenizer_file=file_beside(folder, TOKENIZER_NAME),
        entries=entries,
    )


def file_beside(folder: Path, name: str) -> Path | None:
    """Return a file of a checkpoint's folder; None where there is none.

    Raises:
        CheckpointError: something of this name is there that is no file, or a link to nothing.
    """
    file = folder / name
    if not (file.is_symlink() or file.exists()):
        return None
    if not file.is_file():
        raise CheckpointError(misfit(file) or f"{file} is no regular file")
    return file


def _weights_of_folder(folder: Path) -> Path:
    """The one file of a folder that stands for its weights: safetensors, or the index of its shards."""
    found = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    if folder / WEIGHTS_NAME in found:  # before an index, as transformers does
        return folder / WEIGHTS_NAME
    # Macs leave a `._NAME` beside each file on a foreign disk.
    indexes = sorted(file for file in folder.glob(f"*{INDEX_SUFFIX}") if not file.name.startswith("."))
    if len(indexes) == 1:
        return indexes[0]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(
            f"{folder} holds {len(found)} .safetensors files ({names}) and no single index that says which "
            "belong together; give one file, or add model.safetensors.index.json"
        )
    pickles = sorted(file for suffix in PICKLE_SUFFIXES for file in folder.glob(f"*{suffix}"))
    if pickles:
        raise CheckpointError(_pickle_message(pickles[0]))
    raise CheckpointError(
        f"{folder} holds no .safetensors file; expected {WEIGHTS_NAME} or shards with an index{_instead(folder)}"
    )


def _instead(folder: Path) -> str:
    """What a folder without weights holds that tells why, and what to do; empty where nothing does."""
    snapshots = sorted(folder.glob("snapshots/*/"), key=lambda place: place.stat().st_mtime)
    if snapshots:
        return f"; it is a repository's folder in a hub cache, whose files are in {snapshots[-1]}"
    unfinished = next((file for pattern in _UNFINISHED for file in folder.glob(pattern)), None)
    if unfinished is not None:
        return f"; {unfinished.name} is of a download that is not finished: go on with it"
    foreign = next((file for pattern in _FOREIGN for file in folder.glob(pattern)), None)
    if foreign is not None:
        return f"; {foreign.name} is of another format, which is not read"
    below = next(iter(sorted(folder.glob("*/*.safetensors"))), None)
    return f"; did you mean {below.parent}?" if below is not None else ""


def _pickle_message(file: Path) -> str:
    target = file.with_suffix(".safetensors").name
    script = (
        "import torch; from safetensors.torch import save_file; "
        f"weights = torch.load('{file.name}', weights_only=True, map_location='cpu'); "
        f"save_file({{k: v.contiguous() for k, v in weights.items()}}, '{target}')"
    )
    return (
        f"{file} is a pickle, which can run code when it is opened, so it is refused; "
        f'turn it into safetensors, in its folder: python -c "{script}"'
    )


def _weight_map(index: Path) -> JsonObject:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; the file is damaged, fetch it again")
    return weight_map


def _files_of_index(index: Path) -> tuple[Path, ...]:
    weight_map = _weight_map(index)
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
            raise CheckpointError(
                f"{index}: {str(name)[:80]!r} is no plain file name; the files must lie beside the index"
            )
    names = set(weight_map.values())
    lost = next(filter(None, (lost_link(index.parent / name) for name in sorted(names))), None)
    if lost is not None:
        raise CheckpointError(lost)
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {_listing(missing)} named by {index.name}; fetch the checkpoint again to complete it"
        )
    return tuple(index.parent / name for name in sorted(names))


def _check_index(index: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Every tensor lies where the index says."""
    homes = {entry.stored_name: entry.file.name for entry in entries.values()}
    astray = sorted(name for name, file in _weight_map(index).items() if homes.get(name) != file)
    if astray:
        raise CheckpointError(
            f"{index.name} and its files disagree about {_listing(astray)}; fetch {index.parent} again"
        )


def _listing(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_json(file: Path) -> JsonObject:
    """A JSON object from a small file.

    Raises:
        CheckpointError: unreadable, too large, or no JSON object.
    """
    try:
        if not file.is_file():  # opening a FIFO would wait for ever
            raise CheckpointError(misfit(file) or f"{file} is no regular file")
        if file.stat().st_size > CONFIG_LIMIT_BYTES:
            raise CheckpointError(f"{file} is larger than {CONFIG_LIMIT_BYTES:,} bytes; it is not what its name says")
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, absurd numbers
        raise CheckpointError(
            misfit(file) or f"{file} is not valid JSON ({first_line(error)}); fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object; fetch it again")
    return value


def _read_entries(files: Iterable[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            plain = plain_name(entry.stored_name)
            if plain in entries:
                other = entries[plain]
                raise CheckpointError(
                    f"{file}: tensor {entry.stored_name} is there twice (also {other.stored_name} in {other.file.name})"
                )
            entries[plain] = entry
    return entries


def checkpoint_revision(files: WeightFiles, tokenizer_file: Path | None = None) -> str:
    """16 hex digits that change when a local checkpoint does: config, tokenizer, headers and sizes.

    Not the weights themselves: hashing 18 GB at every start would cost more than it protects.
    `tokenizer_file` is for a tokenizer from elsewhere; the default is the one beside the weights.
    """
    digest = hashlib.sha256()
    for extra in (files.config_file, tokenizer_file or files.tokenizer_file):
        digest.update(extra.read_bytes() if extra is not None else b"")
        digest.update(b"\0")
    for file in files.files:
        digest.update(f"{file.stat().st_size}\0".encode())
        digest.update(read_header_bytes(file))
    return digest.hexdigest()[:16]
