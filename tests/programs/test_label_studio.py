"""A Label Studio server: a project made as the notes of the export say, every picture fetched, all exported back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import programs
import pytest
from finished_runs import Record, Run, about, failure, record
from PIL import Image
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.finished.run_json import seal_of

pytestmark = programs.MARKS

EXAMPLE = Path(__file__).parents[2] / "examples/label_studio_project.sh"
START_TIMEOUT_S = 400  # 40 s for its migrations on two free cores
TURNED = "turned.jpg"
SIZES = {
    "a/photo.jpg": (640, 427),
    "b/photo.jpg": (333, 77),  # equal base names in two folders
    "a/photo.png": (640, 427),  # equal stems in one
    "wide.png": (12_000, 31),
    TURNED: (300, 200),  # stored as 200 x 300
    "hash # 50% off.png": (97, 53),
    "50%25.png": (97, 53),
    "q?d=1&e=2;f.png": (97, 53),
    "plus+plus.png": (97, 53),
    "übung/日本語 ☃.png": (97, 53),
    "e\u0301.png": (97, 53),
    "quote\"'<b>.png": (97, 53),
    "line\nbreak.png": (97, 53),
    "back\\slash.png": (97, 53),
    " lead/trail .png": (97, 53),
    "{{x}} $image.png": (97, 53),
    "n" * 251 + ".png": (97, 53),
    "empty.png": (97, 53),  # nothing found on it
}
LABELS = ("zebra", "car", ' two  words "x" <b>&amp;', "$image", "日本")  # not in the order of the alphabet
META = {"shop": 'Köln "<b>"', "shelf": 3, "seen": [True, None, {"by": "me"}]}
TEXTS = ["a <b>caption</b>,\nof two lines", "How many?\n2 & more"]
SAID = 'What "colour" is the car?\nred <or> & blue'  # of the first car of each picture
# The server lives until stdin ends, however the process that holds the other end ends; then its folder goes.
KEEPER = """
import os, shutil, signal, subprocess, sys
folder, *command = sys.argv[1:]
with open(os.path.join(folder, "log"), "wb") as log:
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    sys.stdin.read()
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
shutil.rmtree(folder)
"""
# What a user does in the project's pages, by the interface that those pages use.
PROJECT = """
import hashlib, io, json, sys, zipfile
from pathlib import Path
import requests
from label_studio_sdk import LabelStudio

url, token, export, out, *folders = sys.argv[1:]
out, export = Path(out), Path(export)
client = LabelStudio(base_url=url, api_key=token)
session = requests.Session()
session.headers["Authorization"] = f"Token {token}"

def ask(method, path, **request):
    answer = session.request(method, url + path, **request)
    assert answer.ok, f"{path}: {answer.status_code} {answer.text[:2000]}"
    return answer

interface = (export / "interface.xml").read_text(encoding="utf-8")
project = client.projects.create(title="md3 test", label_config=interface).id
for folder in folders:
    client.import_storage.local.create(project=project, path=folder, title=folder[-50:], use_blob_urls=True)
with (export / "tasks.json").open("rb") as tasks:
    ask("POST", f"/api/projects/{project}/import", files={"file": ("tasks.json", tasks, "application/json")})
pictures = [session.get(url + task.data["image"]) for task in client.tasks.list(project=project, fields="all")]
accept = {"id": "predictions_to_annotations", "project": project}
ask("POST", "/api/dm/actions", params=accept, json={"selectedItems": {"all": True, "excluded": []}})
exported = f"/api/projects/{project}/export?download_all_tasks=true&exportType="
(out / "project.json").write_bytes(ask("GET", exported + "JSON").content)
coco = zipfile.ZipFile(io.BytesIO(ask("GET", exported + "COCO").content))
(out / "coco.json").write_bytes(coco.read("result.json"))
zipfile.ZipFile(io.BytesIO(ask("GET", exported + "YOLO").content)).extractall(out / "yolo")
print(json.dumps([[picture.status_code, hashlib.sha256(picture.content).hexdigest()] for picture in pictures]))
"""


def box(label: str, *corners: float, score: float = 0.9) -> dict[str, Any]:
    return {"label": label, **dict(zip(("x_min", "y_min", "x_max", "y_max"), corners, strict=True)), "score": score}


def records_of(name: str, number: int) -> Iterator[Record]:
    """Yield what was asked of a picture; boxes that differ from picture to picture, one that leaves it."""
    size = dict(zip(("width", "height"), SIZES[name], strict=True))
    is_empty = name == "empty.png"
    shift = number / 997
    for place, label in enumerate(LABELS):
        inner = box(label, 0.1 + shift, 0.123456789, 0.4 + place / 7 + shift / 3, 0.7777777)
        found = [] if is_empty else [inner, box(label, 0.5 + shift, 0.5, 1.2, 1.3, score=0.4)]
        finder = record(name, "detect", label, objects=found, **size)
        yield finder
        if label == "car" and not is_empty:
            question, answer = SAID.split("\n")
            yield about(finder, 0, question, answer=answer, **size)
    ring = {
        "label": "ring",
        "svg_path": "M 0 0 L 1 0 L 1 1 Z",
        "bbox": box("", 0.1, 1 / 3, 0.5, 0.75 + shift),
        "score": 0.7,
    }
    yield record(name, "segment", "ring", segments=[] if is_empty else [ring], **size)
    for label in ("nose", "car"):
        points = [{"label": label, "x": x, "y": 0.9999999, "score": 0.5} for x in (1 / 3, 0.25 + shift)]
        yield record(name, "point", label, points=[] if is_empty else points, **size)
    yield record(name, "caption", length="short", caption=TEXTS[0], **size)
    question, answer = TEXTS[1].split("\n")
    yield record(name, "query", question, answer=answer, meta=META, **size)


def draw(root: Path) -> None:
    """Draw the pictures, each with bytes of its own."""
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        turned = Image.Exif()
        turned[0x0112] = 6  # a quarter turn to the right
        stored, extra = ((height, width), {"exif": turned}) if name == TURNED else ((width, height), {})
        Image.new("RGB", stored, (number, 100, 200)).save(path, **extra)


def say_root(run: Run) -> None:
    """Write the run.json that says where the pictures are."""
    known = {"schema": "md3-run/1", "root": str(run.root), "seal": seal_of(str(run.root))}
    (run.folder / "run.json").write_text(json.dumps(known))


@dataclass(frozen=True)
class Server:
    """A running server, whose pictures may lie below `document_root`."""

    program: programs.Program
    url: str
    token: str
    document_root: Path

    def project(self, export: Path, notes: str, out: Path) -> list[tuple[int, str]]:
        """Make a project as the notes of an export say; returns status and digest of each picture."""
        root, folders = told(notes)
        assert root == str(self.document_root)
        out.mkdir()
        return [tuple(one) for one in self.program.run(PROJECT, self.url, self.token, export, out, *folders)]


def told(notes: str) -> tuple[str, list[str]]:
    """Return the document root and the storages that an export's notes ask for."""
    (root,) = re.findall(r"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=(.*)", notes)
    (folders,) = re.findall(r"a Local Files source storage with the path (.*) \(no sync needed\)", notes)
    return root, folders.split(" and another with the path ")


def exported(out: Path, *records: object) -> str:
    """Export as a user does; what was said on stderr."""
    command = ["export", *map(str, records), "--format", "labelstudio", "-o", str(out)]
    result = CliRunner().invoke(app, command, prog_name="md3")
    assert result.exit_code == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything here, which is also the document root."""
    return tmp_path_factory.mktemp("label studio")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with SQLite, without telemetry, that is stopped and whose files are gone afterwards, always."""
    program = programs.program("label_studio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, token = tmp_path_factory.mktemp("server"), secrets.token_hex(20)
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(folder),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
    }
    user = ["--username", "a@example.org", "--password", token, "--user-token", token, "--enable-legacy-api-token"]
    start = [program.bin / "label-studio", "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    keeper = subprocess.Popen(
        [program.python, "-c", KEEPER, data, *start, *user],
        env=program.environment | settings,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, keeper, data / "log")
        yield Server(program, url, token, folder)
    finally:
        keeper.communicate()
        assert not data.exists()


def wait_for(url: str, keeper: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers; fail with its log where it does not."""
    end = time.monotonic() + START_TIMEOUT_S
    while keeper.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text(errors="replace")[-4000:])


@dataclass(frozen=True)
class Project:
    """What came back of the one large project."""

    root: Path
    notes: str
    pictures: list[tuple[int, str]]
    tasks: list[dict[str, Any]]
    coco: dict[str, Any]
    expected: list[Record]

    def name(self, path: str) -> str:
        """Return the picture's name that an exported path or URL ends with."""
        (name,) = (name for name in SIZES if path.endswith(f"{self.root.name}/{name}"))
        return name


@pytest.fixture(scope="module")
def project(server: Server, folder: Path) -> Project:
    """All pictures and all tasks in one project."""
    run = Run(folder / "run", folder / "my # pictures é")
    run.folder.mkdir()
    draw(run.root)
    expected = [line for number, name in enumerate(SIZES) for line in records_of(name, number)]
    run.write([failure("broken.jpg", "detect", "zebra"), *expected, failure("a/photo.jpg", "point", "tail")])
    say_root(run)
    notes = exported(folder / "project", run.records)
    pictures = server.project(folder / "project", notes, folder / "back")
    tasks, coco = (json.loads((folder / "back" / name).read_bytes()) for name in ("project.json", "coco.json"))
    return Project(run.root, notes, pictures, tasks, coco, expected)


def test_every_picture_opens(project: Project) -> None:
    digests = [hashlib.sha256((project.root / name).read_bytes()).hexdigest() for name in SIZES]
    assert project.pictures == [(200, digest) for digest in digests]


def pixels(found: dict[str, float], size: tuple[int, int]) -> list[float]:
    """Return left, top, right, bottom of a record's box in pixels, cut to the picture."""
    return [
        min(max(found[key], 0), 1) * size[key[0] == "y"]
        for key in ("x_min", "y_min", "x_max", "y_max")
    ]  # fmt: skip


def wanted(project: Project, task: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (picture, label, found) for all that the records found in a task, in their order."""
    result = {"detect": "objects", "point": "points", "segment": "segments"}[task]
    for line in project.expected:
        if line["task"] == task:
            yield from ((line["image"], found["label"], found) for found in line[result])


def regions(project: Project, kind: str) -> Iterator[tuple[str, str, list[float]]]:
    """Yield (picture, label, numbers in pixels) for the regions of a kind in the exported JSON."""
    for name, task in zip(SIZES, project.tasks, strict=True):
        (annotation,) = task["annotations"]
        for one in annotation["result"]:
            if one["type"] == kind:
                size = (one["original_width"], one["original_height"])
                assert size == SIZES[name]
                yield name, one["value"][kind][0], in_pixels(one["value"], size)


def in_pixels(value: dict[str, Any], size: tuple[int, int]) -> list[float]:
    width, height = (side / 100 for side in size)
    if "points" in value:
        return [number * side for point in value["points"] for number, side in zip(point, (width, height), strict=True)]
    corner = [value["x"] * width, value["y"] * height]
    if "height" not in value:
        return corner
    return [*corner, corner[0] + value["width"] * width, corner[1] + value["height"] * height]


def largest_difference(
    found: list[tuple[str, str, list[float]]], expected: list[tuple[str, str, list[float]]]
) -> float:
    """Return by how many pixels numbers differ, of the same pictures and labels in the same order."""
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one[2], other[2], strict=True))


def test_json_brings_everything_back(project: Project) -> None:
    assert [project.name(unquote(task["data"]["image"])) for task in project.tasks] == list(SIZES)
    boxes = [(name, label, pixels(found, SIZES[name])) for name, label, found in wanted(project, "detect")]
    assert len(boxes) == (len(SIZES) - 1) * len(LABELS) * 2
    assert largest_difference(list(regions(project, "rectanglelabels")), boxes) < 0.001
    points = [
        (name, label, [found["x"] * SIZES[name][0], found["y"] * SIZES[name][1]])
        for name, label, found in wanted(project, "point")
    ]
    assert largest_difference(list(regions(project, "keypointlabels")), points) < 0.001
    rings = [
        (name, label, [x0, y0, x1, y0, x1, y1])
        for name, label, found in wanted(project, "segment")
        for x0, y0, x1, y1 in [pixels(found["bbox"], SIZES[name])]
    ]
    assert largest_difference(list(regions(project, "polygonlabels")), rings) < 0.001
    results = [one for task in project.tasks for one in task["annotations"][0]["result"]]
    scores = [one["score"] for one in results if one["type"] == "rectanglelabels"]
    assert scores == [found["score"] for _, _, found in wanted(project, "detect")]
    for task in project.tasks:
        assert task["data"]["meta"] == META
        texts = [one["value"]["text"] for one in textareas(task) if one["from_name"] != "about"]
        assert texts == [[text] for text in TEXTS]


def textareas(task: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in task["annotations"][0]["result"] if one["type"] == "textarea"]


def test_what_is_said_of_an_object_stands_at_its_region(project: Project) -> None:
    for name, task in zip(SIZES, project.tasks, strict=True):
        said = [one for one in textareas(task) if one["from_name"] == "about"]
        assert [one["value"]["text"] for one in said] == ([] if name == "empty.png" else [[SAID]])
        shapes = task["annotations"][0]["result"]
        cars = [one for one in shapes if one["value"].get("rectanglelabels") == ["car"]]
        for one in said:
            assert one["id"] == cars[0]["id"]
            assert in_pixels(one["value"], SIZES[name]) == in_pixels(cars[0]["value"], SIZES[name])


def test_coco_has_every_box_under_our_numbers(project: Project) -> None:
    """Labels of points are one category there, "default", with the boxes of these labels: the notes say so."""
    assert 'calls boxes and masks of labels that points have, too, "default" (car)' in project.notes
    names = {category["id"]: category["name"] for category in project.coco["categories"]}
    assert list(names.values()) == [*(label for label in (*LABELS, "ring") if label != "car"), "default"]
    assert [number for number in names if number < 6] == [0, 2, 3, 4, 5]
    images = {image["id"]: project.name(image["file_name"]) for image in project.coco["images"]}
    assert list(images.values()) == list(SIZES)
    boxes = [
        (images[one["image_id"]], names[one["category_id"]], [x, y, x + width, y + height])
        for one in project.coco["annotations"]
        if one.get("segmentation") == []
        for x, y, width, height in [one["bbox"]]
    ]
    expected = [
        (name, "default" if label == "car" else label, pixels(found, SIZES[name]))
        for name, label, found in wanted(project, "detect")
    ]
    assert largest_difference(boxes, expected) < 0.001


def test_coco_has_masks_and_the_last_point_of_each_label(project: Project) -> None:
    """Its polygons of turned pictures are in the size before the turn, whatever is imported; its boxes are right."""
    images = {image["id"]: project.name(image["file_name"]) for image in project.coco["images"]}
    rings = {
        images[one["image_id"]]: one["segmentation"][0]
        for one in project.coco["annotations"]
        if one.get("segmentation")
    }
    assert len(rings) == len(SIZES) - 1
    for name, _, found in wanted(project, "segment"):
        left, top, right, bottom = pixels(found["bbox"], SIZES[name][::-1] if name == TURNED else SIZES[name])
        assert rings[name] == pytest.approx([left, top, right, top, right, bottom], abs=0.001)
    points = {images[one["image_id"]]: one["keypoints"] for one in project.coco["annotations"] if "keypoints" in one}
    last = {(name, label): found for name, label, found in wanted(project, "point")}
    for name in points:
        width, height = SIZES[name]
        expected = [(last[name, label]["x"] * width, last[name, label]["y"] * height) for label in ("nose", "car")]
        assert points[name] == [
            *(number for x, y in expected for number in (round(x), round(y), 2)),
            0,
            0,
            0,
        ]  # no tail
    assert len(points) == len(SIZES) - 1


def test_two_runs_with_pictures_of_the_same_names(server: Server, folder: Path) -> None:
    """Each run has a storage of its own; the pictures are told apart."""
    typed: list[object] = []
    for number, name in enumerate(("first", "second")):
        picture = folder / name / "a.png"
        picture.parent.mkdir()
        Image.new("RGB", (97, 53), (number, 0, 0)).save(picture)
        run = Run(folder / f"run {name}", picture.parent)
        size = {"width": 97, "height": 53}
        none = record("a.png", "detect", "zebra", objects=[], **size)
        run.write([none, record("a.png", "detect", "car", objects=[box("car", 0, 0, 0.5, 0.5)], **size)])
        say_root(run)
        typed += ["--as", f"{name}={run.folder}"]
    notes = exported(folder / "both", *typed)
    assert told(notes)[1] == [str(folder / "first"), str(folder / "second")]
    digests = [hashlib.sha256((folder / name / "a.png").read_bytes()).hexdigest() for name in ("first", "second")]
    back = folder / "both back"
    assert server.project(folder / "both", notes, back) == [(200, digest) for digest in digests]
    assert (back / "yolo/classes.txt").read_text().splitlines() == ["zebra", "car"]  # our order, not the alphabet's
    assert (back / "yolo/labels/a.txt").read_text().split() == ["1", "0.25", "0.25", "0.5", "0.5"]


def test_nothing_counts_twice(project: Project) -> None:
    kinds = Counter(one["type"] for task in project.tasks for one in task["annotations"][0]["result"])
    full = len(SIZES) - 1
    assert kinds == {
        "rectanglelabels": full * len(LABELS) * 2,
        "polygonlabels": full,
        "keypointlabels": full * 4,
        "textarea": (full + 1) * 2 + full,
    }


# ---- the example --------------------------------------------------------------------------------


def example(program: programs.Program, folder: Path, *arguments: object, **settings: str) -> list[str]:
    """Run label_studio_project.sh with this md3; return the lines of its stdout."""
    (folder / "md3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m md3cli "$@"\n')
    (folder / "md3").chmod(0o755)
    variables = program.environment | settings
    variables["PATH"] = f"{folder}:{variables['PATH']}"
    command = ["bash", EXAMPLE, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ask(method: str, url: str, token: str) -> Any:
    """Return what the server answers; JSON, or bytes of a picture."""
    request = urllib.request.Request(url, method=method, headers={"Authorization": f"Token {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer) if answer.headers.get_content_type() == "application/json" else answer.read()


def check_project(address: str, token: str, root: Path) -> None:
    """Fail unless the project at an address has all pictures, with something on all but one."""
    url, number = re.fullmatch(r"(http://[\w.:]+)/projects/(\d+)/data", address).groups()
    tasks = ask("GET", f"{url}/api/tasks?project={number}&fields=all&page_size=100", token)["tasks"]
    assert len(tasks) == len(SIZES)
    assert all(task["predictions"][0]["result"] for task in tasks)
    picture = ask("GET", url + tasks[0]["data"]["image"], token)
    assert picture == (root / next(iter(SIZES))).read_bytes()


def test_the_example_asks_a_server_that_runs(server: Server, project: Project, folder: Path, tmp_path: Path) -> None:
    """A personal access token will do."""
    known = ask("POST", f"{server.url}/api/token/", server.token)["token"]
    settings = {"LABEL_STUDIO_URL": f"{server.url}/", "LABEL_STUDIO_API_KEY": known}
    (address,) = example(server.program, tmp_path, folder / "run", tmp_path / "out", **settings)
    assert address.startswith(server.url)
    check_project(address, server.token, project.root)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["project"]


def test_the_example_starts_a_server_once(project: Project, folder: Path, tmp_path: Path) -> None:
    program, out = programs.program("label_studio"), tmp_path / "out"
    try:
        first = example(program, tmp_path, folder / "run", out)
        token = (out / "server/token").read_text()
        assert token in first[0]
        check_project(first[-1], token, project.root)
        second = example(program, tmp_path, folder / "run", out)
        assert second == [first[0], first[1].replace("projects/1/", "projects/2/")]
    finally:
        os.kill(int((out / "server/pid").read_text()), signal.SIGKILL)
