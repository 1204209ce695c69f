"""A start over: what stood in OUTPUT stays until the first new record, and comes back where there is none.

The former run folder is renamed while the new one is made in its place, so that it comes back by a rename whatever
ends this start, a kill included: then the next start finds it. In a bucket nothing can be renamed; there only a
records file that was exported stays.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from md3cli.early import SUFFIX as EARLY_SUFFIX
from md3cli.exporters.leftovers import remove_leftovers
from md3cli.outputs import OutputPlan
from md3cli.publish import output_error
from md3cli.run_info import RunDocument
from md3cli.scale.bucket import Deliveries
from md3cli.scale.choosing import discard, former_of, remove_run
from md3cli.scale.layout import RunFolder, open_run_folder
from md3cli.scale.store import LocalStore

_GOING_SUFFIX = "-next"  # what stands there is thrown away by any start


class FormerRun:
    """The run that was in OUTPUT before; for the one process that holds OUTPUT's lock."""

    def __init__(self, folder: RunFolder, outputs: OutputPlan, deliveries: Deliveries) -> None:
        self._folder, self._outputs, self._deliveries = folder, outputs, deliveries
        self._aside = former_of(folder)
        self._is_waiting = False

    def set_aside(self) -> None:
        """Make room for a new run folder.

        Raises:
            OutputError: nothing can be renamed there.
        """
        self.put_back()
        self._is_waiting = True
        if self._aside is None or not isinstance(self._folder.store, LocalStore):
            discard(self._folder)
        elif self._folder.store.root.is_dir():
            self._rename(self._folder.store.root, self._aside)
        else:  # an empty folder says as well that the new one is not to stay yet
            self._aside.mkdir(parents=True)

    def put_back(self) -> None:
        """Take what was set aside back in its place, unless it has given way; the new folder goes."""
        if self._is_waiting or (self._aside is not None and self._aside.is_dir()):
            self._is_waiting = False
            remove_run(self._folder)
            if self._aside is not None and isinstance(self._folder.store, LocalStore) and self._aside.is_dir():
                self._rename(self._aside, self._folder.store.root)
                with contextlib.suppress(OSError):  # not empty: there was a run folder
                    self._folder.store.root.rmdir()

    def give_way(self, document: RunDocument | None) -> None:
        """Remove the former run, now that there are new records; `document` is the new run.json."""
        if not self._is_waiting:
            return
        self._is_waiting = False
        files = self._outputs.files
        assert files is not None
        if self._aside is not None:  # first, by one rename: from here on the new run folder counts
            going = open_run_folder(self._folder.uri + _GOING_SUFFIX)
            remove_run(going)
            assert isinstance(going.store, LocalStore)
            self._rename(self._aside, going.store.root)
            remove_run(going)
        remove_leftovers(files.run_info, [each.path for each in self._outputs.documents])
        if document is not None:
            document.release()
            self._deliveries.deliver(files.run_info)
        for path in (files.journal, files.journal.with_name(files.journal.name + EARLY_SUFFIX)):
            self._deliveries.remove(path)

    def _rename(self, source: Path, target: Path) -> None:
        try:
            source.rename(target)
        except OSError as error:
            raise output_error(target, error) from error
