"""Print how the package is built: its size, its arrows, its density, and with --trace what one run goes through.

    python tests/support/house.py [--root CHECKOUT] [--base CHECKOUT_OR_REVISION] [--trace] [--list] [--json]
    python tests/support/house.py --docstrings 30 --seed 1

--base adds a column for another checkout, or for a revision of this one, and the change of the density in percent.
--list names what was counted. --trace needs an interpreter with md3cli's dependencies and takes a minute.

How it counts:

lines           Every line has one kind. A docstring's lines, blank ones too, are docstring; a comment's line holds
                nothing else; `import` is every line of an import statement; the rest is code.
density         Characters of the code lines, without indentation and without a comment behind the code, and statements
                that begin in them, for each code line. Docstrings and imports are left out.
function        From `def` to its last line. A function inside a function is counted beside it.
importer        A file with an import statement, lazy ones included, those under TYPE_CHECKING left out.
                `from md3cli.room import module` imports the module, not the room. A file that nothing imports
                (commands and exporters are loaded by name) has no importer, and no single one.
room            A folder, or a file in the root of the package. An arrow between rooms is an import of a file by a file
                at module level, outside TYPE_CHECKING. Where two rooms import each other, the arrows of the rarer
                way run back up. A circle is a group of files that all reach each other by such arrows.
run through     A file of which at least one function is called by `md3 detect FOLDER circle --model tiny` with 12
                pictures, in the process that is started. Bodies of modules and classes are no functions, and no more
                are comprehensions; what decode workers do in their own processes is not seen.
each further    A file with a function that is called more often for 12 distinct pictures than for 4. The first 4 show
                one disc, others up to three, so that more pictures need more steps of a batch, too. Calls that depend
                on time are taken at their least for 12 and at their most for 4, of two runs each.
depth           Frames of the package's own functions on the stack of one thread, at their most.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import tokenize
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = "md3cli"
ROOT = Path(__file__).resolve().parents[2]

MAX_LINE = 120
LONG_FILES, LONG_FUNCTIONS, SHORT_FILE = (800, 500), (80, 40), 60
PUBLIC_FUNCTION = 12  # a longer public function has a docstring
DENSITY_LIMIT = "+6 %"
FEW, MANY = 4, 12  # pictures of the two kinds of runs that are compared
LIMITS: Mapping[str, tuple[str, str]] = {  # row -> no more than, aim
    "lines": ("28,000", "25,500"),
    "files": ("180", "165"),
    "files of more than 800 lines": ("0", "0"),
    "functions of more than 80 lines": ("0", "0"),
    "files with a single importer": ("25", "15"),
    "import circles": ("0", "0"),
    "folders in a circle": ("0", "0"),
    "arrows that run back up": ("2", "0"),
    "files of imports only": ("0", "0"),
    "characters a code line": (DENSITY_LIMIT, DENSITY_LIMIT),
    "statements a code line": (DENSITY_LIMIT, DENSITY_LIMIT),
    "longest line": (str(MAX_LINE), str(MAX_LINE)),
    "statements behind another on their line": ("0", "0"),
    "third-party imports out of place": ("0", "0"),
    "public functions without a docstring": ("0", "0"),
    "files run through": ("60", "50"),
    "files for each further picture": ("33", "25"),
    "own call depth": ("16", "12"),
}
ALLOWED: Mapping[str, tuple[str, ...]] = {  # library -> files and folders that may import it
    "torch": ("model/", "bench/"),
    "triton": ("model/",),
    "transformers": ("model/hf/",),
    "peft": ("model/hf/",),
    "typer": ("commands/", "cli.py"),
    "rich": ("console/",),
    "tqdm": ("console/",),
}
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")  # frames of their own up to Python 3.11

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True)
class Figure:
    """One row of the table: its name, its value, and what was counted."""

    name: str
    value: float
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Import:
    """One name of an import statement, as the module that it loads."""

    module: str
    line: int
    is_lazy: bool
    is_typing: bool

    @property
    def is_at_module_level(self) -> bool:
        return not self.is_lazy and not self.is_typing


@dataclass
class SourceFile:
    """One file of the package, read and parsed; `path` is relative to the package, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.removesuffix("\n").split("\n") if self.text else []

    @cached_property
    def kinds(self) -> list[str]:
        return kinds_of_lines(self)

    @property
    def module(self) -> str:
        parts = [PACKAGE, *self.path.removesuffix(".py").split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        return self.path.rpartition("/")[0] or self.path

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]


def read_package(root: Path) -> list[SourceFile]:
    """Read the package of a checkout, sorted by path."""
    folder = root / PACKAGE
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    return [SourceFile(name, paths[name].read_text(encoding="utf-8")) for name in sorted(paths)]


# Lines and density.


def kinds_of_lines(file: SourceFile) -> list[str]:
    """Return the kind of every line of a file: code, docstring, comment, blank or import."""
    nodes = list(ast.walk(file.tree))
    kinds = ["code" if line.strip() else "blank" for line in file.lines]
    _mark(kinds, (node for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)), "code")  # its blank lines
    for token in comments_of(file):
        if file.lines[token.start[0] - 1].lstrip().startswith("#"):
            kinds[token.start[0] - 1] = "comment"
    _mark(kinds, (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)), "import")
    _mark(kinds, (node.body[0] for node in nodes if isinstance(node, Documented) and has_docstring(node)), "docstring")
    return kinds


def _mark(kinds: list[str], nodes: Iterable[ast.expr | ast.stmt], kind: str) -> None:
    for node in nodes:
        last = node.end_lineno or node.lineno
        kinds[node.lineno - 1 : last] = [kind] * (last - node.lineno + 1)


def comments_of(file: SourceFile) -> list[tokenize.TokenInfo]:
    """Return the comments, those behind code among them."""
    tokens = tokenize.generate_tokens(io.StringIO(file.text).readline)
    return [token for token in tokens if token.type == tokenize.COMMENT]


def has_docstring(node: Documented) -> bool:
    """Return whether a module, class or function begins with a text."""
    return ast.get_docstring(node, clean=False) is not None


def density_of(files: Sequence[SourceFile]) -> tuple[float, float]:
    """Return characters and statements for each code line."""
    num_lines = num_characters = num_statements = 0
    for file in files:
        code = {number for number, kind in enumerate(file.kinds, 1) if kind == "code"}
        behind = sum(len(t.string) for t in comments_of(file) if t.start[0] in code)
        num_lines += len(code)
        num_characters += sum(len(file.lines[number - 1].strip()) for number in code) - behind
        num_statements += sum(isinstance(n, ast.stmt) and n.lineno in code for n in ast.walk(file.tree))
    return num_characters / max(num_lines, 1), num_statements / max(num_lines, 1)


def crowded_lines(file: SourceFile) -> list[int]:
    """Return the lines on which a statement stands behind something else: `a; b`, `if a: b`.

    A body of `...` is left out: the formatter puts it there.
    """
    crowded = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.stmt) and ast.unparse(node) != "...":
            before = file.lines[node.lineno - 1].encode()[: node.col_offset]
            if before.strip():
                crowded.add(node.lineno)
    return sorted(crowded)


def line_figures(files: Sequence[SourceFile]) -> Iterator[Figure]:
    """Count lines, files, and what is too long or too short."""
    yield Figure("lines", sum(len(file.lines) for file in files))
    kinds = Counter(kind for file in files for kind in file.kinds)
    for kind in ("code", "docstring", "comment", "blank", "import"):
        yield Figure(f"  {kind}", kinds[kind])
    yield Figure("files", len(files))
    for bound in LONG_FILES:
        yield _counted(f"files of more than {bound} lines", _told(files, range(bound + 1, sys.maxsize)))
    yield _counted(f"files of fewer than {SHORT_FILE} lines", _told(files, range(SHORT_FILE)))
    for bound in LONG_FUNCTIONS:
        yield _counted(f"functions of more than {bound} lines", long_functions(files, bound))


def _counted(name: str, items: Iterable[str]) -> Figure:
    items = list(items)
    return Figure(name, len(items), items)


def _told(files: Sequence[SourceFile], lengths: range) -> Iterator[str]:
    return (f"{file.path}: {len(file.lines)}" for file in files if len(file.lines) in lengths)


def long_functions(files: Sequence[SourceFile], bound: int) -> Iterator[str]:
    """Yield the functions of more than `bound` lines, with their lengths."""
    for file in files:
        for node in file.functions:
            if length_of(node) > bound:
                yield f"{file.path}:{node.lineno} {node.name}: {length_of(node)}"


def length_of(node: Function) -> int:
    """Return the lines of a function, its decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def density_figures(files: Sequence[SourceFile]) -> Iterator[Figure]:
    """Tell how much stands on a line."""
    characters, statements = density_of(files)
    yield Figure("characters a code line", round(characters, 3))
    yield Figure("statements a code line", round(statements, 4))
    longest = max(((len(line), f"{f.path}:{n}") for f in files for n, line in enumerate(f.lines, 1)), default=(0, ""))
    yield Figure("longest line", longest[0], [longest[1]])
    crowded = (f"{file.path}:{line}" for file in files for line in crowded_lines(file))
    yield _counted("statements behind another on their line", crowded)


# Arrows.


def imports_of(file: SourceFile, modules: frozenset[str]) -> Iterator[Import]:
    """Yield what a file imports; a name that is itself one of `modules` counts as that module."""

    def visit(node: ast.AST, is_lazy: bool, is_typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in _modules_named(node, file, modules):
                yield Import(module, node.lineno, is_lazy, is_typing)
        is_lazy = is_lazy or isinstance(node, Function | ast.Lambda)
        guarded = node.body if isinstance(node, ast.If) and _is_type_checking(node.test) else []
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_lazy, is_typing or child in guarded)

    return visit(file.tree, False, False)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _modules_named(node: ast.Import | ast.ImportFrom, file: SourceFile, modules: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = file.module.split(".") + (["__init__"] if file.path.endswith("__init__.py") else [])
        base = ".".join([*package[: -node.level], *([node.module] if node.module else [])])
    for alias in node.names:
        yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


@dataclass
class Arrows:
    """Which file imports which, by path: `all` with lazy imports, `early` at module level alone."""

    all: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    early: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def arrows_of(files: Sequence[SourceFile]) -> Arrows:
    """Return the imports among the files, without those under TYPE_CHECKING."""
    paths = {file.module: file.path for file in files}
    arrows = Arrows()
    for file in files:
        for found in imports_of(file, frozenset(paths)):
            target = paths.get(found.module)
            if target is None or target == file.path or found.is_typing:
                continue
            arrows.all[file.path].add(target)
            if found.is_at_module_level:
                arrows.early[file.path].add(target)
    return arrows


def single_importers(arrows: Arrows) -> list[str]:
    """Return the files that exactly one other imports, with that other."""
    importers = defaultdict(set)
    for source, targets in arrows.all.items():
        for target in targets:
            importers[target].add(source)
    return sorted(f"{target} <- {min(sources)}" for target, sources in importers.items() if len(sources) == 1)


def circles_of(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that all reach each other."""
    reached = {node: _reached_from(node, arrows) for node in arrows}
    groups = {node: tuple(sorted(n for n in reached[node] if node in reached.get(n, ()))) for node in arrows}
    return [list(group) for group in sorted(set(groups.values())) if len(group) > 1]


def _reached_from(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = arrows.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def arrows_between_rooms(files: Sequence[SourceFile], arrows: Arrows) -> dict[tuple[str, str], list[str]]:
    """Return the arrows at module level by the two rooms that they join."""
    room = {file.path: file.room for file in files}
    joined = defaultdict(list)
    for source, targets in arrows.early.items():
        for target in targets:
            if room[source] != room[target]:
                joined[room[source], room[target]].append(f"{source} -> {target}")
    return joined


def arrows_back_up(joined: Mapping[tuple[str, str], list[str]]) -> list[str]:
    """Return, of each two rooms that import each other, the arrows of the rarer way."""
    back = []
    for (one, other), there in joined.items():
        if one < other and (other, one) in joined:
            again = joined[other, one]
            back += there if len(there) < len(again) else again
    return sorted(back)


def arrow_figures(files: Sequence[SourceFile]) -> Iterator[Figure]:
    """Count importers, circles, and arrows that run back up."""
    arrows = arrows_of(files)
    joined = arrows_between_rooms(files, arrows)
    rooms = defaultdict(set)
    for one, other in joined:
        rooms[one].add(other)
    yield _counted("files with a single importer", single_importers(arrows))
    yield _counted("import circles", (" <-> ".join(circle) for circle in circles_of(arrows.early)))
    yield _counted("  counting lazy imports", (" <-> ".join(circle) for circle in circles_of(arrows.all)))
    in_circles = (room for circle in circles_of(rooms) for room in circle)
    yield _counted("folders in a circle", (room for room in in_circles if not room.endswith(".py")))
    yield _counted("arrows that run back up", arrows_back_up(joined))
    yield _counted("files of imports only", (file.path for file in files if is_shim(file)))
    yield _counted("third-party imports out of place", (place for file in files for place in misplaced(file)))


def is_shim(file: SourceFile) -> bool:
    """Return whether a file holds imports and nothing else but a docstring and `__all__`."""
    if file.path.rpartition("/")[2] in ("__init__.py", "original.py"):
        return False
    body = file.tree.body[has_docstring(file.tree) :]
    return bool(body) and all(map(_is_import_or_all, body))


def _is_import_or_all(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return all(map(_is_import_or_all, [*node.body, *node.orelse]))
    return isinstance(node, ast.Import | ast.ImportFrom) or ast.unparse(node).startswith("__all__ ")


def misplaced(file: SourceFile) -> Iterator[str]:
    """Yield the imports of a library in a file that may not know it."""
    for found in imports_of(file, frozenset()):
        library = found.module.partition(".")[0]
        if not found.is_typing and library in ALLOWED and not file.path.startswith(ALLOWED[library]):
            yield f"{file.path}:{found.line} {library}"


# Docstrings.


def public_parts(file: SourceFile) -> Iterator[tuple[str, Documented]]:
    """Yield the module, its public classes and their public methods, its public functions, each with its place."""
    yield file.path, file.tree

    def visit(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, Documented]]:
        for node in body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                yield f"{file.path}:{node.lineno} {prefix}{node.name}", node
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f"{node.name}.")

    yield from visit(file.tree.body, "")


def docstring_figures(files: Sequence[SourceFile]) -> Iterator[Figure]:
    """Count public docstrings, and the longer public functions that have none."""
    parts = [part for file in files for part in public_parts(file)]
    yield Figure("public docstrings", sum(has_docstring(node) for _, node in parts))
    long = ((place, node) for place, node in parts if isinstance(node, Function) and length_of(node) > PUBLIC_FUNCTION)
    bare = (place for place, node in long if not has_docstring(node))
    yield _counted("public functions without a docstring", bare)


def drawn_docstrings(files: Sequence[SourceFile], count: int, seed: int) -> Iterator[str]:
    """Yield so many public docstrings with their places, drawn at random."""
    texts = [(place, ast.get_docstring(node)) for file in files for place, node in public_parts(file)]
    told = [(place, text) for place, text in texts if text]
    for place, text in sorted(random.Random(seed).sample(told, min(count, len(told)))):
        indented = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        yield f"{PACKAGE}/{place}\n{indented}\n"


# What one run goes through.


class Calls:
    """Counts the calls of the functions in a folder, of all threads, and the depth of their frames."""

    def __init__(self, folder: Path) -> None:
        self._prefix = f"{folder}{os.sep}"
        self._places: dict[CodeType, str | None] = {}
        self._of_thread = threading.local()
        self.counts: Counter[str] = Counter()
        self.deepest: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Be told of an event of the interpreter; see `sys.setprofile`."""
        if event not in ("call", "return"):
            return
        place = self._place(frame.f_code)
        if place is None:
            return
        stack = self._of_thread.__dict__.setdefault("stack", [])
        if event == "return":
            del stack[-1:]
            return
        stack.append(place)
        self.counts[place] += 1
        if len(stack) > len(self.deepest):
            self.deepest = list(stack)

    def _place(self, code: CodeType) -> str | None:
        """Return file, line and name of a function of the folder, and None for all other code."""
        if code not in self._places:
            is_ours = code.co_filename.startswith(self._prefix) and code.co_flags & inspect.CO_OPTIMIZED
            is_ours = is_ours and code.co_name not in COMPREHENSIONS
            file = Path(code.co_filename).as_posix()[len(self._prefix) :]
            self._places[code] = f"{file}:{code.co_firstlineno} {code.co_qualname}" if is_ours else None
        return self._places[code]


def run_profiled(root: str, result: str, *arguments: str) -> None:
    """Run md3 of a checkout in this process with `arguments`; write what was called to the file `result`."""
    sys.path[0] = root  # in the place of this file's folder
    calls = Calls(Path(root) / PACKAGE)
    threading.setprofile(calls)
    sys.setprofile(calls)
    status: Any = 0
    try:
        from md3cli.__main__ import main

        sys.argv = ["md3", *arguments]
        main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    Path(result).write_text(json.dumps({"status": status, "counts": calls.counts, "deepest": calls.deepest}))


def picture(number: int) -> bytes:
    """Return a PNG with one disc to three; size, places and colours follow from the number, which is below 12."""
    width, height, radius = 320 + 4 * number, 200 + 9 * number, 34 + number
    middles = [(70 + 100 * disc, 70 + 35 * disc) for disc in range(1 + number // 4)]
    ground, colour = bytes((250 - 9 * number, 240, 200)), bytes((200, 10 + 15 * number, 40))
    rows = bytearray()
    for y in range(height):
        rows.append(0)  # no filter
        for x in range(width):
            rows += colour if any((x - a) ** 2 + (y - b) ** 2 < radius**2 for a, b in middles) else ground
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def called(root: Path, num_pictures: int) -> dict[str, Any]:
    """Run `md3 detect` over so many pictures, apart from the user's settings and caches; return what it called."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        for number in range(num_pictures):
            (folder / "pictures" / f"{number:02}.png").write_bytes(picture(number))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MD3_")}
        environment |= {key: f"{name}/{key}" for key in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME")}
        environment["OMP_NUM_THREADS"] = "1"
        md3 = ["detect", "pictures", "circle", "--model", "tiny", "--device", "cpu", "-o", "out.json"]
        command = [sys.executable, __file__, "--profiled", str(root), f"{name}/calls.json", *md3]
        done = subprocess.run(command, cwd=name, env=environment, capture_output=True, text=True)
        result = folder / "calls.json"
        if not result.exists() or json.loads(result.read_text())["status"]:
            sys.exit(f"md3 detect failed:\n{done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def trace_figures(root: Path) -> Iterator[Figure]:
    """Run md3 with few and with many pictures, twice each, and count the files of what it calls."""
    few = [called(root, FEW)["counts"] for _ in range(2)]
    runs = [called(root, MANY) for _ in range(2)]
    many = [run["counts"] for run in runs]
    functions = sorted({place for counts in many for place in counts})
    yield _counted("files run through", _files_of(functions))
    yield _counted("  functions", functions)
    more = [f for f in functions if min(c.get(f, 0) for c in many) > max(c.get(f, 0) for c in few)]
    yield _counted("files for each further picture", _files_of(more))
    yield _counted("  functions called for each", more)
    yield _counted("own call depth", max(runs, key=lambda run: len(run["deepest"]))["deepest"])


def _files_of(functions: Iterable[str]) -> list[str]:
    return sorted({function.partition(":")[0] for function in functions})


# The table.


def figures(root: Path, *, has_trace: bool) -> list[Figure]:
    """Return all rows for one checkout."""
    files = read_package(root)
    parts = [line_figures(files), density_figures(files), arrow_figures(files), docstring_figures(files)]
    if has_trace:
        parts.append(trace_figures(root))
    return [figure for part in parts for figure in part]


def base_checkout(base: str, root: Path, folder: Path) -> Path:
    """Return the checkout named by `base`; a revision of `root` is written to `folder` first."""
    if Path(base).is_dir():
        return Path(base).resolve()
    packed = subprocess.run(["git", "-C", str(root), "archive", base, PACKAGE], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def table(now: Sequence[Figure], base: Sequence[Figure] | None) -> str:
    """Return the figures as aligned text, one row each."""
    old = {figure.name: figure.value for figure in base or ()}
    rows = [["", *(["base"] if base else []), "now", *(["change"] if base else []), "no more than", "aim"]]
    for figure in now:
        change = [_number(old[figure.name])] if base else []
        change += [_number(figure.value)]
        change += [_percent(old[figure.name], figure.value)] if base else []
        rows.append([figure.name, *change, *LIMITS.get(figure.name, ("", ""))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def _number(value: float) -> str:
    return f"{value:,}"


def _percent(old: float, new: float) -> str:
    return f"{(new / old - 1) * 100:+.1f} %" if old else ""


def lists(found: Sequence[Figure]) -> str:
    """Return what was counted, a heading for each row that has something to list."""
    return "\n\n".join("\n  ".join([figure.name.strip(), *figure.items]) for figure in found if figure.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout that is looked at")
    parser.add_argument("--base", help="a checkout, or a revision of ROOT, to compare with")
    parser.add_argument("--trace", action="store_true", help="run md3 detect, too, and count what it calls")
    parser.add_argument("--list", action="store_true", help="name what was counted")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--docstrings", type=int, metavar="N", help="print N public docstrings and no table")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of docstrings")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    if arguments.docstrings is not None:
        print("\n".join(drawn_docstrings(read_package(root), arguments.docstrings, arguments.seed)))
        return
    now, base = figures(root, has_trace=arguments.trace), None
    if arguments.base:
        with tempfile.TemporaryDirectory() as folder:
            base = figures(base_checkout(arguments.base, root, Path(folder)), has_trace=arguments.trace)
    if arguments.json:
        columns = {"now": now, "base": base or []}
        print(json.dumps({key: [asdict(figure) for figure in column] for key, column in columns.items()}))
        return
    print(table(now, base))
    if arguments.list:
        print(f"\n{lists(now)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--profiled"]:
        run_profiled(*sys.argv[2:])
    else:
        main()
