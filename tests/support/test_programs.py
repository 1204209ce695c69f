"""The environments of programs.py, with a program of one line in place of the real ones; nothing is downloaded."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import programs
import pytest

pytestmark = pytest.mark.process

GREET = {
    "greet.py": 'WORD = "grüß"\ndef main(): print(WORD)\n',
    "greet-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: greet\nVersion: 1.0\n",
    "greet-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "greet-1.0.dist-info/entry_points.txt": "[console_scripts]\ngreet = greet:main\n",
    "greet-1.0.dist-info/RECORD": "",
}


@pytest.fixture(autouse=True)
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of lists and of one wheel, and another for environments."""
    with zipfile.ZipFile(tmp_path / "greet-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in GREET.items():
            wheel.writestr(name, text)
    monkeypatch.setattr(programs, "LISTS", tmp_path)
    monkeypatch.setattr(programs, "FOLDER", tmp_path / "kept environments")
    monkeypatch.setattr(programs, "_reasons", {})
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("MD3_MODEL", "tiny")
    (tmp_path / "hello.txt").write_text("greet==1.0\n")
    return tmp_path


def offline(name: str, lists: Path) -> programs.Program:
    return programs.program(name, "--no-index", f"--find-links={lists}")


def num_made(lists: Path) -> int:
    return len([path for path in (lists / "kept environments").iterdir() if path.is_dir()])


def test_made_once_and_apart(lists: Path) -> None:
    program = offline("hello", lists)
    script = (
        "import greet, json, os, sys; print('words'); print(json.dumps([greet.WORD, sys.argv[1], dict(os.environ)]))"
    )
    word, argument, variables = program.run(script, lists / "é", environment={"MORE": "1"})
    assert (word, argument, variables["MORE"]) == ("grüß", str(lists / "é"), "1")
    assert not {"PYTHONPATH", "MD3_MODEL"} & variables.keys()
    assert Path(variables["HOME"]) != Path.home()
    said = subprocess.run([program.bin / "greet"], env=program.environment, capture_output=True, check=True)
    assert said.stdout.decode().strip() == "grüß"

    (program.folder / "mine").touch()
    assert offline("hello", lists) == program
    assert (program.folder / "mine").exists()
    (lists / "hello.txt").write_text("greet==1.0  # the same by another text\n")
    assert offline("hello", lists) != program
    assert num_made(lists) == 2


def test_what_a_killed_pip_left_is_made_anew(lists: Path) -> None:
    program = offline("hello", lists)
    (program.folder / programs.FINISHED).unlink()
    (program.folder / "half").touch()
    assert offline("hello", lists) == program
    assert not (program.folder / "half").exists()
    assert (program.folder / programs.FINISHED).exists()


def test_what_cannot_be_had_is_skipped_with_the_reason(lists: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lists / "absent.txt").write_text("surely-not-there==1.0\n")
    reason = "absent cannot be installed: .*No matching distribution found for surely-not-there==1.0"
    with pytest.raises(pytest.skip.Exception, match=reason):
        offline("absent", lists)
    assert num_made(lists) == 0
    monkeypatch.setattr(subprocess, "run", None)  # asked again, it does not wait for pip again
    with pytest.raises(pytest.skip.Exception, match=reason):
        offline("absent", lists)


def test_a_script_that_fails_fails_the_test(lists: Path) -> None:
    with pytest.raises(AssertionError, match="not ready"):
        offline("hello", lists).run("raise SystemExit('not ready')")
