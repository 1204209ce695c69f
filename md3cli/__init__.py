"""md3cli: annotate image collections with Moondream 3, in batches, on your own machine.

Importing the package does not import torch; `Moondream` and `model_path` are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Moondream", "__version__", "model_path"]

if TYPE_CHECKING:
    from md3cli.model.api import Moondream
    from md3cli.model.weights.hub import model_path


def __getattr__(name: str) -> Any:
    if name == "Moondream":
        from md3cli.model.api import Moondream

        return Moondream
    if name == "model_path":
        from md3cli.model.weights.hub import model_path

        return model_path
    raise AttributeError(f"module 'md3cli' has no attribute {name!r}")
