"""The program: commands, usage errors, exit statuses, settings; with a stub in the model's place."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from program import Program, isolate, make_pictures, records_of
from stub_engine import StubEngine, StubModel

from md3cli import __version__
from md3cli.cli import COMMANDS
from md3cli.errors import EngineError


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    isolate(monkeypatch, home)
    return Program(monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", 3)


def test_version(md3: Program) -> None:
    for flag in ("--version", "-V"):
        result = md3(flag)
        assert (result.exit_code, result.stdout) == (0, f"md3 {__version__}\n")


def test_help_lists_every_command(md3: Program) -> None:
    result = md3("--help")
    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.process
def test_help_is_light() -> None:
    check = (
        "import sys, md3cli.__main__ as m\n"
        "sys.argv = ['md3', '--help']\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'rich', 'PIL', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 250, len(sys.modules)"  # 170; they are what its time is made of
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.process
def test_no_command_imports_what_is_slow_for_its_help() -> None:
    check = (
        "import sys\n"
        "from md3cli.cli import COMMANDS, app\n"
        "for name in COMMANDS:\n"
        "    try: app([name, '-h'])\n"
        "    except SystemExit as end: assert end.code == 0, (name, end.code)\n"
        "    assert not {'torch', 'rich', 'pydantic'} & sys.modules.keys(), name\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.process
def test_python_m_md3cli_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "md3cli", "-V"], check=True, capture_output=True, text=True)
    assert done.stdout == f"md3 {__version__}\n"


def test_unknown_command_suggests(md3: Program) -> None:
    result = md3("detct", "x")
    assert result.exit_code == 2
    assert "No such command 'detct'. Did you mean 'detect'?" in result.stderr


def test_a_command_that_was_forgotten_is_asked_for(md3: Program, pictures: Path) -> None:
    result = md3(pictures)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {pictures} is no command; say what to do with it, like md3 caption {pictures} (md3 -h lists all)\n"
    )


def test_an_option_before_the_command_is_told_where_it_belongs(md3: Program) -> None:
    result = md3("--model", "tiny", "detect", "x", "y")
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: No such option: --model. A command's options stand behind its name.\n")
    assert "Did you mean '--version'? A command" in md3("--verson").stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("detect x y --lables z", "'--labels'"),
        ("detect x y --minscore 0.5", "'--min-score'"),
        ("models list --jsn", "'--json'"),
        ("query x --no-reasonin", "'--no-reasoning' or '--reasoning'"),
        ("detect x y --foobar", None),
    ],
)
def test_unknown_option_suggests(md3: Program, typed: str, meant: str | None) -> None:
    result = md3(*typed.split())
    assert result.exit_code == 2
    option = next(word for word in typed.split() if word.startswith("--"))
    suggestion = "" if meant is None else f" Did you mean {meant}?"
    assert result.stderr.endswith(f"Error: No such option: {option}.{suggestion}\n")


def test_an_option_of_another_command_is_told_whose_it_is(md3: Program) -> None:
    told = md3("detect", "x", "y", "--then", "caption").stderr
    assert told.endswith("Error: No such option: --then. It is an option of md3 run, md3 estimate.\n")
    told = md3("caption", "x", "--tile", "auto").stderr
    assert told.endswith("--tile. It is an option of md3 detect, md3 point, md3 run and others.\n")


@pytest.mark.process
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("md3 de", ["detect"]),
        ("md3 detect --max-o", ["--max-objects"]),
        ("md3 detect x y --dtype fp", ["fp32", "fp16"]),
        ("md3 caption x -f co", ["coco"]),
        ("md3 caption x --model ti", ["tiny"]),
        ("md3 run x --task caption:l", ["caption:long"]),
    ],
)
def test_the_shell_completes(typed: str, offered: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_MD3_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-m", "md3cli"], env=os.environ | words, capture_output=True, text=True)
    assert done.stdout.split() == offered


# -- the shapes of arguments ----------------------------------------------------------------------


def test_detect_asks_each_object_of_each_image(md3: Program, pictures: Path) -> None:
    result = md3("detect", pictures, "car", "person")
    assert result.exit_code == 0
    asked = [(record["image"], record["prompt"]) for record in records_of(result.stdout)]
    assert asked == [(f"p{i}.png", prompt) for i in range(3) for prompt in ("car", "person")]
    assert "6 of 6 ok, 3 images in " in result.stderr


def test_caption_of_several_inputs_names_them_as_typed(md3: Program, pictures: Path) -> None:
    result = md3("caption", pictures, pictures / "p1.png", "--length", "short")
    records = records_of(result.stdout)
    assert [record["image"] for record in records] == [f"{pictures}/p{i}.png" for i in range(3)] + [
        f"{pictures}/p1.png"
    ]
    assert {record["length"] for record in records} == {"short"}
    assert len({record["id"] for record in records}) == 4


def test_query_takes_questions_by_position_and_option(md3: Program, pictures: Path) -> None:
    result = md3("query", pictures / "p0.png", "one?", "-q", "two?", "--no-reasoning")
    assert [record["prompt"] for record in records_of(result.stdout)] == ["one?", "two?"]
    engine = md3.models[0].engine
    assert engine is not None
    assert all(not request.reasoning for _, request in engine.seen)


def test_query_without_input_is_text_only(md3: Program) -> None:
    result = md3("query", "-q", "What is an encoder?")
    (record,) = records_of(result.stdout)
    assert (record["image"], record["error"]) == (None, None)
    assert "sha256" not in record


def test_query_refuses_a_lone_question(md3: Program) -> None:
    result = md3("query", "What is an encoder?")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: 'What is an encoder?' is no file, folder, glob, URL or -; if it is the question, ask it without an "
        "image: md3 query -q 'What is an encoder?'\n"
    )


def test_query_refuses_an_input_without_a_question(md3: Program, pictures: Path) -> None:
    result = md3("query", pictures)
    assert result.exit_code == 2
    assert result.stderr == f'error: no question about {pictures}; ask one with -q: -q "What is this?"\n'


def test_query_takes_the_questions_of_a_manifest(md3: Program, pictures: Path) -> None:
    manifest = pictures / "rows.csv"
    manifest.write_text("image,prompt,note\np0.png,why?,x\n")
    (record,) = records_of(md3("query", manifest).stdout)
    assert (record["prompt"], record["meta"]) == ("why?", {"note": "x"})


def test_an_object_that_is_a_file_is_a_glob_forgotten_to_quote(md3: Program, pictures: Path) -> None:
    files = sorted(pictures.iterdir())
    for command in ("detect", "point", "segment"):
        result = md3(command, *files, "car")
        assert result.exit_code == 2
        assert f"{str(files[1])!r} is a file, not an OBJECT; quote the glob" in result.stderr


def test_run_takes_several_tasks_and_encodes_each_image_once(md3: Program, pictures: Path) -> None:
    result = md3("run", pictures, "--task", "caption:long", "--task", "detect:a,b", "--task", "query:Is it, or not?")
    records = records_of(result.stdout)
    assert [(r["task"], r["prompt"]) for r in records[:4]] == [
        ("caption", None),
        ("detect", "a"),
        ("detect", "b"),
        ("query", "Is it, or not?"),
    ]
    assert len(records) == 12


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("caption:tiny", "a caption is one of short, normal, long"),
        ("gaze:x", "no task 'gaze'; one of caption, query, detect, point, segment"),
        ("detect:a,", "an object is missing; write it like detect:car,person"),
        ("query:", "a question is missing; write it like query:Is it raining?"),
    ],
)
def test_run_refuses_a_task_it_does_not_understand(md3: Program, pictures: Path, spec: str, message: str) -> None:
    result = md3("run", pictures, "--task", spec)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_run_without_tasks_needs_a_manifest(md3: Program, pictures: Path) -> None:
    result = md3("run", pictures)
    assert result.exit_code == 2
    assert "say what with --task" in result.stderr
    manifest = pictures / "rows.jsonl"
    manifest.write_text('{"image":"p0.png","task":"point","prompt":"nose"}\n{"image":"p1.png","task":"caption"}\n')
    assert [r["task"] for r in records_of(md3("run", manifest).stdout)] == ["point", "caption"]


def test_stdin_is_read_for_a_dash_only(md3: Program, pictures: Path) -> None:
    lines = f'{pictures}/p0.png\n{{"image": "{pictures}/p1.png", "length": "long"}}\n'
    records = records_of(md3("caption", "-", stdin=lines).stdout)
    assert [record["length"] for record in records] == ["normal", "long"]
    assert "stdin" not in md3("caption", pictures, stdin="nonsense\n").stderr


# -- exit statuses and messages --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "'0' is neither auto nor a number of at least 1"),
        (["--shard", "5/4"], "'5/4' is not a shard; write it like 0/4, 1/4, 2/4, 3/4"),
        (["--fail-on", "some"], "'some' is not one of: none, any, or a share like 5%"),
        (["--max-file-size", "big"], "'big' is not a size; write it like 500M, 1G or 20 GB"),
        (["--format", "xml"], "'xml' is not one of: jsonl, coco"),
        (["--background", "mauvish"], "background 'mauvish' is not a colour"),
        (["-o", "out.xyz"], "out.xyz: no format has the suffix .xyz"),
        (["-o", ""], "OUTPUT is empty; name a file or folder after -o"),
        (["--cache-dir", ""], "the name of the folder is empty"),
        (["--temperature", "inf"], "less than or equal to 1000"),
        (["--top-p", "0"], "0 is not above 0"),
        (["--seed", "-1"], "greater than or equal to 0"),
        (["--max-tokens", str(2**31)], "less than or equal to 2147483647"),
        (["-f", "yolo"], "yolo cannot be printed; name a file or folder with -o"),
        (["-f", "coco", "-f", "csv"], "coco and csv cannot share stdout"),
    ],
)
def test_usage_errors(md3: Program, pictures: Path, arguments: list[str], message: str) -> None:
    result = md3("caption", pictures, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_missing_input_is_status_1(md3: Program, tmp_path: Path) -> None:
    result = md3("detect", tmp_path / "nothing", "car")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: there is no {tmp_path}/nothing;")
    assert result.stderr.count("\n") == 1


def test_a_folder_of_broken_files_is_status_3(md3: Program, tmp_path: Path) -> None:
    for name, content in {"a.jpg": b"", "b.png": b"text", "c.gif": b"GIF89a"}.items():
        (tmp_path / name).write_bytes(content)
    result = md3("caption", tmp_path)
    assert result.exit_code == 3
    assert [record["error"]["type"] for record in records_of(result.stdout)] == ["empty", "not_an_image", "decode"]
    assert md3.num_answered == 0
    assert "0 of 3 ok, 3 failed (decode 1, empty 1, not_an_image 1), 3 images in " in result.stderr


@pytest.mark.parametrize(("fail_on", "status"), [("any", 3), ("none", 0), ("20%", 3), ("25%", 0), ("0%", 3)])
def test_fail_on(md3: Program, pictures: Path, fail_on: str, status: int) -> None:
    (pictures / "broken.png").write_bytes(b"x")
    assert md3("caption", pictures, "--fail-on", fail_on).exit_code == status


def test_a_failure_of_the_model_is_a_record(md3: Program, pictures: Path) -> None:
    result = md3("detect", pictures / "p0.png", "fail me")
    assert result.exit_code == 3
    (record,) = records_of(result.stdout)
    assert record["error"] == {"type": "model", "message": "asked to fail", "retry": True}
    assert "objects" not in record


def test_errors_are_one_line_and_debug_shows_where(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise EngineError("no room \x1b[31mhere")

    monkeypatch.setattr("stub_engine.StubModel.load", fail)
    result = md3("caption", pictures)
    assert (result.exit_code, result.stderr) == (1, "error: no room \\x1b[31mhere\n")
    assert "Traceback" in md3("caption", pictures, "--debug").stderr
    assert "Traceback" in md3("--debug", "caption", pictures).stderr


def test_warnings_are_one_line_without_a_place(md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = StubModel.load

    def warn(model: StubModel) -> StubEngine:
        warnings.warn("the base is \x1b]0;x\x07\nanother", stacklevel=2)
        return load(model)

    monkeypatch.setattr(StubModel, "load", warn)
    result = md3("caption", pictures)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "warning: the base is \\x1b]0;x\\x07\\x0aanother"


def test_a_bug_is_one_line_too(md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stub_engine.StubEngine.step", lambda _: 1 // 0)
    result = md3("caption", pictures)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: unexpected ZeroDivisionError: integer division or modulo by zero (`md3 --debug ...` shows where)\n"
    )


def test_dry_run_needs_no_model(md3: Program, pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"x")
    (pictures / "notes.txt").write_text("x")
    result = md3("detect", pictures, "a", "b", "--dry-run", "--model", "no/such-model")
    assert result.exit_code == 0
    assert result.stdout == (
        '{"images": 4, "requests": 8, "crops": {"2": 3}, "bad": {"not_an_image": 1}, "skipped": {"other suffix": 1}}\n'
    )
    assert md3.models == []


# -- settings ----------------------------------------------------------------------------------------


def test_flag_beats_environment_beats_project_file_beats_user_file(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: str) -> str:
        return records_of(md3("caption", pictures, "--limit", "1", *arguments).stdout)[0]["model"]

    assert asked() == "stub@moondream3"
    user = tmp_path / "home/config/md3cli/md3.toml"
    user.parent.mkdir(parents=True)
    user.write_text('model = "from-user"')
    assert asked() == "stub@from-user"
    Path("md3.toml").write_text('model = "tiny"\n[caption]\nlength = "long"\n[detect]\nmax-objects = 3\n')
    assert asked() == "stub@tiny"
    monkeypatch.setenv("MD3_MODEL", "from-environment")
    assert asked() == "stub@from-environment"
    assert asked("-m", "from-flag") == "stub@from-flag"


def test_a_table_is_for_its_command(md3: Program, pictures: Path) -> None:
    Path("md3.toml").write_text('include = ["p1.*"]\n[caption]\nlength = "long"\n')
    assert [(r["image"], r["length"]) for r in records_of(md3("caption", pictures).stdout)] == [("p1.png", "long")]
    assert [r["image"] for r in records_of(md3("detect", pictures, "x").stdout)] == ["p1.png"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 'x'", "md3.toml: modle: unknown key; no command has such an option; did you mean model?"),
        ("[caption]\nmax-objects = 3", "md3.toml: [caption] max-objects: unknown key; `caption` has no such option"),
        ("[captoin]\nlength = 'long'", "md3.toml: [captoin] is no command; did you mean caption?"),
        ("batch-size = 'x'", "md3.toml: batch-size: 'x' is neither auto nor a number of at least 1"),
        ("offline = 'perhaps'", "md3.toml: offline: expected true or false, got 'perhaps'"),
        ("model = ", "md3.toml: not valid TOML"),
        ("seed = 1979-05-27", "md3.toml: seed: expected text, a number or true/false, got date"),
    ],
)
def test_bad_settings_are_status_1_and_name_their_place(md3: Program, pictures: Path, text: str, message: str) -> None:
    Path("md3.toml").write_text(text)
    result = md3("caption", pictures)
    assert result.exit_code == 1
    assert message in result.stderr
    *named, error = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert all(line.startswith("settings of ") for line in named)  # what the file sets that could be read
    assert len(named) <= 1
    assert md3("caption", "--help").exit_code == 0


def test_unknown_and_bad_environment(md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD3_MODLE", "x")
    result = md3("caption", pictures)
    assert result.exit_code == 1
    assert result.stderr == "error: MD3_MODLE: unknown key; no command has such an option; did you mean model?\n"
    monkeypatch.delenv("MD3_MODLE")
    monkeypatch.setenv("MD3_LIMIT", "-1")
    result = md3("caption", pictures)
    assert (result.exit_code, result.stderr[:17]) == (1, "error: MD3_LIMIT:")


def test_flags_of_a_pair_by_either_name(md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD3_NO_CACHE", "1")
    md3("caption", pictures)
    assert md3.models[-1].options.cache is False
    md3("caption", pictures, "--cache")
    assert md3.models[-1].options.cache is True


def test_an_output_that_cannot_be_locked_is_told(md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("md3cli.system.fcntl.flock", refused)
    result = md3("caption", pictures, "-o", "o.jsonl")
    assert result.exit_code == 0
    assert "warning: o.jsonl.lock cannot be locked on this file system" in result.stderr
