"""Where model files come from: local paths without the network, a hub of our own, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from program import isolate, make_pictures
from quiet_server import QuietServer
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.errors import CheckpointError, OutputError, UsageError
from md3cli.model.weights import hub
from md3cli.model.weights.files import find_weight_files
from md3cli.model.weights.hub import (
    TOKENIZER_REPO,
    cached,
    download,
    known_models,
    model_path,
    plan_download,
    present_path,
    repo_of,
    resolve_model,
    terms_of,
)

GOLDEN = Path(__file__).parents[2] / "golden"
CASE_A = GOLDEN / "case-a" / "checkpoint"
INT4 = GOLDEN / "case-c-formats" / "int4"
REPO = "someone/moondream-small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- names ----------------------------------------------------------------------------------------


def test_aliases_and_repository_ids() -> None:
    assert repo_of("moondream3") == "moondream/moondream3-preview"
    assert repo_of("moondream3.1") == "moondream/moondream3.1-9B-A2B"
    assert repo_of("someone/a_model-1.0") == "someone/a_model-1.0"
    assert repo_of("tiny") is None
    assert repo_of(str(CASE_A)) is None


@pytest.mark.parametrize("name", ["nope", "a/b/c", "./missing", "/missing/model.safetensors", "x/y.safetensors", ""])
def test_other_names_are_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"moondream3, moondream3\.1, tiny"):
        repo_of(name)


def test_an_existing_folder_goes_before_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert repo_of("someone/model") is None


def test_a_local_model_is_named_without_its_place(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(INT4, tmp_path / "int4"))
    here, there = resolve_model(str(INT4)), resolve_model(str(copy))
    assert here.identity == there.identity
    name, revision = here.identity.split("@")
    assert (name, len(revision)) == ("int4", 16)
    assert resolve_model(str(INT4 / "model.safetensors")).name == "int4/model.safetensors"
    assert here.tokenizer_file == INT4 / "tokenizer.json"


@pytest.mark.process
def test_local_models_import_no_hub_and_open_no_socket() -> None:
    script = f"""
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(event) if event.startswith("socket.") else None)
from md3cli.model.weights.hub import resolve_model
resolve_model({str(CASE_A)!r})
assert "huggingface_hub" not in sys.modules and "torch" not in sys.modules
assert not opened, opened
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_a_revision_of_a_local_path_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--revision is for repositories"):
        resolve_model(str(CASE_A), revision="main")


def test_a_lost_embedded_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_TINY_FOLDER", tmp_path / "tiny")
    with pytest.raises(CheckpointError, match="lacks the model 'tiny'"):
        model_path("tiny")
    assert known_tiny().path is None
    shutil.copytree(CASE_A, tmp_path / "tiny")
    assert model_path("tiny") == tmp_path / "tiny"
    assert resolve_model("tiny").identity.startswith("tiny@")


def known_tiny() -> hub.KnownModel:
    (found,) = [model for model in known_models() if model.alias == "tiny"]
    return found


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    other = Path(shutil.copy(CASE_A / "tokenizer.json", tmp_path / "tokenizer.json"))
    with other.open("a") as stream:
        stream.write("\n")
    for given in (other, tmp_path):
        files = resolve_model(str(CASE_A), tokenizer=str(given))
        assert files.tokenizer_file == other
        assert files.revision != resolve_model(str(CASE_A)).revision
    with pytest.raises(CheckpointError, match=r"no such tokenizer\.json"):
        resolve_model(str(CASE_A), tokenizer=str(tmp_path / "missing.json"))


# -- a hub of our own -----------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as downloads use; `files` by repository and name."""

    def __init__(self, files: dict[str, dict[str, bytes]], asked: list[str], *args: Any) -> None:
        self.files, self.asked = files, asked
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.respond(has_body=False)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.respond(has_body=True)

    def respond(self, has_body: bool) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models")
        repo = "/".join(path.split("/")[1:3])
        rest = path.removeprefix(f"/{repo}").lstrip("/")
        if repo not in self.files:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, has_body)
        elif rest.startswith("revision/nope"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, has_body)
        elif rest.startswith("tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{len(content):040x}"}
                for name, content in self.files[repo].items()
            ]
            self.reply(200, json.dumps(listing).encode(), {}, has_body)
        elif rest.startswith("resolve/"):
            self.send_content(self.files[repo].get(rest.split("/", 2)[2]), has_body)
        else:
            siblings = [{"rfilename": name} for name in self.files[repo]]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(info).encode(), {}, has_body)

    def send_content(self, content: bytes | None, has_body: bool) -> None:
        if content is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, has_body)
            return
        self.reply(200, content, {"ETag": f'"{len(content):040x}"', "X-Repo-Commit": COMMIT}, has_body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], has_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


def repo_files(*folders: Path, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = {
        file.name: file.read_bytes() for folder in folders for file in folder.iterdir() if file.name not in without
    }
    return files | {"README.md": b"#", "modeling.py": b"raise SystemExit", "old/model.safetensors": b"x"}


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> Iterator[dict[str, dict[str, bytes]]]:
    """Repositories of a hub on this machine, and an empty cache."""
    files = {REPO: repo_files(CASE_A)}
    server = QuietServer(("127.0.0.1", 0), partial(FakeHub, files, asked))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield files
    server.shutdown()
    server.server_close()


def test_a_repository_is_fetched_once_and_only_what_is_needed(
    served: dict[str, dict[str, bytes]], asked: list[str]
) -> None:
    files = resolve_model(REPO)
    assert files.identity == f"{REPO}@{COMMIT}"
    assert sorted(file.name for file in files.path.iterdir()) == sorted(file.name for file in CASE_A.iterdir())
    assert files.tokenizer_file == files.path / "tokenizer.json"
    asked.clear()
    assert resolve_model(REPO) == files
    assert resolve_model(REPO, offline=True) == files
    assert (present_path(REPO), model_path(REPO)) == (files.path, files.path)
    assert asked == []  # what is complete in the cache asks nobody


def test_the_tokenizer_comes_from_starmie_where_the_weights_have_none(served: dict[str, dict[str, bytes]]) -> None:
    served[REPO] = repo_files(CASE_A, without=("tokenizer.json",))
    with pytest.raises(
        CheckpointError, match=f"no tokenizer.json in .*; {TOKENIZER_REPO}: no such repository.*--tokenizer"
    ):
        resolve_model(REPO)
    served[TOKENIZER_REPO] = repo_files(CASE_A)
    files = resolve_model(REPO)
    assert files.tokenizer_file.read_bytes() == (CASE_A / "tokenizer.json").read_bytes()
    assert "starmie" in str(files.tokenizer_file)
    assert sorted(file.name for file in files.tokenizer_file.parent.iterdir()) == ["tokenizer.json"]


def test_a_tokenizer_of_choice_marks_the_revision(served: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    marked = resolve_model(REPO, tokenizer=str(CASE_A)).revision
    assert marked.startswith(f"{COMMIT}+")
    assert len(marked) == 40 + 1 + 8


def test_a_line_end_in_the_caches_refs_is_read_past(served: dict[str, dict[str, bytes]], asked: list[str]) -> None:
    snapshot = resolve_model(REPO).path
    ref = snapshot.parents[1] / "refs" / "main"
    for text in (f"{COMMIT}\n", f"{COMMIT}\r\n", f"\ufeff{COMMIT}\n"):
        ref.write_text(text, encoding="utf-8")
        asked.clear()
        assert resolve_model(REPO, offline=True).path == snapshot
        assert asked == []
    ref.write_text("../../elsewhere\n")
    assert cached(REPO, None) is None


def test_a_cache_without_its_blobs_says_so(
    served: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = resolve_model(REPO).path
    shutil.rmtree(snapshot.parents[1] / "blobs")
    if not any(file.is_symlink() for file in snapshot.iterdir()):
        pytest.skip("the hub's library made no links here")
    with pytest.raises(CheckpointError, match=r"is a link to .*where nothing is"):
        find_weight_files(snapshot)
    monkeypatch.setattr(hub, "ALIASES", {"moondream3": REPO})
    assert known_models()[0].num_bytes in (None, 0)


@pytest.mark.parametrize("revision", ["/etc", "../../x", "a\0b", "a" * 300, "\n", "a\\b"])
def test_a_revision_that_git_would_not_know_is_no_path(revision: str) -> None:
    with pytest.raises(CheckpointError, match=r"has no revision .*give a branch, a tag or a commit"):
        resolve_model(REPO, revision=revision, offline=True)


def test_terms_are_named_for_each_model(tmp_path: Path) -> None:
    assert "Business Source Licence 1.1" in terms_of("moondream3")
    assert terms_of("moondream3.1").endswith("https://huggingface.co/moondream/moondream3.1-9B-A2B")
    assert "Business" not in terms_of("moondream3.1")
    assert terms_of("someone/else") == "read them at https://huggingface.co/someone/else"
    assert "Apache-2.0" in terms_of("tiny")
    assert "the place the weights came from" in terms_of(str(tmp_path))
    (tmp_path / "LICENSE.md").write_text("")
    assert terms_of(str(tmp_path)) == "read LICENSE.md beside the weights"


def test_sizes_are_known_before_anything_is_fetched(served: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    plan = plan_download(REPO)
    size = sum(file.stat().st_size for file in CASE_A.iterdir())
    assert (plan.repo, plan.revision, plan.num_bytes, plan.missing_bytes) == (REPO, COMMIT, size, size)
    assert plan.cache_folder == tmp_path / "cache"
    assert not list((tmp_path / "cache").glob("**/*.safetensors"))
    download(REPO)
    assert plan_download(REPO).missing_bytes == 0


def test_a_fetch_is_told_before_it_begins_and_once(served: dict[str, dict[str, bytes]], asked: list[str]) -> None:
    told: list[str] = []

    def tell(words: str) -> None:
        told.append(words)
        assert not any("resolve/" in path for path in asked), "no byte was fetched yet"

    resolve_model(REPO, tell=tell)
    (words,) = told
    assert re.fullmatch(rf"{REPO}@{COMMIT}: (.*B), \1 to fetch into .*, .* free; terms of use: read them at .*", words)
    resolve_model(REPO, tell=tell)
    assert len(told) == 1, "it is here"
    with pytest.raises(CheckpointError, match="forbids to fetch"):
        resolve_model("someone/else", offline=True, tell=tell)
    assert len(told) == 1


@pytest.mark.process
def test_an_annotating_command_tells_what_it_fetches(
    served: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path)
    picture = make_pictures(tmp_path / "pictures", 1) / "p0.png"
    ask = ["query", str(picture), "-q", "why?", "--model", REPO, "--max-tokens", "1", "--device", "cpu", "--no-cache"]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 0, result.stderr
    assert f"{REPO}@{COMMIT}: " in result.stderr.splitlines()[0]
    assert "terms of use: read them at" in result.stderr.splitlines()[0]
    assert "to fetch" not in CliRunner().invoke(app, ask).stderr


def test_nothing_is_fetched_where_the_disk_is_too_small(
    served: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    told: list[str] = []
    with pytest.raises(
        OutputError, match=r"too little room: .*B are to come and 1\.0 kB are free; free some, or set HF"
    ):
        resolve_model(REPO, tell=told.append)
    assert "1.0 kB free" in told[0]
    assert not list(tmp_path.glob("cache/**/*.safetensors"))


def test_an_incomplete_snapshot_is_completed(served: dict[str, dict[str, bytes]]) -> None:
    folder = download(REPO)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    assert cached(REPO, None) is None
    with pytest.raises(CheckpointError, match=r"not in .*; fetch it with: md3 models pull"):
        present_path(REPO)
    assert resolve_model(REPO).path == folder
    assert shard.stat().st_size == (CASE_A / shard.name).stat().st_size


def test_pickled_repositories_are_refused(served: dict[str, dict[str, bytes]]) -> None:
    served[REPO] = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."}
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors weights; pickled ones"):
        resolve_model(REPO)


def test_unknown_repository_and_revision(served: dict[str, dict[str, bytes]]) -> None:
    with pytest.raises(CheckpointError, match="someone/else: no such repository on the hub, or a private one"):
        resolve_model("someone/else")
    with pytest.raises(CheckpointError, match="has no revision 'nope'"):
        resolve_model(REPO, revision="nope")


# -- no network -----------------------------------------------------------------------------------


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return cache


@pytest.mark.parametrize(
    ("offline", "why"), [(True, "--offline or HF_HUB_OFFLINE forbids"), (False, "cannot be reached")]
)
def test_what_cannot_be_had_is_said_with_files_place_and_command(unreachable: Path, offline: bool, why: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model("moondream3", offline=offline)
    message = str(caught.value)
    assert "moondream/moondream3-preview: its files (config.json, *.safetensors" in message
    assert f"are not in {unreachable}" in message
    assert why in message
    assert "`md3 models pull moondream/moondream3-preview`" in message


def test_a_folder_without_tokenizer_says_where_to_get_one(unreachable: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CASE_A, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        resolve_model(str(folder), offline=True)
    message = str(caught.value)
    assert f"no tokenizer.json in {folder}" in message
    assert f"`hf download {TOKENIZER_REPO} tokenizer.json`" in message
    assert "--tokenizer" in message


def test_known_models_ask_nobody(unreachable: Path) -> None:
    rows = [model.as_json() for model in known_models()]
    assert [row["name"] for row in rows] == ["moondream3", "moondream3.1", "tiny"]
    assert [row["path"] for row in rows[:2]] == [None, None]


class GatedError(errors.GatedRepoError):
    def __init__(self) -> None:
        Exception.__init__(self, "403")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedError(), r"is gated: accept its terms at https://huggingface\.co/someone/moondream-small.*hf auth login"),
        (
            OSError(28, "No space left on device"),
            r"fetching into .* failed \(.*No space left on device\); run it again",
        ),
        (errors.HFValidationError("bad id"), "no valid repository id: bad id"),
    ],
)
def test_failures_of_the_library_are_translated(
    unreachable: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*args: Any, local_files_only: bool, **kwargs: Any) -> str:
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        resolve_model(REPO)


@pytest.mark.process
def test_the_cache_folder_is_known_before_anything_else_was_asked() -> None:
    code = "from md3cli.model.weights.hub import cache_folder; print(cache_folder())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("hub")
