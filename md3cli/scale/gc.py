"""Removing what no run needs any more: parts that lost the race for a marker, journals of committed shards."""

from __future__ import annotations

import time
from typing import NamedTuple

from md3cli.scale.commits import CommitLog
from md3cli.scale.layout import EXPORTED, RunFolder, commit_name
from md3cli.scale.verify import Verification, orphans_of

YOUNGEST_S = 3600.0  # a younger part may be about to be committed


class Collected(NamedTuple):
    """What was removed, by name; `reopened` are shards that are to be done again."""

    removed: list[str]
    reopened: list[int]


def collect(folder: RunFolder, *, older_than_s: float = YOUNGEST_S, with_damaged: bool = False) -> Collected:
    """Remove what belongs to nothing and was last written `older_than_s` ago.

    `with_damaged`: also take the markers of parts away that are missing, damaged or not of this plan, so that their
    shards are done again.

    Raises:
        OutputError: the folder cannot be changed.
    """
    commits = dict(CommitLog(folder).refresh())
    reopened = []
    if with_damaged:
        verification = Verification(folder)
        for shard, commit in sorted(commits.items()):
            if any(verification.shard_findings(shard, commit)):
                folder.store.remove(commit_name(shard))
                reopened.append(shard)
    for shard in reopened:
        del commits[shard]
    if reopened:
        folder.store.remove(EXPORTED)
    removed = []
    for name in orphans_of(folder, commits):
        store = folder.wip if name.startswith("wip/") else folder.store
        modified_at = store.modified_at(name)
        if modified_at is not None and time.time() - modified_at >= older_than_s:
            store.remove(name)
            removed.append(name)
    return Collected(removed, reopened)
