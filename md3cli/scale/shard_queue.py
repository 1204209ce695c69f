"""Which shard to run next: all that are open, or as one of many ranks first one's own and then what is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from md3cli.scale.attempts import who_runs
from md3cli.scale.commits import Commit, CommitLog
from md3cli.scale.layout import RunFolder, host_name
from md3cli.scale.waiting import Signs


class ShardQueue:
    """Hands out open shards; `commits` is what is known to be done, `owners` who runs the shards that it waits for.

    With `world_size` n, rank r begins with the shards k where k % n == r. Of the others it takes, from the
    end, only those nobody seems to be working on. A shard may still be run by two: only the first commits.
    """

    def __init__(self, folder: RunFolder, num_shards: int, rank: int = 0, world_size: int = 1) -> None:
        self._folder, self._num_shards, self._log = folder, num_shards, CommitLog(folder, num_shards)
        done = self._log.refresh()
        todo = [shard for shard in range(num_shards) if shard not in done]
        self._own = deque(shard for shard in todo if shard % world_size == rank)
        self._others = deque(shard for shard in todo if shard % world_size != rank)
        self._running: set[int] = set()
        self.given_up: set[int] = set()
        self.owners: set[str] = set()
        self._signs = Signs()

    @property
    def commits(self) -> Mapping[int, Commit]:
        return self._log.found

    def refresh(self) -> None:
        """Learn what others have committed."""
        self._log.refresh()

    def take(self) -> int | None:
        """A shard to run now; None when there is none, or none at the moment."""
        self.owners.clear()
        while self._own:
            shard = self._own.popleft()
            if shard not in self.commits:
                self._running.add(shard)
                return shard
        for _ in range(len(self._others)):
            shard = self._others.pop()
            if shard in self.commits:
                continue
            owner = who_runs(self._folder, shard, host_name(), self._signs)
            if owner is None:
                self._running.add(shard)
                return shard
            self.owners.add(owner)
            self._others.appendleft(shard)
        return None

    def finish(self, shard: int, commit: Commit) -> None:
        """Take the shard out: it is committed."""
        self._running.discard(shard)
        self._log.found[shard] = commit

    def reopen(self, shards: Iterable[int]) -> None:
        """Have committed shards done again."""
        for shard in sorted(shards):
            del self._log.found[shard]
            self._own.append(shard)

    def put_back(self, shard: int) -> None:
        """Put the shard of a dead worker in front: it is the next to be taken."""
        self._running.discard(shard)
        self._own.appendleft(shard)

    def give_up(self, shard: int) -> None:
        """Leave out a shard whose workers keep dying, for the rest of this start."""
        self._running.discard(shard)
        self.given_up.add(shard)

    @property
    def is_waiting(self) -> bool:
        """Whether all that is left is run by others."""
        return not self._running and not self._own and bool(self.owners)

    @property
    def num_waiting(self) -> int:
        """Shards that nobody of this queue is running."""
        return len(self._own) + len(self._others)

    @property
    def num_open(self) -> int:
        """Shards that are not committed."""
        return self._num_shards - len(self.commits)

    @property
    def is_finished(self) -> bool:
        """True when there is nothing left to hand out or to wait for."""
        return self.num_open <= len(self.given_up - self.commits.keys())
