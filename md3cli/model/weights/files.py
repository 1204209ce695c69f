"""Which files make up a checkpoint, and what the header of each says: judged before torch sees a byte.

A header's length is bounded before it is read, and its entries must tile the data exactly. What stands in
place of a file (a pointer, a web page, a link to nothing) is told in words. No torch; no file but those that
lie where the checkpoint lies; no judgement about which tensors a model needs.

The headers are judged here, not by safetensors: the library takes a name that is there twice, names no tensor
in most of its errors, and does not tell a file that was cut short from one with bytes behind its end.
Format: https://github.com/huggingface/safetensors (eight bytes of length, JSON, data).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from md3cli.errors import CheckpointError
from md3cli.model.weights.names import plain_name
from md3cli.records import unique_keys

JsonObject = dict[str, Any]
HEADER_LIMIT_BYTES = 10_000_000  # the real model's largest header is under 1 MB
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
CONFIG_LIMIT_BYTES = 10_000_000
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
CHECKSUMS_NAME = "SHA256SUMS"  # as `sha256sum` writes it
_UNFINISHED = ("*.incomplete", ".cache/huggingface/download/*.incomplete", "*.part", "*.crdownload", "*.aria2")
_FOREIGN = ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.npz", "*.zip", "*.tar", "*.tar.gz")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_LOOKED_AT_BYTES = 512
_SHORT_BYTES = 200  # a server's answer ("Entry not found") in place of a file
_FETCH = "fetch it with `hf download` or `md3 models pull`"
_PAGE = f"a web page, as sites answer instead of a file (moved, gated, a login); {_FETCH}"
_LARGE_FILES = f"cloned without its large files; run `git lfs pull` in its folder, or {_FETCH}"
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", f"a Git LFS pointer, {_LARGE_FILES}"),
    (b"version https://hawser", f"a Git LFS pointer, {_LARGE_FILES}"),
    (b"/annex/objects/", "a git-annex pointer; run `git annex get` in its folder"),
    (b"../.git/annex/", "a git-annex pointer; run `git annex get` in its folder"),
    (b"<!doctype", _PAGE),
    (b"<html", _PAGE),
    (b"<?xml", _PAGE),
    (b"gguf", "a GGUF file, llama.cpp's format, which is not read; give the model's .safetensors"),
    (b"pk\x03\x04", "a ZIP archive, as pickled weights (.pt, .bin) are; unpack it, or give the model's .safetensors"),
    (b"\x80\x02\x8a\x0al\xfc", "a pickle (torch's old form), which can run code; give the model's .safetensors"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"\xfd7zxz", "compressed with xz; unpack it first"),
    (b"\x89png", "a picture; give it as INPUT"),
    (b"\xff\xd8\xff", "a picture; give it as INPUT"),
)


def misfit(file: Path) -> str | None:
    """Say what a file that could not be used is, and what to do; None where its first bytes do not tell."""
    if (lost := lost_link(file)) is not None:
        return lost
    try:
        if not file.exists():
            return f"{file}: no such file"
        if not file.is_file():  # opening a FIFO would wait for ever
            kind = "a folder" if file.is_dir() else "no regular file"
            return f"{file} is {kind}, where a file is expected"
        with file.open("rb") as stream:
            start = stream.read(_LOOKED_AT_BYTES)
    except OSError as error:
        return f"{file}: {error.strerror}"
    if not start:
        return f"{file} is empty (0 bytes), as a download leaves that broke off; {_FETCH}"
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    known = next((what for prefix, what in _STARTS if plain.startswith(prefix)), None)
    if known is not None:
        return f"{file} is {known}"
    text = start.decode("ascii", "replace").strip()
    if len(start) >= _SHORT_BYTES or not text.isascii() or not text.isprintable():
        return None
    if text.startswith("../"):
        return f"{file} is a link that was copied as text ({text}); copy the file itself, or {_FETCH}"
    return f"{file} holds nothing but the text {text!r}; {_FETCH}" if text[:1].isalpha() else None


def require_file(file: Path) -> None:
    """Raise a CheckpointError that says what is there where `file` is no regular file; opening a FIFO would hang."""
    if not file.is_file():
        raise CheckpointError(misfit(file) or f"{file} is no regular file")


def local_path(name: str) -> Path | None:
    """Return the path that a name means; None where nothing is there, or where it cannot be a path.

    Raises:
        CheckpointError: a link is there that leads to nothing, or the place may not be looked into.
    """
    try:
        path = Path(name).expanduser()
        if (lost := lost_link(path)) is not None:
            raise CheckpointError(lost)
        return path if path.exists() else None
    except OSError as error:  # a folder that may not be entered; a name too long is no path
        if isinstance(error, PermissionError):
            raise CheckpointError(f"{name:.200}: {error.strerror}") from error
    except (ValueError, RuntimeError):  # a NUL inside; `~nobody`
        pass
    return None


def lost_link(file: Path) -> str | None:
    """Say that a path is a link to nothing, and what to do; None for everything else."""
    if not file.is_symlink() or file.exists():
        return None
    return (
        f"{file} is a link to {os.readlink(file)}, where nothing is (a copied hub cache without its blobs?); "
        "copy the folder with what its links lead to (cp -rL), or fetch it again"
    )


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file, as its header describes it; `dtype` in the safetensors spelling."""

    file: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header_bytes(file: Path) -> bytes:
    """Return the JSON header of a safetensors file, not parsed.

    Raises:
        CheckpointError: the file cannot be read, is cut short, or claims an absurd length.
    """
    try:
        require_file(file)
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(misfit(file) or f"{file} is cut short: {len(prefix)} bytes; fetch it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > HEADER_LIMIT_BYTES:
                raise CheckpointError(
                    misfit(file)
                    or f"{file}: its header claims {length:,} bytes, more than the {HEADER_LIMIT_BYTES:,} any model "
                    "needs; it is no safetensors file or a damaged one"
                )
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    if len(header) < length:
        raise CheckpointError(misfit(file) or f"{file} is cut short: it ends inside its header; fetch it again")
    return header


def read_header(file: Path) -> list[TensorEntry]:
    """Return what a safetensors file says it holds, in the order of its header.

    Raises:
        CheckpointError: the file is no whole safetensors file whose tensors cover its data exactly.
    """
    raw = read_header_bytes(file)
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is no valid JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is no JSON object; it is no safetensors file")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int]] = []
    entries: list[TensorEntry] = []
    for name, item in header.items():
        entry, span = _read_entry(file, name, item)
        entries.append(entry)
        spans.append(span)
    _check_spans(file, spans, file.stat().st_size - 8 - len(raw))
    return entries


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read_entry(file: Path, name: str, item: object) -> tuple[TensorEntry, tuple[int, int]]:
    damaged = CheckpointError(f"{file}: the header's entry for {name[:120]!r} is damaged; fetch the file again")
    if not isinstance(item, dict):
        raise damaged
    dtype, shape, span = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise damaged
    if not all(map(_is_count, shape)) or len(shape) > 8 or not all(map(_is_count, span)):
        raise damaged
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{file}: tensor {name[:120]!r} has the dtype {dtype[:20]!r}, which no known format uses")
    entry = TensorEntry(file, name, dtype, tuple(shape))
    if span[1] - span[0] != entry.num_bytes:
        raise damaged
    return entry, (span[0], span[1])


def _check_spans(file: Path, spans: list[tuple[int, int]], data_bytes: int) -> None:
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointError(f"{file}: its tensors overlap or leave holes; the file is damaged, fetch it again")
        end = stop
    if end > data_bytes:
        raise CheckpointError(f"{file} is cut short: {data_bytes:,} of {end:,} bytes of weights; fetch it again")
    if end < data_bytes:
        raise CheckpointError(f"{file}: {data_bytes - end:,} bytes behind its last tensor; the file is damaged")


def first_line(error: BaseException, limit: int = 120) -> str:
    """Return the first line of an error's text, of at most `limit` characters."""
    return str(error).split("\n", 1)[0][:limit]


def listing(names: Sequence[str], limit: int = 5) -> str:
    """Return the first names of a list in words, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


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
    """Return the checkpoint at `path`: a folder, or a .safetensors file with its config.json beside it.

    Raises:
        CheckpointError: nothing there, pickled weights, several candidates, or a damaged file.
    """
    try:
        if path.suffix.lower() in PICKLE_SUFFIXES and path.is_file():
            raise CheckpointError(_pickle_message(path))
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder; give a checkpoint folder or a .safetensors file")
        folder = path if path.is_dir() else path.parent
        weights = _weights_of_folder(path) if path.is_dir() else path
        if weights.name.endswith(INDEX_SUFFIX) and path.is_dir():
            files, entries = _read_shards(weights)
        else:
            files, entries = (weights,), _read_entries([weights])
        config, tokenizer = (file_beside(folder, name) for name in (CONFIG_NAME, TOKENIZER_NAME))
        return WeightFiles(folder, files, config, tokenizer, entries)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def file_beside(folder: Path, name: str) -> Path | None:
    """Return a file of a checkpoint's folder; None where there is none.

    Raises:
        CheckpointError: something of this name is there that is no file, or a link to nothing.
    """
    file = folder / name
    if not (file.is_symlink() or file.exists()):
        return None
    require_file(file)
    return file


def _weights_of_folder(folder: Path) -> Path:
    """Return the one file that stands for a folder's weights: safetensors, or the index of its shards."""
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
    """Say why a folder may hold no weights; empty where nothing in it tells."""
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


def _read_shards(index: Path) -> tuple[tuple[Path, ...], dict[str, TensorEntry]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; the file is damaged, fetch it again")
    files = _files_of_index(index, weight_map)
    entries = _read_entries(files)
    homes = {entry.stored_name: entry.file.name for entry in entries.values()}
    astray = sorted(name for name, file in weight_map.items() if homes.get(name) != file)
    if astray:
        raise CheckpointError(
            f"{index.name} and its files disagree about {listing(astray, 4)}; fetch {index.parent} again"
        )
    return files, entries


def _files_of_index(index: Path, weight_map: JsonObject) -> tuple[Path, ...]:
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
            f"{index.parent} lacks {listing(missing, 4)} named by {index.name}; "
            "fetch the checkpoint again to complete it"
        )
    return tuple(index.parent / name for name in sorted(names))


def read_json(file: Path) -> JsonObject:
    """Read a JSON object from a small file.

    Raises:
        CheckpointError: unreadable, too large, or no JSON object.
    """
    try:
        require_file(file)
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
    """Return 16 hex digits that change when a local checkpoint does: config, tokenizer, headers and sizes.

    `tokenizer_file` is for a tokenizer from elsewhere; the default is the one beside the weights.
    """
    digest = hashlib.sha256()  # not of the weights: to read 18 GB at every start would cost more than it protects
    for extra in (files.config_file, tokenizer_file or files.tokenizer_file):
        digest.update(extra.read_bytes() if extra is not None else b"")
        digest.update(b"\0")
    for file in files.files:
        digest.update(f"{file.stat().st_size}\0".encode())
        digest.update(read_header_bytes(file))
    return digest.hexdigest()[:16]


def read_checksums(folder: Path) -> Mapping[str, str]:
    """Read SHA256SUMS, file name to digest; empty where there is none or it is not in the form of `sha256sum`."""
    file = folder / CHECKSUMS_NAME
    try:
        if not file.is_file() or file.stat().st_size > CONFIG_LIMIT_BYTES:  # opening a FIFO would wait for ever
            return {}
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    pairs = (line.split("  ", 1) for line in lines if line.strip())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}
