"""Overlays drawn while the run goes on, so that little is left to do at its end.

What is drawn early is exactly what the export would draw, because the export alone decides. A drawing lies in a folder
beside OUT under a digest of all that it depends on: what the shown records found, the styles of their labels, the
picture's file (path, place in it, size, time of change, inode), and how it is encoded. The export goes through the
records as always, asks for the drawing of each digest, and draws what it does not find: pictures whose records came in
several stretches, were retried or added to, whose labels got another place in the order, or whose file has changed
since. It alone names files and puts them in OUT, whole or not at all; a kill leaves a folder that the next start
removes, and costs the drawings only.

The work is done by child processes with the lowest priority: drawing in threads would take the interpreter's lock from
the loop that feeds a GPU. A run never waits for them; what they have no time for is left to the end. Memory is bounded
by the pictures that wait for a child.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from md3cli.child import MAX_MESSAGE_BYTES, Child, connect
from md3cli.errors import EngineError
from md3cli.exporters import ExportOptions
from md3cli.exporters.grouping import ImageGroup, Survey
from md3cli.exporters.palette import palette
from md3cli.exporters.pictures import Pictures
from md3cli.files import temp_beside
from md3cli.records import RecordDict, compact_json
from md3cli.refine.collection import Collection
from md3cli.refine.refinement import refined
from md3cli.system import num_cores

CORES_A_CHILD = 4
MOST_CHILDREN = 4
MOST_WAITING = 32  # pictures that wait for a child; more are left to the end
UNTIL_WORTH_IT = 16  # pictures of a run that are not drawn early: a child takes as long to start
MOST_RECORDS = 1000  # of a picture that is drawn early
_TOLD = ("background", "is_confined", "max_pixels", "max_file_size")  # of the options, what a child needs


class EarlyDrawings:
    """Children that draw pictures of a run as their records are written; a context, which ends them.

    `folder` holds the drawings, each under its `overlay.drawing_name`.
    """

    def __init__(self, records: Path, out: Path, options: ExportOptions) -> None:
        """Begin for the overlay `out` of the run whose `records` file (with its run.json) is being written."""
        self.folder = temp_beside(out)
        self._start = {"records": str(records), "root": str(options.root), "folder": str(self.folder)}
        self._options = {name: getattr(options, name) for name in _TOLD}
        self._waiting: queue.Queue[list[RecordDict] | None] = queue.Queue(MOST_WAITING)
        self._held: list[RecordDict] = []  # of the picture whose records come now
        self._threads: list[threading.Thread] = []
        self._is_over = threading.Event()
        self._num_offered = 0

    def __enter__(self) -> EarlyDrawings:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def num_children(self) -> int:
        """How many children draw now; 0 before there is enough to draw, and after `stop`."""
        return len(self._threads)

    def add(self, records: Iterable[RecordDict]) -> None:
        """Take records that were written, in order; those of a picture are drawn once the next one's come."""
        for record in records:
            if self._held and _picture_of(self._held[0]) != _picture_of(record):
                self._offer(self._held)
                self._held = []
            if record["error"] is None and record["image"] is not None:
                self._held.append(record)

    def _offer(self, records: list[RecordDict]) -> None:
        self._num_offered += 1
        if self._num_offered <= UNTIL_WORTH_IT or len(records) > MOST_RECORDS:
            return
        if not self._threads:
            self._begin()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(records)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(max(1, min(MOST_CHILDREN, num_cores() // CORES_A_CHILD))):
            thread = threading.Thread(target=self._serve, name="early drawings", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self) -> None:
        """Hand pictures to one child, until all is over or it is gone; a drawing that is lost is made at the end."""
        try:
            child = Child("md3cli.exporters.early:draw_for_parent")
        except (EngineError, OSError):  # a system without sockets for children, or without room for one
            return
        with child, contextlib.suppress(EOFError, OSError, TimeoutError):
            child.channel.send(self._start | {"options": self._options})
            while (records := self._waiting.get()) is not None and not self._is_over.is_set():
                message = {"records": records}
                if len(compact_json(message)) < MAX_MESSAGE_BYTES // 2:  # the wire writes in ASCII, which is longer
                    child.channel.send(message)
                    child.channel.receive(None)

    def stop(self) -> None:
        """Wait until what is with the children is drawn; what waits for them is left to the end."""
        self._is_over.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def _picture_of(record: RecordDict) -> tuple[Any, Any]:
    return record["image"], record.get("image_b64")


def draw_for_parent() -> None:
    """Draw what the parent sends, until it is gone; the child's entry."""
    channel = connect()
    if hasattr(os, "nice"):
        os.nice(19)
    with contextlib.suppress(EOFError, OSError):
        start = channel.receive(None)
        drawer = _Drawer(start)
        while True:
            drawer.draw(channel.receive(None)["records"])
            channel.send({})


class _Drawer:
    """The child's side: draws pictures as the export at the end of the run will."""

    def __init__(self, start: dict[str, Any]) -> None:
        options = ExportOptions(root=Path(start["root"]), **start["options"])
        records = Collection.of([Path(start["records"])])
        self._refinement, self._folder = records.refinement, Path(start["folder"])
        self._options, self._pictures = options, Pictures(records, options)
        survey = Survey(records.refinement.labels, records.classes, records.refinement.has_file)
        self._styles = dict(palette(survey.in_order()))

    def draw(self, records: list[RecordDict]) -> None:
        """Draw one picture; what cannot be drawn is left to the export, which says why."""
        from md3cli.exporters.overlay import drawing_name, drawn_file  # Pillow, which the parent does not need

        shown = refined(records, self._refinement)
        sized = next((record for record in shown if "width" in record), None)
        if sized is None:
            return
        size = int(sized["width"]), int(sized["height"])
        group = ImageGroup(sized["image"], sized.get("image_b64"), *size, shown)
        picture = self._pictures.find(group.picture_record)
        if picture is None:
            return
        name = drawing_name(group, picture, self._styles, self._options.background)
        content = None if name is None else drawn_file(group, picture, self._pictures, self._styles)
        if name is not None and content is not None:
            temp = self._folder / f"{name}.new"
            temp.write_bytes(content)
            os.replace(temp, self._folder / name)  # whole or not at all, whenever this child is ended
