"""The independent reference against the golden cases: it must be right before it may judge."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from reference import network as net
from reference import preprocess
from reference.preprocess import crops_of, tiling_of
from reference.random_models import draw_network
from reference.reading import VISION, read_network
from reference.sequence import Encoded, Model
from reference.skills import answer
from reference.texts import stream_pieces, svg_path
from reference.writing import FORMATS as WRITTEN_FORMATS
from reference.writing import formats_of, write_checkpoint
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
FORMATS = ("raw-fp8", "hf-port", "int4")
FOLDERS = {name: GOLDEN / name for name in ("case-a", "case-b", "case-c")}
CASES = {name: (folder / "checkpoint", folder / "expected.json") for name, folder in FOLDERS.items()}
CASES |= {name: (GOLDEN / "case-c-formats" / name, GOLDEN / f"case-c-formats/expected-{name}.json") for name in FORMATS}
TOLERANCE = 1e-4
BESIDE_THE_RESULT = {"trace", "sequence"}


def resized_as_recorded() -> AbstractContextManager[object]:
    """Within it, pictures are resized as the golden cases were made: in one call of Pillow 13, some height first."""
    return patch.object(preprocess, "resize", lambda picture, *size: picture.resize(size, Image.Resampling.LANCZOS))


class Case:
    """A golden case opened once: model, expectations, and every picture encoded."""

    def __init__(self, folder: Path, expected: Path) -> None:
        self.expected = json.loads(expected.read_text())
        self.model = Model(read_network(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))
        images = expected.parent / "images"
        self.images = [Image.open(images / entry["file"]) for entry in self.expected["images"]]
        with torch.no_grad(), resized_as_recorded():
            self.encoded: list[Encoded] = [self.model.encode_image(image) for image in self.images]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*CASES[request.param])


def close(actual: object, expected: object, atol: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


def test_pictures_become_the_same_crops_and_embeddings(case: Case) -> None:
    for entry, image, encoded in zip(case.expected["images"], case.images, case.encoded, strict=True):
        with resized_as_recorded():
            crops, tiling = crops_of(image, case.model.network.config)
        assert list(tiling) == entry["tiling"]
        assert hashlib.sha256(crops.tobytes()).hexdigest() == entry["crops_sha256"]
        assert list(encoded.features.shape) == entry["vision_features"]["shape"]
        close(encoded.features[0, 0, :8], entry["vision_features"]["sample_crop_0_patch_0"])
        close(encoded.features[-1, -1, :8], entry["vision_features"]["sample_last_crop_last_patch"])
        margin = case.model.network.config["vision"]["overlap_margin"]
        stitched = net.stitch(encoded.features[1:], encoded.tiling, case.model.network.grid, margin)
        assert list(stitched.shape) == entry["stitched_shape"]
        close(net.pool(stitched, case.model.network.grid)[0, :8], entry["pooled_sample_0"])
        close(encoded.embedding[0, :8], entry["image_embedding"]["sample_0"])
        close(encoded.embedding[-1, :8], entry["image_embedding"]["sample_last"])


def test_prefix_hidden_states_are_the_same(case: Case) -> None:
    network = case.model.network
    for entry, encoded in zip(case.expected["images"], case.encoded, strict=True):
        prefix = torch.cat([network.tensors["text.wte"][[0]], encoded.embedding])
        with torch.no_grad():
            hidden = net.decode(network, prefix, network.prefix_len).hidden
        close(hidden[entry["prefix_hidden"]["positions"], :8], entry["prefix_hidden"]["rows"])


@pytest.mark.process
def test_every_request_is_answered_alike(case: Case) -> None:
    for number, entry in enumerate(case.expected["requests"]):
        request, expected = entry["request"], entry["result"]
        encoded = None if request["image"] is None else case.encoded[request["image"]]
        actual = answer(case.model, request, encoded)
        for ours, theirs in zip(actual["trace"], expected["trace"], strict=True):
            for key in ("kind", "choice", "pos"):
                assert ours[key] == theirs[key], number
            float32_noise = 1e-5 * max(10.0, abs(theirs["top"]))  # without region.ln the logits reach 55
            close([ours["margin"], ours["top"]], [theirs["margin"], theirs["top"]], atol=float32_noise)
            if "moe_margin" in theirs:
                close(ours["moe_margin"], theirs["moe_margin"])
        without = {name: value for name, value in actual.items() if name not in BESIDE_THE_RESULT}
        assert_same(without, {name: value for name, value in expected.items() if name != "trace"}, number)
        if "stream" in entry:
            assert stream_pieces(case.model, actual["token_ids"]) == entry["stream"]


def assert_same(actual: object, expected: object, where: object) -> None:
    """Equal, floats within 1e-6 (they are written with 12 digits)."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], (where, key))
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(ours, theirs, where)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=1e-6), where
    else:
        assert actual == expected, where


def test_prompts_end_in_the_same_state(case: Case) -> None:
    for entry in case.expected["requests"][::5]:
        request, expected = entry["request"], entry["prompt"]
        encoded = None if request["image"] is None else case.encoded[request["image"]]
        only_prompt = request | ({"max_tokens": 0} if "max_tokens" in request else {"max_objects": 1})
        if request.get("reasoning") or "max_objects" in request:
            continue  # these feed more than the prompt before they end
        sequence = answer(case.model, only_prompt, encoded)["sequence"]
        close(sequence.hidden[:8], expected["hidden_first_8"])
        close(sequence.logits[:16], expected["logits_first_16"])
        close(torch.logsumexp(sequence.logits, 0), expected["logsumexp"])


UNITS = json.loads((GOLDEN / "units.json").read_text())


@pytest.fixture(scope="module")
def any_model() -> Model:
    folder = CASES["case-c"][0]
    return Model(read_network(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))


@pytest.mark.parametrize("case", UNITS["tiling"]["cases"], ids=lambda case: f"{case['width']}x{case['height']}")
def test_tilings(case: dict) -> None:
    assert list(tiling_of(case["width"], case["height"], VISION)) == case["tiling_rows_cols"]


def test_pooling_bins() -> None:
    for case in UNITS["stitched_and_pooled_bins"]:
        assert [list(cell) for cell in net.pooling_bins(case["length"], case["out"])] == case["bins"]


def test_size_bins() -> None:
    for case in UNITS["size_bins"]:
        assert net.size_of_bin(case["bin"], 1024) == pytest.approx(case["size"], abs=1e-9)


def test_stream_pieces(any_model: Model) -> None:
    for case in UNITS["stream"]["cases"]:
        assert stream_pieces(any_model, case["ids"]) == case["pieces"]


def test_paths(any_model: Model) -> None:
    for case in UNITS["svg"]["cases"]:
        assert svg_path(any_model, case["ids"]) == {key: case[key] for key in case if key != "ids"}


def test_encodings(any_model: Model) -> None:
    for case in UNITS["encode"]:
        assert any_model.tokens_of(case["text"]) == case["ids"]


@pytest.mark.process
@pytest.mark.parametrize("seed", [1, 4])
def test_what_is_written_is_read_back(seed: int, tmp_path: Path) -> None:
    network = draw_network(seed, dense=seed == 4)
    assert set(formats_of(network.config)) == {f for f in WRITTEN_FORMATS if seed != 4 or not f.endswith("fp8")}
    for form in formats_of(network.config):
        back = read_network(write_checkpoint(network, tmp_path / form, form))
        lossy = {"original-fp8": 0.05, "raw-fp8": 0.05, "int4": 0.2}.get(form, 0.0)
        expected = {name for name in network.tensors if form != "hf-port" or not name.startswith("region.ln.")}
        assert back.tensors.keys() == expected
        for name in expected:
            np.testing.assert_allclose(back.tensors[name], network.tensors[name], rtol=0, atol=lossy, err_msg=name)


@pytest.mark.process
def test_a_seed_decides_the_model() -> None:
    first, again, other = draw_network(3), draw_network(3), draw_network(7)
    assert first.config == again.config != other.config
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
