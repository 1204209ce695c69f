"""What a peft adapter's settings ask for, held to what md3 can do: add alpha / r · B · A to a weight.

peft has many kinds of LoRA that are stored in the same two factors and mean something else, and more with each
release. So there is a list of what is known to change nothing (peft 0.21's `LoraConfig`); everything else is
refused by name. No torch, no peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from md3cli.errors import CheckpointError
from md3cli.model.weight_files import read_json

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Where the adapter came from, what it was trained on and how, which weights it has: whatever these say, the factors'
# names and shapes say it again, or it is over.
_HARMLESS = frozenset({
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # of initialisations, see `init_lora_weights`
})  # fmt: skip
_READ = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"})
# Initialisations that leave the base weights alone. `pissa`, `olora`, `corda`, `loftq` and `lora_ga` take their start
# out of the base weights: what is saved belongs to weights that exist nowhere.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_DEFAULT_RANK = _DEFAULT_ALPHA = 8  # peft's, for settings that are not there
V = TypeVar("V")
_PLAIN_NAME = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True, slots=True)
class PeftSettings:
    """What of adapter_config.json decides how much of `B · A` is added."""

    file: Path
    rank: int
    alpha: float
    is_rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    parameters: tuple[str, ...]  # names of those that are adapted on their own, not as their module's weight

    @classmethod
    def read(cls, file: Path) -> PeftSettings:
        """Read an adapter_config.json.

        Raises:
            CheckpointError: no such file, damaged, or an adapter that is more than `alpha / r · B · A`.
        """
        raw = read_json(file)
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(f"{file}: an adapter of type {_shown(raw.get('peft_type'))}; only LORA can be merged")
        check_start(file, raw)
        _check_bias(file, raw)
        unknown = [key for key in raw if key not in _HARMLESS | _READ and not _is_off(key, raw[key])]
        if unknown:
            listed = ", ".join(f"{key[:40]} {_shown(raw[key])}" for key in unknown[:5])
            raise CheckpointError(
                f"{file}: {listed} is not known to be plain LoRA, which is all md3 merges; merge it with peft "
                "(merge_and_unload), save the whole model and give that as --model"
            )
        stabilised = raw.get("use_rslora")
        if stabilised not in (None, True, False):
            raise CheckpointError(f"{file}: use_rslora is {_shown(stabilised)}, expected true or false")
        return cls(
            file=file,
            rank=_rank(file, "r", raw.get("r", _DEFAULT_RANK)),
            alpha=_alpha(file, "lora_alpha", raw.get("lora_alpha", _DEFAULT_ALPHA)),
            is_rank_stabilised=bool(stabilised),
            ranks={key: _rank(file, f"rank_pattern {key[:80]}", v) for key, v in _pattern(file, raw, "rank_pattern")},
            alphas={
                key: _alpha(file, f"alpha_pattern {key[:80]}", v) for key, v in _pattern(file, raw, "alpha_pattern")
            },
            parameters=_texts(raw.get("target_parameters")),
        )

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of `B · A`, as peft has it: alpha / r, or alpha / √r where it is rank-stabilised.

        Args:
            module: whose weight is changed, as peft names it in the model.
            rank: of the factors, as the file has them.

        Raises:
            CheckpointError: the settings promise another rank.
        """
        weight = f"{module}.weight"
        name = weight if any(_means(key, weight) for key in self.parameters) else module
        wanted = _first(self.ranks, name, self.rank)
        if rank != wanted:
            raise CheckpointError(
                f"{self.file}: r is {wanted} for {name}, and its factors have the rank {rank}; the two files do "
                "not belong together, copy both again"
            )
        alpha = _first(self.alphas, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def check_start(file: Path, raw: Mapping[str, Any]) -> None:
    """Refuse adapters whose initialisation changed the base weights: added to the true ones they are noise.

    Raises:
        CheckpointError: `init_lora_weights` is not known to leave them alone.
    """
    start = raw.get("init_lora_weights")
    if isinstance(start, str):
        start = start.lower()
    if not isinstance(start, str | bool | None) or start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights {_shown(start)} is not known to leave the base weights as they are, so the "
            "adapter cannot be added to them; where it was trained, convert it with "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL_ADAPTER), or merge it with peft"
        )


def base_of(adapter: Path) -> str | None:
    """Return the model that a peft adapter says it was trained on; None where it does not say."""
    folder = adapter.parent if adapter.is_file() else adapter
    file = folder / PEFT_CONFIG
    named = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    return named if isinstance(named, str) and named else None


def _is_off(key: str, value: object) -> bool:
    """True where a setting that is not known says no. An empty `..._config` says yes, with all its defaults."""
    if value == {}:
        return not key.startswith("use_") and not key.endswith("_config")
    return value is None or value is False or value == []


def _check_bias(file: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("bias") not in ("none", None):
        raise CheckpointError(f"{file}: bias {_shown(raw['bias'])} trains biases as well, which md3 does not merge")


def _pattern(file: Path, raw: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """The entries of `rank_pattern` or `alpha_pattern`; regular expressions may run away and are refused."""
    pattern = raw.get(key)
    if pattern is None:
        return []
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{file}: {key} is {_shown(pattern)}, expected an object of module names and numbers")
    odd = next((name for name in pattern if not _PLAIN_NAME.fullmatch(name)), None)
    if odd is not None:
        raise CheckpointError(
            f"{file}: {key} {odd[:80]!r} is no name of a module; write the names in full, one entry each"
        )
    return list(pattern.items())


def _texts(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _means(key: str, name: str) -> bool:
    """True where a key of peft's means `name`: its whole, or its last parts; behind `^` the whole alone."""
    return name == key.removeprefix("^") or (key[:1] != "^" and name.endswith(f".{key}"))


def _first(pattern: Mapping[str, V], name: str, otherwise: V) -> V:
    return next((value for key, value in pattern.items() if _means(key, name)), otherwise)


def _rank(file: Path, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{file}: {name} is {_shown(value)}, expected a whole number of 1 or more")
    return value


def _alpha(file: Path, name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9:  # neither NaN nor infinity
        return float(value)
    raise CheckpointError(f"{file}: {name} is {_shown(value)}, expected a number")


def _shown(value: object) -> str:
    return f"{value!r:.60}"
