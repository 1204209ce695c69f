"""What the md3.toml of a working folder, which may be a stranger's, is obeyed in; through the program."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from program import Program, isolate, make_pictures, records_of

from md3cli.cli import COMMANDS, options_of

ALLOWED = {
    "length": '"long"',
    "reasoning": "true",
    "no-reasoning": "true",
    "max-objects": "3",
    "max-tokens": "5",
    "temperature": "0.5",
    "top-p": "0.5",
    "seed": "1",
    "batch-size": "2",
    "device": '"cpu"',
    "dtype": '"fp32"',
    "quant": '"int8"',
    "workers": "1",
    "include": '["p*"]',
    "exclude": '["q*"]',
    "format": '"jsonl"',
    "max-pixels": '"1M"',
    "max-file-size": '"1M"',
    "decode-timeout": "5",
    "model": '"tiny"',
}
PLACED = ("adapter", "tokenizer")  # need something that is there


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(monkeypatch)


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures; the working folder is where they lie, the user's own folders are elsewhere."""
    isolate(monkeypatch, tmp_path / "home")
    folder = make_pictures(tmp_path / "data/in", 2)
    monkeypatch.chdir(folder.parent)
    return folder


def own_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "home/config/md3cli/md3.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.mark.process
@pytest.mark.parametrize(("key", "value"), ALLOWED.items())
def test_what_is_harmless_is_obeyed_and_the_file_is_named(md3: Program, key: str, value: str) -> None:
    Path("md3.toml").write_text(f"{key} = {value}\n")
    command = ["query", "in", "-q", "x"] if "reasoning" in key else ["caption", "in"]
    command = ["detect", "in", "x"] if key == "max-objects" else command
    result = md3(*command, "--no-progress")
    assert result.exit_code == 0, result.stderr
    named = "reasoning" if key == "no-reasoning" else key
    assert result.stderr.splitlines()[0] == f"settings of {os.getcwd()}/md3.toml: {named}"
    assert len(records_of(result.stdout)) == 2


@pytest.mark.process
def test_every_other_option_is_refused_by_name(md3: Program) -> None:
    options = {key: name for name in COMMANDS for key in options_of(name)}
    forbidden = {key: name for key, name in options.items() if key not in ALLOWED and key not in PLACED}
    assert {"output", "overwrite", "remote", "root", "cache-dir", "revision", "follow-links", "fail-on"} <= set(
        forbidden
    )
    for key, command in forbidden.items():
        for text in (f'{key} = "1"', f'[{command}]\n{key} = "1"'):
            Path("md3.toml").write_text(text)
            result = md3("caption", "in")
            assert result.exit_code == 1, key
            assert f" {key}: md3.toml of a working folder may be a stranger's and cannot set this" in result.stderr
            assert "home/config/md3cli/md3.toml" in result.stderr
            assert result.stderr.count("\n") == 1
            assert md3.models == []


def test_a_stranger_cannot_have_a_file_written(md3: Program, tmp_path: Path) -> None:
    victim = tmp_path / "victim.jsonl"
    victim.write_text("precious\n")
    Path("md3.toml").write_text('output = "../victim.jsonl"\noverwrite = true\nremote = true\n')
    assert md3("caption", "in").exit_code == 1
    assert victim.read_text() == "precious\n"


def test_the_users_own_file_may_set_all(md3: Program, tmp_path: Path) -> None:
    own_file(tmp_path, 'output = "mine.jsonl"\nfail-on = "none"\nno-cache = true\nmax-pixels = "900M"\n')
    result = md3("caption", "in", "--no-progress")
    assert result.exit_code == 0, result.stderr
    assert "settings of" not in result.stderr
    assert len(records_of(Path("mine.jsonl"))) == 2


def test_the_users_config_folder_is_no_strangers(
    md3: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: Path
) -> None:
    own_file(tmp_path, 'fail-on = "none"\n')
    monkeypatch.chdir(tmp_path / "home/config/md3cli")
    assert md3("caption", pictures, "--no-progress").exit_code == 0


def test_a_file_in_a_folder_above_is_not_read(md3: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("md3.toml").write_text('output = "x.jsonl"\n')
    monkeypatch.chdir("in")
    assert md3("caption", ".", "--no-progress").exit_code == 0
    assert not Path("x.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "own", "bound"),
    [
        ('max-pixels = "269M"', "", "268,435,456"),
        ('max-file-size = "2G"', "", "1,073,741,824"),
        ("decode-timeout = 20.5", "", "20"),
        ("decode-timeout = nan", "", "20"),
        ("decode-timeout = inf", "", "20"),
        ('[caption]\nmax-pixels = "20M"', 'max-pixels = "10M"', "10,000,000"),
        ('[detect]\nmax-pixels = "1G"', "", "268,435,456"),
        ('max-pixels = "500M"', 'max-pixels = "900M"', "268,435,456"),
    ],
)
def test_a_limit_can_only_be_lowered(md3: Program, tmp_path: Path, text: str, own: str, bound: str) -> None:
    own_file(tmp_path, own)
    Path("md3.toml").write_text(text)
    result = md3("caption", "in")
    assert result.exit_code == 1
    assert f"a working folder may only lower a limit ({bound} here)" in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        'model = "somebody/model"',
        'model = "moondream3"',
        'model = "nowhere/at/all"',
        'model = "//host/share/model"',
        'tokenizer = "somebody/tokenizer"',
        'adapter = "nowhere"',
    ],
)
def test_nothing_is_fetched_for_a_stranger(
    md3: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    Path("md3.toml").write_text(text)
    result = md3("caption", "in")
    assert result.exit_code == 1
    assert "can only name what is on this machine already" in result.stderr
    assert md3.models == []
    name = text.partition(" ")[0]
    assert md3("caption", "in", f"--{name}", "typed").exit_code == 0, "what is typed wins, and is the user's choice"


def test_what_is_here_may_be_named(md3: Program) -> None:
    Path("adapter").mkdir()
    Path("tokenizer.json").write_text("{}")
    Path("md3.toml").write_text('adapter = "adapter"\ntokenizer = "tokenizer.json"\nmodel = "tiny"\n')
    result = md3("caption", "in", "--no-progress")
    assert result.exit_code == 0, result.stderr
    assert "md3.toml: adapter, model, tokenizer\n" in result.stderr


def test_quiet_is_quiet_and_what_is_not_in_force_is_not_told(md3: Program) -> None:
    Path("md3.toml").write_text("seed = 3\n[detect]\nmax-objects = 3\n")
    assert md3("caption", "in", "--quiet").stderr == ""
    assert "settings of" not in md3("caption", "in", "--seed", "4").stderr


@pytest.mark.process
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a." * 5000 + "b = 1", "md3.toml: [a] is no command"),
        ("a = " + "[" * 9000, "md3.toml: not valid TOML"),
        ("a = " + "9" * 9000, "md3.toml: not valid TOML"),
        ("seed = 1 # " + "x" * 20_000, "md3.toml: more than 16,384 bytes"),
        (b"a = '\xff'", "md3.toml: not valid TOML"),
        (b"\x1b[2J = 1", "md3.toml: not valid TOML"),
        ('"\\u001b[2J" = 1', "md3.toml: \\x1b[2J: unknown key"),
    ],
)
def test_a_hostile_file_is_told_in_words(md3: Program, content: str | bytes, words: str) -> None:
    Path("md3.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = md3("caption", "in")
    assert result.exit_code == 1
    assert words in result.stderr
    assert "unexpected" not in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_or_a_device_does_not_hang(md3: Program) -> None:
    os.mkfifo("md3.toml")
    assert "md3.toml: not a regular file" in md3("caption", "in").stderr
    os.unlink("md3.toml")
    os.symlink("/dev/zero", "md3.toml")
    assert "md3.toml: not a regular file" in md3("caption", "in").stderr


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be removed")
def test_a_working_folder_that_is_gone_is_told_in_words(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = md3("caption", pictures)
    assert result.exit_code == 1
    assert "error: the working folder cannot be entered (No such file or directory)" in result.stderr
