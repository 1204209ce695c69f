"""Journeys of people who label: what they type, one command after the other, with the model of the package.

The run that is killed while it grows is in tests/run/test_add.py and tests/scale/test_added.py, the template over a
CSV with a misspelled column in tests/commands/test_prompts.py.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from program import clean_environment, isolate, records_of
from typer.testing import CliRunner, Result

from md3cli.cli import app

SCENES = Path(__file__).parents[1] / "examples" / "scenes"
THREE, TWO = ("circle", "square", "triangle"), ("star", "heart")
NUM_SCENES = 12


def md3(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="md3")
    assert result.exit_code == status, result.output
    return result


def detect(*arguments: object) -> Result:
    return md3("detect", *arguments, "--model", "tiny", "--no-progress")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run folder of three classes, finished; its pictures lie beside it in `scenes`."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder / "home")
        patch.setattr("md3cli.run.feed.num_auto_workers", lambda: 0)
        shutil.copytree(SCENES, folder / "scenes")
        detect(folder / "scenes", *THREE, "-o", f"{folder / 'run'}/", "-f", "coco", "-f", "yolo")
        yield folder


@pytest.fixture
def work(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run of three classes of one's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(three / "run", "run")
    os.symlink(three / "scenes", "scenes")
    return three / "scenes"


def shown(path: str | Path) -> Counter[str]:
    """How many boxes of each category a COCO file has."""
    document = json.loads(Path(path).read_bytes())
    names = {one["id"]: one["name"] for one in document["categories"]}
    return Counter(names[one["category_id"]] for one in document["annotations"])


def categories(path: str | Path) -> list[tuple[int, str]]:
    return [(one["id"], one["name"]) for one in json.loads(Path(path).read_bytes())["categories"]]


def found_in(records: list[dict[str, Any]]) -> Counter[str]:
    return Counter(thing["label"] for one in records for thing in one["objects"])


def test_three_classes_then_two_more(work: Path) -> None:
    before = Path("run/records.jsonl").read_bytes().splitlines()
    refused = md3("detect", work, *THREE, *TWO, "-o", "run/", "-f", "coco", "-f", "yolo", "--model", "tiny", status=2)
    assert (
        "it has detect circle, detect square and detect triangle; you now ask detect star and detect heart as well"
        in (" ".join(refused.stderr.split()))
    )
    assert "--add" in refused.stderr
    added = detect(work, *TWO, "-o", "run/", "-f", "coco", "-f", "yolo", "--add")
    assert f"{len(TWO) * NUM_SCENES} of {len(TWO) * NUM_SCENES} ok" in added.stderr
    records = records_of(Path("run/records.jsonl"))
    assert [one["prompt"] for one in records] == [*THREE, *TWO] * NUM_SCENES
    assert set(before) < set(Path("run/records.jsonl").read_bytes().splitlines())
    assert categories("run/coco.json") == list(enumerate((*THREE, *TWO), 1))
    assert yaml.safe_load(Path("run/yolo/data.yaml").read_text())["names"] == dict(enumerate((*THREE, *TWO)))
    assert shown("run/coco.json") == found_in(records)
    assert md3("verify", "run").exit_code == 0


def test_one_class_is_renamed(work: Path) -> None:
    """At the next start, which asks the model nothing, and later by an export alone."""
    before, journal = shown("run/coco.json"), Path("run/records.jsonl").read_bytes()
    again = detect(work, "disc=circle", *THREE[1:], "-o", "run/", "-f", "coco", "-f", "yolo")
    assert "nothing to do" in again.stderr
    assert categories("run/coco.json") == [(1, "disc"), (2, "square"), (3, "triangle")]
    assert shown("run/coco.json") == Counter(
        disc=before["circle"], square=before["square"], triangle=before["triangle"]
    )
    Path("labels.toml").write_text("[[label]]\nname = 'polygon'\nprompts = ['square', 'triangle']\n")
    md3("export", "run", "--labels", "labels.toml", "--nms", "1", "-o", "other.json")
    assert categories("other.json") == [(1, "polygon"), (2, "disc")]
    assert shown("other.json") == Counter(polygon=before["square"] + before["triangle"], disc=before["circle"])
    assert Path("run/records.jsonl").read_bytes() == journal


def test_the_threshold_that_serves_each_class_best(work: Path) -> None:
    truth = work / "instances.json"

    def f1() -> float:
        sections = json.loads(md3("eval", "run", "--gt", truth, "--json").stdout)["sections"]
        return float(next(one for one in sections if one["name"] == "boxes")["scores"]["F1"])

    plain, journal = f1(), Path("run/records.jsonl").read_bytes()
    md3("eval", "run", "--gt", truth, "--best-thresholds", "best.toml")
    text = Path("best.toml").read_text()
    least = [float(score) for score in re.findall(r"min_score = ([0-9.]+)", text)]
    assert len(least) == len(THREE)
    md3("eval", "run", "--gt", truth, "--best-thresholds", "best.toml", status=2)
    assert Path("best.toml").read_text() == text  # only with --overwrite
    detect(work, "--labels", "best.toml", "-o", "run/", "-f", "coco", "-f", "yolo")
    assert f1() > plain
    kept = Counter(
        thing["label"]
        for one in records_of(Path("run/records.jsonl"))
        for thing in one["objects"]
        if thing["score"] >= least[THREE.index(one["prompt"])]
    )
    assert shown("run/coco.json") == kept
    assert sum(kept.values()) < sum(found_in(records_of(Path("run/records.jsonl"))).values())
    assert Path("run/records.jsonl").read_bytes() == journal


def test_the_fifty_least_sure_of_all_runs_as_a_report(work: Path) -> None:
    detect(work, *TWO, "-o", "other/")
    both = records_of(Path("run/records.jsonl")) + records_of(Path("other/records.jsonl"))
    scored = [one for one in both if one["objects"]]
    unsure = {id(one): min(thing["score"] for thing in one["objects"]) for one in scored}
    wanted = sorted(scored, key=lambda one: unsure[id(one)])
    md3("select", "run", "other", "--sort", "least-sure", "--limit", "50", "-o", "doubtful.jsonl")
    doubtful = records_of(Path("doubtful.jsonl"))
    assert len(doubtful) == 50
    assert [one["id"] for one in doubtful[: len(wanted)]] == [one["id"] for one in wanted[:50]]
    md3("report", "run", "other", "--sort", "least-sure", "--limit", "50", "-o", "doubtful.html")
    md3("report", "doubtful.jsonl", "-o", "again.html")
    pages = [cards_of(name) for name in ("doubtful.html", "again.html")]
    assert pages[0] == pages[1]
    entries = [(card["name"], one["prompt"]) for card in pages[0] for one in card["records"]]
    assert entries == [(one["image"], one["prompt"]) for one in doubtful]
    assert all("thumbnail" in card for card in pages[0])  # of both runs, also through the selection's run.json
    scores = [
        min(shape["score"] for shape in one["shapes"])
        for card in pages[0]
        for one in card["records"]
        if one.get("shapes")
    ]
    assert scores == sorted(scores)


def cards_of(name: str) -> list[dict[str, Any]]:
    data = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', Path(name).read_text(), re.DOTALL)
    assert data is not None
    return [card for piece in json.loads(data[1])["cards"] for card in piece]


def test_the_runs_of_two_machines_become_one(work: Path) -> None:
    for part in (1, 2):
        detect(work, *THREE, "-o", f"machine{part}/", "--shard", f"{part}/2")
    whole = {one["id"]: one for one in records_of(Path("run/records.jsonl"))}
    md3("select", "machine1", "machine2", "-o", "both.jsonl")
    merged = records_of(Path("both.jsonl"))
    assert {one["id"]: one for one in merged} == whole
    assert len(merged) == len(whole)
    md3("export", "machine1", "machine2", "-o", "runs.json")
    md3("export", "both.jsonl", "-o", "file.json")
    assert Path("runs.json").read_bytes() == Path("file.json").read_bytes()
    assert shown("file.json") == shown("run/coco.json")
    assert categories("file.json") == categories("run/coco.json")
    md3("export", "both.jsonl", "-f", "yolo", "-o", "yolo")
    written = {path.name: path.read_bytes() for path in Path("yolo/labels").iterdir()}
    assert written == {path.name: path.read_bytes() for path in Path("run/yolo/labels").iterdir()}
    assert len(list(Path("yolo/images").iterdir())) == NUM_SCENES


def test_cameras_that_count_alike_are_told_apart(work: Path) -> None:
    """Two machines, whose pictures have the same names."""
    Path("night").mkdir()
    names = sorted(path.name for path in work.glob("*.png"))
    for one, other in pairwise([*names, names[0]]):
        shutil.copy(work / one, Path("night", other))
    detect("night", *THREE, "-o", "run2/")
    refused = md3("export", "run", "run2", "-o", "both.json", status=1)
    assert "--as NAME=RECORDS" in " ".join(refused.stderr.split())
    md3("export", "--as", "day=run", "--as", "night=run2", "-o", "both.json")
    images = [one["file_name"] for one in json.loads(Path("both.json").read_bytes())["images"]]
    assert images == [f"{folder}/{name}" for folder in ("day", "night") for name in names]
    assert shown("both.json") == Counter({name: 2 * count for name, count in shown("run/coco.json").items()})
    md3("export", "--as", "day=run", "--as", "night=run2", "-f", "yolo", "-o", "yolo")
    for name in names:
        assert Path("yolo/images/night", name).read_bytes() == Path("night", name).read_bytes()
        assert Path("yolo/images/day", name).read_bytes() == (work / name).read_bytes()


def test_a_class_list_from_a_yolo_file(work: Path) -> None:
    Path("data.yaml").write_text(
        "path: ../data\ntrain: images\nnc: 3\nnames:\n  2: heart\n  0: triangle\n  1: circle\n"
    )
    detect(work, "--labels", "data.yaml", "-f", "yolo", "-f", "coco", "-o", "yolo/")
    names = yaml.safe_load(Path("yolo/yolo/data.yaml").read_text())["names"]
    assert names == {0: "triangle", 1: "circle", 2: "heart"}
    assert categories("yolo/coco.json") == [(1, "triangle"), (2, "circle"), (3, "heart")]
    lines = [line for path in Path("yolo/yolo/labels").glob("*.txt") for line in path.read_text().splitlines()]
    places = Counter(names[int(line.split()[0])] for line in lines)
    assert places == shown("yolo/coco.json")
    assert places["circle"] == shown("run/coco.json")["circle"]
    Path("own.yaml").write_text(Path("yolo/yolo/data.yaml").read_text())  # ours is such a file as well
    md3("export", "run", "--labels", "own.yaml", "-o", "again.json")
    assert [name for _, name in categories("again.json")] == ["triangle", "circle", "heart", "square"]


# -- 100,000 records, and a million ----------------------------------------------------------------------

PROMPTS = ("car", "automobile", "dog", "person", "bicycle")
MEMORY_LIMIT_KB = 100_000


def write_large_run(path: Path, num_pictures: int, prompts: Sequence[str] = PROMPTS) -> None:
    draws = random.Random(17)
    facts = {"finish_reason": "stop", "tokens": {"prompt": 738, "output": 7}, "model": "tiny@1", "meta": {}}
    with path.open("w") as lines:
        for n in range(num_pictures):
            for place, prompt in enumerate(prompts):
                corners = [(draws.random() * 0.6, draws.random() * 0.6) for _ in range((n * 7 + place) % 4)]
                objects = [
                    {"label": prompt, "x_min": x, "y_min": y, "x_max": x + 0.3, "y_max": y + 0.3}
                    | {"score": round(draws.uniform(0.001, 0.999), 3)}
                    for x, y in corners
                ]
                head = {"schema": "md3/1", "id": f"{n * len(prompts) + place:032x}"}
                head |= {"image": f"day {n // 1000}/IMG_{n:06d}.jpg", "width": 640, "height": 480}
                line = head | {"task": "detect", "prompt": prompt, "objects": objects, "sha256": f"{n:064x}"}
                lines.write(json.dumps(line | facts | {"error": None}, separators=(",", ":")) + "\n")


# `ru_maxrss` would be that of this process, from which the child is made; VmHWM begins anew with the program.
MEASURE = """
import resource, sys, time
begin = time.monotonic()
from md3cli.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
usage = resource.getrusage(resource.RUSAGE_SELF)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # 0 without any
print(time.monotonic() - begin, usage.ru_utime + usage.ru_stime, int(peak.split()[1]) + children)
"""


def measured(*arguments: object) -> tuple[float, float, int]:
    """Seconds by the clock and of the processor, and the most memory in kB with a child's, of one command."""
    environment = clean_environment(Path("home").absolute())
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, cpu_s, memory_kb = done.stdout.split()
    return float(seconds), float(cpu_s), int(memory_kb)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a program is read from /proc")
def test_thresholds_and_names_of_100_000_records_change_without_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory is bounded; how long it takes beside a plain export is printed, for a person to judge."""
    monkeypatch.chdir(tmp_path)
    write_large_run(Path("r.jsonl"), 100_000 // len(PROMPTS))
    Path("labels.txt").write_text("vehicle=car\nvehicle=automobile\ndog\nperson\nbicycle\n")
    names = ["--labels", "labels.txt"]
    choices = [[], ["--min-score", "0.4"], names, [*names, "--min-score", "0.4", "--nms", "0.5"]]
    for suffix in ("csv", "json"):
        plain_s = plain_cpu_s = 0.0
        for choice in choices:
            seconds, cpu_s, memory_kb = measured("export", "r.jsonl", "-o", f"o.{suffix}", "--overwrite", *choice)
            if not choice:
                plain_s, plain_cpu_s = seconds, cpu_s
            with capsys.disabled():
                what = f"{suffix} {' '.join(choice) or 'plain'}: {seconds:.1f} s ({cpu_s:.1f} s of the processor)"
                ratios = f"{seconds / plain_s:.2f} ({cpu_s / plain_cpu_s:.2f}) of plain"
                print(f"\n{what}, {ratios}, {memory_kb / 1000:.0f} MB", end="")
            assert memory_kb <= MEMORY_LIMIT_KB
            assert Path(f"o.{suffix}").stat().st_size > 1_000_000


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a program is read from /proc")
def test_a_million_records_become_a_flat_set_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How long it takes is printed; a million small files are a matter of the file system as well."""
    monkeypatch.chdir(tmp_path)
    write_large_run(Path("r.jsonl"), 1_000_000, ["car"])
    try:
        line = ["export", "r.jsonl", "-f", "yolo", "--flat", "--split", "train=0.8,val=0.2", "-o", "set"]
        seconds, cpu_s, memory_kb = measured(*line)
        with capsys.disabled():
            print(f"\n{seconds:.1f} s ({cpu_s:.1f} s of the processor), {memory_kb / 1000:.0f} MB")
        counts = [len(os.listdir(f"set/labels/{name}")) for name in ("train", "val")]
        assert sum(counts) == 1_000_000
        assert counts[0] == pytest.approx(800_000, abs=2_000)  # five standard deviations
        assert memory_kb <= 300_000
    finally:
        shutil.rmtree("set", ignore_errors=True)
        Path("r.jsonl").unlink()
