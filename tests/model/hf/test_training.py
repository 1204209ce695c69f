"""Fine-tuning through transformers and peft: the loss, checkpointing, Trainer, adapters and where they load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES, load_case
from hf_cases import load_hf, picture
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from md3cli import Moondream
from md3cli.config import ModelOptions
from md3cli.errors import CheckpointError, ConfigError, RequestError
from md3cli.model.engine.load import load_weights
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.hf.config import PARTS, lora_targets
from md3cli.model.network.loss import SIGMA_SHARE, near_bins_loss
from md3cli.model.network.moondream import size_bin
from md3cli.model.weights.plan import plan_checkpoint

CASE = "c"
FOLDER = CASES[CASE][0]
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}


def fresh_model() -> Moondream3ForConditionalGeneration:
    model = Moondream3ForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    assert isinstance(model, Moondream3ForConditionalGeneration)
    return model


def records() -> list[dict[str, Any]]:
    """One record of each kind, as `md3` writes them."""
    images = [picture(CASE, index) for index in range(3)]
    return [
        {"image": images[0], "task": "detect", "prompt": "cat", "objects": [BOX, BOX]},
        {"image": images[1], "task": "detect", "prompt": "dog", "objects": []},
        {"image": images[1], "task": "point", "prompt": "cat", "points": [{"x": 0.25, "y": 0.5}]},
        {"image": images[2], "task": "caption", "length": "short", "caption": "a cat"},
        {"image": images[2], "task": "query", "prompt": "how many?", "answer": "2"},
        {"image": images[2], "task": "query", "prompt": "how many?", "answer": "2", "reasoning": {"text": "1, 2"}},
        {"image": None, "task": "query", "prompt": "what is a cat?", "answer": "no dog"},
    ]


def processor() -> Moondream3Processor:
    return load_hf(CASE)[1]


def test_a_batch_teaches_decisions_values_and_the_end() -> None:
    batch = processor().collate(records())
    config = load_case(CASE).model.config
    prefix, ids = config.prefix_len, batch["input_ids"]
    detect, empty, point, caption, answer, thought, text_only = (row[row != -100].tolist() for row in batch["labels"])
    coord, eos, end_of_thought = config.tokenizer.coord_id, config.tokenizer.eos_id, config.tokenizer.answer_id
    assert detect == [coord, coord, eos]  # two objects and the end; y and size follow in turn
    assert empty == [eos]
    assert point == [coord, eos]
    words = processor().words
    assert caption == [*words.encode("a cat"), eos]
    assert answer == [*words.encode("2"), eos]
    assert thought == [*words.encode("1, 2"), end_of_thought, *words.encode("2"), eos]
    assert text_only == [*words.encode("no dog"), eos]
    assert (batch["labels"][:6, :prefix] == -100).all()
    assert batch["tilings"][6].tolist() == [0, 0]
    first = int((ids[0, prefix:] == coord).nonzero()[0]) + prefix
    box = torch.tensor([[0.3, 0.3], [0.4, 0.4], [0.4, 0.4]])
    assert torch.allclose(batch["region_labels"][0, first : first + 3], box)
    assert batch["region_values"][0, first + 3].tolist() == pytest.approx([0.3, 0.3])


def test_the_loss_is_the_mean_over_each_kind_of_target() -> None:
    model, batch = load_hf(CASE)[0], processor().collate(records())
    with torch.no_grad():
        output = model(**batch)
        hidden, logits, labels, targets = (
            output.last_hidden_state, output.logits, batch["labels"], batch["region_labels"],
        )  # fmt: skip
        region, tokens = model.model.region, model.model.config.tokenizer
        text, coord, size = [], [], []
        for row, column in (batch["attention_mask"] == 1).nonzero().tolist():
            if labels[row, column] != -100:
                text.append(F.cross_entropy(logits[row, column - 1], labels[row, column]))
            value = targets[row, column]
            if value.isnan().any():
                continue
            if batch["input_ids"][row, column] == tokens.coord_id:
                bins = value[0] * region.num_coord_bins
                coord.append(near_bins_loss(region.coord_logits(hidden[row, column - 1]), bins))
            else:
                bins = size_bin(value, region.num_size_bins)
                size.append(near_bins_loss(region.size_logits(hidden[row, column - 1]), bins).mean())
    assert len(coord) == 6
    assert len(size) == 2
    for found, wanted in zip((output.text_loss, output.coord_loss, output.size_loss), (text, coord, size), strict=True):
        assert torch.allclose(found, torch.stack(wanted).mean(), atol=1e-4)
    assert output.loss == output.text_loss + output.coord_loss + output.size_loss
    assert output.past_key_values is None


def test_near_bins_loss_is_zero_at_the_gaussian_itself() -> None:
    numbers = torch.arange(512).float()
    bins = torch.tensor([100.3])
    logits = -0.5 * ((numbers - bins) / (512 * SIGMA_SHARE)) ** 2
    assert near_bins_loss(logits, bins[0]) == pytest.approx(0.0, abs=1e-5)
    assert near_bins_loss(logits, bins[0] + 2) > 0.1
    assert near_bins_loss(torch.zeros(512), bins[0]) < math.log(512)


def test_labels_alone_work_for_text_and_padding_never_counts() -> None:
    """What collators that know text only hand in: ids as their own labels."""
    model = load_hf(CASE)[0]
    rendered = processor().apply_chat_template(
        [{"role": "user", "content": "query: how?"}, {"role": "assistant", "content": "so"}]
    )
    batch = processor()(
        text=[rendered, "query: a longer question"], images=[picture(CASE, 0)] * 2, padding_side="right"
    )
    with torch.no_grad():
        both = model(**batch, labels=batch["input_ids"].clone())
        marked = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        marked[:, : model.model.config.prefix_len] = -100
        assert torch.equal(both.loss, model(**batch, labels=marked).loss)
        assert both.coord_loss == 0


@pytest.mark.process
def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    batch, model = processor().collate(records()), fresh_model().train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept = gradients()
    model.gradient_checkpointing_enable()
    assert "forward" in vars(model.model.text.blocks[0])
    recomputed = gradients()
    model.gradient_checkpointing_disable()
    assert "forward" not in vars(model.model.text.blocks[0])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kept, recomputed, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in kept)


def lora(parts: tuple[str, ...] = ("attention", "dense", "experts"), **settings: Any) -> LoraConfig:
    targets = lora_targets(load_case(CASE).model.config, parts)
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **targets, **settings})


def test_lora_targets_name_every_matrix_of_a_part() -> None:
    model = get_peft_model(fresh_model(), lora(PARTS))
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    text = load_case(CASE).model.config.text
    assert len(trained) == 4 * text.n_layers + 4 + 2 + 4 * load_case(CASE).model.config.vision.enc_n_layers
    with pytest.raises(ConfigError, match="no part router"):
        lora_targets(load_case(CASE).model.config, ["router"])


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, logging_steps=1,
        save_steps=4, report_to=[], remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
        disable_tqdm=True, seed=3, lr_scheduler_type="constant", **settings,
    )  # fmt: skip


class Losses(TrainerCallback):
    """Keeps the logged losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def train(folder: Path, model: Any, resume_from: str | None = None, **settings: Any) -> list[float]:
    losses = Losses()
    trainer = Trainer(
        model=model, args=arguments(folder, **settings), train_dataset=records() * 4, data_collator=processor().collate,
        processing_class=processor(), callbacks=[losses],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume_from)
    return losses.values


@pytest.mark.process
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_learns_resumes_and_its_checkpoints_are_models(tmp_path: Path) -> None:
    model = fresh_model()
    losses = train(tmp_path / "whole", model, gradient_checkpointing=True)
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]
    checkpoint = tmp_path / "whole/checkpoint-4"
    resumed = fresh_model()
    rest = train(tmp_path / "resumed", resumed, str(checkpoint))
    assert rest == pytest.approx(losses[4:], rel=1e-3)
    # The checkpoint is a folder in the original's layout, with all a model needs.
    last = Moondream.load(str(tmp_path / "whole/checkpoint-8"), dtype="fp32")
    image, settings = picture(CASE, 0), {"max_objects": 2}
    assert last.detect(image, "cat", settings=settings) == model.eval().detect(image, "cat", settings=settings)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_trains_merges_reloads_and_serves_the_commands(tmp_path: Path) -> None:
    model = get_peft_model(fresh_model(), lora())
    losses = train(tmp_path, model, gradient_checkpointing=True)
    assert losses[-1] < losses[0]
    folder = tmp_path / "adapter"
    model.eval().save_pretrained(folder)
    batch = processor().collate(records())
    batch.pop("labels")
    with torch.no_grad():
        adapted = model(**batch).logits
        base = fresh_model().eval()
        assert (base(**batch).logits - adapted).abs().max() > 0.1
        reloaded = PeftModel.from_pretrained(base, folder).eval()
        assert torch.equal(reloaded(**batch).logits, adapted)
        alone = Moondream3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.equal(alone(**batch).logits, adapted)
        merged = reloaded.merge_and_unload()
        assert torch.allclose(merged(**batch).logits, adapted, atol=2e-4)
    # The same folder, read without peft by `--adapter`.
    served = Moondream.load(str(FOLDER), adapter=str(folder), dtype="fp32")
    options = ModelOptions(model=str(FOLDER), adapter=str(folder), dtype="fp32", cache=False)
    weights = load_weights(
        options, plan_checkpoint(FOLDER), dtype=torch.float32, device=torch.device("cpu")
    ).state_dict()
    for name, weight in merged.model.state_dict().items():
        assert torch.allclose(weights[name], weight, atol=1e-5)
    image, settings = picture(CASE, 0), {"max_objects": 2}
    answers = [one.detect(image, "cat", settings=settings)["objects"] for one in (model, merged, served)]
    assert answers[0]
    for other in answers[1:]:
        assert_same_boxes(answers[0], other)
    merged.save_pretrained(tmp_path / "merged")
    again = Moondream.load(str(tmp_path / "merged"), dtype="fp32")
    assert_same_boxes(answers[0], again.detect(image, "cat", settings=settings)["objects"])


def assert_same_boxes(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert all(a[side] == b[side] for side in BOX)
        assert a["score"] == pytest.approx(b["score"], abs=0.002)


@pytest.mark.process
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_that_changed_the_base_are_refused_until_they_are_converted(tmp_path: Path, start: str) -> None:
    """peft alone knows what it took out of the base; transformers and md3 would add the adapter to the true one."""
    model = get_peft_model(fresh_model(), lora(parts=("attention",), init_lora_weights=start))
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01)
    model.save_pretrained(tmp_path / "raw")
    wanted = model.merge_and_unload().model.state_dict()
    for load in (
        lambda: Moondream3ForConditionalGeneration.from_pretrained(tmp_path / "raw"),
        lambda: Moondream.load(str(FOLDER), adapter=str(tmp_path / "raw"), dtype="fp32"),
    ):
        with pytest.raises(CheckpointError, match=f"init_lora_weights '{start}'.*path_initial_model_for_weight"):
            load()
    again = PeftModel.from_pretrained(fresh_model(), tmp_path / "raw", is_trainable=True)
    again.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    options = ModelOptions(model=str(FOLDER), adapter=str(tmp_path / "converted"), dtype="fp32", cache=False)
    weights = load_weights(
        options, plan_checkpoint(FOLDER), dtype=torch.float32, device=torch.device("cpu")
    ).state_dict()
    for name, weight in wanted.items():
        assert torch.allclose(weights[name], weight, atol=1e-4), name


PATTERNS: dict[str, dict[str, float]] = {
    "rank_pattern": {"qkv": 2, "fc1.weight": 6},
    "alpha_pattern": {"attn.proj": 3, "fc1": 5, "^model.text.blocks.0.attn.qkv": 1, "^blocks.0.attn.proj": 9},
}


@pytest.mark.parametrize(
    "settings",
    [{"init_lora_weights": "gaussian"}, {"use_rslora": True}, {"lora_alpha": -4}, {"lora_dropout": 0.5}, PATTERNS],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_is_merged_is_what_peft_merges(tmp_path: Path, settings: dict[str, Any]) -> None:
    parts = ("attention", "dense") if "lora_dropout" in settings else ("attention", "dense", "experts")
    model = get_peft_model(fresh_model(), lora(parts, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(tmp_path)
    wanted = model.merge_and_unload().model.state_dict()
    options = ModelOptions(model=str(FOLDER), adapter=str(tmp_path), dtype="fp32", cache=False)
    weights = load_weights(
        options, plan_checkpoint(FOLDER), dtype=torch.float32, device=torch.device("cpu")
    ).state_dict()
    for name, weight in wanted.items():
        assert torch.allclose(weights[name], weight, atol=1e-6), name


@pytest.mark.process
def test_several_adapters_in_one_process() -> None:
    """Switching changes the answers of `generate` and of the class's own methods, at once and back."""
    torch.manual_seed(0)
    model = get_peft_model(fresh_model(), lora(init_lora_weights=False), adapter_name="one").eval()
    model.add_adapter("two", lora(init_lora_weights=False))
    inputs = processor()(text=["detect: cat"], images=[picture(CASE, 0)])

    def answers() -> tuple[Any, Any]:
        boxes = model.generate(**inputs, max_objects=2)
        return boxes.tolist(), model.detect(picture(CASE, 0), "cat", settings={"max_objects": 2})

    model.set_adapter("one")
    one = answers()
    model.set_adapter("two")
    two = answers()
    model.set_adapter("one")
    assert answers() == one != two
    with model.disable_adapter():
        assert answers()[1] == load_hf(CASE)[0].detect(picture(CASE, 0), "cat", settings={"max_objects": 2})


def test_records_without_a_result_are_refused() -> None:
    with pytest.raises(RequestError, match="no 'objects' to learn from"):
        processor().collate([{"image": picture(CASE, 0), "task": "detect", "prompt": "cat"}])
    with pytest.raises(RequestError, match="segment records"):
        processor().collate([{"image": picture(CASE, 0), "task": "segment", "prompt": "cat", "segments": []}])
