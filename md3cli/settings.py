"""Options that were not typed: from the environment, `md3.toml` and the user's config folder.

Precedence: flag > `MD3_*` environment > `md3.toml` in the working folder > the same file in the user's config folder >
default. Keys are the long option names, at the top level (for every command that has the option) or in a table named
after a command. This file reads the layers between flag and default, and knows nothing of the parser that they belong
to, nor what a stranger's file may not set (commands/folder_settings.py). The user's folders are found here in 20
lines; a library would put them elsewhere for a user without a home.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md3cli.errors import ConfigError
from md3cli.records import printable
from md3cli.system import NotRegularError, open_regular

APP_NAME = "md3cli"
CONFIG_FILE = "md3.toml"
ENV_PREFIX = "MD3_"
MOST_FILE_BYTES = 2**14  # of a settings file; for one of 64 KiB, a single key with dots, the parser takes 14 s

Options = Mapping[str, "OptionName"]


def user_config_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the user's config folder of this program, by the platform's custom; it is not created."""
    return _user_dir(environ, "XDG_CONFIG_HOME", ".config", "Library/Application Support", "APPDATA")


def user_cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the user's cache folder of this program, by the platform's custom; it is not created."""
    return _user_dir(environ, "XDG_CACHE_HOME", ".cache", "Library/Caches", "LOCALAPPDATA")


def _user_dir(environ: Mapping[str, str] | None, xdg: str, unix: str, mac: str, windows: str) -> Path:
    environ = os.environ if environ is None else environ
    if sys.platform == "win32":
        base = Path(environ.get(windows) or _home())
    elif environ.get(xdg):
        base = Path(environ[xdg])
    else:
        base = _home() / (mac if sys.platform == "darwin" else unix)
    return base / APP_NAME


def _home() -> Path:
    """Return the user's home folder; for a user without one a place that all find unwritable."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


@dataclass(frozen=True, slots=True)
class OptionName:
    """What a key means to a command: `parameter` is the parser's name of the value.

    `is_negated` marks the off-switch of a pair (`no-cache` of `--cache/--no-cache`).
    """

    parameter: str
    is_flag: bool = False
    is_negated: bool = False
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """One place that settings come from: keys for all commands, and tables for one.

    `is_of_folder`: it is the file of the working folder, which may be a stranger's.
    """

    origin: str
    common: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]]
    is_of_folder: bool = False

    def place(self, key: str, table: str | None = None) -> str:
        """Return how a message names `key` of this layer."""
        if self.origin == ENV_PREFIX:
            return ENV_PREFIX + key.upper().replace("-", "_")
        return f"{self.origin}: {f'[{table}] ' if table else ''}{key}"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value from a layer, the place it stands at, for messages, and whether that is the working folder's file."""

    value: Any
    place: str
    is_of_folder: bool = False


def read_layers(environ: Mapping[str, str], folder: Path) -> list[Layer]:
    """Read environment, the working folder's file and the user's own; strongest first.

    Raises:
        ConfigError: a file cannot be read or is not TOML.
    """
    layers = [Layer(ENV_PREFIX, _environment_keys(environ), {})]
    folders_file, users_file = folder / CONFIG_FILE, user_config_dir(environ) / CONFIG_FILE
    if os.path.realpath(folder) != os.path.realpath(users_file.parent):  # the user may work in the config folder
        layers += _read_file(folders_file, is_of_folder=True)
    return [*layers, *_read_file(users_file)]


def _environment_keys(environ: Mapping[str, str]) -> dict[str, str]:
    names = (name for name in environ if name.startswith(ENV_PREFIX) and environ[name])
    return {name.removeprefix(ENV_PREFIX).lower().replace("_", "-"): environ[name] for name in names}


def _read_file(path: Path, *, is_of_folder: bool = False) -> list[Layer]:
    """Return the layer that a file is; none where there is no file."""
    try:
        document = tomllib.loads(_text_of(path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # the parser's own, no UTF-8, 5,000 digits, 1,000 brackets
        raise ConfigError(f"{path}: not valid TOML: {printable(str(error))}") from error
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    common = {key: value for key, value in document.items() if key not in tables}
    return [Layer(str(path), common, tables, is_of_folder)]


def _text_of(path: Path) -> str:
    """Return the text of a settings file; a FIFO does not block, and nothing large is read."""
    try:
        fd = open_regular(path)
    except NotRegularError as error:
        advice = "remove it, or write the settings into a file of that name"
        raise ConfigError(f"{path}: not a regular file; {advice}") from error
    with os.fdopen(fd, "rb") as file:
        data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise ConfigError(f"{path}: more than {MOST_FILE_BYTES:,} bytes, which no settings need; remove it")
    return data.decode("utf-8")


def resolve_settings(
    layers: Iterable[Layer], command: str, options: Options, commands: Mapping[str, Callable[[], Options]]
) -> dict[str, Setting]:
    """Return the settings of `command` by parameter name; a table beats a common key, an earlier layer a later one.

    Args:
        options: by long option name, without the dashes.
        commands: the options of every command, as calls, since most runs need not know them.

    Raises:
        ConfigError: a key that no command has, or one that is not of the table's command, or one that only the
            user's own file may set.
    """
    settings: dict[str, Setting] = {}
    layers = list(layers)
    for layer in layers:
        _check_tables(layer, commands)
        for table, keys in ((command, layer.tables.get(command, {})), (None, layer.common)):
            for key, value in keys.items():
                option = options.get(key)
                if option is not None:
                    place = layer.place(key, table)
                    setting = Setting(_as_typed(value, option, place), place, layer.is_of_folder)
                    settings.setdefault(option.parameter, setting)
                else:
                    _check_common(layer, key, commands)
    return settings


def _check_tables(layer: Layer, commands: Mapping[str, Callable[[], Options]]) -> None:
    for table, keys in layer.tables.items():
        if table not in commands:
            raise ConfigError(f"{layer.origin}: [{printable(table)}] is no command{_suggestion(table, commands)}")
        known = commands[table]()
        for key in keys:
            if key not in known:
                place = printable(layer.place(key, table))
                raise ConfigError(f"{place}: unknown key; `{table}` has no such option{_suggestion(key, known)}")


def _check_common(layer: Layer, key: str, commands: Mapping[str, Callable[[], Options]]) -> None:
    known = {name for options in commands.values() for name in options()}
    if key not in known:
        place = printable(layer.place(key))
        raise ConfigError(f"{place}: unknown key; no command has such an option{_suggestion(key, known)}")


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _as_typed(value: Any, option: OptionName, place: str) -> Any:
    """Return `value` as if it had been typed: text, or a list of texts, or a bool for a flag."""
    if isinstance(value, list):
        if not option.is_list or not all(isinstance(item, str | int | float) for item in value):
            raise ConfigError(f"{place}: a list does not fit here")
        return [str(item) for item in value]
    if not isinstance(value, str | int | float):
        raise ConfigError(f"{place}: expected text, a number or true/false, got {type(value).__name__}")
    if option.is_flag:
        return _as_flag(value, place) is not option.is_negated
    if option.is_list:
        return shlex.split(value) if isinstance(value, str) and place.startswith(ENV_PREFIX) else [str(value)]
    return str(value)


def _as_flag(value: str | float, place: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    flag = words.get(str(value).lower())
    if flag is None:
        raise ConfigError(f"{place}: expected true or false, got {printable(str(value))!r}")
    return flag
