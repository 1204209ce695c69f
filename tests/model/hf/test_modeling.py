"""The transformers class against the plain path and the reference cases; every layout in, three out."""

from __future__ import annotations

import json
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES, load_case
from hf_cases import inputs_for, load_hf, picture
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    DynamicCache,
    QuantoConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from md3cli import Moondream
from md3cli.errors import CheckpointError, ConfigError, EngineError, RequestError, UsageError
from md3cli.model.engine import plain
from md3cli.model.engine.machine import MemoryPlan
from md3cli.model.hf import Moondream3Config, Moondream3ForConditionalGeneration, Moondream3Processor, original_methods
from md3cli.model.hf.loading import find_weights
from md3cli.model.weights.names import Format
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.records import Task

TOLERANCE = 1e-4


def plain_logits(name: str, key: int) -> torch.Tensor:
    case = load_case(name)
    with torch.inference_mode():
        sequence = plain.PlainGeneration(case.model, case.job(key).image)
        sequence.feed_prompt(case.prompts.build(case.requests[key], has_image=case.image_indices[key] is not None))
        return sequence.logits()


@pytest.mark.usefixtures("crops_as_recorded")
@pytest.mark.process
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_plain_paths_in_padded_batches(name: str, side: str) -> None:
    model, _ = load_hf(name)
    keys = list(range(0, len(load_case(name).requests), 3))
    inputs = inputs_for(name, keys, side)
    with torch.no_grad():
        logits = model(**inputs).logits
    columns = torch.arange(logits.shape[1])
    last = (columns * inputs["attention_mask"]).argmax(dim=1)
    assert side == "left" or len(set(last.tolist())) > 1
    for row, key in enumerate(keys):
        assert (logits[row, last[row]] - plain_logits(name, key)).abs().max() <= TOLERANCE


@pytest.mark.usefixtures("crops_as_recorded")
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_passes_equal_one_pass(side: str) -> None:
    """Prefix first, then the rest in two pieces, one of a single id."""
    model, _ = load_hf("a")
    inputs = inputs_for("a", [0, 5, 11], side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = model(**inputs, use_cache=False)
        assert whole.past_key_values is None
        cache = DynamicCache()
        first = model(**inputs | {"input_ids": ids[:, :-3], "attention_mask": mask[:, :-3]}, past_key_values=cache)
        second = model(input_ids=ids[:, -3:-1], attention_mask=mask[:, :-1], past_key_values=cache)
        third = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache)
    pieces = torch.cat([part.logits for part in (first, second, third)], dim=1)
    real = mask.bool()
    assert (pieces - whole.logits)[real].abs().max() <= TOLERANCE


def decided(generation: Any, row: int, width: int) -> list[int]:
    return generation.sequences[row, width:].tolist()


def assert_row_is_the_cases(name: str, key: int, generation: Any, row: int, width: int) -> None:
    """Ids, values and finish reason of one row are those the case expects."""
    case = load_case(name)
    expected, config = case.expected[key], case.model.config
    reasoning = expected.get("reasoning") or None
    wanted = [*reasoning["token_ids"], config.tokenizer.answer_id] if reasoning else []
    wanted += expected["token_ids"]
    if expected["finish"] == "stop":
        wanted.append(config.tokenizer.eos_id)
    ids = decided(generation, row, width)
    assert ids[: len(wanted)] == wanted
    assert set(ids[len(wanted) :]) <= {load_hf(name)[1].pad_token_id}
    assert generation.finish_reasons[row] == expected["finish"]
    for index, entry in enumerate(expected.get("objects") or []):
        box = [entry[side] for side in ("x_min", "y_min", "x_max", "y_max")]
        assert torch.allclose(generation.objects[row][index], torch.tensor(box), atol=1e-6)
    for index, entry in enumerate(expected.get("points") or []):
        assert torch.allclose(generation.objects[row][index], torch.tensor([entry["x"], entry["y"]]), atol=1e-6)
    bins = [t["choice"] / config.region.coord_out_dim for t in expected["trace"] if t["kind"] == "coord"]
    tokens = generation.sequences[row, width : width + len(wanted)]
    found = generation.region_values[row, : len(wanted)][tokens == config.tokenizer.coord_id][:, 0]
    assert torch.allclose(found[~found.isnan()], torch.tensor(bins), atol=1e-6)


@pytest.mark.usefixtures("crops_as_recorded")
@pytest.mark.process
@pytest.mark.parametrize("name", CASES)
def test_generate_takes_every_decision_of_the_cases_in_mixed_batches(name: str) -> None:
    """Rows of all skills, pictures of all tilings and texts alone, one batch for each budget."""
    case, (model, _) = load_case(name), load_hf(name)
    batches = defaultdict(list)
    for key, request in enumerate(case.requests):
        if case.is_certain(key):
            is_region = request.task in (Task.DETECT, Task.POINT)
            batches[("objects", request.max_objects) if is_region else ("tokens", request.max_tokens)].append(key)
    num_tokens = [budget for kind, budget in batches if kind == "tokens"]
    num_objects = [budget for kind, budget in batches if kind == "objects"]
    for tokens in set(num_tokens):
        for objects in set(num_objects):
            keys = [*batches[("tokens", tokens)], *batches[("objects", objects)]]
            inputs = inputs_for(name, keys)
            generation = model.generate(
                **inputs, max_new_tokens=tokens, max_objects=objects, return_dict_in_generate=True
            )
            for row, key in enumerate(keys):
                assert_row_is_the_cases(name, key, generation, row, inputs["input_ids"].shape[1])
    assert num_tokens
    assert num_objects


@pytest.mark.usefixtures("crops_as_recorded")
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_cache_and_padded_on_either_side(side: str) -> None:
    case, (model, _) = load_case("c"), load_hf("c")
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)][:8]
    inputs = inputs_for("c", keys, side)
    generation = model.generate(
        **inputs, max_new_tokens=4, max_objects=2, use_cache=False, return_dict_in_generate=True
    )
    wanted = model.generate(**inputs_for("c", keys), max_new_tokens=4, max_objects=2, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(generation.sequences[:, width:], wanted.sequences[:, width:])
    assert torch.allclose(generation.region_values, wanted.region_values, atol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("crops_as_recorded")
@pytest.mark.process
def test_results_are_ids_boxes_points_or_a_list() -> None:
    model, processor = load_hf("a")
    images = [picture("a", 0), picture("a", 1)]
    ids = model.generate(**processor(text=["", "query: what?"], images=images), max_new_tokens=3)
    boxes = model.generate(**processor(text=["detect: cat", "detect: dog"], images=images), max_objects=2)
    points = model.generate(**processor(text=["point: cat", "point: dog"], images=images), max_objects=2)
    mixed = model.generate(**processor(text=["detect: cat", ""], images=images), max_objects=2, max_new_tokens=3)
    assert ids.dtype == torch.int64
    assert boxes.is_floating_point()
    assert boxes.shape[::2] == (2, 4)
    assert points.shape[::2] == (2, 2)
    assert isinstance(mixed, list)
    assert torch.equal(mixed[0], boxes[0][: len(mixed[0])])
    again = model.generate(**processor(text=[""], images=images[1:]), max_new_tokens=3)
    assert processor.decode(mixed[1]) == processor.decode(again[0])
    assert mixed[1][-1] == again[0, -1]
    for row, image in enumerate(images):
        found = model.detect(image, ["cat", "dog"][row], settings={"max_objects": 2})["objects"]
        wanted = torch.tensor([[o["x_min"], o["y_min"], o["x_max"], o["y_max"]] for o in found]).reshape(-1, 4)
        assert torch.allclose(boxes[row, : len(found)], wanted, atol=1e-6)
        assert not boxes[row, len(found) :].any()


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.is_over = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        self.is_over = True


class StopAfter(StoppingCriteria):
    """Ends rows at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.usefixtures("crops_as_recorded")
def test_streamers_and_stopping_criteria(capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = load_hf("a")
    inputs = processor(text=["caption: long"], images=[picture("a", 1)])
    width = inputs["input_ids"].shape[1]
    collector = Collector()
    ids = model.generate(**inputs, max_new_tokens=8, streamer=collector)
    assert collector.is_over
    assert torch.equal(collector.parts[0], inputs["input_ids"])
    assert torch.cat(collector.parts[1:]).tolist() == ids[0, width:].tolist()
    model.generate(**inputs, max_new_tokens=8, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip()
    stopped = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([StopAfter(width + 2)]))
    assert torch.equal(stopped, ids[:, : width + 2])


@pytest.mark.usefixtures("crops_as_recorded")
def test_sampling_follows_the_generators_seed_and_the_warpers() -> None:
    model, processor = load_hf("a")
    inputs = processor(text=["caption: long"], images=[picture("a", 1)])

    def run(**settings: Any) -> list[int]:
        torch.manual_seed(3)
        return model.generate(**inputs, max_new_tokens=6, do_sample=True, **settings)[0].tolist()

    greedy = model.generate(**inputs, max_new_tokens=6)[0].tolist()
    hot = run(temperature=100.0, top_k=0)
    assert hot == run(temperature=100.0, top_k=0)
    assert hot != greedy
    assert run(top_k=1) == greedy
    several = model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=100.0, num_return_sequences=3)
    assert len({tuple(row) for row in several.tolist()}) > 1


@pytest.mark.usefixtures("crops_as_recorded")
def test_scores_come_when_asked_for() -> None:
    model, processor = load_hf("a")
    inputs = processor(text=["caption: short"], images=[picture("a", 0)])
    generation = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    width = inputs["input_ids"].shape[1]
    chosen = generation.sequences[0, width:].tolist()
    assert [int(scores.argmax()) for scores in generation.scores] == chosen


@pytest.mark.usefixtures("crops_as_recorded")
def test_beams_write_text() -> None:
    model, processor = load_hf("a")
    inputs = processor(text=["query: what?", "caption:"], images=[picture("a", 0), picture("a", 1)])
    ids = model.generate(**inputs, max_new_tokens=4, num_beams=3)
    assert ids.shape[0] == 2
    assert inputs["input_ids"].shape[1] < ids.shape[1] <= inputs["input_ids"].shape[1] + 4


@pytest.mark.usefixtures("crops_as_recorded")
def test_inputs_that_do_not_fit_are_refused() -> None:
    model, processor = load_hf("a")
    long = processor(text=["query: " + "what? " * 300], images=[picture("a", 0)])
    with pytest.raises(RequestError, match="context holds 256"):
        model.generate(**long)
    inputs = processor(text=[""], images=[picture("a", 0)])
    cut = {key: value[:, :9] if key in ("input_ids", "attention_mask") else value for key, value in inputs.items()}
    with pytest.raises(RequestError, match="the picture alone takes 26"):
        model(**cut)


@pytest.mark.usefixtures("crops_as_recorded")
@pytest.mark.process
def test_the_originals_methods_are_the_engines() -> None:
    model, _ = load_hf("a")
    case = load_case("a")
    image = picture("a", 2)
    answers = list(case.engine(2).run([case.job(key) for key in range(4)]))
    assert model.moondream().engine.model is model.model
    encoded = model.encode_image(image)
    assert model.query(encoded, "what?", settings={"max_tokens": 4}) == model.query(
        image, "what?", settings={"max_tokens": 4}
    )
    for key in range(4):
        request, answer = case.requests[key], next(a for a in answers if a.key == key)
        if request.task is Task.CAPTION:
            found = model.caption(
                picture("a", case.image_indices[key]), request.length, settings={"max_tokens": request.max_tokens}
            )
            assert found == answer.result
    pieces = model.caption(image, "short", stream=True, settings={"max_tokens": 5})["caption"]
    assert "".join(pieces) == model.caption(image, "short", settings={"max_tokens": 5})["caption"]
    assert isinstance(model.point(image, "cat", settings={"max_objects": 1})["points"], list)
    assert isinstance(model.segment(image, "cat", settings={"max_tokens": 6})["segments"], list)


@pytest.mark.usefixtures("crops_as_recorded")
def test_an_engine_is_dropped_before_another_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its slots take would not be free for the new one's."""
    model, _ = load_hf("a")
    old, plan, was_free = weakref.ref(model.moondream().engine), original_methods.plan_memory, []

    def watched(*arguments: Any) -> MemoryPlan:
        was_free.append(old() is None)
        return plan(*arguments)

    monkeypatch.setattr(original_methods, "plan_memory", watched)
    monkeypatch.setattr(model, "_weights_state", lambda: "trained")
    model.moondream()
    assert was_free == [True]


# ---- from_pretrained, save_pretrained and the Auto classes ---------------------------------------


def load(folder: Path, **settings: object) -> Moondream3ForConditionalGeneration:
    model = Moondream3ForConditionalGeneration.from_pretrained(folder, **settings)
    assert isinstance(model, Moondream3ForConditionalGeneration)
    return model.eval()


def logits_of(model: Moondream3ForConditionalGeneration, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(name, [0, 1])).logits


@pytest.mark.parametrize("name", CASES)
def test_every_layout_loads_as_the_checkpoint_reader_reads_it(name: str) -> None:
    model, case = load_hf(name)[0], load_case(name)
    weights = case.model.state_dict()
    assert set(model.state_dict()) == {f"model.{key}" for key in weights}
    assert all(torch.equal(model.state_dict()[f"model.{key}"], value) for key, value in weights.items())
    assert model.config.has_region_ln == ("region.ln.weight" in weights)
    assert model.config.network == case.model.config


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_auto_classes_know_the_model(auto: type) -> None:
    model = auto.from_pretrained(str(CASES["b"][0]))
    assert isinstance(model, Moondream3ForConditionalGeneration)
    assert model.dtype == torch.bfloat16  # as stored
    assert isinstance(AutoConfig.from_pretrained(str(CASES["b"][0])), Moondream3Config)


@pytest.mark.process
def test_what_is_saved_loads_again_here_in_md3_and_in_the_auto_classes(tmp_path: Path) -> None:
    model = load_hf("a")[0]
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "whole", tmp_path / "shards"):
        again = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
        assert again.dtype == torch.float32
        assert torch.equal(logits_of(again, "a"), logits_of(model, "a"))
        assert again.generation_config.to_dict() == model.generation_config.to_dict()
        plan = plan_checkpoint(folder)
        assert plan.layout is Format.ORIGINAL
        assert plan.config == load_case("a").model.config
        settings = {"max_objects": 2}
        found = Moondream.load(str(folder), dtype="fp32").detect(picture("a", 0), "cat", settings=settings)
        assert found == model.detect(picture("a", 0), "cat", settings=settings)


@pytest.mark.process
def test_the_ports_layout_and_the_vendors(tmp_path: Path) -> None:
    model = load_hf("hf-port")[0]  # weights without region.ln
    for layout in (Format.HF, Format.RAW):
        model.save_pretrained(tmp_path / layout, layout=layout)
        assert plan_checkpoint(tmp_path / layout).layout is layout
        again = load(tmp_path / layout)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
        assert torch.allclose(logits_of(again, "hf-port"), logits_of(model, "hf-port"), atol=1e-5)
    document = json.loads((tmp_path / "hf/config.json").read_text())
    assert document["architectures"] == ["Moondream3ForConditionalGeneration"]
    assert set(document) >= {"text_config", "vision_config", "region_config"}


def test_the_port_has_no_place_for_region_ln(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no LayerNorm before its region heads"):
        load_hf("a")[0].save_pretrained(tmp_path / "port", layout="hf")
    assert not (tmp_path / "port").exists()
    with pytest.raises(CheckpointError, match="layout 'onnx' is not one of original, hf, raw"):
        load_hf("a")[0].save_pretrained(tmp_path / "port", layout="onnx")


@pytest.mark.parametrize("layout", [None, "raw"])
def test_one_process_alone_writes_and_no_argument_is_passed_over(layout: str | None, tmp_path: Path) -> None:
    model = load_hf("a")[0]
    model.save_pretrained(tmp_path / "saved", is_main_process=False, layout=layout)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    if layout is not None:
        with pytest.raises(ConfigError, match="layout='raw' takes no max_shard_size, state_dict"):
            model.save_pretrained(
                tmp_path / "saved", layout=layout, max_shard_size="1MB", state_dict=model.state_dict()
            )


def test_dtypes_and_device_maps() -> None:
    folder = CASES["c"][0]
    assert load(folder, dtype="float32").dtype == torch.float32
    assert load(folder, torch_dtype=torch.float16).dtype == torch.float16
    placed = load(folder, device_map={"": "cpu"}, dtype=torch.float32)
    assert torch.equal(logits_of(placed, "c"), logits_of(load_hf("c")[0], "c"))
    for wrong in ("float3", torch.int8, "float8_e4m3fn"):
        with pytest.raises(CheckpointError, match="no such dtype; use auto"):
            load(folder, dtype=wrong)


def test_a_quantisation_that_packs_no_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantization_config of 'quanto': BitsAndBytesConfig alone"):
        load(CASES["c"][0], quantization_config=QuantoConfig(weights="int8"))
    config = Moondream3Config.from_pretrained(str(CASES["c"][0]))
    for scheme in (BitsAndBytesConfig(load_in_8bit=True), {"quant_method": "gptq", "bits": 4}):
        config.quantization_config = scheme
        with pytest.raises(CheckpointError, match=r"the config says that weights are packed.* they are plain"):
            load(CASES["c"][0], config=config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"state_dict": {"x": torch.zeros(1)}}, "takes no state_dict"),
        ({"subfolder": "x", "variant": "fp16"}, "takes no subfolder, variant"),
        ({"use_safetensors": False}, "pickled weights"),
        ({"dtype": torch.float16, "torch_dtype": torch.float16}, "are one setting"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, UsageError), match=said):
        load(CASES["c"][0], **arguments)


def test_the_hubs_arguments_are_refused_where_a_repository_is_fetched() -> None:
    hub = {"token": "hf_x", "cache_dir": "elsewhere", "force_download": False}
    assert find_weights(str(CASES["c"][0]), dict(hub)) == CASES["c"][0]
    with pytest.raises(ConfigError, match="takes no cache_dir, token: some/where is fetched"):
        find_weights("some/where", dict(hub))


def test_a_state_without_a_folder() -> None:
    model = load_hf("c")[0]
    state = model.state_dict()
    again = Moondream3ForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state)
    assert torch.equal(again.model.text.wte, model.model.text.wte)
    with pytest.raises(ConfigError, match="needs config and state_dict"):
        Moondream3ForConditionalGeneration.from_pretrained(None, config=model.config)
    with pytest.raises(ConfigError, match="quant packs a folder's weights"):
        Moondream3ForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state, quant="int8")


def test_a_new_network_from_a_config_trains_and_has_no_tokenizer(tmp_path: Path) -> None:
    config = Moondream3Config.from_network(load_case("c").model.config, has_region_ln=False)
    torch.manual_seed(0)
    model = Moondream3ForConditionalGeneration(config)
    assert model.model.region.ln is None
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    batch = load_hf("c")[1].collate([{"image": picture("c", 0), "task": "query", "prompt": "how?", "answer": "so"}])
    model(**batch).loss.backward()
    with pytest.raises(EngineError, match="no tokenizer"):
        model.caption(picture("c", 0))
    model.tokenizer_source = str(CASES["c"][0])
    assert "caption" in model.caption(picture("c", 0), settings={"max_tokens": 2})


def test_configs_of_every_layout_are_kept_as_one(tmp_path: Path) -> None:
    for name in CASES:
        config = Moondream3Config.from_pretrained(str(CASES[name][0]))
        assert config.network == load_case(name).model.config
        config.save_pretrained(tmp_path / name)
        assert Moondream3Config.from_pretrained(str(tmp_path / name)).network == config.network
        assert config.num_hidden_layers == config.network.text.n_layers
    with pytest.raises(CheckpointError, match=r"text\.dim must be 64"):
        Moondream3Config({"text": {"dim": 100}})


def test_a_processor_stands_alone(tmp_path: Path) -> None:
    processor = load_hf("b")[1]
    processor.save_pretrained(tmp_path)
    again = Moondream3Processor.from_pretrained(tmp_path)
    text, image = "detect: cat", picture("b", 1)
    for key, value in processor(text=text, images=image).items():
        assert torch.equal(again(text=text, images=image)[key], value)
