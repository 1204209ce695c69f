"""The code of the three model cards: every statement runs with its import, the model's name and the device replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from card_scripts import (
    FOUR_BIT,
    FOUR_BIT_BY_HAND,
    IMPORTS,
    ORIGINAL,
    TRANSFORMERS,
    make_card_pictures,
    run_script,
)
from golden_cases import CASES
from PIL import Image

from md3cli import Moondream
from md3cli.model.quant.layers import has_packed_weights

# On a CPU nothing is compiled of bfloat16 and 4 bits.
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:nothing is compiled")]
DEVICE = {'{"": "cuda"}': '{"": "cpu"}'}


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures that the cards open, in the working folder."""
    make_card_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=IMPORTS)
def imports(request: pytest.FixtureRequest) -> dict[str, str]:
    """What becomes of a card's import: each of the three ways to write it."""
    if request.param != "Moondream":
        pytest.importorskip("accelerate", reason="needs the extra md3cli[hf]")
    return {TRANSFORMERS: IMPORTS[request.param]}


def test_the_originals_card(imports: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    name = {"moondream/moondream3-preview": str(CASES["a"][0])}
    found = run_script(ORIGINAL, imports | name | DEVICE)
    printed = capsys.readouterr().out
    model = found["moondream"]
    if isinstance(model, Moondream):  # the other class has plain parts, which may round bfloat16 otherwise
        model = Moondream.load(CASES["a"][0], device="cpu", dtype="bf16")
    photo, landscape = Image.open("photo.jpg"), Image.open("landscape.jpg")
    first = model.query(image=photo, question="What's in this image?")
    assert "reasoning" in first
    sky = model.query(photo, "What color is the sky?", reasoning=False)
    told = model.query(photo, "Describe what's happening in detail", settings=found_settings())
    text = model.query(question="Explain the concept of machine learning in simple terms")
    captions = [model.caption(landscape, length=length)["caption"] for length in ("short", "normal", "long")]
    warm = model.caption(landscape, length="long", settings={"temperature": 0.3})
    points = model.point(Image.open("crowd.jpg"), "person wearing a red shirt")["points"]
    street = Image.open("street_scene.jpg")
    boxes = model.detect(street, "car")["objects"]
    expected = [first["answer"], sky["answer"], told["answer"] + text["answer"]]
    expected += [f"{kind}: {caption}" for kind, caption in zip(("Short", "Normal", "Long"), captions, strict=True)]
    shown = [f"Point {i}: x={point['x']:.3f}, y={point['y']:.3f}" for i, point in enumerate(points, start=1)]
    names = ("x_min", "y_min", "x_max", "y_max")
    shown += [
        f"Object {i}: " + ", ".join(f"{name}={box[name]:.3f}" for name in names) for i, box in enumerate(boxes, start=1)
    ]
    expected.append(warm["caption"] + "\n".join(shown))
    scene = Image.open("complex_scene.jpg")
    for question in found["questions"]:
        expected += [f"Q: {question}", f"A: {model.query(scene, question, reasoning=False)['answer']}\n"]
    assert printed == "".join(f"{part}\n" for part in expected)
    assert points
    assert boxes
    assert found["result"] == model.query(found["encoded"], found["questions"][-1], reasoning=False)
    assert found["caption"] == model.caption(scene, length="normal")
    assert found["objects"] == model.detect(scene, "vehicle")
    assert len(model.detect(street, "person", settings=found["settings"])["objects"]) <= 10


def found_settings() -> dict[str, Any]:
    """The settings of the card's streamed query."""
    return {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}


def test_the_four_bit_card(imports: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run_script(FOUR_BIT, imports | DEVICE | {"alecccdd/moondream3-preview-4bit": str(CASES["int4"][0])})
    model = found["moondream"]
    assert has_packed_weights(model.engine.model if isinstance(model, Moondream) else model.model)
    again = model.query(image=Image.open("photo.jpg"), question="What's in this image?")
    assert capsys.readouterr().out == f"{again['answer']}\n"
    assert again == found["result"]


def test_the_four_bit_card_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the folder of the checkpoint, as the card says `./`."""
    folder = CASES["int4"][0]
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    replaced = {
        f"from {place} import": "from md3cli.original import" for place in ("config", "moondream", "weights")
    } | {'device="cuda"': 'device="cpu"'}
    found = run_script(FOUR_BIT_BY_HAND, replaced)
    assert has_packed_weights(found["model"]._face().engine.model)
    expected = Moondream.load(folder, device="cpu").query(Image.open("photo.jpg"), "What's in this image?")
    assert found["result"] == expected
    assert capsys.readouterr().out == f"{expected['answer']}\n"
