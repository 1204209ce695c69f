"""Run folders for tests: a plan of small pictures, made and run in this process with the stub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stub_engine import StubModel

from md3cli.config import DecodeOptions, ModelOptions
from md3cli.records import ImageItem, Request, SourceRow, Task
from md3cli.scale.folder import RunFolder, open_run_folder
from md3cli.scale.make_plan import make_plan, put_plan
from md3cli.scale.markers import RunOptions, write_run_options
from md3cli.scale.plan import Plan
from md3cli.scale.shard_runner import ShardRunner

CAPTION = Request(Task.CAPTION)


def planned(
    uri: str, rows: Iterable[SourceRow], requests: tuple[Request, ...] = (CAPTION,), shard_size: int | None = None
) -> tuple[RunFolder, Plan]:
    """A run folder with a plan of `rows`."""
    from md3cli.run.run_info import identity_of

    folder, identity = open_run_folder(uri), StubModel().identity
    config = {"identity": identity_of(requests, identity, "/")}
    plan = put_plan(folder, make_plan(folder, rows, requests, identity, config, shard_size=shard_size))
    write_run_options(folder, RunOptions(ModelOptions(), DecodeOptions(workers=1)), ("md3",))
    return folder, plan


def rows_of(pictures: Path, names: Iterable[str], requests: tuple[Request, ...] = (CAPTION,)) -> list[SourceRow]:
    """A row for each name."""
    return [SourceRow(ImageItem(name, str(pictures / name)), requests) for name in names]


def run_all(folder: RunFolder, plan: Plan) -> None:
    """Every shard, here."""
    with ShardRunner(folder.uri, finder="stub_engine:StubModel") as runner:
        for shard in range(plan.shards):
            runner.run(shard)
