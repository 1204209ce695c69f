"""A small finished run on disk for every test of a format."""

from finished_runs import detect_run, run

__all__ = ["detect_run", "run"]
