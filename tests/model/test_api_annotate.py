"""What `Moondream.annotate` asks of parts of a picture: the same as `--then` and `--tile`, in the same order."""

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
from md3cli.errors import ImageError
from md3cli.model import api_annotate
from md3cli.records import compact_json

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


# -- tiles -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 900 x 600 pixels, of six scenes."""
    whole = Image.new("RGB", (900, 600))
    for place in range(6):
        with Image.open(SCENES / f"scene_0000{place}.png") as scene:
            part = scene.convert("RGB").resize((300, 300))
        whole.paste(part, (place % 3 * 300, place // 3 * 300))
    path = tmp_path_factory.mktemp("mosaic") / "mosaic.png"
    whole.save(path)
    return path


@pytest.mark.process
@pytest.mark.parametrize(("task", "more"), [("detect", {"tile": 400}), ("point", {"tile": "auto", "overlap": 0.3})])
def test_tiles_say_what_the_command_says(tiny: Moondream, mosaic: Path, task: str, more: dict[str, Any]) -> None:
    kinds, options = ["circle", "square"], [f"--{name}={value}" for name, value in more.items()]
    command = [sys.executable, "-m", "md3cli", task, mosaic.name, *kinds, *options, "-m", "tiny", "--dtype", "fp32"]
    said = subprocess.run([*command, "-f", "jsonl"], cwd=mosaic.parent, check=True, stdout=subprocess.PIPE).stdout
    found = list(tiny.annotate(tiled(mosaic, task=task, prompt=kind, **more) for kind in kinds))
    assert [compact_json(record) for record in found] == said.splitlines()
    overlap = more.get("overlap", 0.2)
    assert [record["tiles"] for record in found] == [{"size": more["tile"], "overlap": overlap, "count": 6}] * 2
    assert all(record["objects" if task == "detect" else "points"] for record in found)


@pytest.mark.process
def test_objects_that_tiles_find_are_asked_about_as_the_command_does(tiny: Moondream, mosaic: Path) -> None:
    command = [sys.executable, "-m", "md3cli", "run", mosaic.name, "--task", "detect:circle", "--then", THEN[0]]
    options = ["--tile", "400", "--no-reasoning", "-m", "tiny", "--dtype", "fp32", "-f", "jsonl"]
    said = subprocess.run([*command, *options], cwd=mosaic.parent, check=True, stdout=subprocess.PIPE).stdout
    found = list(tiny.annotate([tiled(mosaic, tile=400, then=THEN[0], reasoning=False)]))
    assert len(found) == 1 + len(found[0]["objects"]) > 2
    assert [without_file(record) for record in found] == [without_file(json.loads(line)) for line in said.splitlines()]


def test_a_picture_in_memory_is_cut_into_tiles(tiny: Moondream, mosaic: Path) -> None:
    with Image.open(mosaic) as opened:
        image = opened.convert("RGB")
    kinds: list[Any] = [mosaic, mosaic.read_bytes(), image, np.array(image)]
    records = list(tiny.annotate(tiled(mosaic, image=kind, tile=400) for kind in kinds))
    assert records[0]["tiles"]["count"] == 6
    assert all(record["objects"] == records[0]["objects"] for record in records)


def test_numbers_of_numpy_are_numbers(tiny: Moondream, mosaic: Path) -> None:
    ways: list[dict[str, Any]] = [{"overlap": 0}, {"overlap": 0.0}, {"tile": np.int64(600), "overlap": np.float32(0)}]
    first, *others = tiny.annotate(tiled(mosaic, **{"tile": 600, **way}) for way in ways)
    assert first["tiles"]["size"] == 600
    texts = [compact_json(record | {"id": ""}) for record in (first, *others)]
    assert texts == texts[:1] * 3
    (again,) = tiny.annotate([tiled(mosaic, tile=600, overlap=np.float32(0))])
    assert again["id"] == first["id"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tile": 377}, "377 is no tile"),
        ({"tile": -1}, "-1 is no tile"),
        ({"tile": 10**30}, "is no tile"),
        ({"tile": True}, "True is no tile"),
        ({"tile": 600.0}, "tile is float 600.0"),
        ({"tile": "600"}, "'600' is no tile"),
        ({"tile": "big\x1b[2J"}, "is no tile"),
        ({"tile": [600]}, "tile is list [600]"),
        ({"tile": np.zeros(2)}, "tile is ndarray"),
        ({"tile": 600, "overlap": 1}, "an overlap of 1;"),
        ({"tile": 600, "overlap": -0.1}, "an overlap of -0.1"),
        ({"tile": 600, "overlap": float("nan")}, "an overlap of nan"),
        ({"tile": 600, "overlap": True}, "an overlap of True"),
        ({"tile": 600, "overlap": "0.2"}, "overlap is str '0.2'"),
        ({"tile": 378, "overlap": 0.9999}, "use larger tiles or a smaller overlap"),
        ({"overlap": 0.2}, "give tile, too"),
        ({"task": "caption", "prompt": None, "tile": "auto"}, "this request is caption"),
        ({"task": "segment", "tile": "auto"}, "this request is segment"),
        ({"task": "point", "tile": "auto", "spatial_refs": [[0.5, 0.5]]}, "ask without tiles"),
        ({"task": "point", "tile": "auto", "then": THEN}, "detect and segment"),
    ],
)
def test_tiles_that_make_no_sense_are_an_error_record(
    tiny: Moondream, mosaic: Path, wrong: dict[str, Any], said: str
) -> None:
    first, second = tiny.annotate([tiled(mosaic, **wrong), request(NAMES[1], then=None)])
    assert first["error"]["type"] == "bad_request"
    assert said in first["error"]["message"]
    assert second["error"] is None


def test_an_encoded_picture_has_no_tiles(tiny: Moondream, mosaic: Path) -> None:
    (record,) = tiny.annotate([tiled(mosaic, image=tiny.encode_image(mosaic), tile="auto")])
    assert "give the picture itself" in record["error"]["message"]


@pytest.mark.parametrize("failing", [1, 2, 6])
def test_a_tile_that_cannot_be_cut_fails_its_request_alone(
    tiny: Moondream, mosaic: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    num_cut, cut = 0, api_annotate.cut_rect

    def cut_or_fail(*args: Any) -> Any:
        nonlocal num_cut
        num_cut += 1
        if num_cut == failing:
            raise ImageError("too_large", "too little memory")
        return cut(*args)

    monkeypatch.setattr(api_annotate, "cut_rect", cut_or_fail)
    asked = [tiled(mosaic, tile=400), tiled(mosaic, tile=400), request(NAMES[1], then=None)]
    first, second, third = tiny.annotate(asked)
    assert first["error"] == {"type": "too_large", "message": f"tile {failing} of 6: too little memory", "retry": False}
    assert "tiles" not in first
    assert second["tiles"]["count"] == 6
    assert third["error"] is None


def test_calls_side_by_side_keep_their_tiles_apart(tiny: Moondream, mosaic: Path) -> None:
    kinds = ("circle", "square", "star")
    wanted = [record for kind in kinds for record in tiny.annotate([tiled(mosaic, tile=400, prompt=kind)])]
    one = tiny.annotate(tiled(mosaic, tile=400, prompt=kind) for kind in kinds)
    other = tiny.annotate(tiled(mosaic, tile=400, prompt=kind) for kind in reversed(kinds))
    both = []
    for first, second in zip(one, other, strict=True):
        tiny.caption(mosaic, length="short")
        both.append((first, second))
    assert [first for first, _ in both] == wanted
    assert [second for _, second in both] == wanted[::-1]
    assert tiny._answers == {}


def tiled(mosaic: Path, **more: Any) -> dict[str, Any]:
    return {"image": mosaic, "name": mosaic.name, "task": "detect", "prompt": "circle", **more}
