"""The options of an estimate: of `md3 estimate`, and of `--estimate` on the annotating commands."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import typer

from md3cli.config import EstimateOptions

_estimate = functools.partial(typer.Option, rich_help_panel="Estimate")


@dataclass(frozen=True, kw_only=True)
class EstimateChoices:
    """Whether to estimate, from how much, at which prices."""

    estimate: Annotated[
        bool,
        _estimate("--estimate", help="With --dry-run: also run a sample, and tell time, tokens, disk and money."),
    ] = False
    estimate_sample: Annotated[
        int, _estimate("--estimate-sample", metavar="N", min=1, help="Images to run of each number of crops.")
    ] = 16
    estimate_open: Annotated[
        int,
        _estimate(
            "--estimate-open",
            metavar="N",
            min=1,
            max=1_000_000,
            help="Images to open to learn their sizes, drawn evenly; the others are taken to be like them.",
        ),
    ] = 2000
    price_per_gpu_hour: Annotated[
        float | None, _estimate("--price-per-gpu-hour", metavar="X", min=0, help="What an hour of one device costs.")
    ] = None
    price_per_1000: Annotated[
        float | None,
        _estimate("--price-per-1000", metavar="X", min=0, help="What 1,000 images cost elsewhere, to compare with."),
    ] = None

    def chosen(self, *, is_json: bool = False) -> EstimateOptions | None:
        """As a value; None where no estimate is asked for."""
        if not self.estimate:
            return None
        return EstimateOptions(
            num_opened=self.estimate_open,
            sample_per_bucket=self.estimate_sample,
            price_per_gpu_hour=self.price_per_gpu_hour,
            price_per_1000=self.price_per_1000,
            is_json=is_json,
        )


NO_ESTIMATE = EstimateChoices()
