"""Prompts: the ids of every golden request, text that never becomes a control token, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import CheckpointError, RequestError
from md3cli.model.engine.prompts import Prompt, Prompts, Tokenizer, read_spatial_ref
from md3cli.model.network.config import SEGMENT_TEMPLATE, ModelConfig
from md3cli.model.weights.plan import normalise_config
from md3cli.records import Request, Task

GOLDEN = Path(__file__).parents[2] / "golden"
CASE_A = GOLDEN / "case-a" / "checkpoint"
CASES = {
    case: (GOLDEN / case / "checkpoint", GOLDEN / case / "expected.json") for case in ("case-a", "case-b", "case-c")
}
CASES |= {
    name: (GOLDEN / "case-c-formats" / name, GOLDEN / "case-c-formats" / f"expected-{name}.json")
    for name in ("raw-fp8", "hf-port", "int4")
}


def read_config(folder: Path = CASE_A) -> ModelConfig:
    return ModelConfig.from_sections(normalise_config(json.loads((folder / "config.json").read_text())))


CONFIG = read_config()
TOKENIZER = Tokenizer.load(CASE_A / "tokenizer.json", CONFIG)
PROMPTS = Prompts(CONFIG, TOKENIZER)


def with_templates(**templates: Any) -> ModelConfig:
    merged = {**CONFIG.tokenizer.templates, **templates}
    return replace(CONFIG, tokenizer=replace(CONFIG.tokenizer, templates=merged))


def golden_requests(expected: Path) -> Iterator[tuple[Request, bool, list[int]]]:
    for entry in json.loads(expected.read_text())["requests"]:
        asked = entry["request"]
        request = Request(
            Task(asked["skill"]),
            asked.get("object", asked.get("question")),
            length=asked.get("length", "normal"),
            reasoning=asked.get("reasoning", False),
            spatial_refs=tuple(tuple(ref) for ref in asked.get("spatial_refs", ())),
        )
        yield request, asked["image"] is not None, entry["result"]["prompt_ids"]


@pytest.mark.parametrize("case", CASES)
def test_golden_prompts(case: str) -> None:
    folder, expected = CASES[case]
    config = read_config(folder)
    prompts = Prompts(config, Tokenizer.load(folder / "tokenizer.json", config))
    requests = list(golden_requests(expected))
    assert requests
    for request, has_image, ids in requests:
        assert prompts.build(request, has_image).ids == ids


# -- tokenizer ------------------------------------------------------------------------------------


def test_golden_encodings() -> None:
    for case in json.loads((GOLDEN / "units.json").read_text())["encode"]:
        assert TOKENIZER.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|md_reserved_2|> b", "<|md_reserved_4|><|md_reserved_4|>"])
def test_special_text_is_plain_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert min(ids) > 20
    assert TOKENIZER.decode(ids) == text


def test_special_text_is_plain_text_for_whole_word_vocabularies(tmp_path: Path) -> None:
    """With `ignore_merges` the vocabulary is asked for whole words, and holds the control tokens too."""
    document = json.loads((CASE_A / "tokenizer.json").read_text())
    document["model"]["ignore_merges"] = True
    document["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document))
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.encode_special_tokens = True
    assert backend.encode("<|endoftext|>").ids == [0]  # what is guarded against
    assert min(Tokenizer.load(file, CONFIG).encode("<|endoftext|>")) > 20


@given(st.text())
def test_any_text_survives(text: str) -> None:
    try:
        ids = TOKENIZER.encode(text)
    except RequestError:
        assert any("\ud800" <= char <= "\udfff" for char in text)
        return
    assert TOKENIZER.decode(ids) == text


def test_half_a_surrogate_pair_is_a_bad_request() -> None:
    with pytest.raises(RequestError, match="no valid Unicode"):
        TOKENIZER.encode("a\ud800")


def test_control_and_unknown_ids_decode_to_nothing() -> None:
    word = TOKENIZER.encode("word")
    assert TOKENIZER.decode([0, *range(1, 10), *word, 448, 100_000]) == "word"
    assert TOKENIZER.decode([]) == ""


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(CASE_A / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=32)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "What is shown in the image?"
    assert Tokenizer.load(tmp_path / "tokenizer.json", CONFIG).encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("lost", [range(21), [5], [9]])
def test_lost_special_tokens_are_named(tmp_path: Path, lost: Any) -> None:
    document = json.loads((CASE_A / "tokenizer.json").read_text())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] not in lost]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    name = {21: "bos 0, eos 0, answer 3", 5: "coord 5", 9: "end of grounding 9"}[
        len(lost) if len(lost) > 1 else lost[0]
    ]
    with pytest.raises(CheckpointError, match=f"lacks special tokens the model needs .*{name}.*--tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json", CONFIG)


def test_a_larger_vocabulary_belongs_to_another_model() -> None:
    small = replace(CONFIG, text=replace(CONFIG.text, vocab_size=447))
    with pytest.raises(CheckpointError, match="has 448 entries and the model 447"):
        Tokenizer.load(CASE_A / "tokenizer.json", small)


@pytest.mark.parametrize(
    ("content", "message"),
    [(content, r"no tokenizer\.json that can be read") for content in (b"{}", b"[1]", b"\xff", b"[" * 100_000)]
    + [(b"", r"is empty \(0 bytes\)"), (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer")],
)
def test_a_damaged_tokenizer_is_a_checkpoint_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path / "tokenizer.json", CONFIG)


def test_a_missing_tokenizer_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer.load(tmp_path / "tokenizer.json", CONFIG)


# -- templates ------------------------------------------------------------------------------------


class WordTokenizer(Tokenizer):
    """Stands in for the real vocabulary: one id for any text."""

    def __init__(self) -> None:
        pass

    @property
    def size(self) -> int:
        return 51200

    def encode(self, text: str) -> list[int]:
        return [20_000 + len(text)]


@pytest.mark.parametrize(
    ("request_", "ids"),
    [
        (Request(Task.CAPTION, length="short"), [1, 32708, 2, 12492, 3]),
        (Request(Task.CAPTION), [1, 32708, 2, 6382, 3]),
        (Request(Task.CAPTION, length="long"), [1, 32708, 2, 4059, 3]),
        (Request(Task.QUERY, "why", reasoning=False), [1, 15381, 2, 20003, 3]),
        (Request(Task.QUERY, "why"), [1, 15381, 2, 20003, 4]),
        (Request(Task.DETECT, "car"), [1, 7235, 476, 2, 20004, 3]),
        (Request(Task.POINT, "car"), [1, 2581, 2, 20004, 3]),
    ],
)
def test_the_real_models_templates(request_: Request, ids: list[int]) -> None:
    assert Prompts(ModelConfig(), WordTokenizer()).build(request_, has_image=True).ids == ids


def test_only_31_segments_without_a_template() -> None:
    request = Request(Task.SEGMENT, "car")
    for name in ("moondream/moondream3.1-9B-A2B", "Moondream3.1"):
        ids = Prompts(ModelConfig(), WordTokenizer(), name).build(request, has_image=True).ids
        assert ids == [1, 17374, 2, 20003, 3]  # no leading space
    with pytest.raises(RequestError, match="segment is not supported by this model"):
        Prompts(ModelConfig(), WordTokenizer(), "moondream/moondream3-preview").build(request, has_image=True)
    given_template = with_templates(segment=None)
    with pytest.raises(RequestError, match="segment is not supported"):
        Prompts(given_template, TOKENIZER, "moondream3.1").build(request, has_image=True)
    assert SEGMENT_TEMPLATE["prefix"] == [1, 17374, 2]


@pytest.mark.parametrize("task", list(Task))
def test_a_null_template_is_a_skill_the_model_lacks(task: Task) -> None:
    prompts = Prompts(with_templates(**{task: None}), TOKENIZER)
    with pytest.raises(RequestError, match=f"{task} is not supported by this model"):
        prompts.build(Request(task, "car"), has_image=True)


def test_unknown_and_null_caption_lengths() -> None:
    with pytest.raises(RequestError, match="'huge' is not one of short, normal, long"):
        PROMPTS.build(Request(Task.CAPTION, length="huge"), has_image=True)
    without_long = Prompts(with_templates(caption={"short": [1], "long": None}), TOKENIZER)
    with pytest.raises(RequestError, match="'long' is not one of short"):
        without_long.build(Request(Task.CAPTION, length="long"), has_image=True)


def test_kestrels_words_for_query() -> None:
    query = {"prefix": [1, 30, 2], "answer_prefix": [3], "reasoning_prefix": [4], "post_reasoning_prefix": []}
    prompts = Prompts(with_templates(query=query), TOKENIZER)
    word = TOKENIZER.encode("why")
    assert prompts.build(Request(Task.QUERY, "why"), has_image=True).ids == [1, 30, 2, *word, 4]
    assert prompts.build(Request(Task.QUERY, "why", reasoning=False), has_image=True).ids == [1, 30, 2, *word, 3]


@pytest.mark.parametrize(
    "templates",
    [
        {"detect": {"prefix": [1, 448], "suffix": [3]}},
        {"detect": {"prefix": ["1"], "suffix": [3]}},
        {"detect": {"prefix": [True], "suffix": [3]}},
        {"detect": {"suffix": [3]}},
        {"detect": [1, 2]},
        {"caption": {"short": "describe"}},
        {"caption": 3},
    ],
)
def test_damaged_templates_are_checkpoint_errors(templates: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.templates\.(detect|caption)"):
        Prompts(with_templates(**templates), TOKENIZER)


def test_default_templates_are_not_for_another_vocabulary() -> None:
    config = replace(CONFIG, tokenizer=ModelConfig().tokenizer)
    prompts = Prompts(config, TOKENIZER)
    for task in Task:
        with pytest.raises(RequestError, match=f"{task} is not supported by this model"):
            prompts.build(Request(task, "car"), has_image=True)


# -- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", "  ", "\n\t"])
@pytest.mark.parametrize("task", [Task.QUERY, Task.DETECT, Task.POINT, Task.SEGMENT])
def test_an_empty_prompt_is_refused(task: Task, text: str | None) -> None:
    with pytest.raises(RequestError, match="prompt that is not empty"):
        PROMPTS.build(Request(task, text), has_image=True)


def test_white_space_round_a_prompt_is_kept() -> None:
    spaced = PROMPTS.build(Request(Task.QUERY, " why ", reasoning=False), has_image=True).ids
    assert spaced[5:-1] == TOKENIZER.encode(" why ")


@pytest.mark.parametrize("task", [Task.CAPTION, Task.DETECT, Task.POINT, Task.SEGMENT])
def test_all_but_queries_need_an_image(task: Task) -> None:
    with pytest.raises(RequestError, match="needs an image"):
        PROMPTS.build(Request(task, "car"), has_image=False)


def test_references_become_placeholders_before_the_question() -> None:
    refs = ((0.25, 0.5), (0.1, 0.2, 0.6, 0.8))
    prompt = PROMPTS.build(Request(Task.QUERY, "why", reasoning=False, spatial_refs=refs), has_image=True)
    assert prompt.ids[:10] == [1, 338, 299, 109, 2, 5, 5, 5, 5, 6]
    assert prompt.ids[10:] == [*TOKENIZER.encode("why"), 3]
    assert prompt.coords == ((5, 0.25), (6, 0.5), (7, 0.35), (8, 0.5))
    ((index, size_wh),) = prompt.sizes
    assert index == 9
    assert size_wh == pytest.approx((0.5, 0.6))


@pytest.mark.parametrize("task", [Task.POINT, Task.SEGMENT])
def test_point_and_segment_take_references(task: Task) -> None:
    prompt = PROMPTS.build(Request(task, "car", spatial_refs=((0.0, 1.0),)), has_image=True)
    assert [value for _, value in prompt.coords] == [0.0, 1.0]


@pytest.mark.parametrize("task", [Task.CAPTION, Task.DETECT])
def test_caption_and_detect_take_no_references(task: Task) -> None:
    with pytest.raises(RequestError, match="takes no spatial references"):
        PROMPTS.build(Request(task, "car", spatial_refs=((0.5, 0.5),)), has_image=True)


def test_references_need_an_image() -> None:
    with pytest.raises(RequestError, match="need an image to refer to"):
        PROMPTS.build(Request(Task.QUERY, "why", spatial_refs=((0.5, 0.5),)), has_image=False)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ((0.5,), "x,y or x_min"),
        ((0.1, 0.2, 0.3), "x,y or x_min"),
        (("a", 0.5), "x,y or x_min"),
        ((True, 0.5), "x,y or x_min"),
        ((None, 0.5), "x,y or x_min"),
        ((float("nan"), 0.5), "from 0 to 1"),
        ((float("inf"), 0.5), "from 0 to 1"),
        ((-0.01, 0.5), "from 0 to 1"),
        ((0.5, 1.01), "from 0 to 1"),
        ((320, 240), "from 0 to 1"),
        ((10**400, 0), "from 0 to 1"),
        ((0.6, 0.2, 0.1, 0.8), "smaller number first"),
        ((0.1, 0.8, 0.6, 0.2), "smaller number first"),
    ],
)
def test_references_that_make_no_sense(ref: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read_spatial_ref(ref)
    assert caught.value.type == "bad_request"


@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_boxes_are_centre_and_size(corners: tuple[float, float, float, float]) -> None:
    x_min, x_max = sorted(corners[:2])
    y_min, y_max = sorted(corners[2:])
    centre, size_wh = read_spatial_ref((x_min, y_min, x_max, y_max))
    assert size_wh is not None
    assert centre[0] - size_wh[0] / 2 == pytest.approx(x_min, abs=1e-12)
    assert centre[1] + size_wh[1] / 2 == pytest.approx(y_max, abs=1e-12)


def test_a_text_only_prompt_is_the_whole_sequence() -> None:
    prompt = PROMPTS.build(Request(Task.QUERY, "why", reasoning=False), has_image=False)
    with_image = PROMPTS.build(Request(Task.QUERY, "why", reasoning=False), has_image=True)
    assert prompt == Prompt([0, *with_image.ids])


def runaway_tokenizer(folder: Path, **parts: Any) -> Path:
    """The case's vocabulary with parts of its own."""
    document = json.loads((CASE_A / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(document | parts), encoding="utf-8")
    return folder / "tokenizer.json"


RUNAWAY = {"Regex": "(a|aa)+$"}
SPLIT = {"type": "Split", "pattern": RUNAWAY, "behavior": "Isolated", "invert": False}
LONG = "a" * 60 + "b"


@pytest.mark.process
@pytest.mark.parametrize(
    "parts", [{"pre_tokenizer": SPLIT}, {"normalizer": {"type": "Replace", "pattern": RUNAWAY, "content": "x"}}]
)
def test_a_pattern_that_runs_away_is_one_bad_request(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], parts: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.load(runaway_tokenizer(tmp_path, **parts), CONFIG)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"the tokenizer fails on this prompt .*--tokenizer") as failure:
            tokenizer.encode(LONG)
        assert failure.value.type == "bad_request"
        assert tokenizer.encode("why")
    assert capfd.readouterr().err == ""  # what Rust says of its panic is nobody's business


def test_an_answer_that_cannot_be_put_into_words_is_the_models_failure(tmp_path: Path) -> None:
    decoder = {"type": "Replace", "pattern": RUNAWAY, "content": "x"}
    tokenizer = Tokenizer.load(runaway_tokenizer(tmp_path, decoder=decoder), CONFIG)
    with pytest.raises(RequestError, match="into words") as failure:
        tokenizer.decode([-1])
    assert failure.value.type == "model"


def test_a_vocabulary_without_the_templates_words_belongs_to_another_model() -> None:
    asks_more = with_templates(caption={"short": [1, CONFIG.text.vocab_size - 1, 3]})
    small = WordTokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WordTokenizer, "size", 40)
        with pytest.raises(CheckpointError, match=r"has 40 entries .* do not belong together"):
            Prompts(asks_more, small)
