"""What holds for the columns of every manifest, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable

from md3cli.errors import InputError
from md3cli.records import printable


def refuse_doubles(columns: Iterable[str], name: str) -> None:
    """Raise InputError where the manifest `name` has a column twice: which of the two counts cannot be told."""
    seen = set()
    for column in columns:
        if column in seen:
            raise InputError(f"the manifest {name} names the column '{printable(column)[:100]}' twice; rename one")
        seen.add(column)
