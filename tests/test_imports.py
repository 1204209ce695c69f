"""Who may import whom, read from the source; and what must never be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "md3cli"

# The rooms, lowest first: a file imports its own room and those before it. A road runs through them
# (records .. commands); wings hang on it and are entered inside functions, at DOORS.
ROOMS = (
    ("md3cli",),  # the version, and lazy names
    ("md3cli.records", "md3cli.errors"),
    ("md3cli.system", "md3cli.refine.template"),
    ("md3cli.child",),
    ("md3cli.refine.labels",),
    ("md3cli.refine.refinement",),
    ("md3cli.settings", "md3cli.signals", "md3cli.config"),
    ("md3cli.files", "md3cli.file_cache"),
    ("md3cli.remote",),
    ("md3cli.source",),
    ("md3cli.images",),
    ("md3cli.finished",),
    ("md3cli.refine",),
    ("md3cli.exporters",),
    ("md3cli.evaluate",),
    ("md3cli.report",),
    ("md3cli.console",),
    ("md3cli.model.network",),
    ("md3cli.model.weights",),
    ("md3cli.model.kernels",),
    ("md3cli.model.quant",),
    ("md3cli.model.engine",),
    ("md3cli.model.inspect", "md3cli.model.calibrate", "md3cli.model.api_requests"),
    ("md3cli.model.api_annotate", "md3cli.model.api_loading"),
    ("md3cli.model.api",),
    ("md3cli.model.hf", "md3cli.model.original"),
    ("md3cli.model",),
    ("md3cli.original",),
    ("md3cli.bench",),
    ("md3cli.run",),
    ("md3cli.estimate",),
    ("md3cli.scale",),
    ("md3cli.pipeline",),
    ("md3cli.commands",),
    ("md3cli.cli",),
    ("md3cli.__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
# Files that may import a higher room, inside a function only.
DOORS: dict[str, str] = {}
# Library -> the only rooms that may import it; an empty tuple is for nobody.
ONLY_IN = {
    "torch": ("md3cli.model", "md3cli.bench"),
    "triton": ("md3cli.model",),
    "transformers": ("md3cli.model.hf",),
    "peft": ("md3cli.model.hf",),
    "typer": ("md3cli.commands", "md3cli.cli"),
    "rich": ("md3cli.console",),
    "tqdm": ("md3cli.console",),
    "pickle": (),
    "marshal": (),
    "shelve": (),
}
# What is still in the wrong room; nothing may be added.
ASTRAY = {}
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


def room_of(module: str) -> str:
    room = module
    while room not in RANK:
        room = room.rpartition(".")[0]
    return room


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module: str) -> None:
    room = room_of(module)
    for found in imports_of(MODULES[module]):
        if not found.module.startswith("md3cli") or found.is_typing or module == "md3cli":
            continue
        target = room_of(found.module)
        is_door = (found.is_deferred and module in DOORS) or (module, target) in ASTRAY
        assert target == room or RANK[target] < RANK[room] or is_door, f"{module}:{found.line} imports {found.module}"


@pytest.mark.parametrize("module", MODULES)
def test_where_libraries_are_imported(module: str) -> None:
    for found in imports_of(MODULES[module]):
        rooms = ONLY_IN.get(found.module.partition(".")[0])
        if (module, found.module.partition(".")[0]) in ASTRAY:
            continue
        is_allowed = rooms is None or found.is_typing or any(f"{module}.".startswith(f"{room}.") for room in rooms)
        assert is_allowed, f"{module}:{found.line} imports {found.module}"


def test_words_and_children_know_the_standard_library_only() -> None:
    for module in ("md3cli.records", "md3cli.errors", "md3cli.system", "md3cli.child"):
        for found in imports_of(MODULES[module]):
            top = found.module.partition(".")[0]
            assert top == "md3cli" or top in WORDS_OUTSIDE, f"{module}:{found.line} imports {found.module}"


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


@pytest.mark.process
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
