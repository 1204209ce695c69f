"""The card of the port to transformers: its code, its modes, its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from card_scripts import PORT, make_card_pictures, run_script
from golden_cases import CASES
from hf_cases import load_hf
from PIL import Image

from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor

FOLDER = str(CASES["hf-port"][0])
CARD_IMPORT = "from transformers import AutoProcessor, AutoModelForCausalLM"


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The two pictures that the card opens, of two sizes: the port asks for one size, we do not."""
    make_card_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    return [Image.open(f"image{number}.jpg") for number in (1, 2)]


@pytest.mark.parametrize("way", ["md3cli.original", "transformers"])
def test_the_cards_code(way: str, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]) -> None:
    imported = {
        "md3cli.original": CARD_IMPORT.replace("transformers", "md3cli.original"),
        "transformers": f"import md3cli.model.hf\n{CARD_IMPORT}",
    }
    replaced = {CARD_IMPORT: imported[way], '"cuda:0"': '"cpu"', "NyxKrage/moondream3-preview-hf": FOLDER}
    found = run_script(PORT, replaced)
    model = found["model"]
    assert isinstance(model, Moondream3ForConditionalGeneration)
    assert isinstance(found["processor"], Moondream3Processor)
    assert model.dtype == torch.bfloat16
    assert pictures[0].size != pictures[1].size
    captions = [model.caption(picture)["caption"] for picture in pictures]
    assert capsys.readouterr().out == "".join(f"{caption}\n" for caption in captions)


def generated(pictures: list[Image.Image], *prompts: Any) -> tuple[Any, list[str]]:
    """What `generate` returns for prompts about the pictures, and the words behind each prompt."""
    model, processor = load_hf("hf-port")
    text = [processor.apply_chat_template(prompt, tokenize=False) for prompt in prompts]
    inputs = processor(text=text, images=pictures)
    with torch.no_grad():
        outputs = model.generate(**inputs, max_new_tokens=12)
    if outputs.is_floating_point():
        return outputs, []
    rows = [output[inputs["input_ids"].shape[1] :] for output in outputs]
    return outputs, [processor.decode(row) for row in rows]


@pytest.mark.parametrize(
    ("prompt", "skill", "arguments"),
    [
        ("", "caption", {"length": "normal"}),
        ("caption: short", "caption", {"length": "short"}),
        ("caption: normal", "caption", {"length": "normal"}),
        ("caption: long", "caption", {"length": "long"}),
        ("query: What is happening in this image?", "query", {"question": "What is happening in this image?"}),
        (
            [{"role": "user", "content": "query: What is happening in this image?"}],
            "query",
            {"question": "What is happening in this image?"},
        ),
    ],
)
def test_modes_that_answer_in_words(
    pictures: list[Image.Image], prompt: Any, skill: str, arguments: dict[str, str]
) -> None:
    outputs, texts = generated(pictures, prompt, prompt)
    assert outputs.dtype == torch.int64
    model, _ = load_hf("hf-port")
    more: dict[str, Any] = {"settings": {"max_tokens": 12}} | ({"reasoning": False} if skill == "query" else {})
    results = [getattr(model, skill)(picture, **arguments, **more) for picture in pictures]
    assert texts == [result["caption" if skill == "caption" else "answer"] for result in results]


def test_reason_thinks_before_it_answers(pictures: list[Image.Image]) -> None:
    model, processor = load_hf("hf-port")
    question = "What is happening in this image?"
    inputs = processor(text=[processor.apply_chat_template(f"reason: {question}", tokenize=False)], images=pictures[:1])
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].tolist()
    result = model.query(pictures[0], question, settings={"max_tokens": 12})
    answer_id = model.config.network.tokenizer.answer_id
    thoughts = output[: output.index(answer_id)] if answer_id in output else output
    assert processor.decode(thoughts) == result["reasoning"]["text"]


def test_detect_gives_boxes_padded_with_zeros(pictures: list[Image.Image]) -> None:
    found, _ = generated(pictures, "detect: dog", "detect: dog")
    model, _ = load_hf("hf-port")
    check_objects(found, [model.detect(picture, "dog")["objects"] for picture in pictures], 4)


def test_point_gives_points_padded_with_zeros(pictures: list[Image.Image]) -> None:
    found, _ = generated(pictures, "point: red car", "point: red car")
    model, _ = load_hf("hf-port")
    check_objects(found, [model.point(picture, "red car")["points"] for picture in pictures], 2)


def check_objects(found: torch.Tensor, expected: list[list[dict[str, float]]], width: int) -> None:
    """Values [batch, most, width] are those of the skills, and zero behind the last object of a row."""
    names = ("x_min", "y_min", "x_max", "y_max") if width == 4 else ("x", "y")
    most = max(map(len, expected))
    assert found.is_floating_point()
    assert found.shape == (len(expected), most, width)
    assert min(map(len, expected)) < most, "nothing is padded"
    for row, objects in zip(found, expected, strict=True):
        wanted = [[entry[name] for name in names] for entry in objects] + [[0.0] * width] * (most - len(objects))
        assert torch.allclose(row, torch.tensor(wanted), atol=1e-6)
