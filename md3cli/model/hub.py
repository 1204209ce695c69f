"""Where a model's files are: an alias, a Hugging Face repository or a local path becomes files on disk.

Local paths and the embedded model never touch the network; `hub_download.py` is asked only for a
repository (or for the tokenizer of a folder that has none). No torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from md3cli.errors import CheckpointError, UsageError
from md3cli.model.hub_download import TOKENIZER_FILES, cache_folder, cached, fetch_model, fetch_tokenizer
from md3cli.model.misfits import local_path
from md3cli.model.weight_files import TOKENIZER_NAME, checkpoint_revision, file_beside, find_weight_files

DEFAULT_MODEL = "moondream3"
TINY = "tiny"
ALIASES: Mapping[str, str] = {
    "moondream3": "moondream/moondream3-preview",
    "moondream3.1": "moondream/moondream3.1-9B-A2B",
}
_LICENCES: Mapping[str, str] = {
    ALIASES["moondream3"]: "Business Source Licence 1.1 with an additional use grant",
    ALIASES["moondream3.1"]: "a licence of its own, not moondream3-preview's",
}
TOKENIZER_REPO = "moondream/starmie-v1"

_TINY_FOLDER = Path(__file__).parent / "tiny"
_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk: `path` is a folder or a .safetensors file; `name` as records show it."""

    path: Path
    tokenizer_file: Path
    name: str
    revision: str

    @property
    def identity(self) -> str:
        """`name@revision`, a record's `model`."""
        return f"{self.name}@{self.revision}"


def model_path(name: str) -> Path:
    """The folder (or .safetensors file) of a model, fetched into the hub's cache where it is not yet there.

    Raises:
        CheckpointError: no such model, or it cannot be had; the message says what to do.
    """
    repo = repo_of(name)
    return _local_path(name) if repo is None else fetch_model(repo)


def present_path(name: str, revision: str | None = None) -> Path:
    """As `model_path`, but only what is already on this machine.

    Raises:
        CheckpointError: no such model, or not here yet.
    """
    repo = repo_of(name)
    if repo is None:
        return _local_path(name)
    folder = cached(repo, revision)
    if folder is None:
        raise CheckpointError(f"{repo} is not in {cache_folder()}; fetch it with: md3 models pull {name}")
    return folder


def resolve_model(
    name: str, *, revision: str | None = None, tokenizer: str | None = None, offline: bool = False
) -> ModelFiles:
    """Find the files of a model.

    Args:
        name: alias, repository id, folder or .safetensors file.
        revision: of a repository; branch, tag or commit.
        tokenizer: file, folder or repository id; the default is the one beside the weights, else
            `TOKENIZER_REPO`.
        offline: look into the cache only.

    Raises:
        CheckpointError: no such model, or its files cannot be had.
        UsageError: a revision of a local path.
    """
    repo = repo_of(name)
    if repo is not None:
        path = fetch_model(repo, revision, offline=offline)
        tokenizer_file = find_tokenizer(path, tokenizer, offline)
        return ModelFiles(path, tokenizer_file, repo, path.name + _tokenizer_mark(tokenizer, tokenizer_file))
    if revision is not None:
        raise UsageError(f"--revision is for repositories on the hub; {name} is on this machine")
    path = _local_path(name)
    files = find_weight_files(path)
    tokenizer_file = find_tokenizer(files.folder, tokenizer, offline)
    return ModelFiles(path, tokenizer_file, shown_name(name), checkpoint_revision(files, tokenizer_file))


def shown_name(name: str) -> str:
    """Return what records call a model: its repository, or the last part of a local path, with its folder for a file.

    Where it lies on the host is nobody's business.
    """
    repo = repo_of(name)
    if repo is not None or name == TINY:
        return repo or name
    full = _local_path(name).resolve()
    return full.name if full.is_dir() else f"{full.parent.name}/{full.name}"


def repo_of(name: str) -> str | None:
    """The hub repository a model name stands for; None for what is on this machine.

    An existing path goes before a repository of the same name, an alias before both.

    Raises:
        CheckpointError: neither an alias nor a path nor the form of a repository id.
    """
    if name in ALIASES:
        return ALIASES[name]
    if name == TINY or (name and local_path(name) is not None):  # Path("") is the working folder
        return None
    if is_repo_id(name):
        return name
    known = ", ".join([*ALIASES, TINY])
    page = ", as of https://huggingface.co/owner/name" if "://" in name else ""
    raise CheckpointError(
        f"model {name!r:.200}: no such file or folder, and neither an alias ({known}) nor a repository id "
        f"(owner/name{page})"
    )


def terms_of(name: str) -> str:
    """Return the terms of use of a model's weights, or where to read them."""
    repo = repo_of(name)
    if repo is not None:
        page = f"https://huggingface.co/{repo}"
        return f"{_LICENCES[repo]}; read it at {page}" if repo in _LICENCES else f"read them at {page}"
    if name == TINY:
        return "Apache-2.0, as this package"
    path = _local_path(name)
    beside = sorted((path if path.is_dir() else path.parent).glob("LICEN[CS]E*"))
    return f"read {beside[0].name} beside the weights" if beside else "those of the place the weights came from"


def is_repo_id(name: str) -> bool:
    """Return True for what has the form of a repository's id, owner/name."""
    return bool(_REPO_ID.fullmatch(name)) and not name.startswith(".") and not name.endswith(".safetensors")


def required_repo(name: str) -> str:
    """`repo_of` where only a repository makes sense.

    Raises:
        UsageError: the model is on this machine.
    """
    repo = repo_of(name)
    if repo is None:
        raise UsageError(f"{name} is on this machine; there is nothing to fetch")
    return repo


def _local_path(name: str) -> Path:
    if name != TINY:
        return Path(name).expanduser()
    if not _TINY_FOLDER.is_dir():
        raise CheckpointError(f"this installation lacks the model {TINY!r} ({_TINY_FOLDER}); install md3cli again")
    return _TINY_FOLDER


def find_tokenizer(folder: Path, tokenizer: str | None, offline: bool) -> Path:
    """Return the tokenizer.json that `tokenizer` names (file, folder or repository); None: that of a model in `folder`.

    Raises:
        CheckpointError: there is none, or it cannot be had.
    """
    if tokenizer is None:
        beside = file_beside(folder, TOKENIZER_NAME)
        return beside or fetch_tokenizer(TOKENIZER_REPO, offline=offline, looked_in=folder)
    given = local_path(tokenizer) if tokenizer else None
    if given is not None:
        found = file_beside(given, TOKENIZER_NAME) if given.is_dir() else file_beside(given.parent, given.name)
        if found is not None:
            return found
    elif not tokenizer.endswith(".json") and _REPO_ID.fullmatch(tokenizer):
        return fetch_tokenizer(tokenizer, offline=offline)
    raise CheckpointError(f"tokenizer {tokenizer!r:.200}: no such tokenizer.json, folder with one, or repository id")


def stored_tokenizer() -> Path | None:
    """The tokenizer of models that bring none, if it is on this machine already."""
    folder = cached(TOKENIZER_REPO, None, TOKENIZER_FILES)
    file = folder / TOKENIZER_NAME if folder else None
    return file if file is not None and file.is_file() else None


def _tokenizer_mark(tokenizer: str | None, file: Path) -> str:
    """A tokenizer of the user's choice changes answers, so it is part of a repository's revision."""
    return "" if tokenizer is None else f"+{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with a short name; `path` None where its files are not on this machine."""

    alias: str
    source: str
    path: Path | None
    num_bytes: int | None

    def as_json(self) -> dict[str, str | int | None]:
        """The row in plain types, for `md3 models list --json`."""
        path = str(self.path) if self.path else None
        return {"name": self.alias, "from": self.source, "path": path, "bytes": self.num_bytes}


def known_models() -> list[KnownModel]:
    """Every alias and the embedded model, with where they lie; asks the cache, not the network."""
    found = [(alias, repo, cached(repo, None)) for alias, repo in ALIASES.items()]
    found.append((TINY, "this package", _TINY_FOLDER if _TINY_FOLDER.is_dir() else None))
    return [KnownModel(alias, source, path, _weight_bytes(path)) for alias, source, path in found]


def _weight_bytes(folder: Path | None) -> int | None:
    return None if folder is None else sum(f.stat().st_size for f in folder.glob("*.safetensors") if f.is_file())
