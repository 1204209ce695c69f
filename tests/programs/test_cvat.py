"""What CVAT imports with, datumaro, reads `cvat` and `voc`; CVAT's own client takes the task, and the guide runs.

CVAT's importer is a fork of datumaro that no index has; this is its makers' release, whose readers of these two formats
began as the fork's. No server is started: what it would send back is made by datumaro from what it was sent.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import COLOUR, HOSTILE, KINDS, NAMES, Run, family, mixed_run, run

from md3cli.records import printable

__all__ = ["mixed_run", "run"]
pytestmark = programs.MARKS
ROOT = Path(__file__).parents[2]

# Prints what datumaro reads of argv[1] in the format argv[2]; a picture that does not open fails.
READ = """
import json, sys
from datumaro import Dataset

dataset = Dataset.import_from(sys.argv[1], sys.argv[2])
labels = dataset.categories()[list(dataset.categories())[0]]
found = {}
for item in dataset:
    assert sorted(item.media.data.shape[:2]) == [80, 120]  # as stored: datumaro, unlike CVAT, turns no picture
    shapes = []
    for shape in item.annotations:
        box = shape.get_bbox() if hasattr(shape, "get_bbox") else None
        facts = [shape.type.name, labels[shape.label].name, box, shape.attributes.get("score")]
        shapes.append(facts + [shape.attributes.get("text")])
    found[item.id] = [item.media.path, shapes]
print(json.dumps(found))
"""

# Prints what datumaro reads about the shapes of argv[1]: the label of each, and its attributes.
SAID = """
import json, sys
from datumaro import Dataset

dataset = Dataset.import_from(sys.argv[1], "cvat")
labels = dataset.categories()[list(dataset.categories())[0]]
print(json.dumps([[labels[one.label].name, one.attributes] for item in dataset for one in item.annotations]))
"""

# Takes the labels of a task as `cvat-cli task create` does: names, colours, kinds and attributes are checked there.
TASK = """
import json, sys
from cvat_sdk import models

task = models.TaskWriteRequest(name="a task", labels=json.load(open(sys.argv[1])))
print(json.dumps([[label.name, str(label.type), [a.name for a in label.attributes]] for label in task.labels]))
"""

# Is `cvat-cli` without a server: the arguments are parsed by its own parser, and what was sent comes back as COCO.
CLIENT = """
import argparse, shutil, sys, zipfile
from pathlib import Path
from cvat_cli._internal.commands_all import COMMANDS
from cvat_cli._internal.common import configure_common_arguments
from cvat_sdk import models
from datumaro import Dataset

parser = argparse.ArgumentParser()
configure_common_arguments(parser)
COMMANDS.configure_parser(parser)
typed = parser.parse_args()
sent = Path("sent")
if "annotation_path" in typed:
    models.TaskWriteRequest(name=typed.name, labels=typed.labels)
    assert typed.annotation_format == "CVAT 1.1"
    zipfile.ZipFile(typed.resources[0]).extractall(sent / "images")
    shutil.copy(typed.annotation_path, sent / "default.xml")
    print(1)
else:
    assert (typed.fileformat, typed.resource_id) == ("COCO 1.0", 1)
    Dataset.import_from(str(sent), "cvat").export("coco", "coco_instances", save_media=False)
    with zipfile.ZipFile(typed.filename, "w") as file:
        for path in Path("coco/annotations").iterdir():
            file.write(path, f"annotations/{path.name}")
"""


def read(out: Path, format: str) -> dict[str, Any]:
    found: dict[str, Any] = programs.program("cvat").run(READ, out, format)
    return found


def test_every_shape_of_every_picture_is_read(mixed_run: Run) -> None:
    _, out = mixed_run.export("cvat", "out")
    found = read(out, "cvat")
    assert len(found) == len((*NAMES, *KINDS))
    assert {"a/photo", "b/photo", "a/photo.png", "kinds/turned", "kinds/new"} <= found.keys()
    assert len({path for path, _ in found.values()}) == len(found)
    dog, car = ["bbox", "dog", [60, 8, 60, 40], 0.4, None], ["bbox", "car", [12, 20, 48, 40], 0.9, None]
    for name, (_, shapes) in found.items():
        assert shapes[:2] == ([] if name == "empty" else [dog, car])
        assert len(shapes) == (6 if name == "a/photo" else 0 if name == "empty" else 2)
    ring, nose, caption, answer = found["a/photo"][1][2:]
    assert ring == ["polygon", "ring", [12, 20, 48, 40], 0.7, None]
    assert (nose[:2], nose[2][:2], nose[3]) == (["points", "nose"], [120, 20], 0.8)
    assert (caption[:2], caption[4]) == (["label", "caption"], "a car,\na <dog>")
    assert (answer[:2], answer[4]) == (["label", "answer"], "2 & 3")


def test_what_is_said_of_an_object_is_an_attribute_that_its_label_has(run: Run) -> None:
    run.write(family())
    _, out = run.export("cvat", "out")
    found = programs.program("cvat").run(SAID, out)
    labels = programs.program("cvat").run(TASK, out / "labels.json")
    held = {name: attributes for name, _, attributes in labels}
    assert all(said.keys() - {"occluded"} <= {*held[label]} for label, said in found)
    said = [said for label, said in found if label in ("car", "ring")]
    assert [one.get(COLOUR) for one in said] == ["red", "\n".join(map(printable, HOSTILE.splitlines())), None]
    assert said[0]["caption short"] == "A small car."
    assert said[2]["Is it round?"] == "Yes"


@pytest.mark.parametrize("is_flat", [True, False])
def test_voc_is_found_with_boxes_within_a_pixel(mixed_run: Run, is_flat: bool) -> None:
    _, out = mixed_run.export("voc", "out", is_flat=is_flat)
    found = read(out, "voc")
    assert len(found) == len((*NAMES, *KINDS))
    for name, (path, shapes) in found.items():
        assert Path(path).is_relative_to(out / "JPEGImages")
        assert Path(path).relative_to(out / "JPEGImages").as_posix().rpartition(".")[0] == name
        boxes = {shape[1]: shape[2] for shape in shapes}
        assert (boxes == {}) == (name == "empty")
        if boxes:
            assert boxes["dog"] == pytest.approx([60, 8, 60, 40], abs=1)
            assert boxes["car"] == pytest.approx([12, 20, 48, 40], abs=1)


def test_the_client_takes_the_labels(mixed_run: Run) -> None:
    _, out = mixed_run.export("cvat", "out")
    labels = programs.program("cvat").run(TASK, out / "labels.json")
    assert [label[0] for label in labels] == ["dog", "car", "ring", "nose", "caption", "answer"]
    assert [label[2] for label in labels] == [["score"]] * 4 + [["text"], ["question", "text"]]


def test_the_guide_from_a_folder_to_a_task_and_back(tmp_path: Path) -> None:
    program = programs.program("cvat")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, line in (
        ("md3", f'"{sys.executable}" -m md3cli "$@"'),
        ("python", f'"{sys.executable}" "$@"'),
        ("cvat-cli", f'"{program.python}" "{tmp_path}/client.py" "$@"'),
    ):
        (commands / name).write_text(f"#!/bin/sh\nexec {line}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "client.py").write_text(CLIENT)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "examples/cvat_task.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    environment = program.environment | {"PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    script = "set -euo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout
    (scores,) = re.findall(r"^ *all +([\d.]+)", done.stdout, re.MULTILINE)
    assert float(scores) == 1.0  # nobody has corrected anything
    corrected = json.loads((tmp_path / "corrected/annotations/instances_default.json").read_bytes())
    assert len(corrected["images"]) == 12
