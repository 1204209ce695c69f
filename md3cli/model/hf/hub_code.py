"""Code from the hub, switched off: what transformers and bitsandbytes would download and run.

bitsandbytes asks the package `kernels` for compiled code from huggingface.co: while it is imported, on a CPU with
bfloat16 units, and when it first computes on Apple's GPUs. `switch_off` makes that package impossible to import for its
back-ends, whoever imports bitsandbytes afterwards (transformers, peft, Trainer); they take the code that was installed
with them. A program that imported bitsandbytes before md3cli has decided for itself. transformers asks for code where a
config or a call names a kernel: `NoHubCode` refuses such names. Knows nothing of models.
"""

from __future__ import annotations

import builtins
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from md3cli.errors import EngineError

_GUARDED = "bitsandbytes.backends."  # the modules that ask for code
_FETCHER = "kernels"
_KERNEL_ARGUMENTS = ("use_kernels", "kernel_config", "allow_all_kernels")
_ATTENTIONS = (None, "eager", "sdpa")


def _import(name: str, *args: Any, **kwargs: Any) -> ModuleType:
    """Import as Python does, but for the package that fetches code."""
    if name.partition(".")[0] == _FETCHER:
        raise ImportError(f"md3cli runs no code from the hub, so {_FETCHER} is not there for bitsandbytes")
    return builtins.__import__(name, *args, **kwargs)


def _is_about_md3(record: logging.LogRecord) -> bool:
    return "kernels-community" not in str(record.msg)  # advice to install what is switched off here


class _GuardedLoader(Loader):
    """Runs a module as its own loader does, with the import statement replaced in that module alone."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        logging.getLogger(module.__name__).addFilter(_is_about_md3)
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        self._inner.exec_module(module)


class _Guard(MetaPathFinder):
    """Finds the guarded modules where Python's own finder does, and gives them the loader above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_GUARDED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _GuardedLoader(spec.loader)
        return spec


def switch_off() -> None:
    """Keep bitsandbytes from fetching code, from now on in this process; a second call does nothing."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())


def refuse_kernels(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of `from_pretrained` that fetch kernels, or choose among kernels that this network has not.

    Raises:
        EngineError: one of them does.
    """
    asked = next((key for key in _KERNEL_ARGUMENTS if arguments.get(key)), None)
    if asked is not None:
        raise EngineError(f"{asked} downloads code and runs it, which md3cli never does; leave it out")
    experts = arguments.get("experts_implementation")
    if experts not in (None, "eager"):
        raise EngineError(f"experts_implementation {experts!r:.80} is not to be had; leave it out")
    _check_attention(arguments.get("attn_implementation"))


def _check_attention(wanted: object) -> None:
    if wanted not in _ATTENTIONS:
        raise EngineError(
            f"attn_implementation {wanted!r:.80} may be code from the hub, which md3cli never runs; use sdpa"
        )


class NoHubCode:
    """A model class that takes no code from the hub, whatever its config says and whoever makes or changes it."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Judge what a config names before transformers fetches it: in `__init__`, `from_config`, and later.

        Raises:
            EngineError: it may be code.
        """
        _check_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc, no-any-return]

    def load_custom_generate(self, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Refuse a way to generate that is a repository's or a folder's code; transformers calls it in `generate`.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            f"custom_generate {pretrained_model_name_or_path!r:.80} is code, which md3cli never runs; give a function"
        )

    def set_use_kernels(self, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        """Refuse kernels, which transformers fetches here.

        Raises:
            EngineError: `use_kernels` is true.
        """
        refuse_kernels({"use_kernels": use_kernels})
        super().set_use_kernels(use_kernels, *args, **kwargs)  # type: ignore[misc]
