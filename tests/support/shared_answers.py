"""What a network that processes share answers, compared with one process: one of the processes, or all of them.

    python tests/support/shared_answers.py [--size 2] [NAME …]

starts the processes, on the CPU, and prints a line of JSON for each combination of `SHARED`, as the first process has
it; what another one has otherwise is an error. `run` does the same for a test, with any function of this file. The
processes are forks of one that has imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from md3cli.errors import Md3Error

TINY, FOUR_HEADS = "tiny", "four heads"
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": (TINY, {"tp_size": 2}),
    "ep2": (TINY, {"tp_size": 2, "ep_size": 2, "tp_plan": {}}),
    "tp2 x ep2": (TINY, {"tp_size": 2, "ep_size": 2}),
    "ep4": (TINY, {"tp_size": 4, "ep_size": 4, "tp_plan": {}}),
    "tp4": (FOUR_HEADS, {"tp_size": 4}),
    "tp4 x ep4": (FOUR_HEADS, {"tp_size": 4, "ep_size": 4}),
}
PATIENCE = timedelta(seconds=200)


def four_heads(folder: Path) -> Path:
    """Write a random network with four heads in both towers and seven experts; return its folder."""
    from reference.random_models import draw_config, draw_network
    from reference.writing import write_checkpoint

    config = draw_config(1)
    config["text"] |= {"dim": 256, "n_heads": 4, "n_kv_heads": 4}
    config["text"]["moe"] |= {"num_experts": 7, "experts_per_token": 2, "expert_inner_dim": 32, "start_layer": 1}
    config["vision"] |= {"enc_dim": 64, "enc_n_heads": 4, "proj_out_dim": 256}
    config["region"] |= {"dim": 256}
    return write_checkpoint(draw_network(1, config=config), folder / "four-heads", "original")


def answers(names: list[str], folder: str) -> dict[str, Any]:
    """Compare combinations with one process; say what part of the bytes is here, and what the answers' bits are.

    The comparison is the first process's; `folder` is that of the network with four heads.
    """
    from placed_answers import TINY as TINY_FOLDER
    from placed_answers import ask, compare, load
    from transformers.distributed import DistributedConfig

    found: dict[str, Any] = {}
    alone: dict[Path, tuple[dict[str, Any], int]] = {}
    for name in names:
        network, config = SHARED[name]
        home = TINY_FOLDER if network == TINY else Path(folder)
        if home not in alone:
            plain = load(home)
            alone[home] = ask(plain, home) if dist.get_rank() == 0 else {}, num_bytes(plain)
        model = load(home, distributed_config=DistributedConfig(**config))
        asked = ask(model, home)
        assert model.moondream().engine.model.is_shared
        expected, whole = alone[home]
        found[name] = {"bytes": num_bytes(model) / whole, "bits": bits_of(asked)}
        if expected:
            found[name] |= compare(asked, expected)
    return found


def bits_of(asked: dict[str, Any]) -> str:
    """Return a hash of logits, tokens and answers."""
    tensors = [asked["logits"], *asked["tokens"]]
    parts = [tensor.numpy().tobytes() for tensor in tensors] + [json.dumps(asked["answers"]).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def num_bytes(model: torch.nn.Module) -> int:
    """The bytes of storage behind a model's parameters."""
    return sum(
        storage.nbytes()
        for storage in {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}.values()
    )


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


def killed() -> dict[str, Any]:
    """Kill the last process while the others ask; return what they are told."""
    from placed_answers import drawn, load
    from transformers.distributed import DistributedConfig

    size, said = dist.get_world_size(), {}
    model = load(distributed_config=DistributedConfig(tp_size=size))
    if dist.get_rank() == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ids = torch.arange(20, 30)[None]
    calls = {"forward": lambda: model(input_ids=ids), "caption": lambda: model.caption(drawn(), length="short")}
    for name, call in calls.items():
        try:
            call()
        except Md3Error as error:
            said[name] = str(error)
    return said


def run(size: int, folder: Path, *calls: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Call functions of this file, each (name, argument, …), in `size` processes that share what they load.

    Return for each process what they return, by name. The last process may die in `killed`, which comes last.
    """
    command = [sys.executable, __file__, "--size", str(size), "--room", str(folder), "--calls", json.dumps(calls)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w+") as said:
        started = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            started.wait(timeout=290)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
        said.seek(0)
        assert started.returncode == 0, said.read()[-6000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(size)]


def _be_all(size: int, room: Path, calls: list[list[Any]]) -> int:
    """Fork the processes and wait for them; return how many failed."""
    import placed_answers  # noqa: F401 - once for all of them
    import transformers.distributed  # noqa: F401

    started = [multiprocessing.get_context("fork").Process(target=_be_one, args=(rank, size, room, calls))
               for rank in range(size)]  # fmt: skip
    for process in started:
        process.start()
    for process in started:
        process.join()
    codes = [process.exitcode for process in started]
    if calls[-1][0] == "killed":
        assert codes.pop() == -signal.SIGKILL
    return sum(code != 0 for code in codes)


def _be_one(rank: int, size: int, room: Path, calls: list[list[Any]]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    meet = f"file://{room / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=PATIENCE)
    found = {}
    for function, *arguments in calls:
        (room / f"found-{rank}.json").write_text(json.dumps(found))
        found[function] = globals()[function](*arguments)
    (room / f"found-{rank}.json").write_text(json.dumps(found))
    if "killed" not in found:
        dist.destroy_process_group()


def main() -> None:
    """Be the processes, or start them and print what they found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--room", type=Path)
    parser.add_argument("--calls", type=json.loads)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    if given.room is not None:
        sys.exit(_be_all(given.size, given.room, given.calls))
    names = given.names or [name for name, (_, config) in SHARED.items() if config["tp_size"] == given.size]
    with TemporaryDirectory() as folder:
        model = str(four_heads(Path(folder))) if any(SHARED[name][0] == FOUR_HEADS for name in names) else ""
        first, *others = (found["answers"] for found in run(given.size, Path(folder), ("answers", names, model)))
    for name, found in first.items():
        bits = found.pop("bits")
        assert all(other[name]["bits"] == bits for other in others), name
        print(json.dumps({"shared": name, **found}))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    main()
