"""Fine-tune the embedded model on questions and answers with trl's SFTTrainer, which needs `pip install 'md3cli[trl]'`.

python examples/sft_trl.py --out sft
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

# First, so that bitsandbytes, which trl imports, fetches no code.
from md3cli import model_path
from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor

# isort: split
import numpy as np
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined, import-not-found, unused-ignore]
from world_draw import make_picture
from world_text import count_question


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """Scenes with a question about how many there are, and the answer."""
    for index in range(count):
        picture = make_picture(51, index)
        question = count_question(np.random.default_rng(index), picture)
        yield {
            "prompt": [{"role": "user", "content": f"query: {question.text}"}],
            "completion": [{"role": "assistant", "content": question.answer}],
            "image": picture.image,
        }


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", required=True)
parser.add_argument("--model", type=model_path, default="tiny", help="default tiny")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=8)
args = parser.parse_args()

settings = SFTConfig(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=args.batch_size,
    learning_rate=1e-4,
    logging_steps=10,
    max_length=None,  # a picture's placeholders must not be cut
    completion_only_loss=True,
    gradient_checkpointing=False,
    bf16=False,
    dataloader_pin_memory=False,
    report_to=[],
)
trainer = SFTTrainer(
    model=Moondream3ForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32),
    args=settings,
    train_dataset=Dataset.from_list(list(conversations(args.batch_size * args.steps))),
    processing_class=Moondream3Processor.from_pretrained(args.model),
)
trainer.train()
trainer.save_model()  # a folder for `md3 query … -m OUT`
