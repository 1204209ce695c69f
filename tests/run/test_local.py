"""A whole run with a stub in the model's place: order, resume, outputs, memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image
from program import Program, clean_environment, isolate, make_pictures, records_of, start
from stub_engine import StubEngine, StubModel, answer

from md3cli.errors import CheckpointError, OutputError
from md3cli.images.crops import PreparedImage
from md3cli.records import Answer, ImageFacts, ImageItem, Request, Task, make_record
from md3cli.run.journal import Journal, encode_record
from md3cli.run.record_index import RequestIds


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", 11)


def test_records_are_in_input_order_though_answers_are_not(md3: Program, pictures: Path) -> None:
    (pictures / "p3.png").write_bytes(b"broken")
    records = records_of(md3("detect", pictures, "b", "a").stdout)
    assert [(r["image"], r["prompt"]) for r in records] == [(f"p{i}.png", p) for i in range(11) for p in "ba"]
    assert [r["image"] for r in records if r["error"]] == ["p3.png", "p3.png"]


@pytest.mark.process
def test_two_runs_give_the_same_lines_whatever_the_batch(md3: Program, pictures: Path) -> None:
    runs = [md3("caption", pictures, "--batch-size", str(size), "--workers", "2").stdout for size in (1, 3, 64)]
    assert runs[0] == runs[1] == runs[2]


def test_one_picture_asked_often_is_decoded_once(md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = pictures / "rows.jsonl"
    rows = [{"image": "p0.png", "task": "detect", "prompt": prompt} for prompt in "abc"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = []
    submit = md3cli_decode().PicturePool.submit
    monkeypatch.setattr(
        "md3cli.images.pool.PicturePool.submit", lambda self, *what: opened.append(what) or submit(self, *what)
    )
    assert len(records_of(md3("run", manifest, "--task", "detect:x").stdout)) == 3
    assert len(opened) == 1


def md3cli_decode() -> object:
    import md3cli.images.pool

    return md3cli.images.pool


def test_repeats_of_a_request_are_records_of_their_own(md3: Program, pictures: Path) -> None:
    (pictures / "list.txt").write_text("p0.png\np1.png\np0.png\n")
    records = records_of(md3("detect", pictures / "list.txt", "car", "car").stdout)
    assert len(records) == 6
    assert len({record["id"] for record in records}) == 6
    assert records[0]["objects"] == records[5]["objects"]


# -- resume --------------------------------------------------------------------------------------------


def test_the_same_command_resumes_and_ends_with_the_same_file(md3: Program, pictures: Path) -> None:
    command = ("detect", pictures, "car", "person", "-o", "out.jsonl")
    assert md3(*command).exit_code == 0
    whole = Path("out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for num_lines, torn in ((0, b""), (1, b""), (9, b'{"schema":"md3/1","id":"12'), (22, b"")):
        Path("out.jsonl").write_bytes(b"".join(lines[:num_lines]) + torn)
        result = md3(*command)
        assert result.exit_code == 0
        assert Path("out.jsonl").read_bytes() == whole
        assert md3.num_answered == 22 - num_lines
        assert ("repaired out.jsonl" in result.stderr.replace(f"{os.getcwd()}/", "")) == bool(torn)


def test_what_is_done_is_not_even_opened(md3: Program, pictures: Path) -> None:
    command = ("caption", pictures, "-o", "out.jsonl")
    md3(*command)
    for picture in pictures.iterdir():
        picture.write_bytes(b"not a picture any more")
    result = md3(*command)
    assert result.exit_code == 0
    assert md3.models[-1].engine is None
    assert "nothing to do: all 11 were done before" in result.stderr


def test_overwrite_starts_over(md3: Program, pictures: Path) -> None:
    md3("caption", pictures, "-o", "out.jsonl")
    assert md3("caption", pictures, "--length", "long", "-o", "out.jsonl", "--overwrite").exit_code == 0
    assert md3.num_answered == 11
    assert {record["length"] for record in records_of(Path("out.jsonl"))} == {"long"}


@pytest.mark.parametrize("num_broken", [1, 11])
def test_a_model_that_cannot_be_loaded_leaves_the_old_records_though_pictures_failed_before_it(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch, num_broken: int
) -> None:
    command = ("detect", pictures, "x", "-o", "out/", "-f", "csv")
    md3(*command)
    before = {path: path.read_bytes() for path in Path("out").iterdir() if path.suffix != ".lock"}
    for i in range(num_broken):
        (pictures / f"p{i}.png").write_bytes(b"broken")

    def cannot_be_loaded(model: StubModel) -> StubEngine:
        raise CheckpointError("no such device")

    with monkeypatch.context() as broken:
        broken.setattr(StubModel, "load", cannot_be_loaded)
        assert md3(*command, "--overwrite").exit_code == 1
    assert {path: path.read_bytes() for path in before} == before
    assert md3(*command, "--overwrite").exit_code == 3
    assert [bool(record["error"]) for record in records_of(Path("out/records.jsonl"))] == [
        i < num_broken for i in range(11)
    ]


def test_starting_over_takes_away_what_was_made_of_the_old_records(md3: Program, pictures: Path) -> None:
    formats = ("coco", "csv", "html", "overlay", "txt", "yolo")
    md3("detect", pictures, "x", "-o", "out/", *(word for format in formats for word in ("-f", format)))
    Path("out/overlay/notes.md").write_text("mine")
    Path("out/mine.json").write_text("mine")
    assert md3("detect", pictures, "y", "-o", "out/", "-f", "csv", "--overwrite").exit_code == 0
    left = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())
    ours = [".md3", "records.csv", "records.jsonl", "records.jsonl.lock", "run.json"]
    assert left == sorted([*ours, "mine.json", "overlay/notes.md"])


def test_starting_over_in_a_folder_without_a_run_takes_nothing_away(md3: Program, pictures: Path) -> None:
    Path("out").mkdir()
    Path("out/coco.json").write_text("mine")
    assert md3("detect", pictures, "y", "-o", "out/", "-f", "csv", "--overwrite").exit_code == 0
    assert Path("out/coco.json").read_text() == "mine"


def test_retry_failed_leaves_one_record_a_request_in_input_order(md3: Program, pictures: Path) -> None:
    good = (pictures / "p4.png").read_bytes()
    (pictures / "p4.png").write_bytes(b"broken")
    command = ("caption", pictures, "-o", "out.jsonl")
    assert md3(*command).exit_code == 3
    assert md3(*command).exit_code == 3, "the failure still stands in OUTPUT"
    assert md3.num_answered == 0
    (pictures / "p4.png").write_bytes(good)
    assert md3(*command, "--retry-failed").exit_code == 0
    assert md3.num_answered == 1
    records = records_of(Path("out.jsonl"))
    assert [record["image"] for record in records] == [f"p{i}.png" for i in range(11)]
    assert not any(record["error"] for record in records)


def test_input_that_changed_between_two_starts(md3: Program, pictures: Path) -> None:
    """What came since is done, what went keeps its record, nothing is done twice."""
    command = ("caption", pictures, "-o", "out.jsonl")
    md3(*command)
    before = Path("out.jsonl").read_bytes()
    (pictures / "p3.png").unlink()
    (pictures / "p5.png").write_bytes(b"not a picture any more")
    shutil.copy(pictures / "p0.png", pictures / "new.png")
    assert md3(*command).exit_code == 0
    assert md3.num_answered == 1
    after = Path("out.jsonl").read_bytes()
    assert after.startswith(before)
    assert [record["image"] for record in records_of(after[len(before) :])] == ["new.png"]


@pytest.mark.process
def test_a_second_process_is_refused_with_the_pid_of_the_first(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    out = tmp_path / "out.jsonl"
    with start("caption", pictures, "-o", out, step_s=600) as first:
        while not out.exists():
            time.sleep(0.02)
            assert first.poll() is None
        for options in ((), ("--overwrite",)):
            second = start("caption", pictures, "-o", out, *options)
            _, stderr = second.communicate(timeout=240)
            assert second.returncode == 1
            assert f"being written by another run: process {first.pid} on".encode() in stderr
        first.kill()
    third = start("caption", pictures, "-o", out)
    third.communicate(timeout=240)
    assert third.returncode == 0, "the kernel has freed the lock"
    assert [record["image"] for record in records_of(out)] == [f"p{i}.png" for i in range(11)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["caption", "--length", "long"], "it has caption normal; you now ask caption long"),
        (["caption", "--temperature", "0.5"], "temperature 0, now 0.5"),
        (["caption", "-m", "other"], "model stub@moondream3, now stub@other"),
        (["detect", "car"], "it has caption normal; you now ask detect car"),
    ],
)
def test_output_of_another_command_is_refused(md3: Program, pictures: Path, change: list[str], message: str) -> None:
    md3("caption", pictures, "-o", "out.jsonl")
    before = Path("out.jsonl").read_bytes()
    command, *rest = change
    result = md3(command, pictures, *rest, "-o", "out.jsonl")
    assert result.exit_code == 2
    assert message in result.stderr
    assert Path("out.jsonl").read_bytes() == before


def test_a_foreign_file_is_not_written_over(md3: Program, pictures: Path) -> None:
    for name, content in {"mine.jsonl": b'{"a": 1}\n', "mine.json": b"{}", "mine.csv": b"x"}.items():
        Path(name).write_bytes(content)
        result = md3("caption", pictures, "-o", name)
        assert result.exit_code == 2
        assert "choose another -o" in result.stderr
        assert ("--overwrite to replace it" in result.stderr) == (name != "mine.jsonl"), "never offered for records"
        assert Path(name).read_bytes() == content


def test_a_held_output_is_refused(md3: Program, pictures: Path) -> None:
    with Journal.open(Path("out.jsonl")):
        result = md3("caption", pictures, "-o", "out.jsonl")
    assert result.exit_code == 1
    assert f"is being written by another run: process {os.getpid()}" in result.stderr


def test_memory_that_runs_out_is_told_once_and_noted(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = StubEngine.step

    def halve(self: StubEngine) -> object:
        self.batch_size = max(1, self.batch_size // 2)
        return step(self)

    monkeypatch.setattr(StubEngine, "step", halve)
    result = md3("detect", pictures, "a", "fail me", "-o", "out.jsonl", "--batch-size", "8")
    assert result.exit_code == 3
    assert result.stderr.count("out of memory with a batch of 8: going on with 4") == 1
    assert result.stderr.count("out of memory") == 1
    assert json.loads(Path("out.jsonl.run.json").read_text())["starts"][-1]["batch_sizes"] == [8, 4, 2, 1]
    errors = [record["error"] and record["error"]["type"] for record in records_of(Path("out.jsonl"))]
    assert errors == [None, "model"] * 11


# -- outputs ---------------------------------------------------------------------------------------------


def test_suffixes_choose_the_format_and_keep_the_records_beside(md3: Program, pictures: Path) -> None:
    assert md3("detect", pictures, "car", "-o", "out.json").exit_code == 0
    assert len(json.loads(Path("out.json").read_text())["annotations"]) == 11
    assert len(records_of(Path("out.json.records.jsonl"))) == 11
    info = json.loads(Path("out.json.run.json").read_text())
    assert info["root"] == str(pictures)
    assert info["counts"] == {"ok": 11, "failed": 0, "errors": {}}
    assert info["stages"].keys() == {"load", "vision", "prefill", "decode"}
    assert info["starts"][0]["exit_status"] == 0
    assert Path("out.json.lock").exists()
    for name in ("out.parquet", "out.csv"):
        assert md3("detect", pictures, "car", "-o", name).exit_code == 0
        assert Path(name).stat().st_size > 100


def test_a_folder_holds_records_and_each_format(md3: Program, pictures: Path) -> None:
    result = md3("detect", pictures, "car", "-o", "run/", "-f", "coco", "-f", "yolo", "-f", "html")
    assert result.exit_code == 0
    assert {path.name for path in Path("run").iterdir()} == {
        ".md3",
        "records.jsonl",
        "records.jsonl.lock",
        "run.json",
        "coco.json",
        "yolo",
        "report.html",
    }
    coco = Path("run/coco.json").read_bytes()
    shutil.rmtree("run/yolo")
    assert md3("detect", pictures, "car", "-o", "run/", "-f", "coco", "-f", "yolo", "-f", "html").exit_code == 0
    assert Path("run/yolo").is_dir(), "documents are made again from the records"
    assert Path("run/coco.json").read_bytes() == coco


def test_a_document_can_be_printed(md3: Program, pictures: Path, tmp_path: Path) -> None:
    result = md3("detect", pictures, "car", "-f", "coco")
    assert len(json.loads(result.stdout)["images"]) == 11
    assert md3("detect", pictures, "car", "-f", "csv").stdout.startswith("image,")
    left = [path.name for path in (tmp_path / "home/cache/md3cli").iterdir()]
    assert left == ["own-runs.key"], "nothing is left behind"


def test_a_disk_that_fills_up_is_status_1_and_loses_nothing(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Journal.append

    def full(self: Journal, records: list[dict[str, object]]) -> None:
        append(self, records[:4])
        raise OutputError("cannot write out.jsonl: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        result = md3("caption", pictures, "-o", "out.jsonl")
    assert result.exit_code == 1
    assert result.stderr.endswith("error: cannot write out.jsonl: No space left on device\n")
    assert 1 <= len(records_of(Path("out.jsonl"))) <= 4
    assert md3("caption", pictures, "-o", "out.jsonl").exit_code == 0
    assert [record["image"] for record in records_of(Path("out.jsonl"))] == [f"p{i}.png" for i in range(11)]


def test_shards_part_the_images(md3: Program, pictures: Path) -> None:
    for shards in (("0/3", "1/3", "2/3"), ("1/3", "2/3", "3/3")):
        parts = [{r["image"] for r in records_of(md3("caption", pictures, "--shard", s).stdout)} for s in shards]
        assert sorted(image for part in parts for image in part) == sorted(f"p{i}.png" for i in range(11))


def test_root_confines(md3: Program, pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (tmp_path / "rows.csv").write_text("image\np0.png\n../outside.png\n")
    records = records_of(md3("caption", tmp_path / "rows.csv", "--root", pictures).stdout)
    assert [record["error"] and record["error"]["type"] for record in records] == [None, "outside_root"]


def test_verbose_names_each_failure_and_quiet_says_nothing(md3: Program, pictures: Path) -> None:
    (pictures / "p0.png").write_bytes(b"x")
    assert "warning: p0.png: not_an_image:" in md3("caption", pictures, "-v", "-o", "a.jsonl").stderr
    assert md3("caption", pictures, "--quiet", "-o", "b.jsonl").stderr == ""


def test_nothing_a_file_is_called_reaches_the_terminal_raw(md3: Program, pictures: Path) -> None:
    (pictures / "a\x1b[31m\n.png").write_bytes(b"x")
    result = md3("caption", pictures, "-v")
    assert "\x1b" not in result.stderr + result.stdout
    assert "a\\x1b[31m\\x0a.png" in result.stderr


def test_a_window_smaller_than_the_pictures_ahead(md3: Program, pictures: Path) -> None:
    make_pictures(pictures, 70)
    assert len(records_of(md3("caption", pictures, "--batch-size", "1").stdout)) == 70


@pytest.mark.process
def test_a_late_picture_holds_back_the_records_behind_it(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(pictures, 80)
    monkeypatch.setattr("md3cli.run.order.BATCHES_AHEAD", 2)
    from md3cli.images.pool import PicturePool

    decode = PicturePool._decode_in_worker

    def slow_first(self: PicturePool, item: ImageItem, data: bytes | None) -> object:
        if item.name == "p0.png":
            time.sleep(1.5)
        return decode(self, item, data)

    monkeypatch.setattr(PicturePool, "_decode_in_worker", slow_first)
    records = records_of(md3("caption", pictures, "--batch-size", "2", "--workers", "2").stdout)
    assert [record["image"] for record in records] == [f"p{i}.png" for i in range(80)]


# ---- large runs, which take minutes: memory, open files, the start of a resume -------------------


OPEN_FILES = 256
CAPTION = Request(Task.CAPTION)


def memory_mb(pid: int, kind: str = "VmRSS") -> float:
    """`kind` VmRSS is what a process holds now, VmHWM the most it ever held."""
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def num_records(out: Path) -> int:
    with open(out, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_100_000_pictures_in_bounded_memory_with_few_files(tmp_path: Path) -> None:
    count, seeds = 100_000, make_pictures(tmp_path / "seeds", 20)
    for i in range(count):
        folder = tmp_path / f"pictures/{i // 1000}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(seeds / f"p{i % 20}.png", folder / f"{i}.png")
    out = tmp_path / "out.jsonl"
    command = ("caption", tmp_path / "pictures", "-o", out, "--batch-size", 16, "--workers", 2, "--quiet")
    environment = clean_environment(tmp_path / "home")
    process = start(*command, env=environment, preexec_fn=limit_files, stderr=subprocess.DEVNULL)
    samples_mb = []
    while process.poll() is None:
        time.sleep(0.5)
        with contextlib.suppress(OSError, IndexError):  # it ends, or its workers do
            workers = children_of(process.pid)
            sample_mb = sum(map(memory_mb, [process.pid, *workers]))
            if len(workers) == 2 and num_records(out) > count // 10:
                samples_mb.append(sample_mb)
    early_mb, late_mb = samples_mb[0], max(samples_mb)
    assert process.returncode == 0
    assert num_records(out) == count
    print(f"{early_mb:.0f} MB at 10 %, {late_mb:.0f} MB at most later")
    assert late_mb - early_mb < 50


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_resume_behind_a_million_records(tmp_path: Path) -> None:
    count, num_new = 1_000_000, 10
    pictures, out = make_pictures(tmp_path / "pictures", num_new), tmp_path / "out.jsonl"
    names = [f"gone/{i}.png" for i in range(count)]
    manifest = pictures / "all.txt"
    manifest.write_text("".join(f"{name}\n" for name in [*names, *(f"p{i}.png" for i in range(num_new))]))
    write_journal(out, names)
    environment = clean_environment(tmp_path / "home")
    size, started = out.stat().st_size, time.monotonic()
    process = start("caption", manifest, "-o", out, env=environment, stderr=subprocess.DEVNULL, step_s=0.5)
    while out.stat().st_size == size:
        time.sleep(0.02)
        assert process.poll() is None
    first_s, cpu_s, peak_mb = time.monotonic() - started, cpu_seconds(process.pid), memory_mb(process.pid, "VmHWM")
    assert process.wait(240) == 0
    assert num_records(out) == count + num_new
    print(f"first new record after {first_s:.1f} s, of them {cpu_s:.1f} s on the CPU; {peak_mb:.0f} MB")
    assert peak_mb < 1000
    assert cpu_s < 10, "on the processor, as what runs beside it slows the clock down"


def write_journal(path: Path, names: list[str]) -> None:
    """Records of these pictures as a run would have written them, but for what the pictures show."""
    identity = StubModel().identity
    ids = RequestIds(identity)
    picture = PreparedImage(None, None, 24, 24, "0" * 64)  # type: ignore[arg-type]
    answered = Answer(0, answer(0, picture, CAPTION).result, "stop", 10, 3)
    record = make_record("<id>", ImageItem("<name>", ""), ImageFacts(24, 24, "0" * 64), CAPTION, identity, answered, {})
    head, middle, tail = encode_record(record).decode().replace("<name>", "<id>").split("<id>")
    with open(path, "w") as file:
        file.writelines(f"{head}{ids.next_id(name, CAPTION)}{middle}{name}{tail}" for name in names)
