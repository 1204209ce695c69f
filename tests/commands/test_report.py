"""`md3 export` as typed: exit status, what it says, how fast it starts."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from md3cli.cli import app
from md3cli.exporters import FORMATS
from md3cli.finished.run_json import seal_of

BOX = {"label": "car", "x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "score": 0.9}
SINGLE = {"jsonl": "out.jsonl", "coco": "out.json", "parquet": "out.parquet", "csv": "out.csv", "html": "out.html"}


def md3(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], prog_name="md3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder of one picture with a box, a caption and a failure."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (120, 80)).save(tmp_path / "pictures/a b.png")
    run = tmp_path / "run"
    run.mkdir()
    head = {
        "schema": "md3/1",
        "image": "a b.png",
        "width": 120,
        "height": 80,
        "model": "tiny@1",
        "meta": {},
        "error": None,
    }
    failed = {"type": "decode", "message": "cut \x1b[31m short", "retry": False}
    records = [
        {**head, "id": "1", "task": "detect", "prompt": "car", "objects": [BOX], "finish_reason": "stop"},
        {**head, "id": "2", "task": "caption", "prompt": None, "length": "short", "caption": "a car"},
        {**head, "id": "3", "image": "bad.png", "task": "detect", "prompt": "car", "error": failed},
    ]
    (run / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    root = str(tmp_path / "pictures")
    (run / "run.json").write_text(json.dumps({"root": root, "seal": seal_of(root)}))
    return run


@pytest.mark.parametrize("format", [*FORMATS, "html"])
def test_every_format_is_written(folder: Path, format: str) -> None:
    out = folder.parent / SINGLE.get(format, "out")
    result = md3(folder / "records.jsonl", "--format", format, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert out.is_file() if format in SINGLE else out.is_dir()


def test_a_run_folder_stands_for_its_records_and_the_suffix_for_the_format(folder: Path) -> None:
    out = folder.parent / "out.json"
    result = md3(folder, "-o", out)
    assert result.exit_code == 0
    assert result.stderr == (
        f"{out}: coco, 3 records, 1 images, 1 failed ones left out\n"
        "note: captions stand in each image's own `captions`, since readers of boxes take no other annotations\n"
    )


def test_without_a_file_the_document_is_printed(folder: Path) -> None:
    result = md3(folder, "--format", "coco")
    assert [category["name"] for category in json.loads(result.stdout)["categories"]] == ["car"]
    result = md3(folder, "--format", "csv")
    assert [row["label"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["car", "", ""]


def test_texts_beside_the_pictures_need_no_output(folder: Path) -> None:
    result = md3(folder, "-f", "txt", "--beside")
    assert result.exit_code == 0, result.output
    assert (folder.parent / "pictures/a b.txt").read_text() == "a car"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "say what to write"),
        (["-o", "out.xyz"], 2, "say what to write"),
        (["-f", "parquet"], 2, "cannot be printed"),
        (["-f", "unheard"], 2, "unheard"),
        (["-f", "overlay", "-o", "out", "--root", "nowhere"], 2, "--root nowhere"),
        (["-f", "coco", "--coco-ids-from", "gt.json"], 1, "gt.json"),
        (["-f", "coco", "--max-pixels", "many"], 2, "many"),
    ],
)
def test_mistakes_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    result = md3("run", *arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_records_that_are_not_there_or_no_records(tmp_path: Path) -> None:
    result = md3(tmp_path / "none.jsonl", "-f", "coco")
    assert (result.exit_code, "none.jsonl" in result.stderr) == (1, True)
    (tmp_path / "other.jsonl").write_text('{"text": "not ours"}\n')
    result = md3(tmp_path / "other.jsonl", "-f", "coco")
    assert (result.exit_code, "line 1" in result.stderr) == (1, True)


def test_what_stands_there_is_kept(folder: Path) -> None:
    out = folder.parent / "out.csv"
    out.write_text("mine")
    result = md3(folder, "-o", out)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert out.read_text() == "mine"
    assert md3(folder, "-o", out, "--overwrite").exit_code == 0
    assert out.read_text() != "mine"


@pytest.mark.process
def test_a_full_disk_leaves_nothing(folder: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from md3cli.exporters import *; from md3cli.errors import *\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "for format, out in (('coco', 'o.json'), ('voc', 'voc'), ('csv', 'o.csv'), ('txt', 'txt')):\n"
        "    try: export_records(Path(sys.argv[1]), format, Path(sys.argv[1]) / out, ExportOptions())\n"
        "    except OutputError as error: print(error)\n"
    )
    # No .pyc is written: the limit would cut them short.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write") >= 3
    assert {path.name for path in folder.iterdir()} <= {"records.jsonl", "run.json", "txt"}


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(folder: Path, number: signal.Signals, status: int) -> None:
    records = folder / "records.jsonl"
    head = json.loads(records.read_bytes().splitlines()[0])
    with records.open("a") as file:
        file.writelines(json.dumps({**head, "image": f"{n}.png"}) + "\n" for n in range(20_000))
    command = [sys.executable, "-m", "md3cli", "export", records, "-f", "voc", "-o", folder / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(folder.glob(".out.tmp-*/Annotations/*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=240)
    assert process.returncode == status
    assert "Traceback" not in said
    assert {path.name for path in folder.iterdir()} == {"records.jsonl", "run.json"}


@pytest.mark.process
def test_it_starts_light(folder: Path) -> None:
    code = (
        "import sys; from md3cli.cli import app\n"
        "try: app(['export', sys.argv[1], '-f', 'coco'], prog_name='md3')\n"
        "finally: print(sorted({'torch', 'pyarrow', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)\n"
        "assert len(sys.modules) < 450, len(sys.modules)"  # 317; they are what its half a second is made of
    )
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_hundred_thousand_records_to_coco(tmp_path: Path) -> None:
    """In 30 s and 300 MB, the limits promised for a machine with two cores."""
    record = {"schema": "md3/1", "id": "0" * 32, "image": "IMAGE", "width": 640, "height": 480, "task": "detect"}
    record |= {"prompt": "car", "objects": [BOX] * 3, "sha256": "0" * 64, "finish_reason": "stop"}
    record |= {"tokens": {"prompt": 738, "output": 31}, "model": "tiny@1", "meta": {}, "error": None}
    line = json.dumps(record)
    with (tmp_path / "records.jsonl").open("w") as file:
        file.writelines(line.replace("IMAGE", f"folder/{number:09d}.jpg") + "\n" for number in range(100_000))
    code = (
        "import re, sys; from pathlib import Path; from md3cli.exporters import *\n"
        "export_records(Path(sys.argv[1]), 'coco', Path(sys.argv[2]), ExportOptions())\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
    )
    start = time.monotonic()
    command = [sys.executable, "-c", code, tmp_path / "records.jsonl", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 30
    assert int(done.stdout) < 300_000
    assert len(json.loads((tmp_path / "out.json").read_bytes())["annotations"]) == 300_000
