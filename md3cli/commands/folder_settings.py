"""What `md3.toml` of the working folder may set: it may have come with a stranger's data set.

It may say how pictures are asked, and name what is on this machine already. It may not name files to write, start
over, fetch anything, or raise a limit: that is for flags, the environment and the user's own file. Only cli.py asks,
and only where there is such a file: a rule that guards the user stands in a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from md3cli.commands.parse import parse_bytes, parse_count
from md3cli.config import DecodeOptions
from md3cli.errors import ConfigError, Md3Error
from md3cli.records import printable
from md3cli.settings import CONFIG_FILE, Layer, Setting, user_config_dir

_HARMLESS = frozenset(
    {"length", "reasoning", "no-reasoning", "max-objects", "max-tokens", "temperature", "top-p", "seed", "batch-size"}
    | {"device", "dtype", "quant", "workers", "include", "exclude", "format"}
)
_ON_THIS_MACHINE = frozenset({"model", "adapter", "tokenizer"})


_DEFAULTS = DecodeOptions()
# Limits that may be lowered: how the text is read, and the default.
_LIMITS: Mapping[str, tuple[Callable[[str], float], float]] = {
    "max-pixels": (parse_count, _DEFAULTS.max_pixels),
    "max-file-size": (parse_bytes, _DEFAULTS.max_file_size),
    "decode-timeout": (float, _DEFAULTS.timeout_s),
}
_NOT_HERE = f"{CONFIG_FILE} of a working folder may be a stranger's and cannot set this"


def check_folder_settings(layers: Sequence[Layer], settings: Mapping[str, Setting], typed: Sequence[str]) -> str | None:
    """Refuse what the working folder's file may not set; return the line that tells what is obeyed, if anything is.

    Args:
        layers: all of them, strongest first; every key was found to be some command's.
        settings: what is in force of them, by parameter.
        typed: the command's arguments; what they name is not the folder's to be checked.

    Raises:
        ConfigError: it sets another key, a higher limit, or something that is not on this machine; names the key.
    """
    for layer in layers:
        if layer.is_of_folder:
            for table, key, value in _keys(layer):
                _check_key(layer.place(key, table), key, value, _own_limits(layers, key))
    _check_presence(settings, typed)
    names = sorted(name.replace("_", "-") for name, setting in settings.items() if setting.is_of_folder)
    names = [name for name in names if _typed(typed, f"--{name}") is None]
    origin = next(layer.origin for layer in layers if layer.is_of_folder)
    return f"settings of {printable(origin)}: {', '.join(names)}" if names else None


def _keys(layer: Layer) -> Iterator[tuple[str | None, str, object]]:
    for key, value in layer.common.items():
        yield None, key, value
    for table, keys in layer.tables.items():
        for key, value in keys.items():
            yield table, key, value


def _own_limits(layers: Sequence[Layer], key: str) -> list[float]:
    """Return what the user's own file says of a limit, for whichever command."""
    own = (entry for layer in layers if not layer.is_of_folder for entry in _keys(layer))
    limits = (_limit(key, value) for _, name, value in own if name == key)
    return [limit for limit in limits if limit is not None]


def _limit(key: str, value: object) -> float | None:
    """Return a limit as a number; None where it is not one, which the command's parser tells."""
    try:
        return _LIMITS[key][0](str(value))
    except (KeyError, ValueError, OverflowError):
        return None


def _check_key(place: str, key: str, value: object, own_limits: Sequence[float]) -> None:
    if key in _HARMLESS or key in _ON_THIS_MACHINE:
        return
    if key not in _LIMITS:
        raise ConfigError(f"{printable(place)}: {_NOT_HERE}; {_elsewhere(key)}")
    limit = _limit(key, value)
    bound = min([_LIMITS[key][1], *own_limits])
    if limit is not None and (math.isnan(limit) or limit > bound):
        raise ConfigError(
            f"{printable(place)}: a working folder may only lower a limit ({bound:,.12g} here); {_elsewhere(key)}"
        )


def _elsewhere(key: str) -> str:
    return f"type --{key}, or set it in your own {user_config_dir() / CONFIG_FILE}"


def _check_presence(settings: Mapping[str, Setting], typed: Sequence[str]) -> None:
    """Refuse a model, adapter or tokenizer that the folder's file names and that is not on this machine."""
    asked = {name: _typed(typed, f"--{name}") for name in ("model", "adapter", "tokenizer", "revision")}
    asked["model"] = asked["model"] or _typed(typed, "-m")
    texts = {name: asked[name] or (str(settings[name].value) if name in settings else None) for name in asked}
    for name in ("adapter", "tokenizer", "model"):
        setting = settings.get(name)
        if setting is None or not setting.is_of_folder or asked[name] is not None:
            continue
        try:
            _check_present(name, str(setting.value), texts["revision"], texts["tokenizer"])
        except Md3Error as error:
            raise ConfigError(
                f"{printable(setting.place)}: {error}; {CONFIG_FILE} of a working folder may be a stranger's and can "
                f"only name what is on this machine already; {_elsewhere(name)}"
            ) from error


def _check_present(name: str, value: str, revision: str | None, tokenizer: str | None) -> None:
    if value.startswith(("//", "\\\\")):
        raise ConfigError(f"{printable(value)} is on another machine")
    if name == "adapter":
        if not Path(value).exists():
            raise ConfigError(f"{printable(value)} is not here")
        return
    from md3cli.model.weights.hub import find_tokenizer, present_path, resolve_model

    if name == "tokenizer":
        find_tokenizer(Path(), value, offline=True)
    else:
        present_path(value, revision)
        resolve_model(value, revision=revision, tokenizer=tokenizer, offline=True)


def _typed(arguments: Sequence[str], option: str) -> str | None:
    """Return what stands behind `option` in the arguments; None where it is not typed."""
    for number, argument in enumerate(arguments):
        name, is_joined, value = argument.partition("=")
        if name == option:
            return value if is_joined else (*arguments[number + 1 :], "")[0]
        if len(option) == 2 and argument.startswith(option):
            return argument.removeprefix(option)
    return None
