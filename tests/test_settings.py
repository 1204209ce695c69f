"""Layers of settings: environment, project file, user file."""

from __future__ import annotations

from pathlib import Path

import pytest

from md3cli.errors import ConfigError
from md3cli.settings import OptionName, read_layers, resolve_settings, user_cache_dir, user_config_dir

DETECT = {
    "model": OptionName("model"),
    "cache": OptionName("cache", is_flag=True),
    "no-cache": OptionName("cache", is_flag=True, is_negated=True),
    "include": OptionName("include", is_list=True),
    "max-objects": OptionName("max_objects"),
}
COMMANDS = {"detect": lambda: DETECT, "caption": lambda: {"length": OptionName("length")}}


def resolved(environ: dict[str, str], folder: Path) -> dict[str, object]:
    settings = resolve_settings(read_layers(environ, folder), "detect", DETECT, COMMANDS)
    return {name: setting.value for name, setting in settings.items()}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_nothing_is_set_by_default(tmp_path: Path, environ: dict[str, str]) -> None:
    assert resolved(environ | {"HOME": "x", "MD3_MODEL": ""}, tmp_path) == {}


def test_the_stronger_layer_wins_key_by_key(tmp_path: Path, environ: dict[str, str]) -> None:
    write(tmp_path / "config/md3cli/md3.toml", 'model = "user"\nmax-objects = 1\ncache = false\n')
    write(tmp_path / "md3.toml", 'model = "project"\nmax-objects = 2\n')
    assert resolved(environ | {"MD3_MODEL": "env"}, tmp_path) == {"model": "env", "max_objects": "2", "cache": False}


def test_a_table_beats_the_common_keys_of_its_file_only(tmp_path: Path, environ: dict[str, str]) -> None:
    write(tmp_path / "config/md3cli/md3.toml", "[detect]\nmax-objects = 1\n")
    write(tmp_path / "md3.toml", 'max-objects = 2\nmodel = "common"\n[detect]\nmodel = "table"\n')
    assert resolved(environ, tmp_path) == {"max_objects": "2", "model": "table"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MD3_CACHE": "off"}, {"cache": False}),
        ({"MD3_NO_CACHE": "yes"}, {"cache": False}),
        ({"MD3_NO_CACHE": "0"}, {"cache": True}),
        ({"MD3_INCLUDE": "*.png 'a b*'"}, {"include": ["*.png", "a b*"]}),
        ({"MD3_MAX_OBJECTS": "7"}, {"max_objects": "7"}),
    ],
)
def test_environment(
    tmp_path: Path, environ: dict[str, str], environment: dict[str, str], expected: dict[str, object]
) -> None:
    assert resolved(environ | environment, tmp_path) == expected


def test_lists_and_numbers_of_a_file(tmp_path: Path, environ: dict[str, str]) -> None:
    write(tmp_path / "md3.toml", 'include = ["*.png", "a b*"]\nmax-objects = 7\nno-cache = true\n')
    assert resolved(environ, tmp_path) == {"include": ["*.png", "a b*"], "max_objects": "7", "cache": False}
    write(tmp_path / "md3.toml", 'include = "a b*"\n')
    assert resolved(environ, tmp_path) == {"include": ["a b*"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('length = "long"\n[detect]\nlength = "long"', "[detect] length: unknown key; `detect` has no such option"),
        ("max_objects = 3", "max_objects: unknown key; no command has such an option; did you mean max-objects?"),
        (
            "[caption]\nlenght = 'x'",
            "[caption] lenght: unknown key; `caption` has no such option; did you mean length?",
        ),
        ("model = ['a']", "model: a list does not fit here"),
        ("include = [['a']]", "include: a list does not fit here"),
        ("include = [1, {}]", "include: a list does not fit here"),
        ("model = 12:00:00", "model: expected text, a number or true/false, got time"),
        ("cache = 'maybe'", "cache: expected true or false, got 'maybe'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, environ: dict[str, str], text: str, message: str) -> None:
    write(tmp_path / "md3.toml", text)
    with pytest.raises(ConfigError) as error:
        resolved(environ, tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/md3.toml: ")
    assert message in str(error.value)


def test_a_key_of_another_command_is_no_error(tmp_path: Path, environ: dict[str, str]) -> None:
    write(tmp_path / "md3.toml", 'length = "long"\n[caption]\nlength = "short"\n')
    assert resolved(environ, tmp_path) == {}


def test_an_unreadable_file_is_named(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "md3.toml").mkdir()
    with pytest.raises(ConfigError, match="not a regular file"):
        read_layers(environ, tmp_path)
    (tmp_path / "md3.toml").rmdir()
    (tmp_path / "md3.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_layers(environ, tmp_path)


def test_folders_follow_xdg() -> None:
    environ = {"XDG_CONFIG_HOME": "/c", "XDG_CACHE_HOME": "/d"}
    assert (user_config_dir(environ), user_cache_dir(environ)) == (Path("/c/md3cli"), Path("/d/md3cli"))
    assert user_cache_dir({}) == Path.home() / ".cache/md3cli"
