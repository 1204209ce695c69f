"""Writing: every layout reads back, here and by the independent reference; nothing half stays behind."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from reference import random_models
from reference.network import Network
from reference.reading import read_network
from torch import Tensor

from md3cli.errors import CheckpointError, OutputError
from md3cli.model.network.config import ModelConfig
from md3cli.model.weights import write
from md3cli.model.weights.codes import LowBit, pack_nibbles, quantise, quantise_fp8, quantise_int4
from md3cli.model.weights.names import Format, Recipe
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.model.weights.read import load_model
from md3cli.model.weights.write import convert_checkpoint, write_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"
CASE_C = GOLDEN / "case-c" / "checkpoint"
EXACT_LAYOUTS = (Format.ORIGINAL, Format.RAW, Format.HF)

network_of = functools.cache(random_models.draw_network)


def weights_of(network: Network, layout: Format) -> dict[str, Tensor]:
    """Weights that bfloat16 holds exactly; the port has no `region.ln`."""
    no_ln = layout is Format.HF
    return {
        name: tensor.to(torch.bfloat16)
        for name, tensor in network.tensors.items()
        if not (no_ln and name.startswith("region.ln."))
    }


def config_of(network: Network) -> ModelConfig:
    return ModelConfig.from_sections(network.config)


@pytest.mark.process
@pytest.mark.parametrize("layout", EXACT_LAYOUTS)
@pytest.mark.parametrize("dense", [False, True])
def test_what_is_written_is_read_by_us_and_by_the_reference(tmp_path: Path, layout: Format, dense: bool) -> None:
    network = network_of(5, dense)
    weights = weights_of(network, layout)
    write_checkpoint(weights, config_of(network), tmp_path / "out", layout, shard_limit_bytes=300_000)
    model = load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert plan_checkpoint(tmp_path / "out").layout is layout
    theirs = read_network(tmp_path / "out").tensors
    ours = model.state_dict()
    assert ours.keys() == theirs.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(ours[name], tensor), name
        assert torch.equal(theirs[name], tensor.float()), name


@pytest.mark.process
@pytest.mark.parametrize("layout", [Format.ORIGINAL_FP8, Format.RAW_FP8, Format.INT4])
def test_packed_layouts_keep_their_precision(tmp_path: Path, layout: Format) -> None:
    network = network_of(5)
    weights = weights_of(network, layout)
    write_checkpoint(weights, config_of(network), tmp_path / "out", layout)
    plan = plan_checkpoint(tmp_path / "out")
    assert plan.layout is layout
    theirs = read_network(tmp_path / "out").tensors
    packed = {slot.name for slot in plan.slots if slot.recipe in (Recipe.FP8, Recipe.INT4)}
    assert packed
    for name, tensor in load_model(tmp_path / "out", dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
        largest_error = (tensor - weights[name].float()).abs().max()
        assert (largest_error > 0) == (name in packed), name
        assert largest_error <= 0.1 * weights[name].abs().max(), name


def test_fp8_error_is_half_a_step() -> None:
    weight = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    again = quantise_fp8(weight).dequantise(torch.float32)
    step = weight.abs() * 2.0**-3 + weight.abs().amax(-1, keepdim=True) / 448 * 2.0**-9
    assert ((again - weight).abs() <= step / 2).all()


def test_int4_error_is_half_a_step_and_nibbles_lie_as_published() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    quantised = quantise_int4(weight)
    packed, scale, zero_point = pack_nibbles(quantised.codes), quantised.scale, quantised.zero_point
    assert zero_point is not None
    again = quantised.dequantise(torch.float32)
    assert ((again - weight).abs() <= scale / 2 + 1e-6).all()
    high_of_row_1 = (packed[1] >> 4).float()  # group 1; its low nibble is group 1 + 2
    assert torch.equal((high_of_row_1 - zero_point[1]) * scale[1], again[1])
    assert torch.equal(((packed[1] & 15).float() - zero_point[3]) * scale[3], again[3])


def test_constant_groups_survive_packing() -> None:
    for weight in (torch.zeros(2, 128), torch.zeros(1, 2, 128)):
        kind = LowBit.INT4 if weight.ndim == 2 else LowBit.FP8
        assert torch.equal(quantise(weight, kind).dequantise(torch.float32), weight)


def test_shards_have_an_index_and_a_limit(tmp_path: Path) -> None:
    network = network_of(5)
    limit = 200_000
    write_checkpoint(
        weights_of(network, Format.ORIGINAL),
        config_of(network),
        tmp_path / "out",
        Format.ORIGINAL,
        shard_limit_bytes=limit,
    )
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    largest = max(tensor.nbytes for tensor in weights_of(network, Format.ORIGINAL).values())
    assert all(shard.stat().st_size < max(limit, largest) + 20_000 for shard in shards)  # and its header


def test_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """Streaming: each tensor is made once, after the one before was written."""

    class Counting(Mapping[str, Tensor]):
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            self.tensors, self.asked = tensors, []

        def __getitem__(self, name: str) -> Tensor:
            self.asked.append(name)
            return self.tensors[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.tensors)

        def __len__(self) -> int:
            return len(self.tensors)

    network = network_of(5)
    state = Counting(weights_of(network, Format.RAW))
    write_checkpoint(state, config_of(network), tmp_path / "out", Format.RAW)
    assert sorted(state.asked) == sorted(state.tensors)


def test_nothing_half_is_left_where_writing_fails(tmp_path: Path) -> None:
    class Failing(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            if name == "text.wte":
                raise OSError(28, "No space left on device")
            return super().__getitem__(name)

    network = network_of(5)
    state = Failing(weights_of(network, Format.RAW))
    with pytest.raises(OutputError, match="No space left on device"):
        write_checkpoint(state, config_of(network), tmp_path / "out", Format.RAW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already there"):
        convert_checkpoint(CASE_C, tmp_path / "out", Format.RAW)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs \d{3},\d{3} bytes and .* has 1,000 left"):
        convert_checkpoint(CASE_C, tmp_path / "out", Format.RAW)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_not_written(tmp_path: Path) -> None:
    network = network_of(5)
    weights = weights_of(network, Format.RAW) | {"text.extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"not a model of this configuration: text\.extra"):
        write_checkpoint(weights, config_of(network), tmp_path / "out", Format.RAW)


@pytest.mark.parametrize("source", ["raw-fp8", "hf-port", "int4"])
@pytest.mark.parametrize("layout", EXACT_LAYOUTS)
def test_converting_changes_no_value(tmp_path: Path, source: str, layout: Format) -> None:
    folder = GOLDEN / "case-c-formats" / source
    if layout is Format.HF and source != "hf-port":
        with pytest.raises(CheckpointError, match="no LayerNorm before its region heads"):
            convert_checkpoint(folder, tmp_path / "out", layout)
        assert list(tmp_path.iterdir()) == []
        return
    written: list[int] = []
    plan = convert_checkpoint(folder, tmp_path / "out", layout, progress=written.append)
    assert plan.layout is layout
    assert sum(written) == sum(entry.num_bytes for entry in plan.files.entries.values())
    before, after = (load_model(path, dtype=torch.bfloat16).state_dict() for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert plan.config.tokenizer == plan_checkpoint(folder).config.tokenizer
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_copy_that_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_one_bit_off(state: Mapping[str, Tensor], *args: object, **kwargs: object) -> None:
        changed = {name: state[name].clone() for name in state}
        changed["text.wte"][0, 0] += 1
        write_checkpoint(changed, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "write_checkpoint", write_one_bit_off)
    with pytest.raises(OutputError, match=r"text\.wte reads back different"):
        convert_checkpoint(CASE_C, tmp_path / "out", Format.RAW)
