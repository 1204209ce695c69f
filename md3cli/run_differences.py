"""What one run was asked and another is, told in words: why OUTPUT cannot be gone on with.

Both come as JSON, the earlier one from a file that anybody may have written: whatever is not of the form that a run
writes is compared leaf by leaf.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from md3cli.records import Task, printable

SHOWN_LIMIT_CHARS = 60
SHOWN_BEFORE_CHARS = 20  # of a long text, before the first character in which it differs from another
MOST_REQUESTS_SHOWN = 6
_WHAT_IS_ASKED = frozenset({"task", "prompt"})
_NAMES = {"ids": "the way in which ids are made", "root": "the folder of INPUT", "inputs": "INPUT"}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return how two runs differ, a phrase each: `temperature 0, now 0.3`; empty where they do not.

    `old` and `new` are identities (run_info.py) or configurations of plans (scale/plan.py), which hold one.
    """
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if key == "requests" and _are_requests(before) and _are_requests(now):
            found += _of_requests(before, now)
        elif isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now)
        else:
            found.append(f"{_NAMES.get(key, _option(key))} {change(before, now)}")
    return found


def change(before: Any, now: Any) -> str:
    """`0, now 0.3`; of long texts the places in which they differ."""
    before, now = _text(before), _text(now)
    return f"{_cut(before, [now])}, now {_cut(now, [before])}"


def asked_otherwise(before: Sequence[str], now: Sequence[str]) -> str:
    """`it has detect circle; you now ask detect star as well`, of the names of requests, which differ."""
    more, less = list((Counter(now) - Counter(before)).elements()), list((Counter(before) - Counter(now)).elements())
    has = f"it has {_listed(before, now)}"
    if not more and not less:
        return f"{has}; you now ask the same in another order: {_listed(now, before)}"
    if before and not less:
        return f"{has}; you now ask {_listed(more, before)} as well"
    if not more:
        return f"{has}; you now ask {'only ' if now else ''}{_listed(now, before)}"
    return f"{has}; you now ask {_listed(now, before)}"


def name_of(request: Mapping[str, Any]) -> str:
    """Return how a request is called: `detect circle`, `caption short`, `query "How many?"`."""
    task, prompt = _text(request.get("task")), request.get("prompt")
    if task == Task.CAPTION:
        return f"{task} {_text(request.get('length'))}"
    return f'{task} "{_text(prompt)}"' if task == Task.QUERY else f"{task} {_text(prompt)}"


def _are_requests(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(request, dict) for request in value)


def _of_requests(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which are asked otherwise, and with which settings."""
    names_before, names_now = [name_of(request) for request in before], [name_of(request) for request in now]
    found = [] if names_before == names_now else [asked_otherwise(names_before, names_now)]
    earlier = dict(zip(names_before, before, strict=True))
    settings: dict[str, list[str]] = {}
    for name, request in zip(names_now, now, strict=True):
        for phrase in _of_settings(earlier.get(name, request), request):
            settings.setdefault(phrase, []).append(name)
    for phrase, names in settings.items():
        is_of_all = len(names) == len(names_now)
        found.append(phrase if is_of_all else f"{phrase} for {_listed(names, names)}")
    return found


def _of_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in now if key not in _WHAT_IS_ASKED and before.get(key) != now[key]]
    if str(now.get("task")) == Task.CAPTION:
        keys = [key for key in keys if key != "length"]  # it is in the name
    return [f"{_option(key)} {change(before.get(key), now[key])}" for key in keys]


def _option(key: str) -> str:
    return printable(key.replace("_", "-"))


def _text(value: Any) -> str:
    """A value as a person would write it."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cut(text: str, others: Sequence[str]) -> str:
    """`text`, or of a long one the part that tells it from `others`."""
    if len(text) <= SHOWN_LIMIT_CHARS:
        return text
    start = max((_same_chars(text, other) for other in others if other != text), default=0) - SHOWN_BEFORE_CHARS
    start = start if start + SHOWN_BEFORE_CHARS >= SHOWN_LIMIT_CHARS - 1 else 0
    part = text[start : start + SHOWN_LIMIT_CHARS]
    return f"{'…' if start else ''}{part}{'…' if start + SHOWN_LIMIT_CHARS < len(text) else ''}"


def _same_chars(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    """`a, b and c`; of many the first few. Each is cut so that it differs from `others`, and from its neighbours."""
    if not names:
        return "what the rows of a manifest say"
    unlike = [*others[: 2 * MOST_REQUESTS_SHOWN], *names[: 2 * MOST_REQUESTS_SHOWN]]
    shown = [_cut(name, unlike) for name in names[:MOST_REQUESTS_SHOWN]]
    if len(names) > MOST_REQUESTS_SHOWN:
        return f"{', '.join(shown)} and {len(names) - MOST_REQUESTS_SHOWN:,} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
