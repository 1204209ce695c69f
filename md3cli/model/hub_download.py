"""Repositories on the Hugging Face hub: the files that are needed, from the cache or over the network.

What is complete in the cache is used as it is, so that a run resumed tomorrow uses the weights of
today; `download` (`md3 models pull`) fetches the repository's present state. The newest revision
cannot be known from here, so no default is pinned: records name the revision that was used.
`huggingface_hub` is imported when a repository is asked for, not before. Its own settings hold:
HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import CheckpointError
from md3cli.model.weight_files import CONFIG_NAME, INDEX_SUFFIX, TOKENIZER_NAME

MODEL_FILES = (CONFIG_NAME, "*.safetensors", f"*{INDEX_SUFFIX}", TOKENIZER_NAME)
TOKENIZER_FILES = (TOKENIZER_NAME,)
_REVISION = re.compile(r"[\w.+@-][\w.+@/-]{0,249}")
_COMMIT = re.compile(rb"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What fetching a repository means: bytes in all and still to come, and the room there is."""

    repo: str
    revision: str
    num_bytes: int
    missing_bytes: int
    cache_folder: Path
    free_bytes: int


def fetch_model(repo: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """The folder of a model repository's files, named after its commit.

    Raises:
        CheckpointError: the files cannot be had, or the repository holds no safetensors.
    """
    folder = cached(repo, revision, MODEL_FILES)
    if folder is None:
        folder = Path(_snapshot(repo, revision, MODEL_FILES, offline=offline))
    return _with_weights(repo, folder)


def fetch_tokenizer(repo: str, *, offline: bool = False, looked_in: Path | None = None) -> Path:
    """A repository's tokenizer.json; `looked_in` is a folder the message should mention.

    Raises:
        CheckpointError: it cannot be had.
    """
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
    """Sizes of a model repository's files, asked of the hub, before anything is fetched.

    Raises:
        CheckpointError: the hub cannot be asked, or there is no such repository.
    """
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


def download(repo: str, revision: str | None = None) -> Path:
    """Fetch what is missing of a repository's present state; an interrupted download is continued.

    Raises:
        CheckpointError: as `plan_download`; or the repository holds no safetensors.
    """
    return _with_weights(repo, Path(_snapshot(repo, revision, MODEL_FILES)))


def cached(repo: str, revision: str | None, patterns: tuple[str, ...] = MODEL_FILES) -> Path | None:
    """The folder of a repository's files, if they are complete in the cache; asks nobody."""
    hub = _import_hub()
    _check_revision(repo, revision)
    try:
        revision = _commit_of_edited_ref(repo, revision) or revision
        folder = hub.snapshot_download(repo, revision=revision, local_files_only=True, **_selection(patterns))
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        return None
    return Path(folder)


def _check_revision(repo: str, revision: str | None) -> None:
    """Refuse what git knows no branch, tag or commit by: the library would take it for a path."""
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(f"{repo} has no revision {revision!r:.80}; give a branch, a tag or a commit")


def _commit_of_edited_ref(repo: str, revision: str | None) -> str | None:
    """The commit of a branch whose file in the cache was written by hand or by a shell, with a line end behind it.

    The hub's library takes the line end for a part of the commit's name, and finds nothing.
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
    """Where the hub's library keeps its files."""
    return Path(_import_hub().constants.HF_HUB_CACHE)


def _import_hub() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the library reads it when it is imported
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.file_download

    return huggingface_hub


def _snapshot(
    repo: str, revision: str | None, patterns: tuple[str, ...], *, offline: bool = False, dry_run: bool = False
) -> Any:
    """`snapshot_download` with every failure as one line that says what to do."""
    hub = _import_hub()
    errors = hub.errors
    wanted = f"{repo}@{revision}" if revision else repo
    _check_revision(repo, revision)
    try:
        return hub.snapshot_download(
            repo,
            revision=revision,
            local_files_only=offline,
            dry_run=dry_run,
            **_selection(patterns),
        )
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
            f"{wanted}: fetching into {cache_folder()} failed ({_first_line(error)}); "
            "run it again, what is already there is kept"
        ) from error


def _selection(patterns: tuple[str, ...]) -> dict[str, list[str]]:
    return {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}  # files at the top only


def _missing(wanted: str, repo: str, patterns: tuple[str, ...], why: str) -> str:
    """Which files, where they were looked for, what to run."""
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


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:200]
