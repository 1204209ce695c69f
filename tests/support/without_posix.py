"""Hide from md3cli what Windows lacks, and from nobody else: other packages see the modules as they are.

    python without_posix.py [--no-sockets] SCRIPT ARGUMENTS

runs a script that way. Child interpreters of md3cli are told to hide the same. `--no-sockets` hides Unix sockets as
well, without which no child can be spoken to.
"""

from __future__ import annotations

import builtins
import runpy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = frozenset({"fcntl", "resource"})
NAMES: Mapping[str, frozenset[str]] = {
    "os": frozenset(
        {"O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_NOFOLLOW", "O_DIRECTORY", "fdatasync", "pread", "pwrite"}
        | {"posix_fadvise", "sched_getaffinity", "getuid", "getpgid", "killpg", "setsid", "fork"}
    ),
    "signal": frozenset({"SIGHUP", "SIGKILL", "SIGSTOP"}),
    "socket": frozenset(),
}
SOCKETS = frozenset({"AF_UNIX"})


class Poorer(ModuleType):
    """A module without some of its names."""

    def __init__(self, module: ModuleType, hidden: frozenset[str]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update({name: value for name, value in vars(module).items() if name not in hidden})


def hide(hidden_sockets: Iterable[str] = ()) -> None:
    """Let every import of md3cli from now on meet what Windows has."""
    real = builtins.__import__
    poorer: dict[str, ModuleType] = {}

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        importer = (globals or {}).get("__name__", "")
        if importer.partition(".")[0] != "md3cli":
            return real(name, globals, locals, fromlist, level)
        if name in MODULES:
            raise ImportError(f"{name} is hidden from {importer}")
        found = real(name, globals, locals, fromlist, level)
        if name in NAMES and name not in poorer:
            poorer[name] = Poorer(found, NAMES[name] | (frozenset(hidden_sockets) if name == "socket" else frozenset()))
        return poorer.get(name, found)

    builtins.__import__ = import_
    _hide_from_children()


def _hide_from_children() -> None:
    from md3cli import child

    begin, code_of = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})", child.code_of

    def code_that_hides(entry: str) -> str:
        is_hiding = "import without_posix; without_posix.hide()"
        return f"{begin}; import json; sys.path += json.loads(sys.argv[1]); {is_hiding}; {code_of(entry)}"

    child.code_of = code_that_hides


def main() -> None:
    del sys.argv[0]
    hidden = SOCKETS if sys.argv[0] == "--no-sockets" else frozenset()
    if hidden:
        del sys.argv[0]
    hide(hidden)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
