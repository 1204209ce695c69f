"""What a file is that is not what its name says: a pointer instead of weights, a web page, a link to nothing.

Clones without their large files, downloads that a site answered with a page, and folders copied without what their
links lead to are how checkpoints get damaged in practice; each has its own remedy. No torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from md3cli.errors import CheckpointError

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
    """Say in words what `file` is and what to do, where it is one of the usual wrong things; else None.

    Only for files that could not be used: what is said is guessed from the first bytes.
    """
    lost = lost_link(file)
    if lost is not None:
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
    """Say that a path is a link whose end is not there, and what to do; None for everything else."""
    if not file.is_symlink() or file.exists():
        return None
    return (
        f"{file} is a link to {os.readlink(file)}, where nothing is (a copied hub cache without its blobs?); "
        "copy the folder with what its links lead to (cp -rL), or fetch it again"
    )
