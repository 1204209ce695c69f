"""labelme opens what `labelme` wrote: every shape of every picture, and nothing is lost when it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import COLOUR, HOSTILE, KINDS, NAMES, Run, family, mixed_run, run

__all__ = ["mixed_run", "run"]
pytestmark = programs.MARKS

# Prints, for each file below argv[1], what labelme reads; saves it as labelme does, and prints what it reads then.
LOAD = """
import json, sys
from pathlib import Path
from labelme._label_file import read_label_file, write_label_file
from labelme.utils import img_data_to_pil

def read(path):
    data = read_label_file(str(path))
    shapes = [[s["label"], s["shape_type"], s["points"], s["other_data"]] for s in data.shapes]
    said = [s["description"] for s in data.shapes]
    size = img_data_to_pil(data.image_data).size
    return data, {"image": data.image_path, "size": size, "shapes": shapes, "said": said, "other": data.other_data}

found = {}
for path in Path(sys.argv[1]).rglob("*.json"):
    data, before = read(path)
    shapes = [{**s.pop("other_data"), **s} for s in data.shapes]
    write_label_file(str(path), shapes=shapes, image_path=data.image_path, image_height=before["size"][1],
                     image_width=before["size"][0], other_data=data.other_data, flags=data.flags)
    found[path.relative_to(sys.argv[1]).as_posix()] = [before, read(path)[1]]
print(json.dumps(found))
"""
STOPS = ("moving", "print", "deep", "few")
DOG = ["dog", "rectangle", [[60.0, 8.0], [120.0, 48.0]], {"score": 0.4}]
CAR = ["car", "rectangle", [[12.0, 20.0], [60.0, 60.0]], {"score": 0.9}]
RING = ["ring", "polygon", [[12.0, 20.0], [60.0, 20.0], [60.0, 60.0]], {"score": 0.7}]
NOSE = ["nose", "point", [[120.0, 20.0]], {"score": 0.8}]


def opened(folder: Path) -> dict[str, Any]:
    """What labelme reads of each file: before it saves, and after."""
    program = programs.program("labelme", "--no-deps")
    found: dict[str, Any] = program.run(LOAD, folder, environment={"QT_QPA_PLATFORM": "offscreen"})
    return found


@pytest.mark.parametrize("is_beside", [False, True])
def test_every_shape_is_opened_and_kept(mixed_run: Run, is_beside: bool) -> None:
    report, out = mixed_run.export("labelme", "out", beside=is_beside)
    folder = mixed_run.root if is_beside else out
    if is_beside:  # labelme stops at these of the user's own; in `out` they are PNG
        for name in STOPS:
            (folder / "kinds" / f"{name}.json").unlink()
        assert any("labelme may not open" in note for note in report.notes)
    found = opened(folder)
    assert len(found) == len((*NAMES, *KINDS)) - len(STOPS) * is_beside
    for name, (before, after) in found.items():
        assert after == before
        assert before["size"] == [120, 80]
        assert ((folder / name).parent / before["image"]).is_file()
        extra = [RING, NOSE] if name == "a/photo.json" else []
        assert before["shapes"] == ([] if name == "empty.json" else [DOG, CAR, *extra])
    assert found["a/photo.json"][1]["other"]["description"] == "a car,\na <dog>"


def test_what_is_said_of_an_object_is_kept_with_its_shape(run: Run) -> None:
    run.write(family())
    _, out = run.export("labelme", "out")
    ((before, after),) = opened(out).values()
    assert after == before
    small = {COLOUR: "red", "caption short": "A small car."}
    print(before)
    assert [shape[3].get("attributes") for shape in before["shapes"]] == [
        small,
        {COLOUR: HOSTILE},
        None,
        {"Is it round?": "Yes"},
    ]
    assert before["said"] == [
        f"{COLOUR}: red\ncaption short: A small car.",
        f"{COLOUR}: {HOSTILE}",
        "",
        "Is it round?: Yes",
    ]
