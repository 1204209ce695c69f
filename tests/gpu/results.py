"""What was found so far, kept in results.json: written whole by renaming, so that it can be read at any time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from .children import Line
from .goals import judged
from .options import Options
from .predictions import card_of, prediction_of, predictions

OK, FAILED, SKIPPED, NOT_MEASURED = "ok", "failed", "skipped", "not measured"
WRITE_EVERY_S = 1.0


class Results:
    """results.json of one run.

    `data` is what is written: `card`, `torch`, whatever else the facts say, and for each part its status, its
    figures `{value, prediction, unit}` (value null: predicted and not reached), and what it noted. At full size on
    CUDA `goals` says which of them were reached.
    """

    def __init__(self, options: Options, part_names: Sequence[str]) -> None:
        self.options = options
        self.path = options.out / "results.json"
        self.data: dict[str, Any] = {
            "card": "unknown",
            "torch": _version("torch"),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "device": options.device,
            "config": options.config,
            "command": list(options.command),
            "predictions": "",
            "parts": {name: _nothing(NOT_MEASURED if name in options.names else SKIPPED) for name in part_names},
        }
        self._written_at = 0.0

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = self.data["parts"]
        return parts

    def take_fact(self, line: Line) -> None:
        """Something about the machine."""
        if "note" in line:
            self.data[line["note"]] = line["value"]
        elif "fail" in line:
            self.data.setdefault("problem", line["fail"].splitlines()[-1])

    def expect(self) -> None:
        """Put predictions in, now that the card is known: what is never reached keeps them without a value."""
        card = self._card()
        self.data["predictions"] = f"for an {card.upper()}" if card else "only for an H100 or H200 at full size"
        for name in self.options.names:
            for figure, (value, unit) in predictions(name, card).items():
                self.parts[name]["figures"][figure] = {"value": None, "prediction": value, "unit": unit}
        self.write()

    def take(self, name: str, line: Line) -> None:
        """Something that a child of the part `name` said."""
        part = self.parts[name]
        if "figure" in line:
            part["figures"][line["figure"]] = self._figure(name, line)
        elif "note" in line:
            part[line["note"]] = line["value"]
        if time.monotonic() - self._written_at > WRITE_EVERY_S:
            self.write()

    def add_error(self, name: str, text: str) -> None:
        """A failure in words; the part's status is set by `end`."""
        self.parts[name].setdefault("errors", []).append(text)

    def end(self, name: str, status: str, seconds: float) -> None:
        self.parts[name]["status"] = status
        self.parts[name]["seconds"] = round(seconds, 1)
        self.write()

    def write(self) -> None:
        """Write results.json beside itself, then rename: whoever reads it finds a whole one."""
        if self.options.device == "cuda" and self.options.config == "full":
            self.data["goals"] = judged(self.parts)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)
        self._written_at = time.monotonic()

    def _figure(self, name: str, line: Line) -> dict[str, Any]:
        expected = prediction_of(name, self._card(), line)
        return {"value": line["value"], "prediction": expected, "unit": line["unit"]}

    def _card(self) -> str:
        return card_of(self.data["card"], self.options.config)


def _nothing(status: str) -> dict[str, Any]:
    return {"status": status, "figures": {}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
