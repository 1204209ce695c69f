"""Scripts written for the original model's card run unchanged on `md3cli.Moondream`.

Each test is such a script with `model` and `image` given; only the checks behind it are ours. The
weights are random, so what is checked is the shape of results and that equal roads lead to equal
answers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from reference.random_models import draw_network
from reference.writing import write_checkpoint

from md3cli import Moondream
from md3cli.errors import ImageError

TALKATIVE = 22  # a seed whose model writes several words, grounds, and finds things in `image`
SETTINGS = {"max_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(draw_network(TALKATIVE), tmp_path_factory.mktemp("scripts") / "model", "original")


@pytest.fixture(scope="module")
def model(folder: Path) -> Moondream:
    return Moondream.load(str(folder), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.radial_gradient("L").resize((90, 60)).convert("RGB")


@pytest.mark.process
def test_captions_of_three_lengths(model: Moondream, image: Image.Image) -> None:
    for length in ("short", "normal", "long"):
        caption = model.caption(image, length=length, settings=SETTINGS)["caption"]
        assert isinstance(caption, str)
    assert model.caption(image, settings=SETTINGS) == model.caption(image, length="normal", settings=SETTINGS)


def test_a_caption_can_be_streamed(model: Moondream, image: Image.Image) -> None:
    stream = model.caption(image, length="normal", stream=True, settings=SETTINGS)
    chunks = []
    for chunk in stream["caption"]:
        chunks.append(chunk)
    assert len(chunks) > 1
    assert "".join(chunks) == model.caption(image, length="normal", settings=SETTINGS)["caption"]


def test_a_query_with_reasoning(model: Moondream, image: Image.Image) -> None:
    result = model.query(image=image, question="What is in the image?", reasoning=True, settings=SETTINGS)
    print(result["answer"])
    assert list(result["reasoning"])[:2] == ["text", "grounding"]
    assert isinstance(result["reasoning"]["text"], str)
    assert result["reasoning"]["grounding"]
    for chunk in result["reasoning"]["grounding"]:
        assert set(chunk) == {"start_idx", "end_idx", "points"}
        assert all(len(point) == 2 for point in chunk["points"])
    assert isinstance(result["answer"], str)


def test_a_query_without_reasoning_has_none(model: Moondream, image: Image.Image) -> None:
    assert set(model.query(image, "What is this?", reasoning=False, settings=SETTINGS)) == {"answer"}


@pytest.mark.process
def test_an_answer_can_be_streamed(model: Moondream, image: Image.Image) -> None:
    for reasoning in (False, True):
        plain = model.query(image, "What is this?", reasoning=reasoning, settings=SETTINGS)
        stream = model.query(image, "What is this?", reasoning=reasoning, stream=True, settings=SETTINGS)
        assert not isinstance(stream["answer"], str)
        assert "".join(stream["answer"]) == plain["answer"]
        assert ("reasoning" in stream) == reasoning
        if reasoning:
            assert stream["reasoning"] == plain["reasoning"]


@pytest.mark.process
def test_a_question_without_an_image(model: Moondream) -> None:
    result = model.query(question="What is an encoder?", reasoning=False, settings=SETTINGS)
    assert isinstance(result["answer"], str)
    reasoned = model.query(question="What is an encoder?", settings=SETTINGS)
    assert {"reasoning", "answer"} <= set(reasoned)


def test_spatial_references(model: Moondream, image: Image.Image) -> None:
    refs = [[0.2, 0.3], [0.1, 0.2, 0.6, 0.8]]
    result = model.query(image, "What is here?", spatial_refs=refs, reasoning=False, settings=SETTINGS)
    assert isinstance(result["answer"], str)


def test_detect_and_point(model: Moondream, image: Image.Image) -> None:
    settings = {"max_objects": 3}
    objects = model.detect(image, "face", settings=settings)["objects"]
    assert 0 < len(objects) <= 3
    for box in objects:
        assert box["x_min"] <= box["x_max"]
        assert box["y_min"] <= box["y_max"]
    points = model.point(image, "person", settings=settings)["points"]
    assert 0 < len(points) <= 3
    for point in points:
        assert 0 <= point["x"] < 1
        assert 0 <= point["y"] < 1


@pytest.mark.process
def test_an_encoded_image_answers_like_the_image(model: Moondream, image: Image.Image) -> None:
    encoded = model.encode_image(image)
    assert model.caption(encoded, length="short", settings=SETTINGS) == model.caption(
        image, length="short", settings=SETTINGS
    )
    assert model.query(encoded, "What?", settings=SETTINGS) == model.query(image, "What?", settings=SETTINGS)
    few = {"max_objects": 2}
    assert model.detect(encoded, "car", settings=few) == model.detect(image, "car", settings=few)
    assert model.point(encoded, "car", settings=few) == model.point(image, "car", settings=few)


def test_encoding_twice_is_encoding_once(model: Moondream, image: Image.Image) -> None:
    encoded = model.encode_image(image)
    again = model.encode_image(encoded)
    assert model.caption(again, settings=SETTINGS) == model.caption(encoded, settings=SETTINGS)


def test_sampling_settings(model: Moondream, image: Image.Image) -> None:
    settings = {"temperature": 0.5, "max_tokens": 8, "top_p": 0.3}
    first = model.caption(image, length="short", settings=settings)["caption"]
    assert first == model.caption(image, length="short", settings=settings)["caption"]


@pytest.mark.slow
def test_compiling_changes_no_answer(folder: Path, model: Moondream, image: Image.Image) -> None:
    compiled = Moondream.load(folder, device="cpu", dtype="fp32")
    compiled.compile()
    few = {"max_objects": 2}
    expected = model.detect(image, "sign", settings=few)["objects"]
    for ours, theirs in zip(compiled.detect(image, "sign", settings=few)["objects"], expected, strict=True):
        for corner in ("x_min", "y_min", "x_max", "y_max"):
            assert ours[corner] == pytest.approx(theirs[corner], abs=1e-6)


@pytest.mark.process
@pytest.mark.timeout(60)
def test_other_questions_may_be_asked_while_a_stream_runs(model: Moondream, image: Image.Image) -> None:
    encoded = model.encode_image(image)
    few = {"max_objects": 2}
    plain, objects = model.caption(encoded, settings=SETTINGS), model.detect(encoded, "car", settings=few)
    chunks = []
    for chunk in model.caption(encoded, stream=True, settings=SETTINGS)["caption"]:
        chunks.append(chunk)
        assert model.detect(encoded, "car", settings=few) == objects
    assert "".join(chunks) == plain["caption"]


@pytest.mark.process
@pytest.mark.timeout(60)
def test_two_streams_may_run_side_by_side(model: Moondream, image: Image.Image) -> None:
    lengths = ("short", "long")
    plain = [model.caption(image, length=length, settings=SETTINGS)["caption"] for length in lengths]
    streams = [model.caption(image, length=length, stream=True, settings=SETTINGS)["caption"] for length in lengths]
    pieces = list(itertools.zip_longest(*streams, fillvalue=""))
    assert ["".join(column) for column in zip(*pieces, strict=True)] == plain


@pytest.mark.timeout(60)
def test_a_stream_may_be_left_early(model: Moondream, image: Image.Image) -> None:
    objects = model.detect(image, "car", settings={"max_objects": 2})
    for _chunk in model.query(image, "Why?", reasoning=False, stream=True, settings=SETTINGS)["answer"]:
        break
    assert model.detect(image, "car", settings={"max_objects": 2}) == objects


@pytest.mark.process
@pytest.mark.timeout(60)
def test_questions_may_be_asked_while_records_arrive(model: Moondream, image: Image.Image) -> None:
    rows = [{"image": image, "task": "caption", "max_tokens": n, "meta": {"n": n}} for n in (24, 3, 12, 1, 7)]
    expected = list(model.annotate(rows))
    again = []
    for record in model.annotate(rows):
        again.append(record)
        number = record["meta"]["n"]
        assert model.caption(image, settings={"max_tokens": number})["caption"] == record["caption"]
    assert again == expected


def test_arguments_come_in_the_originals_order() -> None:
    expected = {
        "encode_image": ["image"],
        "caption": ["image", "length", "stream", "settings"],
        "query": ["image", "question", "reasoning", "spatial_refs", "stream", "settings"],
        "detect": ["image", "object", "settings"],
        "point": ["image", "object", "settings"],
        "compile": [],
    }
    for name, arguments in expected.items():
        positional = [
            parameter.name
            for parameter in inspect.signature(getattr(Moondream, name)).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name != "self"
        ]
        assert [argument for argument in positional if argument in arguments] == arguments, name
        assert positional[: len(arguments)] == arguments, name


@pytest.mark.process
def test_a_script_over_a_folder(model: Moondream, image: Image.Image, tmp_path: Path) -> None:
    def pictures() -> Iterator[Image.Image]:
        for path in sorted(tmp_path.glob("*.png")):
            yield Image.open(path)

    for number in range(2):
        image.rotate(90 * number, expand=True).save(tmp_path / f"{number}.png")
    captions = [model.caption(picture, settings=SETTINGS)["caption"] for picture in pictures()]
    assert captions[0] == model.caption(image, settings=SETTINGS)["caption"]
    assert len(captions) == 2


def test_a_picture_that_cannot_be_read_is_named(model: Moondream) -> None:
    with pytest.raises(ImageError, match=r"^nowhere/a\.png: cannot open"):
        model.caption("nowhere/a.png")
