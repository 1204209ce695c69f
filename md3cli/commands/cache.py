"""`md3 cache`: look at, shrink and empty the encoding cache. No model, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from md3cli.commands.help import App
from md3cli.commands.parse import checked, parse_bytes, parse_folder
from md3cli.file_cache import CacheInfo, FileCache
from md3cli.records import printable
from md3cli.settings import user_cache_dir

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
    _tell("holds", _open(cache_dir).info(), as_json)


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
    _tell("removed", _open(cache_dir).prune(size), as_json)


@app.command("clear")
def clear(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Remove everything.

    Examples:
        md3 cache clear
    """
    _tell("removed", _open(cache_dir).clear(), as_json)


def _open(cache_dir: Path | None) -> FileCache:
    return FileCache(cache_dir or user_cache_dir(), limit_bytes=0)


def _tell(verb: str, facts: CacheInfo, as_json: bool) -> None:
    if as_json:
        line = json.dumps({"path": str(facts.path), "files": facts.num_files, "bytes": facts.num_bytes, "what": verb})
    else:
        line = f"{printable(str(facts.path))}: {verb} {facts.num_files:,} encodings, {facts.num_bytes / 1e6:,.1f} MB"
    typer.echo(line)
