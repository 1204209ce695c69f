"""run.json of a run folder: how the latest start runs it, for workers on any machine; and who started it when.

Unlike the plan it may change from start to start: device, batch size and the like are no part of a record.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from md3cli import __version__
from md3cli.config import DecodeOptions, ModelOptions
from md3cli.errors import InputError
from md3cli.records import printable
from md3cli.scale.layout import RUN, STARTS, RunFolder, host_name, new_attempt

RUN_SCHEMA = "md3-run-folder/1"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a worker needs beside the plan."""

    model: ModelOptions
    decode: DecodeOptions

    def to_json(self) -> dict[str, Any]:
        model = asdict(self.model)
        model["cache_dir"] = None if self.model.cache_dir is None else os.path.abspath(self.model.cache_dir)
        return {"model": model, "decode": asdict(self.decode)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunOptions:
        """Raises TypeError, KeyError: it is none of ours."""
        model = {field.name: document["model"][field.name] for field in fields(ModelOptions)}
        if model["cache_dir"] is not None:
            model["cache_dir"] = Path(model["cache_dir"])
        decode: dict[str, Any] = dict(document["decode"])
        decode |= {name: tuple(value) for name, value in decode.items() if isinstance(value, list)}
        return cls(ModelOptions(**model), DecodeOptions(**decode))


def write_run_options(folder: RunFolder, options: RunOptions, argv: tuple[str, ...]) -> None:
    """Note how this start runs the plan, in the place of what the start before noted."""
    document = {
        "schema": RUN_SCHEMA,
        "md3": __version__,
        "python": sys.version.split()[0],
        "arguments": [printable(argument) for argument in argv],
        **options.to_json(),
    }
    folder.store.put(RUN, (json.dumps(document, indent=1) + "\n").encode())


def read_run_options(folder: RunFolder) -> RunOptions:
    """How the latest start runs the plan.

    Raises:
        InputError: there is no run.json, or none of this version.
    """
    try:
        return RunOptions.from_json(json.loads(folder.store.read(RUN) or b""))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{printable(folder.uri)}/{RUN} is missing or of another version of md3") from error


class StartNote:
    """A file of its own for every start, so that processes on many machines never write the same one."""

    def __init__(self, folder: RunFolder, facts: Mapping[str, Any]) -> None:
        self._folder, self._name = folder, f"{STARTS}/{new_attempt()}.json"
        self._document = {"started": _now(), "host": host_name(), "pid": os.getpid(), **facts}
        self._put()

    def end(self, status: int, facts: Mapping[str, Any]) -> None:
        """Note how it ended."""
        self._document |= {"ended": _now(), "exit_status": status, **facts}
        self._put()

    def _put(self) -> None:
        self._folder.store.put(self._name, (json.dumps(self._document, indent=1) + "\n").encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
