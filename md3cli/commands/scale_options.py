"""The options that spread a run over processes, devices and machines; a group of `AnnotateOptions`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from md3cli.commands.values import checked
from md3cli.config import ScaleOptions

_scale = functools.partial(typer.Option, rich_help_panel="Many processes")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def parse_devices(text: str) -> tuple[str, ...]:
    """`cuda:0,cuda:1` as two devices.

    Raises:
        ValueError: one is no device, or stands there twice.
    """
    devices = tuple(part.strip() for part in text.split(","))
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise ValueError(
                f"{device!r} is no device; name some of cuda:0, cuda:1, ..., cpu, mps, with commas between"
            )
    if len(set(devices)) < len(devices):
        raise ValueError("a device stands there twice; --workers-per-device says how many processes each gets")
    return devices


@dataclass(frozen=True, kw_only=True)
class ScaleFlags:
    """Where and by how many processes a run is done. Any of them makes a run folder in (or beside) OUTPUT."""

    devices: Annotated[
        str | None,
        _scale(
            "--devices",
            metavar="DEVICE,...",
            callback=checked(parse_devices),
            help="A model process on each of these devices: cuda:0,cuda:1.",
        ),
    ] = None
    workers_per_device: Annotated[
        int | None, _scale("--workers-per-device", metavar="N", min=1, help="So many model processes on each device.")
    ] = None
    worker_rank: Annotated[
        int,
        _scale("--worker-rank", metavar="R", min=0, help="Which of the processes that share OUTPUT this is, from 0."),
    ] = 0
    world_size: Annotated[
        int, _scale("--world-size", metavar="N", min=1, help="How many processes, on any machines, share OUTPUT.")
    ] = 1
    engine: Annotated[
        Literal["local", "ray"] | None,
        _scale("--engine", help="Who runs the shards: this machine, or a Ray cluster.", show_default=False),
    ] = None
    ray_address: Annotated[
        str | None,
        _scale("--ray-address", metavar="ADDRESS", help="The cluster: auto, or an address; else one is started here."),
    ] = None
    shard_size: Annotated[
        int | None,
        _scale("--shard-size", metavar="N", min=1, help="Images a shard; by default 64 to 1,024 by their number."),
    ] = None

    def scale_options(self) -> ScaleOptions:
        """What the options say as one value."""
        return ScaleOptions(
            devices=() if self.devices is None else parse_devices(self.devices),
            workers_per_device=self.workers_per_device,
            rank=self.worker_rank,
            world_size=self.world_size,
            engine=self.engine,
            shard_size=self.shard_size,
            ray_address=self.ray_address,
        )


ONE_PROCESS = ScaleFlags()
