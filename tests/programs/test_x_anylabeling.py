"""X-AnyLabeling opens what `labelme` wrote: every shape with its score, the caption and the answers."""

from __future__ import annotations

import programs
from finished_runs import COLOUR, HOSTILE, KINDS, NAMES, Run, family, mixed_run, run

__all__ = ["mixed_run", "run"]
pytestmark = programs.MARKS

LOAD = """
import json, sys
from pathlib import Path
from anylabeling.views.labeling.label_file import LabelFile
from anylabeling.views.labeling.utils import img_data_to_qimage

found = {}
for path in Path(sys.argv[1]).rglob("*.json"):
    file = LabelFile(str(path))
    shapes = [[s.label, s.shape_type, [[p.x(), p.y()] for p in s.points], s.score] for s in file.shapes]
    said = [[s.attributes, s.description] for s in file.shapes]
    picture = path.with_name(file.image_path)
    assert file.image_data == picture.read_bytes()
    shown = img_data_to_qimage(file.image_data, str(picture))
    assert (shown.width(), shown.height()) == (120, 80), picture
    found[path.relative_to(sys.argv[1]).as_posix()] = [shapes, said, file.other_data]
print(json.dumps(found))
"""
DOG = ["dog", "rectangle", [[60.0, 8.0], [120.0, 8.0], [120.0, 48.0], [60.0, 48.0]], 0.4]
CAR = ["car", "rectangle", [[12.0, 20.0], [60.0, 20.0], [60.0, 60.0], [12.0, 60.0]], 0.9]
RING = ["ring", "polygon", [[12.0, 20.0], [60.0, 20.0], [60.0, 60.0]], 0.7]
NOSE = ["nose", "point", [[120.0, 20.0]], 0.8]


def test_every_shape_is_opened(mixed_run: Run) -> None:
    program = programs.program("x_anylabeling", "--no-deps")
    _, out = mixed_run.export("labelme", "out")
    found = program.run(LOAD, out, environment={"QT_QPA_PLATFORM": "offscreen"})
    assert len(found) == len((*NAMES, *KINDS))
    for name, (shapes, *_) in found.items():
        extra = [RING, NOSE] if name == "a/photo.json" else []
        assert shapes == ([] if name == "empty.json" else [DOG, CAR, *extra])
    *_, other = found["a/photo.json"]
    assert other["description"] == "a car,\na <dog>"
    assert [said["content"] for said in other["chat_history"]] == ["How many?", "2 & 3"]


def test_what_is_said_of_an_object_is_an_attribute_of_its_shape(run: Run) -> None:
    run.write(family())
    _, out = run.export("labelme", "out")
    found = programs.program("x_anylabeling", "--no-deps").run(LOAD, out, environment={"QT_QPA_PLATFORM": "offscreen"})
    ((_, said, _),) = found.values()
    assert said == [
        [{COLOUR: "red", "caption short": "A small car."}, f"{COLOUR}: red\ncaption short: A small car."],
        [{COLOUR: HOSTILE}, f"{COLOUR}: {HOSTILE}"],
        [{}, ""],
        [{"Is it round?": "Yes"}, "Is it round?: Yes"],
    ]
