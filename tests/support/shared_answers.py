"""What a network that processes share answers, compared with one process: one of the processes, or all of them.

    python tests/support/shared_answers.py [--size 2] [NAME …]

starts the processes, on the CPU, and prints a line of JSON for each combination of `SHARED`, as the first process has
it; what another one has otherwise is an error. `run` does the same for a test, with any function of this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

SHARED: dict[str, dict[str, Any]] = {
    "tp2": {"tp_size": 2},
    "ep2": {"tp_size": 2, "ep_size": 2, "tp_plan": {}},
    "tp2 x ep2": {"tp_size": 2, "ep_size": 2},
    "ep4": {"tp_size": 4, "ep_size": 4, "tp_plan": {}},
}
PATIENCE = timedelta(seconds=200)


def answers(names: list[str]) -> dict[str, Any]:
    """Compare each combination with one process; say what part of the bytes is here, and what the logits' bits are."""
    from placed_answers import ask, compare, load
    from transformers.distributed import DistributedConfig

    expected, whole = ask(load()), num_bytes(load())
    found = {}
    for name in names:
        model = load(distributed_config=DistributedConfig(**SHARED[name]))
        asked = ask(model)
        bits = hashlib.sha256(asked["logits"].numpy().tobytes()).hexdigest()
        found[name] = {**compare(asked, expected), "bytes": num_bytes(model) / whole, "bits": bits}
    return found


def num_bytes(model: torch.nn.Module) -> int:
    """The bytes of storage behind a model's parameters."""
    return sum(
        storage.nbytes()
        for storage in {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}.values()
    )


def others(folder: str) -> dict[str, Any]:
    """Return what `saved` and `refusals` return."""
    return {"saved": saved(folder), "said": refusals(f"{folder}/adapter")}


def saved(target: str) -> dict[str, Any]:
    """Save a shared network in two layouts, load it again in one process, and compare all tensors."""
    from placed_answers import load
    from transformers.distributed import DistributedConfig

    model, same = load(distributed_config=DistributedConfig(tp_size=2, ep_size=2)), {}
    for layout in ("original", "raw"):
        model.save_pretrained(Path(target) / layout, layout=layout)
        dist.barrier()
        again, plain = load(Path(target) / layout).state_dict(), load().state_dict()
        same[layout] = again.keys() == plain.keys() and all(torch.equal(again[name], plain[name]) for name in plain)
    return same


def refusals(folder: str) -> dict[str, Any]:
    """What is refused, in words."""
    from peft import LoraConfig
    from placed_answers import TINY, load
    from transformers import BitsAndBytesConfig
    from transformers.distributed import DistributedConfig

    from md3cli.errors import Md3Error

    LoraConfig(base_model_name_or_path=str(TINY)).save_pretrained(folder)
    wanted: dict[str, dict[str, Any]] = {
        "unknown rule": {"tp_size": 2, "tp_plan": {"model.text.lm_head": "sideways"}},
        "unknown module": {"tp_size": 2, "tp_plan": {"model.text.head": "replicate"}},
        "wrong kind": {"tp_size": 2, "tp_plan": {"model.text.lm_head": "heads"}},
        "two rules": {"tp_size": 2, "tp_plan": {"model.text.blocks.0.attn.qkv": "colwise_gather_output"}},
        "fsdp": {"tp_size": 1, "fsdp_size": 2},
        "other processes": {"tp_size": 4},
        "way of tokens": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    }
    calls: dict[str, dict[str, Any]] = {
        name: {"distributed_config": DistributedConfig(**config)} for name, config in wanted.items()
    }
    two = DistributedConfig(tp_size=2)
    calls["unknown word"] = {"distributed_config": {"tp_size": 2, "tp_plann": {}}}
    calls["plan of another name"] = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="sideways")}
    calls["places"] = {"distributed_config": two, "device_map": "cpu"}
    calls["bits"] = {"distributed_config": two, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    calls["adapter"] = {"distributed_config": two, "folder": Path(folder)}
    said = {}
    for name, arguments in calls.items():
        try:
            load(**arguments)
        except Md3Error as error:
            said[name] = str(error)
    model = load(distributed_config=DistributedConfig(tp_size=2, tp_plan={"model.vision.blocks.*.attn": "replicate"}))
    assert model.model.vision.blocks[0].attn.num_heads == 4  # type: ignore[union-attr]
    ids = torch.arange(20, 30)[None]
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    wrong = {
        "compile": model.compile,
        "beams": lambda: model.generate(input_ids=ids, num_beams=2, do_sample=True, max_new_tokens=2),
        "adapt": lambda: model.add_adapter(LoraConfig(target_modules=["qkv"])),
        "learn": lambda: model.train()(input_ids=ids, labels=ids),
    }
    for name, call in wrong.items():
        try:
            call()
        except Md3Error as error:
            said[name] = str(error)
    return said


def run(size: int, function: str, argument: Any, folder: Path) -> list[dict[str, Any]]:
    """Call a function of this file in `size` processes that share what they load; return what each of them returns."""
    command = [sys.executable, __file__, "--size", str(size), "--meet", str(folder / "meet"), "--call", function]
    command.append(json.dumps(argument))
    room = {**os.environ, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            command,
            env={**room, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        ended = [process.communicate(timeout=280) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, error) in zip(started, ended, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def _be_one(size: int, meet: str, function: str, argument: Any) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=PATIENCE)
    print(json.dumps(globals()[function](argument)))
    dist.destroy_process_group()


def main() -> None:
    """Be one of the processes, or start them and print what they found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--meet")
    parser.add_argument("--call", default="answers")
    parser.add_argument("argument", nargs="*")
    given = parser.parse_args()
    if given.meet is not None:
        _be_one(given.size, given.meet, given.call, json.loads(given.argument[0]))
        return
    names = given.argument or [name for name, config in SHARED.items() if config["tp_size"] == given.size]
    with TemporaryDirectory() as folder:
        first, *others = run(given.size, "answers", names, Path(folder))
    assert all(other == first for other in others), others
    for name, found in first.items():
        print(json.dumps({"shared": name, **{key: value for key, value in found.items() if key != "bits"}}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
