"""LoRA adapters merged into a loaded network: the vendor's layout and folders that peft saved.

Both are read from safetensors, without peft, as low-rank changes of canonical weights, and added to them in float32
before any kernel takes the weights over; afterwards the network computes as if it had been trained so.

peft stores many kinds of LoRA in the same two factors, although they mean something else, and adds more with each
release. So this file lists the settings that are known to change nothing (peft 0.21's `LoraConfig`) and refuses every
other setting by name.

Sources: Moondream 3 specification, section 16; peft's LoRA layout (`lora_A`, `lora_B`, alpha / r; a stack of expert
matrices keeps its factors interleaved).

Shape suffixes: X experts, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from md3cli.errors import CheckpointError
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.files import PICKLE_SUFFIXES, listing, local_path, read_header, read_json
from md3cli.model.weights.names import Shape, expected_tensors

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Where the adapter came from, how it was trained, which weights it has. What of this still matters is said again by
# the names and shapes of the factors.
_HARMLESS = frozenset({
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),  # of initialisations, see `init_lora_weights`
})  # fmt: skip
_READ = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"})
# Initialisations that leave the base weights alone. `pissa`, `olora`, `corda`, `loftq` and `lora_ga` subtract their
# start from the base weights: the saved factors belong to changed weights, which no file holds.
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
        if raw.get("bias") not in ("none", None):
            raise CheckpointError(f"{file}: bias {_shown(raw['bias'])} trains biases as well, which md3 does not merge")
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

        `module` is named as by peft; `rank` is that of the file's factors.

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
    # An empty `..._config` says yes, with all its defaults.
    if value == {}:
        return not key.startswith("use_") and not key.endswith("_config")
    return value is None or value is False or value == []


def _pattern(file: Path, raw: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    """Return the entries of `rank_pattern` or `alpha_pattern`; refuse regular expressions, which may run for ever."""
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
    """Return True where a key of peft's means `name`: all of it, or its last parts; behind `^` all of it alone."""
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


_VENDOR_TEXT = re.compile(r"(?:^|.*\.)(dense|moe)\.([0-9]{1,4})\.(up|down)_(a|b)(?:\.weight)?")
_VENDOR_VISION = re.compile(r"(?:^|.*\.)vision_lora\.proj_fc2\.(up|down)(?:\.weight)?")
_PEFT_FACTOR = re.compile(r"(?:base_model\.)?(?:model\.)*((?:text|vision|region)\..+)\.lora_([AB])\.weight")
_PEFT_EXPERT = re.compile(r"(text\.blocks\.[0-9]{1,4}\.mlp\.fc[12])\.([0-9]{1,4})")
_DTYPES = ("BF16", "F16", "F32", "F64")
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one weight: `scale · up · down`; of experts one for each, stacked."""

    weight: str  # canonical name
    up: Tensor  # [out, R] or [X, out, R]
    down: Tensor  # [R, in] or [X, R, in]
    scale: float


def merge_adapter(model: Moondream3, path: Path) -> None:
    """Add the adapter at `path` (a folder or a .safetensors file) to the weights of `model`.

    Raises:
        CheckpointError: no adapter there, one that is not understood, or of another model.
    """
    for change in read_adapter(path, model.config):
        parameter = model.get_parameter(change.weight)
        # A new tensor: the old one may be mapped from the checkpoint's file.
        parameter.data = merged(parameter.data, change)


def merged(weight: Tensor, change: LowRank) -> Tensor:
    """Return the changed weight in the dtype it had, computed in float32 matrix by matrix.

    Raises:
        CheckpointError: the sum is too large for the dtype.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    stacks = (t if t.dim() == 3 else t[None] for t in (weight, change.up, change.down, result))
    for old, up, down, new in zip(*stacks, strict=True):
        delta = change.scale * (up.to(old.device, torch.float32) @ down.to(old.device, torch.float32))
        new.copy_(old.float() + delta)
    if not result.isfinite().all():
        name = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(f"{change.weight} with the adapter is not finite in {name}; its factors are too large")
    return result


def read_adapter(path: Path, config: ModelConfig) -> list[LowRank]:
    """Read the changes that an adapter makes to a network of this configuration.

    Raises:
        CheckpointError: as for `merge_adapter`.
    """
    file, settings = _find(path)
    tensors = _read_tensors(file)
    changes = _read_vendor(file, tensors, config) if settings is None else _read_peft(file, tensors, settings, config)
    if not changes:
        raise CheckpointError(f"{file} holds no adapter")
    shapes = expected_tensors(config, has_region_ln=True)
    for change in changes:
        _check(file, change, shapes)
    return changes


def _read_tensors(file: Path) -> dict[str, Tensor]:
    for entry in read_header(file):
        if entry.dtype not in _DTYPES or not 2 <= len(entry.shape) <= 3 or 0 in entry.shape:
            raise CheckpointError(
                f"{file}: {entry.stored_name[:120]} is {entry.dtype} {list(entry.shape)}, expected a matrix (or one "
                f"for each expert) of {', '.join(_DTYPES)}"
            )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name[:120]} holds NaN or infinity; the training went wrong, or the file")
    return tensors


def _find(path: Path) -> tuple[Path, PeftSettings | None]:
    """Return the file of the weights, and peft's settings where peft wrote it."""
    if path.suffix in PICKLE_SUFFIXES and not path.is_dir():
        raise CheckpointError(_pickle_message(path))
    found_path = local_path(str(path))
    if found_path is None or not (found_path.is_file() or found_path.is_dir()):
        raise CheckpointError(f"adapter {str(path)[:200]}: no such folder or .safetensors file")
    path = found_path
    if path.is_file():
        if path.name not in (PEFT_CONFIG, PEFT_WEIGHTS) or not (path.parent / PEFT_CONFIG).is_file():
            return path, None
        path = path.parent
    if (path / PEFT_CONFIG).is_file():
        file, pickle = path / PEFT_WEIGHTS, path / f"{Path(PEFT_WEIGHTS).stem}.bin"
        if pickle.is_file() and not file.exists():
            raise CheckpointError(_pickle_message(pickle))
        return file, PeftSettings.read(path / PEFT_CONFIG)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:_NAMED_IN_ERRORS]) or "none"
        raise CheckpointError(
            f"{path}: an adapter is {PEFT_CONFIG} and {PEFT_WEIGHTS}, or one .safetensors; found {found}"
        )
    return files[0], None


def _pickle_message(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is opened, so it is refused; save its "
        "lora_state_dict with safetensors.torch.save_file and name that file"
    )


def _check(file: Path, change: LowRank, shapes: Mapping[str, Shape]) -> None:
    shape = shapes.get(change.weight)
    if shape is None or len(shape) < 2:
        raise CheckpointError(f"{file} changes {change.weight}, which this model does not have as a matrix")
    up, down = tuple(change.up.shape), tuple(change.down.shape)
    rank = up[-1]
    if up != (*shape[:-1], rank) or down != (*shape[:-2], rank, shape[-1]):
        raise CheckpointError(
            f"{file}: {change.weight} is {list(shape)} here, the adapter's factors are {list(up)} and {list(down)}; "
            "it was made for another model"
        )


def _unknown(file: Path, names: list[str]) -> CheckpointError:
    listed = listing([name[:120] for name in names])
    lacks_config = not (file.parent / PEFT_CONFIG).exists() and any(map(_PEFT_FACTOR.fullmatch, names))
    advice = f"; they are peft's, whose {PEFT_CONFIG} must lie beside the file" if lacks_config else ""
    return CheckpointError(f"{file}: these tensors are not understood as an adapter of Moondream 3: {listed}{advice}")


def _put(file: Path, factors: dict[str, dict[str, Tensor]], weight: str, factor: str, tensor: Tensor) -> None:
    """Keep a factor of a weight's change; a file that has it under two names is refused."""
    if factor in factors.setdefault(weight, {}):
        raise CheckpointError(f"{file}: two changes of {weight} under different names; md3 merges one")
    factors[weight][factor] = tensor


def _pair(file: Path, weight: str, factors: Mapping[str, Tensor], down: str, up: str) -> tuple[Tensor, Tensor]:
    if factors.keys() != {down, up}:
        raise CheckpointError(f"{file}: of the two factors for {weight} one is missing")
    return factors[down], factors[up]


# -- the vendor's layout ----------------------------------------------------------------------------


def _read_vendor(file: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> list[LowRank]:
    """Read keys that end in `dense.{i}.{up_a,…}` or `moe.{j}.{…}`, j from the first sparse layer; no scaling."""
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    first_sparse = config.text.moe.start_layer if config.text.moe is not None else config.text.n_layers
    for name, tensor in tensors.items():
        if text := _VENDOR_TEXT.fullmatch(name):
            kind, number, side, factor = text.groups()
            layer = int(number) + (first_sparse if kind == "moe" else 0)
            weight = f"text.blocks.{layer}.mlp.{'fc1' if side == 'up' else 'fc2'}.weight"
            _put(file, factors, weight, factor, tensor)
        elif vision := _VENDOR_VISION.fullmatch(name):
            factor = "a" if vision[1] == "down" else "b"
            _put(file, factors, "vision.proj_mlp.fc2.weight", factor, tensor)
        else:
            unknown.append(name)
    if unknown:
        raise _unknown(file, unknown)
    changes = []
    for weight, found in factors.items():
        down, up = _pair(file, weight, found, "a", "b")
        changes.append(LowRank(weight, up, down, 1.0))
    return changes


# -- peft's layout ----------------------------------------------------------------------------------


def _read_peft(file: Path, tensors: Mapping[str, Tensor], settings: PeftSettings, config: ModelConfig) -> list[LowRank]:
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        match = _PEFT_FACTOR.fullmatch(name.replace(".base_layer", ""))
        if match is None:
            unknown.append(name)
        else:
            _put(file, factors, match[1], match[2], tensor)
    if unknown:
        raise _unknown(file, unknown)
    shapes = expected_tensors(config, has_region_ln=True)
    changes, apart = [], dict[str, dict[int, LowRank]]()
    for module, found in factors.items():
        weight = f"{module}.weight"
        down, up = _pair(file, weight, found, "A", "B")
        if expert := _PEFT_EXPERT.fullmatch(module):
            change = LowRank(weight, up, down, settings.scale(f"model.{module}", len(down)))
            apart.setdefault(f"{expert[1]}.weight", {})[int(expert[2])] = change
            continue
        shape = shapes.get(weight, ())
        if len(shape) == 3 and down.dim() == up.dim() == 2 and len(down) % shape[0] == up.shape[1] % shape[0] == 0:
            # From peft's factors of a stack, [X * R, in] and [out, R * X], to [X, R, in] and [X, out, R].
            down = down.view(shape[0], -1, down.shape[-1])
            up = up.view(up.shape[0], -1, shape[0]).permute(2, 0, 1)
        changes.append(LowRank(weight, up, down, settings.scale(f"model.{module}", down.shape[-2])))
    return changes + [_stacked(file, weight, shapes.get(weight, ()), found) for weight, found in apart.items()]


def _stacked(file: Path, weight: str, shape: Shape, found: Mapping[int, LowRank]) -> LowRank:
    """Return the change of a stack of experts that were adapted one by one, as those of a packed model are."""
    first = next(iter(found.values()))
    if len(shape) != 3 or max(found) >= shape[0]:
        raise CheckpointError(f"{file} changes {first.weight} and others, which this model does not have")
    if any(
        (one.up.shape, one.down.shape, one.scale) != (first.up.shape, first.down.shape, first.scale)
        for one in found.values()
    ):
        raise CheckpointError(f"{file}: the experts of {weight} differ in rank, alpha or size; md3 merges equal ones")
    up, down = torch.zeros(shape[0], *first.up.shape), torch.zeros(shape[0], *first.down.shape)
    for number, change in found.items():
        up[number], down[number] = change.up, change.down
    return LowRank(weight, up, down, first.scale)
