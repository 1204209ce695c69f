"""What records of `Moondream.annotate` ask next: the same as `md3 run --then`, in the same order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from md3cli import Moondream
from md3cli.model import api_annotate

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
NAMES = ["scene_00005.png", "scene_00002.png"]
THEN = ["query:What colour is the {label}?", "caption:short"]


@pytest.fixture(scope="module")
def tiny() -> Moondream:
    return Moondream.load("tiny", device="cpu", dtype="fp32")


def request(name: str, **more: Any) -> dict[str, Any]:
    asked = {"task": "detect", "prompt": "circle", "reasoning": False, "then": THEN}
    return {"image": str(SCENES / name), "name": name, **asked, **more}


def without_file(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("id", "sha256", "region", "model", "meta")}


@pytest.mark.process
def test_it_is_what_the_command_says(tiny: Moondream, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(SCENES / name) for name in NAMES))
    words = [word for spec in THEN for word in ("--then", spec)]
    command = [sys.executable, "-m", "md3cli", "run", str(listed), "--task", "detect:circle", *words, "--no-reasoning"]
    subprocess.run([*command, "-m", "tiny", "--dtype", "fp32", "-o", tmp_path / "o.jsonl"], check=True)
    wanted = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    found = list(tiny.annotate([request(name) | {"name": str(SCENES / name)} for name in NAMES]))
    assert [without_file(record) for record in found] == [without_file(record) for record in wanted]
    assert [record.get("region", {}).get("index") for record in found] == [
        record.get("region", {}).get("index") for record in wanted
    ]
    assert {record["region"]["of"] for record in found if "region" in record} <= {record["id"] for record in found}


def test_children_follow_their_parent_among_other_requests(tiny: Moondream) -> None:
    plain = {"image": str(SCENES / NAMES[0]), "task": "caption", "length": "short"}
    found = list(tiny.annotate([plain, request(NAMES[0]), plain]))
    assert [("region" in record, record["task"]) for record in found] == [
        (False, "caption"),
        (False, "detect"),
        *[(True, "query"), (True, "caption")] * len(found[1]["objects"]),
        (False, "caption"),
    ]
    assert len({record["id"] for record in found}) == len(found)


def test_a_picture_in_memory_is_cut_too(tiny: Moondream) -> None:
    path = SCENES / NAMES[0]
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    kinds: list[Any] = [str(path), path.read_bytes(), image, np.array(image)]
    texts = [
        [record.get("answer") for record in tiny.annotate([request(NAMES[0], image=kind, then=THEN[0])])]
        for kind in kinds
    ]
    assert len(texts[0]) > 1
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"then": "fly:x"}, "fly"),
        ({"then": 5}, "not a SPEC"),
        ({"then": ["query:{name}"]}, "{name}"),
        ({"then": THEN, "pad": "x"}, "pad"),
        ({"then": THEN, "pad": -1}, "pad"),
        ({"task": "caption", "prompt": None}, "detect and segment"),
    ],
)
def test_a_request_that_cannot_ask_on_is_an_error_record(tiny: Moondream, wrong: dict[str, Any], said: str) -> None:
    first, second = tiny.annotate([request(NAMES[0], **wrong), request(NAMES[1], then=None)])
    assert first["error"]["type"] in ("bad_request", "bad_row")
    assert said in first["error"]["message"]
    assert second["error"] is None


def test_an_encoded_picture_has_no_parts(tiny: Moondream) -> None:
    encoded = tiny.encode_image(str(SCENES / NAMES[0]))
    (record,) = tiny.annotate([request(NAMES[0], image=encoded)])
    assert "give the picture itself" in record["error"]["message"]


def test_other_calls_between_lose_nothing(tiny: Moondream) -> None:
    def asked() -> Iterator[dict[str, Any]]:
        for name in NAMES * 3:
            yield request(name)
            tiny.caption(str(SCENES / name), length="short")  # it steps the same engine

    found = list(tiny.annotate(asked()))
    parents = [record for record in found if "region" not in record]
    assert [record["image"] for record in parents] == NAMES * 3
    assert len(found) == sum(1 + 2 * len(record["objects"]) for record in parents)
    assert tiny._answers == {}


def test_calls_side_by_side_lose_nothing(tiny: Moondream) -> None:
    image = str(SCENES / NAMES[0])
    asked = [{"image": image, "task": "caption", "length": length} for length in ("short", "long")]
    one, other = tiny.annotate(asked), tiny.annotate(asked)
    first = next(one)
    assert len(list(other)) == 2  # it steps the engine until nothing is left of the first call either
    assert [record["length"] for record in (first, *one)] == ["short", "long"]
    assert tiny._answers == {}


def test_a_picture_that_changes_meanwhile_is_not_mixed_up(
    tiny: Moondream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_annotate, "KEPT_BYTES", 0)  # so that it is read again
    path = tmp_path / "scene.png"
    path.write_bytes((SCENES / NAMES[0]).read_bytes())
    records = []
    for record in tiny.annotate([{**request(NAMES[0]), "image": str(path)}]):
        records.append(record)
        path.write_bytes((SCENES / NAMES[1]).read_bytes())
    assert records[0]["objects"]
    about_objects = [r for r in records[1:] if r["error"] is None]
    assert not about_objects
    assert {r["error"]["type"] for r in records[1:]} == {"bad_request"}
