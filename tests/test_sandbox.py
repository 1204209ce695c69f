"""What a run with the real model may do: no network, no pickle, nothing written outside its folders.

Python's own audit hooks tell, in the run's main process; the decode workers import no code that
could (tests of imports), and what C code does is looked at with strace where that is there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program import clean_environment, make_pictures

pytestmark = pytest.mark.process

AUDIT = """
import atexit, json, os, socket, sys

seen = {"network": [], "pickle": [], "written": [], "ran": []}
NAMES = {socket.AF_INET, socket.AF_INET6}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def hook(event, arguments):
    if event == "socket.__new__" and arguments[1] in NAMES:
        seen["network"].append(repr(arguments[1:]))
    elif event in ("socket.connect", "socket.bind", "socket.sendto") and isinstance(arguments[1], tuple):
        seen["network"].append(f"{event} {arguments[1]}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        seen["network"].append(f"{event} {arguments[0]}")
    elif event == "pickle.find_class":
        seen["pickle"].append(".".join(map(str, arguments)))
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & WRITING:
        seen["written"].append(os.path.realpath(os.fsdecode(arguments[0])))
    elif event in ("os.mkdir", "os.remove", "os.link", "os.symlink", "os.rename"):
        path = arguments[1 if event in ("os.rename", "os.link", "os.symlink") else 0]
        if isinstance(path, (str, bytes)) and arguments[-1] == -1:  # else below a folder that was opened for it
            seen["written"].append(os.path.realpath(os.fsdecode(path)))
    elif event in ("subprocess.Popen", "os.exec", "os.system", "os.posix_spawn"):
        seen["ran"].append(str(arguments[0]))

sys.addaudithook(hook)

@atexit.register
def tell():
    seen_at_end = {name: list(found) for name, found in seen.items()}
    with open(os.environ["AUDIT_OUT"], "w") as file:
        json.dump(seen_at_end, file)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(AUDIT)
    make_pictures(tmp_path / "pictures", 6)
    (tmp_path / "pictures/p2.png").write_bytes(b"no picture")
    (tmp_path / "out").mkdir()
    return tmp_path


def environment_of(place: Path) -> dict[str, str]:
    """Every folder that programs write to by habit is one of this test's."""
    folders = {"HOME": "home", "TMPDIR": "tmp", "XDG_DATA_HOME": "data", "XDG_STATE_HOME": "state"}
    (place / "tmp").mkdir(exist_ok=True)
    ours = {name: str(place / folder) for name, folder in folders.items()}
    audit = {"PYTHONPATH": str(place / "site"), "AUDIT_OUT": str(place / "audit.json"), "PYTHONDONTWRITEBYTECODE": "1"}
    return clean_environment(place / "home") | ours | audit


def md3(place: Path, *arguments: object) -> dict[str, list[str]]:
    """What a run with the tiny model did."""
    command = [sys.executable, "-m", "md3cli", *map(str, arguments), "-m", "tiny", "--quiet", "--max-tokens", "4"]
    done = subprocess.run(command, env=environment_of(place), cwd=place, capture_output=True, timeout=280, check=False)
    assert done.returncode in (0, 3), done.stderr.decode()
    seen: dict[str, list[str]] = json.loads((place / "audit.json").read_bytes())
    return seen


COMMANDS: dict[str, tuple[Any, ...]] = {
    "detect to a document": ("detect", "pictures", "circle", "-o", "out/boxes.json"),
    "printed": ("caption", "pictures", "-f", "csv"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_local_run_touches_nothing_but_its_own(place: Path, name: str) -> None:
    seen = md3(place, *COMMANDS[name])
    assert seen["network"] == []
    assert seen["pickle"] == []
    assert {os.path.basename(program)[:6] for program in seen["ran"]} == {"python"}, "decode workers only"
    home = place / "home"
    allowed = [place / "out", home / "cache/md3cli", home / "config", place / "tmp"]
    made_on_the_way = {str(home), str(home / "cache"), os.devnull}
    strays = [path for path in seen["written"] if path not in made_on_the_way and not is_below(path, allowed)]
    assert strays == []
    assert sorted(path.name for path in place.iterdir()) == ["audit.json", "home", "out", "pictures", "site", "tmp"]
    assert list((place / "tmp").iterdir()) == [], "Python's tempfile tries the folder out, and no more"


def is_below(path: str, folders: list[Path]) -> bool:
    return any(Path(path).is_relative_to(os.path.realpath(folder)) for folder in folders)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not there")
def test_no_process_of_a_local_run_opens_a_network_socket(place: Path) -> None:
    log = place / "out/trace"
    arguments = ["-m", "md3cli", "detect", "pictures", "circle", "-m", "tiny", "-o", "out/o.jsonl", "--quiet"]
    command = ["strace", "-f", "-qq", "-e", "trace=socket", "-o", str(log), sys.executable, *arguments]
    environment = environment_of(place) | {"PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, timeout=280, check=False)
    if b"Operation not permitted" in done.stderr:
        pytest.skip("processes may not be traced here")
    assert done.returncode == 3, done.stderr.decode()
    assert [line for line in log.read_text().splitlines() if "AF_INET" in line] == []
