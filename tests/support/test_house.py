"""The counts of house.py, on invented packages of a few lines."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import house
import pytest
from house import Figure, SourceFile, figures, read_package
from PIL import Image

Write = Callable[..., Path]


@pytest.fixture
def checkout(tmp_path: Path) -> Write:
    """A function that writes a package and returns its checkout; `a__b="..."` is the file a/b.py."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            path = tmp_path / "md3cli" / (re.sub(r"(?<=[a-z])__(?=[a-z_])", "/", name) + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        return tmp_path

    return write


def rows(root: Path) -> Mapping[str, Figure]:
    return {figure.name: figure for figure in figures(root, has_trace=False)}


def counted(root: Path, name: str) -> list[str]:
    """What a row counts, its number checked."""
    row = rows(root)[name]
    assert row.value == len(row.items)
    return list(row.items)


def test_every_line_has_one_kind(checkout: Write) -> None:
    root = checkout(
        a='''\
        """Two lines

        and a blank one."""
        from os import (
            path,
            sep,
        )

        # A comment.
        NAME = 1  # behind code

        TEXT = """
        # no comment

        """


        class A:
            """Doc."""

            def f(self):
                """Doc."""
                import sys  # lazy
                return sys
        ''',
        b="",
    )
    found = rows(root)
    kinds = {"  docstring": 5, "  import": 5, "  comment": 1, "  code": 8, "  blank": 5}
    assert {name: found[name].value for name in kinds} == kinds
    assert found["lines"].value == 24
    assert found["files"].value == 2


def test_a_last_line_without_its_end_is_a_line() -> None:
    assert len(SourceFile("a.py", "A = 1\nB = 2").lines) == len(SourceFile("a.py", "A = 1\nB = 2\n").lines) == 2
    assert SourceFile("a.py", "").lines == []


@pytest.mark.process
def test_long_and_short_files(checkout: Write) -> None:
    root = checkout(a="A = 1\n" * 801, b="A = 1\n" * 800, c="A = 1\n" * 500, d="A = 1\n" * 60, e="A = 1\n" * 59)
    assert counted(root, "files of more than 800 lines") == ["a.py: 801"]
    assert counted(root, "files of more than 500 lines") == ["a.py: 801", "b.py: 800"]
    assert counted(root, "files of fewer than 60 lines") == ["e.py: 59"]


def test_long_functions(checkout: Write) -> None:
    def function(name: str, length: int) -> str:
        return f"@decorated\ndef {name}():\n" + "    pass\n" * (length - 1)

    root = checkout(a=function("long", 81) + function("longer", 80) + function("short", 40))
    assert counted(root, "functions of more than 80 lines") == ["a.py:2 long: 81"]
    assert [item.split()[1] for item in counted(root, "functions of more than 40 lines")] == ["long:", "longer:"]


def test_density_leaves_out_what_is_no_code(checkout: Write) -> None:
    text = '"""A docstring that is long."""\nimport os\n\nAB = 1  # why\nif AB:\n    CD = (\n        2\n    )\n'
    found = rows(checkout(a=text))
    assert found["characters a code line"].value == round((8 + 6 + 6 + 1 + 1) / 5, 3)  # 8: two blanks stay
    assert found["statements a code line"].value == 3 / 5
    assert found["longest line"] == Figure("longest line", 31, ["a.py:1"])


def test_crowded_lines(checkout: Write) -> None:
    text = """\
    A = 1; B = 2
    if A: B = 3
    if B:
        A = 2
    elif A:
        A = 3
    else: A = 4
    class C: ...
    class D: E = 5
    @staticmethod
    def f():
        return "a; b"
    """
    root = checkout(a=text)
    assert counted(root, "statements behind another on their line") == ["a.py:1", "a.py:2", "a.py:7", "a.py:9"]


def test_single_importers(checkout: Write) -> None:
    root = checkout(
        lonely="",
        once="",
        lazy="",
        twice="",
        typing_only="",
        by_name="",
        room____init__="",
        room__inside="from . import beside\n",
        room__beside="",
        a="""\
        from typing import TYPE_CHECKING
        from md3cli import once, twice
        from md3cli.room.inside import name
        from md3cli import absent
        if TYPE_CHECKING:
            from md3cli import typing_only
        else:
            import md3cli.lonely
        """,
        b="""\
        import md3cli.twice
        from md3cli import once_more
        def f():
            from md3cli.lazy import name
            from md3cli.lazy import other
        """,
    )
    assert counted(root, "files with a single importer") == [
        "lazy.py <- b.py",
        "lonely.py <- a.py",
        "once.py <- a.py",
        "room/beside.py <- room/inside.py",
        "room/inside.py <- a.py",
    ]


def test_a_room_is_imported_for_its_own_names_alone(checkout: Write) -> None:
    root = checkout(room____init__="name = 1\n", room__module="", a="from md3cli.room import module\n")
    assert counted(root, "files with a single importer") == ["room/module.py <- a.py"]
    checkout(a="from md3cli.room import name\n")
    assert counted(root, "files with a single importer") == ["room/__init__.py <- a.py"]


def test_circles(checkout: Write) -> None:
    root = checkout(a="from md3cli import b\n", b="from md3cli import c\n", c="def f():\n    from md3cli import a\n")
    assert counted(root, "import circles") == []
    assert counted(root, "  counting lazy imports") == ["a.py <-> b.py <-> c.py"]
    checkout(c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from md3cli import a\n")
    assert counted(root, "  counting lazy imports") == []
    checkout(c="try:\n    from md3cli import a\nexcept ImportError:\n    a = None\n")
    assert counted(root, "import circles") == ["a.py <-> b.py <-> c.py"]


def test_arrows_that_run_back_up(checkout: Write) -> None:
    root = checkout(
        up__a="from md3cli.down import one, two\n",
        up__b="from md3cli.down import one\nfrom md3cli.up import a\n",
        down__one="",
        down__two="from md3cli.up import b\n",
        other="from md3cli.up import a\n",
    )
    assert counted(root, "import circles") == ["down/two.py <-> up/a.py <-> up/b.py"]
    assert counted(root, "arrows that run back up") == ["down/two.py -> up/b.py"]
    assert counted(root, "folders in a circle") == ["down", "up"]
    checkout(down__two="def f():\n    from md3cli.up import b\n")
    assert counted(root, "arrows that run back up") == counted(root, "folders in a circle") == []


def test_rooms_in_a_circle_of_three(checkout: Write) -> None:
    root = checkout(x__a="import md3cli.y.a\n", y__a="import md3cli.root\n", root="import md3cli.x.b\n", x__b="")
    assert counted(root, "arrows that run back up") == counted(root, "import circles") == []
    assert counted(root, "folders in a circle") == ["x", "y"]


def test_shims(checkout: Write) -> None:
    imports = '"""Doc."""\nfrom os import path\n__all__ = ["path"]\n'
    root = checkout(
        shim=imports, face=imports + "A = 1\n", original=imports, room____init__=imports, empty='"""D."""\n'
    )
    assert counted(root, "files of imports only") == ["shim.py"]


def test_libraries_in_their_places(checkout: Write) -> None:
    allowed = {"model__a": "torch", "bench__a": "torch", "model__hf__a": "peft", "cli": "typer", "console__a": "rich"}
    texts = {name: f"import {library}\n" for name, library in allowed.items()}
    root = checkout(**texts, typed="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n")
    assert counted(root, "third-party imports out of place") == []
    checkout(source="def f():\n    from torch.nn import Linear\n", model__b="import transformers.utils\n")
    checkout(commands__a="import tqdm\nimport typer\nimport torchless\n", bench__b="import triton\n")
    assert counted(root, "third-party imports out of place") == [
        "bench/b.py:1 triton",
        "commands/a.py:1 tqdm",
        "model/b.py:1 transformers",
        "source.py:2 torch",
    ]


def test_docstrings(checkout: Write) -> None:
    body = "    pass\n" * 11
    long = f"def bare():\n{body}    pass\n"
    short = f"def short():\n{body}"
    private = long.replace("bare", "_bare")
    method = textwrap.indent(long, "    ").replace("bare()", "method(self)")
    told = 'class Told:\n    """About it."""\n    def f(self):\n        """Do it."""\n'
    root = checkout(a=f'"""A file."""\n{long}{short}{private}class _A:\n{method}class B:\n{method}', b=told)
    assert rows(root)["public docstrings"].value == 3
    bare = [item.split()[1] for item in counted(root, "public functions without a docstring")]
    assert bare == ["bare", "B.method"]
    drawn = list(house.drawn_docstrings(read_package(root), 30, seed=1))
    assert drawn == [
        "md3cli/a.py\n    A file.\n",
        "md3cli/b.py:1 Told\n    About it.\n",
        "md3cli/b.py:3 Told.f\n    Do it.\n",
    ]
    two = [list(house.drawn_docstrings(read_package(root), 2, seed)) for seed in range(20)]
    assert two[0] == list(house.drawn_docstrings(read_package(root), 2, seed=0))
    assert any(draw != two[0] for draw in two)


MAIN = """\
import threading
from md3cli import deep, never

def main():
    status = deep.three(2)
    threading.Thread(target=deep.in_thread).start()
    raise SystemExit(status)
"""
DEEP = """\
def three(n):
    return three(n - 1) if n else sum(x for x in [0])

def in_thread():
    list(map(str, [1]))

def per_picture(pictures):
    for _ in pictures:
        each()

def each():
    pass
"""


@pytest.mark.process
def test_calls_are_counted_in_all_threads(checkout: Write, tmp_path: Path) -> None:
    never = "class A:\n    B = [x for x in range(3)]\n\ndef f():\n    pass\n"
    root = checkout(__init__="", __main__=MAIN, deep=DEEP, never=never)
    command = [sys.executable, house.__file__, "--profiled", str(root), str(tmp_path / "calls.json")]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "calls.json").read_text())
    assert found["status"] == 0
    assert found["counts"] == {"__main__.py:4 main": 1, "deep.py:1 three": 3, "deep.py:4 in_thread": 1}
    assert found["deepest"] == ["__main__.py:4 main", *["deep.py:1 three"] * 3]


@pytest.mark.process
def test_files_of_what_is_called_more_often(checkout: Write) -> None:
    main = "import os\nfrom md3cli.deep import per_picture\n\ndef main():\n    per_picture(os.listdir('pictures'))\n"
    root = checkout(__init__="", __main__=main, deep=DEEP)
    found = {figure.name: figure.items for figure in house.trace_figures(root)}
    assert found == {
        "files run through": ["__main__.py", "deep.py"],
        "  functions": ["__main__.py:4 main", "deep.py:11 each", "deep.py:7 per_picture"],
        "files for each further picture": ["deep.py"],
        "  functions called for each": ["deep.py:11 each"],
        "own call depth": ["__main__.py:4 main", "deep.py:7 per_picture", "deep.py:11 each"],
    }


@pytest.mark.process
def test_a_run_that_fails_gives_no_figures(checkout: Write) -> None:
    root = checkout(__init__="", __main__="def main():\n    raise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="md3 detect failed"):
        list(house.trace_figures(root))


@pytest.mark.process
def test_pictures_differ_and_can_be_read(tmp_path: Path) -> None:
    pictures = [house.picture(number) for number in range(house.MANY)]
    assert len(set(pictures)) == house.MANY
    for number, data in enumerate(pictures):
        (tmp_path / "a.png").write_bytes(data)
        with Image.open(tmp_path / "a.png") as image:
            colours = image.getcolors() or []
        assert image.size == (320 + 4 * number, 200 + 9 * number)
        assert len(colours) == 2


def house_py(*arguments: str | Path) -> str:
    command = [sys.executable, house.__file__, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.process
def test_the_table_compares_with_a_revision(checkout: Write) -> None:
    root = checkout(a="A = 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=A", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *arguments], check=True)
    checkout(a="A = 1234\nB = 2\n")
    lines = house_py("--root", root, "--base", "HEAD", "--list").splitlines()
    assert lines[0].split() == ["base", "now", "change", "no", "more", "than", "aim"]
    assert lines[1].split() == ["lines", "1", "2", "+100.0", "%", "28,000", "25,500"]
    assert "characters a code line 5.0 6.5 +30.0 % +6 % +6 %" in [" ".join(line.split()) for line in lines]
    assert lines[lines.index("files of fewer than 60 lines") + 1] == "  a.py: 2"
    assert house_py("--root", root, "--base", root).splitlines()[1].split()[1:5] == ["2", "2", "+0.0", "%"]


@pytest.mark.process
def test_json(checkout: Write) -> None:
    found = json.loads(house_py("--root", checkout(a="A = 1\n"), "--json"))
    assert found["now"][0] == {"name": "lines", "value": 1, "items": []}
    assert found["base"] == []


@pytest.mark.process
def test_this_checkout_can_be_counted() -> None:
    """Every row has its limit under its own name."""
    found = rows(house.ROOT)
    traced = {"files run through", "files for each further picture", "own call depth"}
    assert set(house.LIMITS) - traced <= set(found)
    assert found["lines"].value > 10_000
