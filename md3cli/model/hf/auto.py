"""`AutoModelForCausalLM` and `AutoProcessor` that know one model, Moondream 3, and run no code of a checkpoint.

With `trust_remote_code=True`, which the cards' snippets say, transformers' own run the code that a config.json names
wherever they do not know its `model_type`. These read weights in any layout and no code, whatever a config.json says.
Users reach them through `md3cli.original`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from md3cli.model.hf import Moondream3ForConditionalGeneration, Moondream3Processor


class AutoModelForCausalLM:
    """Makes a `Moondream3ForConditionalGeneration`, as transformers' class of this name would."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Moondream3ForConditionalGeneration:
        """Load weights; arguments and errors are those of `Moondream3ForConditionalGeneration.from_pretrained`."""
        return Moondream3ForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class AutoProcessor:
    """Makes a `Moondream3Processor`, as transformers' class of this name would."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Moondream3Processor:
        """Load a processor; arguments and errors are those of `Moondream3Processor.from_pretrained`.

        Pictures are cut by Pillow, exactly as the original does: what `use_fast=False` asks of other processors.
        """
        return Moondream3Processor.from_pretrained(pretrained_model_name_or_path, **kwargs)
