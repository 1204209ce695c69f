"""A worker process of the local supervisor: a model that stays warm, and a shard per message.

A fresh interpreter, told over a socketpair how to run and then which shard to run, until the other side is
gone; then it ends at once, whatever it is doing. Ctrl-C is the supervisor's to handle. Its stderr is the
supervisor's too, to be shown when it dies.

Messages in: `{"run": {...}}` once, `{"shard": k}`, `{"stop": true}`. Out: `{"ready": true}`, `{"shard": k,
"attempt": name}` when it begins, `{"ok": n, "failed": n}` of the shard so far, `{"done": k}`, `{"stopped": true}`,
`{"error": text}` when the run cannot go on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from queue import SimpleQueue
from typing import Any

from md3cli.child import Channel, connect
from md3cli.errors import Md3Error
from md3cli.scale.markers import RunOptions
from md3cli.scale.shard_runner import ShardRunner, ShardStopped

TELL_INTERVAL_S = 0.25  # between two words on how far a shard is


def serve() -> None:
    """Run shards until the supervisor sends no more or is gone."""
    with contextlib.suppress(OSError):  # the supervisor is gone
        _Worker(connect()).to_the_end()


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._shards: SimpleQueue[int | None] = SimpleQueue()
        self._is_stopped = False
        self._runner: ShardRunner | None = None
        self._told_at = 0.0

    def to_the_end(self) -> None:
        """Load the model, run the shards that the supervisor sends, and tell it of each, until it sends no more."""
        setup = self._channel.receive(None)["run"]
        threading.Thread(target=self._listen, daemon=True).start()
        options = RunOptions.from_json(setup["options"])
        try:
            with ShardRunner(
                setup["uri"], finder=setup["finder"], model=options.model, decode=options.decode
            ) as self._runner:
                self._channel.send({"ready": True})
                while (shard := self._shards.get()) is not None:
                    self._run(self._runner, shard)
        except ShardStopped:
            self._channel.send({"stopped": True})
        except Md3Error as error:
            self._channel.send({"error": str(error)})

    def _run(self, runner: ShardRunner, shard: int) -> None:
        self._told_at = 0.0
        runner.run(shard, should_stop=lambda: self._is_stopped, on_start=self._begin, on_progress=self._tell)
        self._channel.send({"done": shard})

    def _begin(self, shard: int, attempt: str) -> None:
        self._channel.send({"shard": shard, "attempt": attempt})

    def _tell(self, ok: int, failed: int) -> None:
        if time.monotonic() - self._told_at >= TELL_INTERVAL_S:
            self._told_at = time.monotonic()
            self._channel.send({"ok": ok, "failed": failed})

    def _listen(self) -> None:
        """In a thread of its own, so that a supervisor that died is noticed in the middle of a step."""
        while True:
            try:
                message: dict[str, Any] = self._channel.receive(None)
            except (EOFError, OSError):
                os._exit(1)
            if "shard" in message:
                self._shards.put(message["shard"])
            else:
                self._is_stopped = True
                self._shards.put(None)
                if self._runner is not None and self._runner.is_loading:  # nothing to lose, and it may take minutes
                    os._exit(0)
