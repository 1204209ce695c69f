"""An INPUT without anything to annotate is an error: most often it is the wrong folder, or too narrow a filter.

A part of INPUT that happens to be empty, a shard or a limit of 0, is no error; nor that all of it has labels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from md3cli.config import SourceSpec
from md3cli.errors import InputError
from md3cli.records import printable
from md3cli.remote.address import is_address, shown
from md3cli.source.source import HAVE_LABELS, OTHER_SHARDS, Source
from md3cli.source.walk import STDIN, is_glob

MOST_INPUTS_SHOWN = 3


def check_not_empty(source: Source, spec: SourceSpec, *, is_allowed: bool) -> None:
    """Look for a first row before anything slow, such as a model, is loaded; stdin and buckets are not looked into.

    Raises:
        InputError: the whole of INPUT, whatever the shard, has no row, and that is not allowed.
    """
    if is_allowed or spec.limit == 0 or any(typed == STDIN or is_address(typed) for typed in spec.inputs):
        return
    if source.is_empty():
        raise _error(spec, source.skipped)


def check_found(source: Source, spec: SourceSpec, *, is_allowed: bool) -> None:
    """Refuse a source that was read to its end and gave no row.

    Raises:
        InputError: the whole of INPUT, whatever the shard, has no row, and that is not allowed.
    """
    if not (is_allowed or spec.limit == 0 or source.skipped[OTHER_SHARDS] or source.skipped[HAVE_LABELS]):
        raise _error(spec, source.skipped)


def empty_words(spec: SourceSpec) -> str:
    """Say in words where nothing to annotate was found."""
    more = f" and {len(spec.inputs) - MOST_INPUTS_SHOWN} more" if len(spec.inputs) > MOST_INPUTS_SHOWN else ""
    inputs = ", ".join(
        "stdin" if typed == STDIN else printable(shown(typed)) for typed in spec.inputs[:MOST_INPUTS_SHOWN]
    )
    return f"{'--limit 0 takes' if spec.limit == 0 else 'there is'} nothing to annotate in {inputs}{more}"


def _error(spec: SourceSpec, skipped: Mapping[str, int]) -> InputError:
    passed_over = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()) if count)
    is_pattern = any(is_glob(typed) and not os.path.exists(typed) for typed in spec.inputs)
    nothing = "nothing matches it" if is_pattern else "it is empty"
    found = f"not taken: {passed_over}" if passed_over else nothing
    return InputError(
        f"{empty_words(spec)} ({found}); name another INPUT, look at --include, --exclude and --recursive, "
        "or type --allow-empty if that is fine"
    )
