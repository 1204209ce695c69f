"""The shards of a queue on a Ray cluster, with what the other ways of running them offer."""

from __future__ import annotations

from collections.abc import Callable

from md3cli.config import RunConfig
from md3cli.scale import shards
from md3cli.scale.commits import read_commit
from md3cli.scale.layout import RunFolder
from md3cli.scale.plan import Plan
from md3cli.scale.ray_cluster import RayOptions
from md3cli.scale.ray_engine import run_on_ray
from md3cli.scale.ray_worker import ShardAnswer
from md3cli.scale.shard_queue import ShardQueue


class RayDriver:
    """Progress comes by whole shards: `num_ok` and `num_failed`, of shards under way, are always 0."""

    num_ok = num_failed = 0

    def __init__(self, folder: RunFolder, plan: Plan, queue: ShardQueue, config: RunConfig) -> None:
        self._folder, self._plan, self._queue, self._config = folder, plan, queue, config
        self._is_stopping = False

    def run(self, on_step: Callable[[], None]) -> None:
        """Run shards until none is left, or a stop was asked for; `on_step` is called several times a second.

        Raises:
            MissingExtraError: Ray is not installed.
            EngineError: no cluster, or a worker cannot go on.
        """

        def should_stop() -> bool:
            on_step()
            return self._is_stopping

        todo = [shard for shard in range(self._plan.shards) if shard not in self._queue.commits]
        run_on_ray(
            self._folder,
            self._plan,
            todo,
            RayOptions(self._config.scale.ray_address, self._config.scale.workers_per_device or 1),
            device=self._config.model.device,
            should_stop=should_stop,
            on_answer=self._take,
            finder=shards.FINDER,
        )

    def _take(self, answer: ShardAnswer) -> None:
        commit = read_commit(self._folder, answer.shard)
        if commit is not None:
            self._queue.finish(answer.shard, commit)

    def stop(self) -> None:
        """Have every worker finish its step, and `run` return."""
        self._is_stopping = True

    def close(self) -> None:
        """Nothing is left behind by `run`."""
