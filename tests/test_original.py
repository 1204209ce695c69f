"""`md3cli.original`: its names are there, and nothing is loaded before one is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import md3cli.original
from md3cli.errors import MissingExtraError


@pytest.mark.parametrize("name", md3cli.original.__all__)
def test_every_name_is_there(name: str) -> None:
    if name.startswith(("Auto", "Moondream3")):
        pytest.importorskip("transformers", reason="needs the extra md3cli[hf]")
    assert getattr(md3cli.original, name).__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"md3cli\.original.*'HfMoondream'"):
        md3cli.original.HfMoondream  # noqa: B018


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("md3cli.model.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"md3cli\[hf\]"):
        md3cli.original.AutoProcessor  # noqa: B018


@pytest.mark.process
def test_importing_it_loads_nothing_and_manual_loading_no_transformers() -> None:
    check = (
        "import sys\n"
        "import md3cli.original\n"
        "assert sys.modules.keys().isdisjoint({'torch', 'transformers'})\n"
        "from md3cli.original import MoondreamConfig, MoondreamModel, load_weights\n"
        "MoondreamModel(MoondreamConfig())\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
