"""Hostile pictures, names and manifests through the whole program: one right record each, and a clean terminal."""

from __future__ import annotations

import base64
import os
import pty
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from corpus import Case, write_corpus
from hostile_manifests import GOOD, Manifest, write_manifests
from program import STUB_MD3, Program, isolate, make_pictures, records_of, start

from md3cli.records import is_printable
from md3cli.source.walk import has_image_suffix

pytestmark = pytest.mark.process

PATIENCE_S = 240  # machines may be loaded


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: Any) -> tuple[Path, list[Case]]:
    root = tmp_path_factory.mktemp("corpus")
    return root, write_corpus(root)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(record: dict[str, Any]) -> tuple[tuple[int, int] | None, str | None]:
    """Upright size and error type, as a `Case` has them."""
    if record["error"] is not None:
        return None, record["error"]["type"]
    return (record["width"], record["height"]), None


def path_of(record: dict[str, Any]) -> str:
    """The exact path that a record speaks of."""
    return os.fsdecode(base64.b64decode(record["image_b64"])) if "image_b64" in record else record["image"]


def escapes_in(data: bytes) -> list[str]:
    """What must not reach a terminal raw; new lines may, and the carriage return that a terminal adds to them."""
    return [char for char in data.decode().replace("\r\n", "\n") if not is_printable(char) and char != "\n"]


def test_every_file_of_the_corpus_is_one_right_record(corpus: tuple[Path, list[Case]], home: Path) -> None:
    root, cases = corpus
    listed = [case for case in cases if not {"\n", "\0"} & set(case.path)]  # a list of paths has no way to say it
    (home / "all.txt").write_bytes(b"".join(os.fsencode(case.path) + b"\n" for case in listed))
    process = start("caption", home / "all.txt", "--root", root, "--workers", 2, "-v", "-o", home / "out.jsonl")
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stdout, escapes_in(stderr)) == (3, b"", [])
    assert b"Traceback" not in stderr
    records = records_of(home / "out.jsonl")
    assert [path_of(record) for record in records] == [case.path for case in listed]
    wrong = {}
    for record, case in zip(records, listed, strict=True):
        is_outside = case.path in ("special/to-zero.jpg", "special/to-tty.jpg")  # links that leave --root
        if outcome(record) != ((None, "outside_root") if is_outside else (case.size, case.error)):
            wrong[case.path] = (outcome(record), record["error"])
    assert wrong == {}


def test_the_corpus_as_a_folder(corpus: tuple[Path, list[Case]], home: Path) -> None:
    root, cases = corpus
    process = start("caption", root, "--workers", 2)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert escapes_in(stderr) == []
    found = {path_of(record): outcome(record) for record in records_of(stdout)}
    assert len(found) == len(records_of(stdout))
    wanted = {
        case.path: (case.size, case.error)
        for case in cases
        if os.path.lexists(os.fsencode(root) + b"/" + os.fsencode(case.path))
        if has_image_suffix(case.path)
        if not os.path.basename(case.path).startswith(".") and case.path != "special/to-folder.jpg"  # not followed
    }
    assert {path: found.get(path) for path in wanted} == wanted
    assert len(wanted) >= 300


@pytest.mark.parametrize("format", ["", "-f jsonl", "-f csv", "-f coco"])
def test_a_terminal_sees_no_escape_of_a_name_a_prompt_or_an_answer(
    corpus: tuple[Path, list[Case]], home: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Both streams on a terminal, with the bar: all control codes are the program's own few."""
    root, _ = corpus
    label = "\x1b]0;owned\x07 \x9b2J \u202e car"
    command = [
        sys.executable,
        str(STUB_MD3),
        "detect",
        str(root / "names"),
        label,
        "-v",
        "--workers",
        "2",
    ]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    shown = bytearray()

    def read(fd: int) -> bytes:
        shown.extend(data := os.read(fd, 1 << 16))
        return data

    status = os.waitstatus_to_exitcode(pty.spawn(["bash", "-c", f"{shlex.join(command)} {format} </dev/null"], read))
    assert status == 0
    own = rb"\x1b\[[0-9;]*m|\r|\x1b\[A"  # colours; the bar goes back to the start of its line, or up
    left = re.sub(own, b"", bytes(shown))
    assert escapes_in(left) == []
    assert b"]0;owned" in left
    assert b"[31m.jpg" in left


# -- manifests -----------------------------------------------------------------------------------------


def test_every_row_of_every_manifest_is_one_right_record(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "manifests"
    make_pictures(folder, 1)
    manifests = write_manifests(folder)
    assert len(manifests) >= 40
    assert (folder / GOOD).exists()
    md3 = Program(monkeypatch)
    wrong = {manifest.name: found for manifest in manifests if (found := what_is_wrong(md3, folder, manifest))}
    assert wrong == {}


def what_is_wrong(md3: Program, folder: Path, manifest: Manifest) -> str:
    """Empty when all is as expected."""
    result = md3("run", folder / manifest.name, "--task", "caption", *manifest.options)
    if escapes_in(result.stderr.encode()):
        return f"raw escapes in {result.stderr!r}"
    if manifest.status is not None:
        is_told = result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
        return "" if result.exit_code == manifest.status and is_told else f"{result.exit_code}: {result.stderr}"
    records = records_of(result.stdout)
    outcomes = tuple(record["error"] and record["error"]["type"] for record in records)
    is_bad = any(outcomes)
    if outcomes != manifest.outcomes or result.exit_code != (3 if is_bad else 0):
        messages = [record["error"] and record["error"]["message"] for record in records]
        return f"{result.exit_code}: {outcomes[:20]} {messages[:20]} {result.stderr[-300:]}"
    errors = [record["error"] for record in records if record["error"]]
    bad_rows = [error["message"] for error in errors if error["type"] in ("bad_row", "bad_request")]
    unnumbered = [message for message in bad_rows if not re.match(r"(line|row) \d+: |row group", message)]
    return f"rows without a number: {unnumbered}" if unnumbered else ""
