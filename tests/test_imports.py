"""Who may import whom, read from the source; and what must never be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "md3cli"

# What the modules are called in the rules below. A longer prefix goes first.
LAYERS = {
    "md3cli.records": "words",
    "md3cli.errors": "words",
    "md3cli.settings": "settings",
    "md3cli.signals": "settings",
    "md3cli.console": "console",
    "md3cli.console": "console",
    "md3cli.finished.failures": "console",
    "md3cli.model": "model",
    "md3cli.exporters": "finished",
    "md3cli.report": "finished",
    "md3cli.evaluate": "finished",
    "md3cli.finished.run_json": "finished",
    "md3cli.exporters.svg_path": "finished",
    "md3cli.finished.guards": "finished",  # asks run.json where a finished run has its files
    "md3cli.finished.guards": "finished",
    "md3cli.run.journal_scan": "finished",
    "md3cli.run.local": "pipeline",
    "md3cli.run.dry_run": "pipeline",
    "md3cli.estimate": "pipeline",
    "md3cli.run.model_handle": "pipeline",
    "md3cli.run.feed": "pipeline",
    "md3cli.run.order": "pipeline",
    "md3cli.run.output": "pipeline",
    "md3cli.scale": "pipeline",
    "md3cli.commands.doctor": "pipeline",
    "md3cli.commands": "commands",
    "md3cli.cli": "commands",
    "md3cli.__main__": "commands",
    "md3cli": "files",  # source, images, journal and what they are made of; the version
}
# Layer -> the layers it may import when it is itself imported. Inside a function body only `pipeline`
# and `commands` may go further, to everything; `package` is `md3cli` itself (version, lazy names).
MAY_IMPORT = {
    "words": {"words"},
    "settings": {"words", "settings"},
    "files": {"words", "files", "settings"},
    "console": {"words", "console"},
    "model": {"words", "model", "files", "settings"},  # settings: the user's cache folder
    "finished": {"words", "finished", "files"},
    "pipeline": {"words", "settings", "files", "console", "finished", "pipeline"},
    "commands": {"words", "settings", "files", "console", "finished", "pipeline", "commands"},
}
NEVER = {
    "torch": {"words", "settings", "files", "console", "finished", "pipeline", "commands"},
    "transformers": {"words", "settings", "files", "console", "finished", "pipeline", "commands", "model"},
    "peft": {"words", "settings", "files", "console", "finished", "pipeline", "commands", "model"},
    "typer": {"words", "settings", "files", "console", "finished", "pipeline", "model"},
    "rich": {"words", "settings", "files", "finished", "pipeline", "model"},
    "tqdm": {"words", "settings", "files", "finished", "pipeline", "model"},
    "pickle": set(MAY_IMPORT),
    "marshal": set(MAY_IMPORT),
    "shelve": set(MAY_IMPORT),
}
ONLY_HF = {"transformers", "peft", "accelerate"}  # md3cli/model/hf/ is the only place that knows them
WORDS_OUTSIDE = set(sys.stdlib_module_names)


class Import:
    """One import statement's module; `is_deferred` inside a function, `is_typing` under TYPE_CHECKING."""

    def __init__(self, module: str, line: int, is_deferred: bool, is_typing: bool) -> None:
        self.module, self.line, self.is_deferred, self.is_typing = module, line, is_deferred, is_typing


def module_name(path: Path) -> str:
    parts = ("md3cli", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, is_deferred: bool, is_typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_deferred, is_typing)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                is_module = node.module == "md3cli" and (PACKAGE / f"{alias.name}.py").exists()
                yield Import(f"md3cli.{alias.name}" if is_module else node.module, node.lineno, is_deferred, is_typing)
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            yield from visit(child, is_deferred or inside, is_typing or typing)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False, False)


def layer_of(module: str) -> str:
    name = module
    while name not in LAYERS:
        name = name.rpartition(".")[0]
    return LAYERS[name]


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module: str) -> None:
    layer = layer_of(module)
    for found in imports_of(MODULES[module]):
        if not found.module.startswith("md3cli") or found.is_typing or module == "md3cli":
            continue
        if found.module == "md3cli":  # the version
            continue
        if found.is_deferred and layer in ("pipeline", "commands"):
            continue
        target = layer_of(found.module)
        assert target in MAY_IMPORT[layer], f"{module}:{found.line} ({layer}) imports {found.module} ({target})"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_never_imported(module: str) -> None:
    layer = layer_of(module)
    for found in imports_of(MODULES[module]):
        top = found.module.partition(".")[0]
        if found.is_typing or (top in ONLY_HF and module.startswith("md3cli.model.hf")):
            continue
        assert layer not in NEVER.get(top, ()), f"{module}:{found.line} imports {top}"


def test_the_words_know_the_standard_library_only() -> None:
    for module in ("md3cli.records", "md3cli.errors"):
        for found in imports_of(MODULES[module]):
            top = found.module.partition(".")[0]
            assert top == "md3cli" or top in WORDS_OUTSIDE, f"{module}:{found.line} imports {found.module}"


def test_the_network_does_not_know_the_engine() -> None:
    network = {"config", "layers", "vision", "text", "moe", "region", "moondream", "packing"}
    network |= {"checkpoint", "name_tables", "tensor_table", "formats"}
    engine = {"engine", "tasks", "decoding", "encoder", "kv_cache", "load", "api", "sampling", "prompts", "plain"}
    for name in sorted(network):
        for found in imports_of(MODULES[f"md3cli.model.{name}"]):
            assert found.module.removeprefix("md3cli.model.") not in engine, f"{name}:{found.line}"


def test_no_import_circles() -> None:
    """At import time; what a function imports later cannot go round."""
    arrows = {
        module: {
            found.module
            for found in imports_of(path)
            if found.module in MODULES and not found.is_deferred and not found.is_typing
        }
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in arrows[module]:
                follow(target, (*path, module))
            done.add(module)

    for module in MODULES:
        follow(module, ())


def test_an_answer_on_a_cpu_leaves_triton_alone() -> None:
    """Nobody without a GPU misses it; where it is installed it is not even looked into."""
    check = (
        "import sys\n"
        "from PIL import Image\n"
        "from md3cli.model.api import Moondream\n"
        "model = Moondream.load('tiny', device='cpu')\n"
        "assert 'answer' in model.query(Image.new('RGB', (64, 64)), 'what?', settings={'max_tokens': 2})\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert 'torch' in loaded\n"
        "assert 'triton' not in loaded\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
