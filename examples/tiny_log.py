"""The log of a training run: a CSV file and its curves."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

LOG_EVERY = 20  # steps


class Log:
    """log.csv: means over the last steps, a row every LOG_EVERY steps."""

    FIELDS = (
        *("step", "elapsed_s", "share", "loss", "text", "text_accuracy", "coord", "size"),
        *("dense", "dense_kind", "dense_colour", "dense_rank", "dense_offset"),
        *("least_expert", "norm", "rate", "pictures_per_s"),
    )

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, list[dict[str, float]]()
        if not path.exists():
            path.write_text(",".join(self.FIELDS) + "\n")

    def add(self, values: dict[str, float], header: dict[str, float]) -> None:
        """Note one step; `header` holds the fields that are not averaged."""
        self._rows.append(values)
        if len(self._rows) < LOG_EVERY:
            return
        names = sorted({name for row in self._rows for name in row})
        means = {n: float(np.mean([row[n] for row in self._rows if n in row])) for n in names}
        row = {name: f"{value:.5g}" for name, value in {**means, **header}.items()}
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.FIELDS, restval="").writerow(row)
        print(" ".join(f"{name} {row[name]}" for name in self.FIELDS if name in row), flush=True)
        self._rows.clear()


def plot(log_file: Path, target: Path) -> None:
    """The curves of log.csv as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with log_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    panels = (("text", "coord", "size", "dense"), ("text_accuracy", "dense_kind", "dense_rank", "dense_offset"))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            points = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
            axis.plot(*zip(*points, strict=True), label=name) if points else None
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    pyplot.close(figure)
