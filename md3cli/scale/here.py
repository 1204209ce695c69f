"""Shards run in this very process: a rank of its own, or one process going on with the plan of many."""

from __future__ import annotations

import time
from collections.abc import Callable

from md3cli.scale.run_options import RunOptions
from md3cli.scale.shard_queue import ShardQueue
from md3cli.scale.shards import ModelFinder, ShardRunner, ShardStopped

WAIT_S = 0.5  # for others, before looking again


class ShardsHere:
    """Runs the shards of `queue`, one after another.

    Attributes:
        num_ok, num_failed: requests of the shard under way that are finished.
    """

    def __init__(self, uri: str, queue: ShardQueue, options: RunOptions, find: ModelFinder) -> None:
        self._uri, self._queue, self._options, self._find = uri, queue, options, find
        self._is_stopping = False
        self.num_ok = self.num_failed = 0

    def run(self, on_step: Callable[[], None]) -> None:
        """Run shards until none is left, or a stop was asked for; `on_step` is called between two steps of the model.

        Raises:
            Md3Error: the run cannot go on here.
        """

        def should_stop() -> bool:
            on_step()
            return self._is_stopping

        if self._queue.is_finished:
            return
        options = self._options
        with ShardRunner(self._uri, finder=self._find, model=options.model, decode=options.decode) as runner:
            while not (should_stop() or self._queue.is_finished):
                shard = self._queue.take()
                if shard is None:
                    time.sleep(WAIT_S)
                    continue
                try:
                    result = runner.run(shard, should_stop=should_stop, on_progress=self._note)
                except ShardStopped:
                    return
                self._queue.finish(shard, result.commit)
                self._note(0, 0)

    def _note(self, ok: int, failed: int) -> None:
        self.num_ok, self.num_failed = ok, failed

    def stop(self) -> None:
        """Have `run` finish the step it is in, and return."""
        self._is_stopping = True

    def close(self) -> None:
        """Nothing is left behind by `run`."""
