"""The bytes of a model in few bits under AutoModelForCausalLM and under Moondream: all tensors that a network reaches.

python tests/support/low_bit_bytes.py [--model tiny|mid]

Makes folders of the model in int4, int8 and float8 (`mid`: random weights of the real widths, extremes spread over all
codes), loads each both ways in bf16, and prints the bytes beside those of the plain model.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import md3cli.model.hf  # noqa: F401 - registers the model
from md3cli import Moondream, model_path
from md3cli.model.quant.matrices import Int8Matrix
from md3cli.model.quant.quantise import QuantiseSettings, quantise_checkpoint
from md3cli.model.weights.codes import LowBit
from md3cli.model.weights.names import INT8_SCALE, Format, is_portable
from md3cli.model.weights.plan import plan_checkpoint
from md3cli.model.weights.random_weights import CONFIGS, random_model
from md3cli.model.weights.write import write_checkpoint

_LEAVES = (str, bytes, int, float, type(None), type)
_LAYOUTS = {LowBit.INT4: (Format.INT4, ".packed"), LowBit.INT8: (Format.INT8, INT8_SCALE), LowBit.FP8: None}


def reachable_bytes(network: nn.Module) -> int:
    """Bytes of every tensor that can be reached from a network's objects, each storage once.

    A tensor of a layout of its own has no storage to ask, and what torch's int8 engine packed is no tensor: of these
    the values are counted.
    """
    sizes: dict[object, int] = {}
    seen: dict[int, Any] = {}
    todo: list[Any] = [network]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, _LEAVES):
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            if one.layout is torch.strided:
                sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            else:
                sizes[id(one)] = one.numel() * one.element_size()
            continue
        if isinstance(one, Int8Matrix):
            sizes[id(one)] = one.num_bytes
            continue
        todo += _parts(one)
    return sum(sizes.values())


def _parts(one: Any) -> list[Any]:
    """What an object holds; of functions what is bound to them."""
    if isinstance(one, dict):
        return list(one.values())
    if isinstance(one, list | tuple | set | frozenset):
        return list(one)
    names = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
    held = [getattr(one, name) for name in names if not name.startswith("__") and hasattr(one, name)]
    held += list(getattr(one, "__dict__", {}).values())
    held += [cell.cell_contents for cell in getattr(one, "__closure__", None) or ()]
    held += [getattr(one, name) for name in ("__self__", "func", "args", "keywords") if hasattr(one, name)]
    return held


def make_folder(model: str, kind: LowBit, folder: Path) -> Path:
    """Write the embedded model, or random weights of a size of `random_weights`, in few bits."""
    if model == "tiny":
        quantise_checkpoint(model_path("tiny"), folder, QuantiseSettings(kind))
        return folder
    tiny = model_path("tiny")  # its tokenizer knows the ids of its own prompts
    config = replace(CONFIGS[model], tokenizer=plan_checkpoint(tiny).config.tokenizer)
    network = random_model(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    state = network.state_dict()
    layout, mark = _LAYOUTS[kind] or (Format.ORIGINAL_FP8, None)
    marks = [f"{name}{mark}" for name in state if mark is not None and is_portable(name)]
    write_checkpoint(state, config, folder, layout, marks=marks, tokenizer_file=tiny / "tokenizer.json")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "mid"), default="tiny")
    args = parser.parse_args()
    print("| weights | plain | Moondream | AutoModelForCausalLM | quotient |\n|---|---|---|---|---|")
    for kind in LowBit:
        with tempfile.TemporaryDirectory() as made:
            folder = make_folder(args.model, kind, Path(made) / "model")
            plan = plan_checkpoint(folder)
            plain = sum(torch.Size(slot.shape).numel() for slot in plan.slots) * 2
            ours = reachable_bytes(Moondream.load(folder, device="cpu", dtype="bf16", batch_size=1).engine.model)
            gc.collect()  # an engine goes in circles
            theirs = reachable_bytes(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
        print(f"| {kind} | {plain:,} | {ours:,} | {theirs:,} | {theirs / ours:.4f} |", flush=True)


if __name__ == "__main__":
    main()
