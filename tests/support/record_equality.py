"""When two records are equal: all but scores is, and scores are within a tolerance."""

from __future__ import annotations

import json
from typing import Any

SCORE_TOLERANCE = 0.002


def is_same(ours: bytes, theirs: bytes) -> bool:
    """Whether two lines are equal records: all but scores is equal, and scores are within the tolerance."""
    return ours == theirs or _is_close(json.loads(ours), json.loads(theirs))


def _is_close(ours: Any, theirs: Any, key: str = "") -> bool:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(_is_close(ours[name], theirs[name], name) for name in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_is_close, ours, theirs))
    if key == "score":
        return abs(ours - theirs) <= SCORE_TOLERANCE + 1e-9
    return type(ours) is type(theirs) and bool(ours == theirs)
