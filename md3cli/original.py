"""The names of the original's repository, of its ports, and of their cards: a script changes its imports alone.

    from md3cli.original import MoondreamConfig, MoondreamModel, load_weights    # the 4-bit card's manual loading
    from md3cli.original import AutoModelForCausalLM, AutoProcessor              # the others', with md3cli[hf]

No code of a checkpoint is run. Importing this file imports neither torch nor transformers; a name does when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from md3cli.errors import MissingExtraError

if TYPE_CHECKING:
    from md3cli.model.hf import Moondream3Config, Moondream3ForConditionalGeneration, Moondream3Processor
    from md3cli.model.hf.auto import AutoModelForCausalLM, AutoProcessor
    from md3cli.model.original import MoondreamConfig, MoondreamModel, load_weights

__all__ = [
    "AutoModelForCausalLM",
    "AutoProcessor",
    "Moondream3Config",
    "Moondream3ForConditionalGeneration",
    "Moondream3Processor",
    "MoondreamConfig",
    "MoondreamModel",
    "load_weights",
]

_PLACES = {
    "md3cli.model.original": ("MoondreamConfig", "MoondreamModel", "load_weights"),
    "md3cli.model.hf.auto": ("AutoModelForCausalLM", "AutoProcessor"),
    "md3cli.model.hf": ("Moondream3Config", "Moondream3ForConditionalGeneration", "Moondream3Processor"),
}


def __getattr__(name: str) -> Any:
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module 'md3cli.original' has no attribute {name!r}")
    try:
        return getattr(import_module(place), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtraError(f"md3cli.original.{name}", "hf") from error
