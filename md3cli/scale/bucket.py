"""OUTPUT in a bucket: its files are made in a folder of this machine, and put into the bucket once they are whole.

The records themselves go to the run folder in the bucket as they are committed; what is made here is made of them,
can be made again anywhere, and is gone when the program ends.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from md3cli.config import OutputOptions
from md3cli.files import scratch_folder
from md3cli.records import printable
from md3cli.remote.address import folder_of
from md3cli.run.output import OutputPlan, written_paths
from md3cli.run.run_info import OutputPaths
from md3cli.scale.folder import RunFolder
from md3cli.scale.store import LocalStore, ObjectStore


@contextlib.contextmanager
def in_local_folder(output: OutputOptions) -> Iterator[OutputOptions]:
    """Give an OUTPUT at an address a path on this machine, for as long as the program writes it."""
    assert output.path is not None
    with tempfile.TemporaryDirectory(prefix="output-", dir=scratch_folder()) as made:
        yield replace(output, path=Path(made) / output.path.name)


class Deliveries:
    """Carries OUTPUT's files between this machine and a bucket; for an OUTPUT on this machine it carries nothing.

    `lock` is the file to lock for a run, `output` how a user names what is locked.
    """

    def __init__(self, output: OutputOptions, files: OutputPaths, folder: RunFolder) -> None:
        """`files` are OUTPUT's on this machine, `folder` is the run folder."""
        self._bucket: ObjectStore | None = None
        self.lock, self.output = files.lock, str(files.journal)
        if output.address is None or isinstance(folder.store, LocalStore):
            return
        is_folder = files.run_info.parent == output.path
        self._here = files.run_info.parent
        self._bucket = ObjectStore(output.address if is_folder else folder_of(output.address))
        self.output = output.address
        # Keeps a second run of this machine out; of other machines nobody knows, and the markers decide.
        self.lock = folder.wip.root.with_name(f"{folder.wip.root.name}.lock")

    def _name(self, path: Path) -> str:
        return path.relative_to(self._here).as_posix()

    def address_of(self, path: Path) -> str:
        """Return how a user names one of OUTPUT's files."""
        return str(path) if self._bucket is None else f"{self._bucket.uri}/{self._name(path)}"

    def has(self, path: Path) -> bool:
        """Return whether OUTPUT has such a file."""
        return path.is_file() if self._bucket is None else self._bucket.has(self._name(path))

    def fetch(self, path: Path) -> None:
        """Copy a file of OUTPUT to this machine, unless it is here already or nowhere."""
        if self._bucket is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._bucket.download(self._name(path), path)

    def deliver(self, path: Path) -> None:
        """Copy a file or folder that was made here to OUTPUT, and remove there what is not in the folder here."""
        if self._bucket is None or not path.exists():
            return
        if not path.is_dir():
            self._bucket.upload(path, self._name(path))
            return
        files = {self._name(file): file for file in path.rglob("*") if file.is_file()}
        for name, file in files.items():
            self._bucket.upload(file, name)
        for name in self._bucket.names_below(self._name(path)):
            if name not in files:  # of an earlier start
                self._bucket.remove(name)

    def remove(self, path: Path) -> None:
        """Remove a file of OUTPUT, here and there."""
        path.unlink(missing_ok=True)
        if self._bucket is not None:
            self._bucket.remove(self._name(path))

    def written(self, outputs: OutputPlan) -> list[str]:
        """Return what a finished run has written, as a user names it."""
        if self._bucket is None or outputs.files is None:
            return written_paths(outputs)
        made = [document.path for document in outputs.documents if document.path.exists()]
        return [printable(self.address_of(path)) for path in (*made, outputs.files.journal)]
