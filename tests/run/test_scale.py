"""Large runs: memory, open files, and the start of a resume behind a million records. Minutes, so with -m slow."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
from program import clean_environment, make_pictures, start
from stub_engine import StubModel, answer

from md3cli.images.crops import PreparedImage
from md3cli.records import ImageFacts, ImageItem, Request, Task, make_record
from md3cli.run.journal import encode_record
from md3cli.run.record_index import RequestIds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
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
    assert process.wait(120) == 0
    assert num_records(out) == count + num_new
    print(f"first new record after {first_s:.1f} s, of them {cpu_s:.1f} s on the CPU; {peak_mb:.0f} MB")
    assert peak_mb < 1000
    assert cpu_s < 10, "on the processor, as what runs beside it slows the clock down"


def write_journal(path: Path, names: list[str]) -> None:
    """Records of these pictures as a run would have written them, but for what the pictures show."""
    identity = StubModel().identity
    ids = RequestIds(identity)
    picture = PreparedImage(None, None, 24, 24, "0" * 64)  # type: ignore[arg-type]
    result = answer(0, picture, CAPTION).result
    record = make_record(
        "<id>", ImageItem("<name>", ""), ImageFacts(24, 24, "0" * 64), CAPTION, identity,
        result=result or {}, finish_reason="stop", prompt_tokens=10, output_tokens=3, meta={},
    )  # fmt: skip
    head, middle, tail = encode_record(record).decode().replace("<name>", "<id>").split("<id>")
    with open(path, "w") as file:
        file.writelines(f"{head}{ids.next_id(name, CAPTION)}{middle}{name}{tail}" for name in names)
