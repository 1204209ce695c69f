"""LoRA adapters merged into the network: the vendor's layout and peft's, against the sums written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_cases import CASES, load_case
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from md3cli import Moondream
from md3cli.errors import CheckpointError
from md3cli.model.network.layers import gate
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.adapters import merge_adapter, read_adapter
from md3cli.model.weights.read import load_model

CASE, RANK = "a", 4


def fresh_model() -> Moondream3:
    return load_model(CASES[CASE][0], dtype=torch.float32)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def vendor_tensors(prefix: str = "text_lora.") -> dict[str, Tensor]:
    """Every dense and sparse layer of the case, and the vision projection."""
    config = load_case(CASE).model.config
    text, moe = config.text, config.text.moe
    assert moe is not None
    rank = RANK // moe.experts_per_token
    tensors = {}
    for i in range(moe.start_layer):
        shapes = {
            "up_a": (RANK, text.dim),
            "up_b": (text.ff_dim, RANK),
            "down_a": (RANK, text.ff_dim),
            "down_b": (text.dim, RANK),
        }
        tensors |= {f"{prefix}dense.{i}.{name}": random(*shape) for name, shape in shapes.items()}
    for j in range(text.n_layers - moe.start_layer):
        inner = moe.expert_inner_dim
        pairs = {
            "up_a": (rank, text.dim),
            "up_b": (2 * inner, rank),
            "down_a": (rank, inner),
            "down_b": (text.dim, rank),
        }
        tensors |= {f"{prefix}moe.{j}.{name}": random(moe.num_experts, *shape) for name, shape in pairs.items()}
    vision = config.vision
    tensors["vision_lora.proj_fc2.down"] = random(RANK, vision.proj_inner_dim)
    tensors["vision_lora.proj_fc2.up"] = random(vision.proj_out_dim, RANK)
    return tensors


def test_vendor_layout_is_the_sum_the_specification_writes(tmp_path: Path) -> None:
    tensors = vendor_tensors()
    save_file(tensors, tmp_path / "adapter.safetensors")
    plain, adapted = fresh_model(), fresh_model()
    merge_adapter(adapted, tmp_path)
    x = random(7, plain.config.text.dim)
    dense, part = plain.text.blocks[0].mlp, {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if "dense.0" in k}
    up = dense.fc1(x) + x @ part["up_a"].T @ part["up_b"].T
    z = F.gelu(up, approximate="tanh")
    wanted = dense.fc2(z) + z @ part["down_a"].T @ part["down_b"].T
    assert torch.allclose(adapted.text.blocks[0].mlp(x), wanted, atol=1e-5)

    layer = plain.config.text.moe.start_layer
    moe, part = plain.text.blocks[layer].mlp, {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if "moe.0" in k}
    routing = moe.route(x)
    wanted = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(routing.experts_NA[token].tolist(), routing.weights_NA[token], strict=True):
            u = moe.fc1.weight[expert] @ x[token] + part["up_b"][expert] @ (part["up_a"][expert] @ x[token])
            z = gate(u[None])[0]
            y = moe.fc2.weight[expert] @ z + part["down_b"][expert] @ (part["down_a"][expert] @ z)
            wanted[token] += weight * y
    assert torch.allclose(adapted.text.blocks[layer].mlp(x), wanted, atol=1e-4)

    change = tensors["vision_lora.proj_fc2.up"] @ tensors["vision_lora.proj_fc2.down"]
    projection = plain.vision.proj_mlp.fc2.weight + change
    assert torch.allclose(adapted.vision.proj_mlp.fc2.weight, projection, atol=1e-6)
    untouched = [name for name, _ in plain.named_parameters() if ".mlp.fc" not in name and "proj_mlp" not in name]
    assert all(torch.equal(plain.get_parameter(name), adapted.get_parameter(name)) for name in untouched)


def test_the_file_behind_the_weights_stays_as_it_is(tmp_path: Path) -> None:
    save_file(vendor_tensors("any.prefix."), tmp_path / "adapter.safetensors")
    before = {name: value.clone() for name, value in fresh_model().state_dict().items()}
    merge_adapter(load_model(CASES[CASE][0], dtype=torch.bfloat16), tmp_path / "adapter.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in fresh_model().state_dict().items())


def write_peft(folder: Path, tensors: dict[str, Tensor], **settings: object) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(document))


def peft_pair(module: str, out: int, inner: int, rank: int = RANK) -> dict[str, Tensor]:
    prefix = f"base_model.model.model.{module}"
    return {f"{prefix}.lora_A.weight": random(rank, inner), f"{prefix}.lora_B.weight": random(out, rank)}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"attn.proj": 4}}, 1.0),
        ({"alpha_pattern": {"qkv": 4}}, 2.0),
    ],
)
def test_peft_scales(tmp_path: Path, settings: dict[str, object], scale: float) -> None:
    dim = load_case(CASE).model.config.text.dim
    pair = peft_pair("text.blocks.1.attn.proj", dim, dim)
    write_peft(tmp_path, pair, **settings)
    (change,) = read_adapter(tmp_path, load_case(CASE).model.config)
    assert change.weight == "text.blocks.1.attn.proj.weight"
    assert change.scale == scale


@pytest.mark.process
def test_through_the_front_door(tmp_path: Path) -> None:
    """`--adapter DIR` is `Moondream.load(adapter=DIR)`; without it the answers are the old ones."""
    save_file(vendor_tensors(), tmp_path / "adapter.safetensors")
    folder, image = str(CASES[CASE][0]), CASES[CASE][1] / "image0.png"
    settings = {"max_objects": 2}
    plain, adapted = Moondream.load(folder), Moondream.load(folder, adapter=str(tmp_path))
    answers = [md.detect(image, "cat", settings=settings) for md in (plain, adapted, plain)]
    assert answers[0] == answers[2] != answers[1]
    assert adapted.engine.identity.adapter == str(tmp_path)


BROKEN = [
    ({"text_lora.dense.0.up_a": (4, 128)}, "one is missing"),
    ({"text_lora.dense.0.up_a": (4, 99), "text_lora.dense.0.up_b": (192, 4)}, "made for another model"),
    ({"text_lora.dense.9.up_a": (4, 128), "text_lora.dense.9.up_b": (192, 4)}, "does not have as a matrix"),
    ({"text_lora.dense.0.gate_a": (4, 128)}, "not understood .*gate_a"),
    ({"text_model.transformer.h.0.mixer.Wqkv.A": (4, 128)}, "not understood"),
    ({}, "holds no adapter"),
]


@pytest.mark.parametrize(("shapes", "message"), BROKEN)
def test_what_is_not_understood_is_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    save_file({name: random(*shape) for name, shape in shapes.items()}, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, load_case(CASE).model.config)


BEYOND = [
    ({"peft_type": "LOHA"}, "type 'LOHA'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "PiSSA_niter_16"}, "init_lora_weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"init_lora_weights": "corda", "corda_config": {}}, "init_lora_weights"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    ({"init_lora_weights": "of next year"}, "init_lora_weights"),
    ({"init_lora_weights": ["gaussian"]}, "init_lora_weights"),
    ({"use_dora": True}, "use_dora True"),
    ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"velora_config": {"num_groups": 64}}, "velora_config"),
    ({"kasa_config": {}}, "kasa_config {}"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    ({"use_something_new": 0}, "use_something_new 0"),
    ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
    ({"bias": "all"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"modules_to_save": ["text.lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"use_something_new": 3}, "use_something_new 3 is not known .*merge_and_unload"),
    ({"alpha_pattern": {"(a+)+": 4}}, "no name of a module"),
    ({"alpha_pattern": ["x"]}, "alpha_pattern is .* expected an object"),
    ({"rank_pattern": 3}, "rank_pattern is 3"),
    ({"rank_pattern": {"qkv": 0}}, "rank_pattern qkv is 0"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a number"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": 1e300}, "lora_alpha is"),
    ({"lora_alpha": True}, "lora_alpha is True"),
    ({"r": "4"}, "r is '4'"),
    ({"r": -4}, "r is -4"),
    ({"r": True}, "r is True"),
    ({"r": 8}, "r is 8 for .*have the rank 4"),
    ({"rank_pattern": {"attn.proj": 2}}, "r is 2 for"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
]


@pytest.mark.parametrize(("settings", "message"), BEYOND)
def test_beyond_plain_lora_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    write_peft(tmp_path, peft_pair("text.blocks.1.attn.proj", 128, 128), **settings)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, load_case(CASE).model.config)


HARMLESS: list[dict[str, object]] = [
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": True, "corda_config": {"corda_method": "kpm"}},  # converted: its start is told no more
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "rank_pattern": {"model.text.blocks.1.attn.proj": RANK}},
    {"lora_dropout": 0.3, "task_type": "CAUSAL_LM", "target_modules": "all-linear", "megatron_core": "megatron.core"},
    {"use_something_new": None, "another": False, "and_more": {}},
    {"rank_pattern": {"mlp.fc1": 2}, "alpha_pattern": {"j": 7, "^attn.proj": 9}},  # of other modules
]


@pytest.mark.parametrize("settings", HARMLESS)
def test_what_changes_nothing_is_taken(tmp_path: Path, settings: dict[str, object]) -> None:
    write_peft(tmp_path, peft_pair("text.blocks.1.attn.proj", 128, 128), **settings)
    (change,) = read_adapter(tmp_path, load_case(CASE).model.config)
    assert change.scale == 8 / RANK


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("\xff", "is not valid JSON"),
    ],
)
def test_settings_that_are_no_settings(tmp_path: Path, text: str, message: str) -> None:
    write_peft(tmp_path, peft_pair("text.blocks.1.attn.proj", 128, 128))
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, load_case(CASE).model.config)


def peft_of(a: Tensor, b: Tensor, module: str = "text.blocks.1.attn.proj") -> dict[str, Tensor]:
    prefix = f"base_model.model.model.{module}"
    return {f"{prefix}.lora_A.weight": a.contiguous(), f"{prefix}.lora_B.weight": b.contiguous()}


PAIR = random(RANK, 128), random(128, RANK)
ODD_FACTORS = [
    (peft_of(torch.tensor(1.0), torch.tensor(1.0)), "is F32 .*, expected a matrix"),
    (peft_of(PAIR[0][:0], PAIR[1][:, :0]), "is F32 .*, expected a matrix"),
    (peft_of(PAIR[0].to(torch.int8), PAIR[1].to(torch.int8)), "is I8"),
    (peft_of(PAIR[0] / 0, PAIR[1]), "NaN or infinity"),
    (peft_of(PAIR[0], PAIR[1] * float("nan")), "NaN or infinity"),
    (peft_of(random(RANK, 99), PAIR[1]), "made for another model"),
    (peft_of(*PAIR, module="text.blocks.99.attn.proj"), "does not have as a matrix"),
    (peft_of(*PAIR, module="text.blocks.1.ln"), "does not have as a matrix"),
    (
        peft_of(*PAIR) | {"base_model.model.model.text.blocks.1.attn.proj.lora_magnitude_vector": PAIR[0] + 1},
        "magnitude",
    ),
    (peft_of(*PAIR) | {"model.text.blocks.1.attn.proj.lora_A.weight": PAIR[0] + 1}, "two changes of"),
    ({f"dense.{'9' * 5000}.up_a": PAIR[0]}, "not understood"),
]


@pytest.mark.parametrize(("tensors", "message"), ODD_FACTORS)
def test_factors_that_are_none(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    write_peft(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, load_case(CASE).model.config)


def test_a_sum_that_overflows_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path, peft_of(PAIR[0] * 1e20, PAIR[1] * 1e20))
    with pytest.raises(CheckpointError, match="is not finite in float32"):
        merge_adapter(fresh_model(), tmp_path)


def test_peft_files_are_found_by_name_and_missed_by_name(tmp_path: Path) -> None:
    config, weights = load_case(CASE).model.config, tmp_path / "adapter_model.safetensors"
    write_peft(tmp_path, peft_of(*PAIR))
    by_folder, by_file = read_adapter(tmp_path, config), read_adapter(weights, config)
    assert by_folder[0].scale == by_file[0].scale == 8 / RANK
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no such file"):
        read_adapter(tmp_path, config)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_adapter(tmp_path, config)
    (tmp_path / "elsewhere").rename(weights)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"whose adapter_config.json must lie beside"):
        read_adapter(tmp_path, config)


def test_places_where_no_adapter_is(tmp_path: Path) -> None:
    config = load_case(CASE).model.config
    with pytest.raises(CheckpointError, match="no such folder"):
        read_adapter(tmp_path / "nothing", config)
    with pytest.raises(CheckpointError, match="found none"):
        read_adapter(tmp_path, config)
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_adapter(tmp_path / "finetune@7.pt", config)
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="holds nothing but the text"):
        read_adapter(tmp_path, config)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_adapter(tmp_path, config)
