"""What OUTPUT has been asked, and what a command asks: both together, how they differ in words, what to type then.

`--add` makes a command ask what OUTPUT has been asked, in its order, and then what is new. A request that is there with
other settings is refused, for two answers to one question would stand beside each other in every format. Without
`--add` a difference is refused, and the message has the command line that goes on. run.json and plans may have been
written by anybody: what is not of the form that a run writes is compared leaf by leaf, and told. This file knows
nothing of records, files and names that are shown.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

from md3cli.errors import OutputMismatchError, RowError
from md3cli.records import Box, Region, Request, Task, Tiles, printable, request_fields
from md3cli.source.requests import read_setting

SHOWN_LIMIT_CHARS = 60
SHOWN_BEFORE_CHARS = 20  # of a long text, before the first character in which it differs from another
MOST_REQUESTS_SHOWN = 6  # in one message
LONGEST_COMMAND_CHARS = 1000  # that a message repeats
_WHAT_IS_ASKED = frozenset({"task", "prompt"})
_OF_EACH = {"requests": "", "then": "of each object found: "}
OF_ROWS = "what the rows of a manifest say"
_NAMES = {"ids": "the way in which ids are made", "root": "the folder of INPUT", "inputs": "INPUT"}


def request_of(document: Mapping[str, Any]) -> Request:
    """Return a request of what `request_fields` made of it, also by way of JSON."""
    parts: dict[str, Any] = {"task": Task(document["task"]), "choices": tuple(document["choices"])}
    parts["spatial_refs"] = tuple(map(tuple, document["spatial_refs"]))
    if (tiles := document.get("tiles")) is not None:
        parts["tiles"] = Tiles(**tiles)
    if (region := document.get("region")) is not None:
        parts["region"] = Region(**{**region, "box": Box(*region["box"])})
    return Request(**{**document, **parts})


def requests_in(identity: Mapping[str, Any], key: str = "requests") -> tuple[Request, ...] | None:
    """Return the requests of the identity of a run; None where they are not of the form that a run writes.

    With the key `then` they are those about each object found; a run that asks none has none.
    """
    documents = identity.get(key, [] if key == "then" else None)
    if not _are_requests(documents):
        return None
    try:
        found = tuple(map(_checked_request, documents))
    except (KeyError, TypeError, ValueError, RowError):
        return None
    return found if json.loads(json.dumps([request_fields(request) for request in found])) == documents else None


def _checked_request(document: Mapping[str, Any]) -> Request:
    """Read a request that anybody may have written; raises RowError and the errors of `request_of`."""
    texts = [document["prompt"], *document["choices"]]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError
    if "region" in document:  # a run asks about regions only what its rows or records bring
        raise TypeError
    settings = document.keys() - {*_WHAT_IS_ASKED, "choices", "tiles"}
    return request_of({**document, **{name: read_setting(name, document[name]) for name in settings}})


def together(held: Sequence[Request], asked: Sequence[Request]) -> tuple[Request, ...]:
    """Return what OUTPUT has been asked (`held`), in its order, and behind it what is new in `asked`.

    Raises:
        OutputMismatchError: the same is asked with other settings than OUTPUT has it.
    """
    new = new_in(asked, held)
    settings = {name_of(request_fields(request)): request_fields(request) for request in held}
    for request in new:
        name = name_of(request_fields(request))
        if name in settings:
            phrases = _of_settings(settings[name], request_fields(request))
            raise OutputMismatchError(
                f"OUTPUT has {_cut(name, [])} with other settings: {', '.join(phrases)}. --add keeps what is there: "
                "leave out what OUTPUT has been asked, give it the settings that it had, or choose another -o"
            )
    return (*held, *new)


def new_in(asked: Sequence[Request], held: Sequence[Request]) -> tuple[Request, ...]:
    """Return the requests that OUTPUT has not been asked; one that is typed twice is asked twice."""
    known = set(held)
    return tuple(request for request in asked if request not in known)


def ask_all(requests: Sequence[Request]) -> bool:
    """Return whether a command asks something of every row; else its rows have to bring what is asked."""
    return any(request.prompt is not None or request.task is Task.CAPTION for request in requests)


def is_grown(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the identity `now` asks what `before` does and more behind it, of pictures or of objects."""
    held, asked = _lists_in(before), _lists_in(now)
    if held is None or asked is None or any(b[: len(a)] != a for a, b in zip(held, asked, strict=True)):
        return False
    return held != asked


def _lists_in(identity: Mapping[str, Any]) -> list[tuple[Request, ...]] | None:
    """Return what the identity of a run asks of pictures, and what of objects; None as for `requests_in`."""
    found = [requests_in(identity, key) for key in _OF_EACH]
    return None if None in found else [requests for requests in found if requests is not None]


def with_asked_of(
    identity: Mapping[str, Any], other: Mapping[str, Any], *, is_pad_kept: bool = False
) -> dict[str, Any]:
    """Return the identity of a run, asking what `other` asks, of objects too.

    With `is_pad_kept` the room around those stays what it is where the run has some.
    """
    keys = [*_OF_EACH, *(() if is_pad_kept and "pad" in identity else ("pad",))]
    kept = {key: value for key, value in identity.items() if key not in keys}
    return kept | {key: other[key] for key in keys if key in other}


def listed(requests: Sequence[Request]) -> str:
    """Return requests as a person would name them; of many the first few."""
    names = [name_of(request_fields(request)) for request in requests]
    return _listed(names, names) if names else OF_ROWS


def way_on(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    argv: Sequence[str],
    output: str,
    *,
    may_add_then: bool = True,
) -> str:
    """Return what to type where two runs differ in what they ask alone: a sentence with a blank behind it, or nothing.

    `before` and `now` are as for `differences`; `argv` is the command with the program's name, `output` is OUTPUT.
    `may_add_then`: --add can add what is asked about objects.
    """
    was, wanted = before.get("identity", before), now.get("identity", now)
    before_all, now_all = _lists_in(was), _lists_in(wanted)
    if before_all is None or now_all is None:
        return ""
    (held, then), (asked, then_asked) = before_all, now_all
    if not (ask_all(held) and ask_all(asked)):
        return ""
    keys = {*_OF_EACH, *(("pad",) if ("pad" in was) != ("pad" in wanted) else ())}
    if differences(_without(before, keys), _without(now, keys)):
        return ""
    try:
        num_new = len(together(held, asked)) - len(held)
        num_then = len(together(then, then_asked)) - len(then)
    except OutputMismatchError:
        return ""
    if num_then and not may_add_then:
        return ""
    is_less = set(asked) != set(held) or bool(then and not then_asked)
    if is_less and not (num_new or num_then):
        return f"For a part of the records, type `{_selecting((*held, *then), asked, output)}`. "
    what = "keep what is there and ask what is new as well" if num_new or num_then else "go on with what is there"
    command = printable(shlex.join(with_option(argv, "--add")))
    typed = f"type `{command}`" if len(command) <= LONGEST_COMMAND_CHARS else "type the same command with --add"
    return f"To {what}, {typed}. "


def with_option(argv: Sequence[str], option: str) -> list[str]:
    """Return a command line with one more option, where it counts as one."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return [*argv[:at], option, *argv[at:]]


def _selecting(held: Sequence[Request], asked: Sequence[Request], output: str) -> str:
    """Return the command that takes the records of `asked`, of many the first few, out of OUTPUT."""
    prompts = list(dict.fromkeys(request.prompt for request in asked if request.prompt is not None))
    tasks = list(dict.fromkeys(str(request.task) for request in asked))
    is_of_all_tasks = {str(request.task) for request in held} == set(tasks)
    words = [] if is_of_all_tasks and prompts else [word for task in tasks for word in ("--task", task)]
    words += [word for prompt in prompts[:MOST_REQUESTS_SHOWN] for word in ("--prompt", prompt)]
    more = " ..." if len(prompts) > MOST_REQUESTS_SHOWN else ""
    return printable(shlex.join(["md3", "select", output, *words])) + more + " -o PART.jsonl"


def _without(document: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    if isinstance(identity := document.get("identity"), Mapping):
        return {**document, "identity": _without(identity, keys)}
    return {key: value for key, value in document.items() if key not in keys}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return how two runs differ, a phrase each: `temperature 0, now 0.3`; empty where they do not.

    `old` and `new` are identities (run_info.py) or configurations of plans (scale/plan.py), which hold one.
    """
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if before == now or (key == "pad" and None in (before, now) and old.get("then") != new.get("then")):
            continue
        if key in _OF_EACH and _are_requests(before or []) and _are_requests(now or []):
            nothing = "nothing" if key == "then" else OF_ROWS
            found += [_OF_EACH[key] + phrase for phrase in _of_requests(before or [], now or [], nothing)]
        elif isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now)
        else:
            found.append(f"{_NAMES.get(key, _option(key))} {change(before, now)}")
    return found


def change(before: Any, now: Any) -> str:
    """Return `0, now 0.3`; of long texts only the places in which they differ."""
    before, now = _text(before), _text(now)
    return f"{_cut(before, [now])}, now {_cut(now, [before])}"


def asked_otherwise(before: Sequence[str], now: Sequence[str], nothing: str = OF_ROWS) -> str:
    """Return `it has detect circle; you now ask detect star as well`, of the names of requests, which differ.

    `nothing` is how none of them is called.
    """
    more, less = list((Counter(now) - Counter(before)).elements()), list((Counter(before) - Counter(now)).elements())
    has = f"it has {_listed(before, now) if before else nothing}"
    if not now:
        return f"{has}; you now ask {nothing}"
    if not more and not less:
        return f"{has}; you now ask the same in another order: {_listed(now, before)}"
    if before and not less:
        return f"{has}; you now ask {_listed(more, before)} as well"
    if not more:
        return f"{has}; you now ask only {_listed(now, before)}"
    return f"{has}; you now ask {_listed(now, before)}"


def name_of(request: Mapping[str, Any]) -> str:
    """Return how a request is called: `detect circle`, `caption short`, `query "How many?"`."""
    task, prompt = _text(request.get("task")), request.get("prompt")
    if task == Task.CAPTION:
        return f"{task} {_text(request.get('length'))}"
    return f'{task} "{_text(prompt)}"' if task == Task.QUERY else f"{task} {_text(prompt)}"


def _are_requests(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(request, dict) for request in value)


def _of_requests(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], nothing: str = OF_ROWS
) -> list[str]:
    names_before, names_now = [name_of(request) for request in before], [name_of(request) for request in now]
    found = [] if names_before == names_now else [asked_otherwise(names_before, names_now, nothing)]
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
    names = dict.fromkeys((*now, *before))  # what a request does not use is not there
    keys = [key for key in names if key not in _WHAT_IS_ASKED and before.get(key) != now.get(key)]
    if str(now.get("task")) == Task.CAPTION:
        keys = [key for key in keys if key != "length"]  # it is in the name
    return [f"{_option(key)} {change(before.get(key), now.get(key))}" for key in keys]


def _option(key: str) -> str:
    return printable(key.replace("_", "-"))


def _text(value: Any) -> str:
    """Return a value as a person would write it."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cut(text: str, others: Sequence[str]) -> str:
    """Return `text`, or of a long one the part that tells it from `others`."""
    if len(text) <= SHOWN_LIMIT_CHARS:
        return text
    start = max((_same_chars(text, other) for other in others if other != text), default=0) - SHOWN_BEFORE_CHARS
    start = start if start + SHOWN_BEFORE_CHARS >= SHOWN_LIMIT_CHARS - 1 else 0
    part = text[start : start + SHOWN_LIMIT_CHARS]
    return f"{'…' if start else ''}{part}{'…' if start + SHOWN_LIMIT_CHARS < len(text) else ''}"


def _same_chars(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    """Return `a, b and c`; of many the first few. Each is cut so that it differs from `others` and its neighbours."""
    unlike = [*others[: 2 * MOST_REQUESTS_SHOWN], *names[: 2 * MOST_REQUESTS_SHOWN]]
    shown = [_cut(name, unlike) for name in names[:MOST_REQUESTS_SHOWN]]
    if len(names) > MOST_REQUESTS_SHOWN:
        return f"{', '.join(shown)} and {len(names) - MOST_REQUESTS_SHOWN:,} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
