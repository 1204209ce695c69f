"""Teach the embedded model a shape it has never seen, with a LoRA, and let `md3 eval` judge.

    python examples/finetune_lora.py --out arrows

draws scenes with arrows among the eight old shapes, asks the model for all nine kinds in held-out ones,
trains adapters on detection with transformers' Trainer and peft, and asks again with
`--adapter arrows/adapter`. Needs the extra md3cli[hf,eval]; some minutes on two CPU cores. With `--bits 4` the model is
packed by bitsandbytes (md3cli[bnb]) while it is trained: QLoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shapes import write_collection
from torch.utils.data import Dataset
from training import model_options, options, run_md3, train
from world import KINDS, NEW_KIND
from world_draw import make_picture
from world_text import matching

from md3cli.model.hf.config import PARTS

ALL_KINDS = (*KINDS, NEW_KIND)
TRAIN_SEED, HELD_OUT_SEED = 41, 42  # the embedded model's own scenes have others
OFTEN = (*KINDS, *[NEW_KIND] * 3)  # what training scenes draw their kinds from
NEW_SHARE = 0.35  # of the records look for the new shape; the others keep the old ones in mind


class Scenes(Dataset[dict[str, Any]]):
    """Records to learn from, drawn as they are asked for: one picture and one kind to look for in it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = make_picture(TRAIN_SEED, index, OFTEN)
        rng = np.random.default_rng([TRAIN_SEED, index, 1])
        wanted = NEW_KIND if rng.random() < NEW_SHARE else str(rng.choice(KINDS))
        sides = ("x_min", "y_min", "x_max", "y_max")
        boxes = [dict(zip(sides, one.box_xyxy, strict=True)) for one in matching(wanted, picture.instances)]
        return {"image": picture.image, "task": "detect", "prompt": wanted, "objects": boxes}


def evaluate(out: Path, name: str, model: Sequence[str]) -> None:
    """Ask for every kind in the held-out scenes, and score the answers: `md3 detect`, then `md3 eval`."""
    records, scenes = str(out / f"{name}.jsonl"), out / "held-out"
    run_md3("detect", str(scenes), *ALL_KINDS, *model, "-o", records, "--overwrite", "--quiet")
    run_md3("eval", records, "--gt", str(scenes / "instances.json"), "-o", str(out / name))


def main() -> None:
    """Draw, ask, train, ask again."""
    parser = options(__doc__, steps=550, rate=8e-4, rank=16)
    parser.add_argument("--scenes", type=int, default=80, help="held-out scenes")
    args = parser.parse_args()
    write_collection(HELD_OUT_SEED, args.scenes, args.out / "held-out", ALL_KINDS)
    evaluate(args.out, "before", model_options(args, None))
    trained = train(args, Scenes(args.steps * args.batch_size), PARTS)
    evaluate(args.out, "after", model_options(args, trained))


if __name__ == "__main__":
    main()
