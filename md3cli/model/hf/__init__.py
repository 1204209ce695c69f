"""Moondream 3 at home in the Hugging Face world: Auto classes, `generate`, Trainer, PEFT.

    import md3cli.model.hf
    from transformers import AutoModelForCausalLM, AutoProcessor

Importing this package registers the classes below; no other part of md3cli imports transformers. The
network, the checkpoint reader and the engine are those the commands use: here stands only what
transformers wants to see of them.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from md3cli.model.hf.config import Moondream3Config
from md3cli.model.hf.hub_code import switch_off
from md3cli.model.hf.modeling import Moondream3ForConditionalGeneration, Moondream3Output
from md3cli.model.hf.processing import Moondream3Processor

__all__ = ["Moondream3Config", "Moondream3ForConditionalGeneration", "Moondream3Output", "Moondream3Processor"]

switch_off()
AutoConfig.register(Moondream3Config.model_type, Moondream3Config, exist_ok=True)
AutoModelForCausalLM.register(Moondream3Config, Moondream3ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(Moondream3Config, Moondream3ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(Moondream3Config, Moondream3Processor, exist_ok=True)  # type: ignore[no-untyped-call]
