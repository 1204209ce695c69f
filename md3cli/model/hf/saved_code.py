"""The file of imports in a saved folder, by which a transformers that knows nothing of md3cli finds its classes.

config.json and processor_config.json name the classes under `auto_map`, as models with code of their own do. The file
that they name holds imports alone, so that a folder brings no code, and loads wherever md3cli is installed:
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. md3cli itself never reads `auto_map`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from md3cli.model.weights.files import CONFIG_NAME, read_json

_MODULE = "modeling_md3"
_CLASSES = {
    "AutoConfig": "Moondream3Config",
    "AutoModelForCausalLM": "Moondream3ForConditionalGeneration",
    "AutoModelForImageTextToText": "Moondream3ForConditionalGeneration",
    "AutoProcessor": "Moondream3Processor",
}
_TEXT = f'''"""Moondream 3's classes for transformers. They are installed with: pip install 'md3cli[hf]'"""

from md3cli.original import {", ".join(sorted(set(_CLASSES.values())))}
'''


def auto_map(*auto_classes: str) -> dict[str, str]:
    """Return which of our classes an Auto class finds in a saved folder; for all Auto classes where none is named."""
    return {name: f"{_MODULE}.{_CLASSES[name]}" for name in auto_classes or _CLASSES}


def write_imports(folder: Path) -> Path:
    """Write the file that `auto_map` names; return its path."""
    path = folder / f"{_MODULE}.py"
    path.write_text(_TEXT, encoding="utf-8")
    return path


def name_classes(folder: Path) -> None:
    """Name our classes in a folder that `write_checkpoint` made: in its config.json, and by the file of imports."""
    write_imports(folder)
    config = folder / CONFIG_NAME
    config.write_text(json.dumps(read_json(config) | {"auto_map": auto_map()}, indent=1), encoding="utf-8")


class NamedBySavedFolders:
    """A class that every folder names which we save."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: transformers would copy our source into the next folder that is saved, and break it there."""
