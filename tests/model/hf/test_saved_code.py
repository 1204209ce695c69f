"""What a saved folder names under `auto_map`: imports, for a plain transformers; and md3cli reads no such name."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES
from hf_cases import load_hf, picture
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from typer.testing import CliRunner

import md3cli.original
from md3cli import Moondream
from md3cli.cli import app
from md3cli.errors import EngineError
from md3cli.model.hf import Moondream3Config, Moondream3ForConditionalGeneration, Moondream3Processor
from md3cli.model.hf.saved_code import auto_map

# A program that never says md3cli: it loads with transformers alone, and saves what it loaded.
PLAIN = """
import sys
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

folder, again, image = sys.argv[1:]
assert not any(name.startswith("md3cli") for name in sys.modules)
ORDER
inputs = processor(text=["caption: short"], images=[Image.open(image)])
ids = model.generate(**inputs, max_new_tokens=4)
print(ids.tolist())
model.save_pretrained(again)
processor.save_pretrained(again)
assert len(AutoTokenizer.from_pretrained(folder)) == len(processor.tokenizer)
"""
MODEL = "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype='float32')"
PROCESSOR = "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a model, as `save_pretrained` writes it."""
    model, _ = load_hf("a")
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_saved_folder_names_imports_from_md3cli_only(saved: Path) -> None:
    named = json.loads((saved / "config.json").read_text())["auto_map"]
    assert named == auto_map()
    assert {reference.partition(".")[0] for reference in named.values()} == {"modeling_md3"}
    assert [path.name for path in saved.glob("*.py")] == ["modeling_md3.py"]
    docstring, *statements = ast.parse((saved / "modeling_md3.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) and node.module == "md3cli.original" for node in statements)
    imported = {alias.name for node in statements for alias in node.names}  # type: ignore[attr-defined]
    assert {reference.partition(".")[2] for reference in named.values()} == imported
    assert imported <= set(md3cli.original.__all__)


def test_a_processor_names_its_class_too(tmp_path: Path) -> None:
    written = load_hf("a")[1].save_pretrained(tmp_path)
    assert {Path(path).name for path in written} == files_of(tmp_path)
    document = json.loads((tmp_path / "processor_config.json").read_text())
    assert document["auto_map"] == {"AutoProcessor": "modeling_md3.Moondream3Processor"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("lines", "has_processor"),
    [pytest.param([PROCESSOR, MODEL], True, id="whole"), pytest.param([MODEL, PROCESSOR], False, id="model alone")],
)
def test_a_saved_folder_loads_in_a_plain_transformers(
    saved: Path, tmp_path: Path, lines: list[str], has_processor: bool
) -> None:
    model, processor = load_hf("a")
    if has_processor:
        processor.save_pretrained(saved)
    image = CASES["a"][1] / sorted(path.name for path in CASES["a"][1].iterdir())[0]
    script = PLAIN.replace("ORDER", "\n".join(lines))
    if not has_processor:
        script = script.replace("AutoTokenizer.from_pretrained(folder)", "processor.tokenizer")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved), str(tmp_path / "again"), str(image)],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    inputs = processor(text=["caption: short"], images=[Image.open(image)])
    assert json.loads(done.stdout) == model.generate(**inputs, max_new_tokens=4).tolist()
    copies = [path.name for path in (tmp_path / "home" / "modules").rglob("*.py") if path.name != "__init__.py"]
    assert copies == ["modeling_md3.py"]
    # What was loaded through the file is saved as it was: with the file, and without a copy of md3cli's sources.
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_md3.py"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == auto_map()


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A checkpoint whose config and processor name code that would leave a mark."""
    folder = tmp_path / "strange"
    shutil.copytree(CASES["a"][0], folder)
    mark = tmp_path / "mark"
    for name in ("hf_moondream", "modeling_md3", "custom_generate/generate"):
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(mark)!r}, 'w').close()\nclass HfMoondream: ...\n")
    named = dict.fromkeys((*auto_map(), "AutoTokenizer", "AutoModel"), "hf_moondream.HfMoondream")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": named}))
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": named, "processor_class": "HfMoondream"}))
    return folder


def query_by_command(folder: str) -> None:
    """Ask a question without a picture with `md3`."""
    asked = ["query", "-q", "What?", "-m", folder, "--device", "cpu", "--max-tokens", "2", "--no-reasoning"]
    result = CliRunner().invoke(app, asked, prog_name="md3")
    assert result.exit_code == 0, result.output


LOADERS = {
    "md3": query_by_command,
    "Moondream": Moondream.load,
    "Moondream.from_pretrained": Moondream.from_pretrained,
    "the class": Moondream3ForConditionalGeneration.from_pretrained,
    "the processor": Moondream3Processor.from_pretrained,
    "the config": Moondream3Config.from_pretrained,
    "original's AutoModelForCausalLM": md3cli.original.AutoModelForCausalLM.from_pretrained,
    "original's AutoProcessor": md3cli.original.AutoProcessor.from_pretrained,
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
}


@pytest.mark.parametrize("name", LOADERS)
def test_code_that_a_checkpoint_names_is_not_run(strange: Path, name: str) -> None:
    """Not even by transformers' own classes for models, which know `moondream3` once `md3cli.model.hf` is imported."""
    trusts: list[dict[str, Any]] = [{}] if name in ("md3", "Moondream") else [{}, {"trust_remote_code": True}]
    for trust in trusts:
        LOADERS[name](str(strange), **trust)
        assert not (strange.parent / "mark").exists()


@pytest.mark.parametrize("name", ["the class", "original's AutoModelForCausalLM", "original's AutoProcessor"])
def test_code_is_not_run_for_a_model_type_that_nobody_knows(strange: Path, name: str) -> None:
    """Here transformers' own Auto classes would run it."""
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "hf_moondream"}))
    LOADERS[name](str(strange), trust_remote_code=True)
    assert not (strange.parent / "mark").exists()


def test_code_that_generates_is_not_run(strange: Path) -> None:
    model = Moondream3ForConditionalGeneration.from_pretrained(strange, dtype=torch.float32, trust_remote_code=True)
    ids = torch.arange(20, 24)[None]
    with pytest.raises(EngineError, match="is code, which md3cli never runs"):
        model.generate(input_ids=ids, custom_generate=str(strange), trust_remote_code=True)
    with pytest.raises(EngineError, match=r"transformers-community/dola.* is code"):
        model.generate(input_ids=ids, dola_layers="low", trust_remote_code=True)
    assert not (strange.parent / "mark").exists()


def test_the_ports_own_processor_files_are_passed_over(strange: Path) -> None:
    """They name a class of the port that is called as ours is."""
    document = {"processor_class": "Moondream3Processor", "auto_map": {"AutoProcessor": "hf_moondream.HfMoondream"}}
    (strange / "processor_config.json").write_text(json.dumps(document))
    for auto in (AutoProcessor, md3cli.original.AutoProcessor):
        processor = auto.from_pretrained(str(strange), use_fast=False, trust_remote_code=True)
        assert isinstance(processor, Moondream3Processor)
        assert processor.network == load_hf("a")[1].network
    assert not (strange.parent / "mark").exists()


def test_a_strangers_names_are_not_saved_again(strange: Path, tmp_path: Path) -> None:
    model = Moondream3ForConditionalGeneration.from_pretrained(str(strange), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == auto_map()
    assert "hf_moondream.py" not in files_of(tmp_path / "saved")


def test_answers_of_the_strange_folder_are_those_of_its_weights(strange: Path) -> None:
    settings = {"max_tokens": 4}
    image = picture("a", 0)
    expected = Moondream.load(CASES["a"][0]).caption(image, settings=settings)
    assert Moondream.load(strange).caption(image, settings=settings) == expected


@pytest.mark.parametrize("layout", ["hf", "raw"])
def test_other_layouts_name_no_code(tmp_path: Path, layout: str) -> None:
    model, _ = load_hf("hf-port")
    model.save_pretrained(tmp_path / layout, layout=layout)
    assert not list((tmp_path / layout).glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / layout / "config.json").read_text())
