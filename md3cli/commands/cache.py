"""`md3 cache`: look at, shrink and empty the encoding cache, and compiled code beside it. No model, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from md3cli.commands.help import App
from md3cli.commands.parse import checked, parse_bytes, parse_folder
from md3cli.file_cache import COMPILED, CacheInfo, FileCache
from md3cli.files import remove_folder
from md3cli.records import printable
from md3cli.settings import user_cache_dir

_EARLIER = "inductor"  # of the cache folder: compiled code of earlier versions

app = App(
    help="The encoding cache: image embeddings kept on disk, so that other prompts to the same pictures are cheap.",
    no_args_is_help=True,
)

CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        parser=checked(parse_folder),
        help="Folder of the cache; default: the user's own.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a line of text.")]


@app.command("info")
def info(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Where the cache is and how much it holds.

    Examples:
        md3 cache info
    """
    _tell("holds", [cache.info() for cache in _open(cache_dir)], as_json)


@app.command("prune")
def prune(
    size: Annotated[int, typer.Option(parser=parse_bytes, metavar="SIZE", help="Keep about this much: 5G, 500M.")],
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Remove what was not used for the longest time.

    Examples:
        md3 cache prune --size 5G
    """
    _tell("removed", [cache.prune(size) for cache in _open(cache_dir)], as_json)


@app.command("clear")
def clear(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Remove everything.

    Examples:
        md3 cache clear
    """
    removed = [cache.clear() for cache in _open(cache_dir)]
    remove_folder(removed[0].path.parent / _EARLIER)
    _tell("removed", removed, as_json)


def _open(cache_dir: Path | None) -> list[FileCache]:
    """Return the caches of a folder: of encodings, and of compiled code where there is any."""
    root = cache_dir or user_cache_dir()
    caches = [FileCache(root, limit_bytes=0)]
    if (root / COMPILED).is_dir():
        caches.append(FileCache(root, limit_bytes=0, folder=COMPILED))
    return caches


def _tell(verb: str, facts: list[CacheInfo], as_json: bool) -> None:
    encodings, *compiled = facts
    if as_json:
        line = {"path": str(encodings.path), "files": encodings.num_files, "bytes": encodings.num_bytes, "what": verb}
        line["compiled_bytes"] = sum(code.num_bytes for code in compiled)
        typer.echo(json.dumps(line))
        return
    for found, what in zip(facts, ("encodings", "files of compiled code"), strict=False):
        place, size = printable(str(found.path)), f"{found.num_bytes / 1e6:,.1f} MB"
        typer.echo(f"{place}: {verb} {found.num_files:,} {what}, {size}")
