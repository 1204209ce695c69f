"""Walking a remote folder: the same order, suffixes and globs as on a disk."""

from __future__ import annotations

from dataclasses import dataclass, field

from md3cli.errors import ImageError, InputError
from md3cli.records import printable
from md3cli.remote.address import path_of, shown
from md3cli.remote.reading import Reader, explain
from md3cli.walk import Entry, Walk, natural_sorted

MOST_LEVELS = 200  # of folders: a web server whose pages lead in a circle shows ever deeper ones


@dataclass(slots=True)
class RemoteWalk(Walk):
    """A walk below an address. A folder that cannot be listed ends it: silence would lose what is in there."""

    reader: Reader = field(kw_only=True)

    def entries(self, path: str) -> list[Entry]:
        """The entries of a folder in natural order.

        Raises:
            InputError: it cannot be listed; tried several times. Or it lies deeper than any folder can be meant to.
        """
        if path_of(path).count("/") > MOST_LEVELS:
            raise InputError(
                f"{printable(shown(path))[:200]}... lies more than {MOST_LEVELS} folders deep; where they lead in a "
                "circle leave that one out with --exclude, or use --no-recursive"
            )
        try:
            found = self.reader.entries(path)
        except ImageError as error:
            raise InputError(f"cannot list {explain(path, error)}") from error
        kinds: dict[str, set[bool]] = {}
        for entry in found:
            kinds.setdefault(entry.name, set()).add(entry.is_folder)
        kinds.pop("", None)  # the object that stands for the folder itself, or one below `//`
        names = natural_sorted(list(kinds))
        return [Entry(name, is_folder, False) for name in names for is_folder in sorted(kinds[name])]

    def is_own(self, folder: str) -> bool:
        return False  # md3 makes no exports in buckets

    def is_run_folder(self, folder: str) -> bool:
        return False

    def is_meant_as_file(self, root: str, path: str, entry: Entry) -> bool:
        return False
