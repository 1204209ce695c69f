"""Pictures given to the class in any form, and what is said of those that cannot be used."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from corpus import encode, picture
from PIL import Image

from md3cli import Moondream
from md3cli.errors import ImageError, RequestError


@pytest.fixture(scope="module")
def tiny() -> Moondream:
    return Moondream.load("tiny", device="cpu", dtype="fp32")


PICTURE = picture("RGB", (64, 48))
FILE = encode(PICTURE, "PNG")


@pytest.mark.process
def test_every_form_of_a_picture_gives_the_same_answer(tiny: Moondream, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(FILE)
    forms = [path, str(path), FILE, bytearray(FILE), memoryview(FILE), PICTURE, np.asarray(PICTURE)]
    answers = [tiny.detect(form, "cat", settings={"max_objects": 2}) for form in forms]
    assert all(answer == answers[0] for answer in answers)
    rows = [{"image": form, "task": "caption", "max_tokens": 2} for form in forms]
    assert all(record["error"] is None and record["width"] == 64 for record in tiny.annotate(rows))


def test_grey_arrays_are_pictures(tiny: Moondream) -> None:
    assert tiny.encode_image(np.asarray(PICTURE.convert("L"))).width == 64


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"no picture " * 9999, "bytes of length 109,989"),
        (bytearray(FILE[:99]), "bytearray of length 99"),
        (b"", "bytes of length 0"),
        (np.zeros((9, 8, 4), np.uint8), r"ndarray \(uint8, \[9, 8, 4\]\)"),
        (np.zeros((9, 8, 3)), r"ndarray \(float64, \[9, 8, 3\]\)"),
        (np.zeros((0, 8, 3), np.uint8), r"ndarray \(uint8, \[0, 8, 3\]\)"),
        (np.zeros(9, np.uint8), r"ndarray \(uint8, \[9\]\)"),
        (io.BytesIO(FILE), "a value of the type BytesIO"),
        ([[1, 2, 3]] * 9999, "a value of the type list"),
        (17, "a value of the type int"),
        (Path("not/there.png"), "not/there.png"),
        (base64.b64encode(FILE * 99).decode(), r"text of [\d,]+ characters, taken for a path"),
        (Image.open(io.BytesIO(encode(picture("RGB", (400, 300)), "PNG")[:2000])), r"a PIL image \(RGB, 400 x 300\)"),
    ],
)
def test_what_cannot_be_used_is_named_by_kind_and_size(tiny: Moondream, image: object, words: str) -> None:
    with pytest.raises((RequestError, ImageError), match=words) as caught:
        tiny.caption(image)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300
    [record] = tiny.annotate([{"image": image, "task": "caption"}])
    assert record["error"] is not None
    assert len(record["error"]["message"]) < 300
