"""Where a model's files are: an alias, a Hugging Face repository or a local path becomes files on disk.

Local paths and the embedded model never touch the network. What is complete in the hub's cache is used as it is,
so that a run resumed tomorrow uses the weights of today; `download` (`md3 models pull`) fetches a repository's
present state. The newest revision cannot be known from here, so no default is pinned: records name the revision
that was used. `huggingface_hub` is imported when a repository is asked for, not before; its own settings hold
(HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT), and its errors are told in words here. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.console import size_words
from md3cli.errors import CheckpointError, OutputError, UsageError
from md3cli.model.weights.files import (
    CONFIG_NAME,
    INDEX_SUFFIX,
    TOKENIZER_NAME,
    checkpoint_revision,
    file_beside,
    find_weight_files,
    first_line,
    local_path,
)

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

_TINY_FOLDER = Path(__file__).parents[1] / "tiny"
_REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
MODEL_FILES = (CONFIG_NAME, "*.safetensors", f"*{INDEX_SUFFIX}", TOKENIZER_NAME)
TOKENIZER_FILES = (TOKENIZER_NAME,)
_REVISION = re.compile(r"[\w.+@-][\w.+@/-]{0,249}")
_COMMIT = re.compile(rb"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What fetching a repository means: its bytes, those that are still to come, and the room there is."""

    repo: str
    revision: str
    num_bytes: int
    missing_bytes: int
    cache_folder: Path
    free_bytes: int

    def announce(self, tell: Callable[[str], None]) -> None:
        """Tell sizes, room and terms of use, before anything is fetched.

        Raises:
            OutputError: there is too little room.
        """
        missing, free = size_words(self.missing_bytes), size_words(self.free_bytes)
        tell(
            f"{self.repo}@{self.revision}: {size_words(self.num_bytes)}, {missing} to fetch into {self.cache_folder}, "
            f"{free} free; terms of use: {terms_of(self.repo)}"
        )
        if self.missing_bytes > self.free_bytes:
            raise OutputError(
                f"{self.cache_folder} has too little room: {missing} are to come and {free} are free; free some, or "
                "set HF_HUB_CACHE to another folder"
            )


def fetch_model(
    repo: str, revision: str | None = None, *, offline: bool = False, tell: Callable[[str], None] | None = None
) -> Path:
    """Return the folder of a model repository's files, named after its commit; `tell` hears what is to be fetched.

    Raises:
        CheckpointError: the files cannot be had, or the repository holds no safetensors.
        OutputError: there is too little room for them.
    """
    folder = cached(repo, revision)
    if folder is None:
        if not offline:
            plan_download(repo, revision).announce(tell or _tell_nobody)
        folder = Path(_snapshot(repo, revision, MODEL_FILES, offline=offline))
    return _with_weights(repo, folder)


def _tell_nobody(words: str) -> None:
    pass


def _fetch_tokenizer(repo: str, *, offline: bool, looked_in: Path | None = None) -> Path:
    folder = cached(repo, None, TOKENIZER_FILES)
    if folder is None:
        try:
            folder = Path(_snapshot(repo, None, TOKENIZER_FILES, offline=offline))
        except CheckpointError as error:
            before = f"no {TOKENIZER_NAME} in {looked_in}; " if looked_in else ""
            raise CheckpointError(f"{before}{error}; or give the file with --tokenizer") from error
    file = folder / TOKENIZER_NAME
    if not file.is_file():
        raise CheckpointError(f"{repo} holds no {TOKENIZER_NAME}; give another tokenizer with --tokenizer")
    return file


def plan_download(repo: str, revision: str | None = None) -> DownloadPlan:
    """Ask the hub for the sizes of a model repository's files, before anything is fetched.

    Raises:
        CheckpointError: the hub cannot be asked, or there is no such repository.
    """
    with _no_bars():
        files = _snapshot(repo, revision, MODEL_FILES, dry_run=True)
    cache = cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return DownloadPlan(
        repo=repo,
        revision=files[0].commit_hash if files else (revision or "main"),
        num_bytes=sum(file.file_size or 0 for file in files),
        missing_bytes=sum(file.file_size or 0 for file in files if file.will_download),
        cache_folder=cache,
        free_bytes=shutil.disk_usage(existing).free,
    )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the library from drawing a bar for its second of asking."""
    utils = _import_hub().utils
    is_silent = utils.are_progress_bars_disabled()
    if not is_silent:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if not is_silent:
            utils.enable_progress_bars()


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch what is missing of a repository's present state, and continue a download that broke off.

    Raises:
        CheckpointError: as `plan_download`; or the repository holds no safetensors.
    """
    return _with_weights(repo, Path(_snapshot(repo, revision, MODEL_FILES)))


def cached(repo: str, revision: str | None, patterns: tuple[str, ...] = MODEL_FILES) -> Path | None:
    """Return the folder of a repository's files if they are complete in the cache, without asking the hub."""
    hub = _import_hub()
    _check_revision(repo, revision)
    try:
        revision = _commit_of_edited_ref(repo, revision) or revision
        folder = hub.snapshot_download(repo, revision=revision, local_files_only=True, **_selection(patterns))
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        return None
    return Path(folder)


def _check_revision(repo: str, revision: str | None) -> None:
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        # The library would take it for a path.
        raise CheckpointError(f"{repo} has no revision {revision!r:.80}; give a branch, a tag or a commit")


def _commit_of_edited_ref(repo: str, revision: str | None) -> str | None:
    """Return the commit of a branch whose file in the cache has a line end behind it; else None.

    A hand or a shell writes it so. The hub's library takes the line end for a part of the commit, and finds nothing.
    """
    folder = _import_hub().file_download.repo_folder_name(repo_id=repo, repo_type="model")
    file = cache_folder() / folder / "refs" / (revision or "main")
    try:
        text = file.read_bytes() if file.is_file() and file.stat().st_size < 200 else b""
    except (OSError, ValueError):  # ValueError: a NUL in the revision
        return None
    commit = text.removeprefix(b"\xef\xbb\xbf").strip()
    return commit.decode() if commit != text and _COMMIT.fullmatch(commit) else None


def cache_folder() -> Path:
    """Return the folder in which the hub's library keeps its files."""
    return Path(_import_hub().constants.HF_HUB_CACHE)


def _import_hub() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the library reads it when it is imported
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.file_download
    import huggingface_hub.utils

    return huggingface_hub


def _snapshot(
    repo: str, revision: str | None, patterns: tuple[str, ...], *, offline: bool = False, dry_run: bool = False
) -> Any:
    """Call `snapshot_download`; every failure becomes one line that says what to do."""
    hub = _import_hub()
    errors = hub.errors
    wanted = f"{repo}@{revision}" if revision else repo
    _check_revision(repo, revision)
    try:
        try:
            return hub.snapshot_download(
                repo, revision=revision, local_files_only=offline, dry_run=dry_run, **_selection(patterns)
            )
        except errors.DryRunError as error:  # hides what a fetch would have raised
            if isinstance(error.__cause__, errors.RepositoryNotFoundError):
                raise error.__cause__ from None
            raise errors.LocalEntryNotFoundError(str(error)) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{wanted} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{wanted}: no such repository on the hub, or a private one; check the name, and for a private one "
            "run `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{wanted} is no valid repository id: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        why = "the hub cannot be reached"
        if offline or hub.constants.HF_HUB_OFFLINE:
            why = "--offline or HF_HUB_OFFLINE forbids to fetch them"
        raise CheckpointError(_missing(wanted, repo, patterns, why)) from error
    except OSError as error:  # the network broke off, the disk is full
        raise CheckpointError(
            f"{wanted}: fetching into {cache_folder()} failed ({first_line(error, 200)}); "
            "run it again, what is already there is kept"
        ) from error


def _selection(patterns: tuple[str, ...]) -> dict[str, list[str]]:
    return {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}  # files at the top only


def _missing(wanted: str, repo: str, patterns: tuple[str, ...], why: str) -> str:
    files = ", ".join(patterns)
    command = f"md3 models pull {repo}" if patterns is MODEL_FILES else f"hf download {repo} {files}"
    return (
        f"{wanted}: its files ({files}) are not in {cache_folder()} and {why}; where there is a network, run "
        f"`{command}` (or set HF_HUB_CACHE to a folder that has them), or give a local folder instead"
    )


def _with_weights(repo: str, folder: Path) -> Path:
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{repo} holds no .safetensors weights; pickled ones (.pt, .bin) can run code and are not read"
        )
    return folder


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
    """Return the folder (or .safetensors file) of a model; fetch it into the hub's cache where it is not there yet.

    Raises:
        CheckpointError: no such model, or it cannot be had; the message says what to do.
    """
    repo = repo_of(name)
    return _local_path(name) if repo is None else fetch_model(repo)


def present_path(name: str, revision: str | None = None) -> Path:
    """Return the folder (or .safetensors file) of a model that is already on this machine.

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
    name: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    offline: bool = False,
    tell: Callable[[str], None] | None = None,
) -> ModelFiles:
    """Find the files of a model: an alias, repository id, folder or .safetensors file.

    `revision` is a branch, tag or commit of a repository; `offline` looks into the cache only. `tokenizer` is a
    file, folder or repository id; the default is the one beside the weights, else `TOKENIZER_REPO`. `tell` hears
    what is fetched, before it is.

    Raises:
        CheckpointError: no such model, or its files cannot be had.
        OutputError: there is too little room for them.
        UsageError: a revision of a local path.
    """
    repo = repo_of(name)
    if repo is not None:
        path = fetch_model(repo, revision, offline=offline, tell=tell)
        tokenizer_file = find_tokenizer(path, tokenizer, offline)
        # A tokenizer of the user's choice changes answers, so the revision names it.
        mark = f"+{hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()[:8]}" if tokenizer is not None else ""
        return ModelFiles(path, tokenizer_file, repo, path.name + mark)
    if revision is not None:
        raise UsageError(f"--revision is for repositories on the hub; {name} is on this machine")
    path = _local_path(name)
    files = find_weight_files(path)
    tokenizer_file = find_tokenizer(files.folder, tokenizer, offline)
    return ModelFiles(path, tokenizer_file, shown_name(name), checkpoint_revision(files, tokenizer_file))


def shown_name(name: str) -> str:
    """Return what records call a model: its repository, or the end of its path; never where it lies on the host."""
    repo = repo_of(name)
    if repo is not None or name == TINY:
        return repo or name
    full = _local_path(name).resolve()
    return full.name if full.is_dir() else f"{full.parent.name}/{full.name}"


def repo_of(name: str) -> str | None:
    """Return the hub repository that a model name stands for; None for what is on this machine.

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
    """Return the repository of a model that can only be on the hub.

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
        return beside or _fetch_tokenizer(TOKENIZER_REPO, offline=offline, looked_in=folder)
    given = local_path(tokenizer) if tokenizer else None
    if given is not None:
        found = file_beside(given, TOKENIZER_NAME) if given.is_dir() else file_beside(given.parent, given.name)
        if found is not None:
            return found
    elif not tokenizer.endswith(".json") and _REPO_ID.fullmatch(tokenizer):
        return _fetch_tokenizer(tokenizer, offline=offline)
    raise CheckpointError(f"tokenizer {tokenizer!r:.200}: no such tokenizer.json, folder with one, or repository id")


def stored_tokenizer() -> Path | None:
    """Return the tokenizer of models that bring none, if it is on this machine already."""
    folder = cached(TOKENIZER_REPO, None, TOKENIZER_FILES)
    file = folder / TOKENIZER_NAME if folder else None
    return file if file is not None and file.is_file() else None


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with a short name; `path` None where its files are not on this machine."""

    alias: str
    source: str
    path: Path | None
    num_bytes: int | None

    def as_json(self) -> dict[str, str | int | None]:
        """Return the row in plain types, for `md3 models list --json`."""
        path = str(self.path) if self.path else None
        return {"name": self.alias, "from": self.source, "path": path, "bytes": self.num_bytes}


def known_models() -> list[KnownModel]:
    """Return every alias and the embedded model, and where they lie, without asking the hub."""
    found = [(alias, repo, cached(repo, None)) for alias, repo in ALIASES.items()]
    found.append((TINY, "this package", _TINY_FOLDER if _TINY_FOLDER.is_dir() else None))
    return [KnownModel(alias, source, path, _weight_bytes(path)) for alias, source, path in found]


def _weight_bytes(folder: Path | None) -> int | None:
    return None if folder is None else sum(f.stat().st_size for f in folder.glob("*.safetensors") if f.is_file())
