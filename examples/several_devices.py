"""Ask one model that is too large for one device: over the devices of one process, or shared out over processes.

    python examples/several_devices.py MODEL PICTURE QUESTION [--memory 0=20GB --memory cpu=30GB] [--offload FOLDER]
    torchrun --standalone --nproc-per-node 2 examples/several_devices.py MODEL PICTURE QUESTION [--whole-experts]

Started with python, layers go to the GPUs, then to the CPU, then to files in FOLDER, as far as `--memory` lets them.
Started with torchrun, each process holds a part of every layer, on a GPU of its own where there are any; with
`--whole-experts` some of the experts whole, instead of a part of each. The answer is that of a single device.
MODEL is an alias, a repository or a folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.distributed.configuration_utils import DistributedConfig

from md3cli.original import AutoModelForCausalLM


def main() -> None:
    """Load the model as it was started, and print one answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("--memory", metavar="DEVICE=SIZE", action="append", default=[])
    parser.add_argument("--offload", metavar="FOLDER", type=Path)
    parser.add_argument("--whole-experts", action="store_true")
    given = parser.parse_args()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    placement: dict[str, Any] = {"device_map": "auto", "offload_folder": given.offload}
    if given.memory:
        rooms = dict(room.split("=", 1) for room in given.memory)
        placement["max_memory"] = {int(name) if name.isdigit() else name: room for name, room in rooms.items()}
    if size > 1:
        experts = size if given.whole_experts else 1
        placement = {"distributed_config": DistributedConfig(tp_size=size, ep_size=experts)}
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, **placement)
    answer = model.query(Image.open(given.picture), given.question, reasoning=False)["answer"]
    if os.environ.get("RANK", "0") == "0":  # every process asks, and every process is answered alike
        print(answer)
    if size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
