"""`--add`: a command whose requests join those that OUTPUT has been asked; decided before INPUT is opened.

From then on the run is one that asks all of it: what OUTPUT has is done already, and the rest is new. Nothing is held
here: whoever locks OUTPUT later compares once more. Apart from output.py, which knows OUTPUT as it is being written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from md3cli.config import DEFAULT_PAD, MOST_PAD, RunConfig
from md3cli.errors import OutputMismatchError, UsageError
from md3cli.finished.run_json import number_of, read_facts
from md3cli.records import Request, printable
from md3cli.refine.labels import Labels
from md3cli.refine.refinement import Refinement
from md3cli.run.asked import ask_all, listed, new_in, requests_in, together
from md3cli.run.output import OutputPlan
from md3cli.run.run_info import RUN_SCHEMA
from md3cli.source.specs import are_followed


class Held(NamedTuple):
    """What OUTPUT has been asked, also of objects (`then`); the identity that says so; how what is found is called."""

    requests: tuple[Request, ...]
    then: tuple[Request, ...]
    identity: Mapping[str, Any]
    labels: Labels = Labels()


def check_may_add(config: RunConfig, plan: OutputPlan) -> None:
    """Refuse --add where it cannot mean anything.

    Raises:
        UsageError: nothing stays on disk, it is to be started over, or the command itself makes no request.
    """
    if plan.files is None:
        raise UsageError("--add adds to what stands in OUTPUT; name the file or folder with -o")
    if config.output.overwrite:
        raise UsageError("--add keeps what OUTPUT has and --overwrite does not; leave one of them out")
    if not (ask_all(config.requests) or config.then):
        raise UsageError(
            "--add adds what the command asks, and here the rows of the manifest ask; write new rows into the manifest "
            "and run the same command without --add, or say what to ask of all rows with -q or --task"
        )


def grown(
    config: RunConfig,
    plan: OutputPlan,
    planned: Held | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> RunConfig:
    """Return `config` with the requests of OUTPUT in front of its own; as it is where OUTPUT is not there.

    Names that OUTPUT has given stay, for requests of it may still be open. `planned` is of an unfinished plan of many
    processes, which counts more than run.json; `say` is told what is new.

    Raises:
        OutputMismatchError: OUTPUT has records, and nothing tells what was asked; or it was asked otherwise.
    """
    assert plan.files is not None
    facts = read_facts(plan.files.run_info, RUN_SCHEMA)
    if not facts and planned is None:
        _refuse_unknown(plan)
        if not config.requests:
            raise UsageError("there is no OUTPUT whose objects --then could be about; say what to find with --task")
        return config
    held = planned or _held_in(facts["identity"])
    if held is None or number_of(held.identity.get("pad", config.pad), MOST_PAD) is None:
        return config  # somebody has changed it: the comparison to come tells what
    if not ask_all(held.requests):
        raise OutputMismatchError(
            "OUTPUT was asked what the rows of a manifest say, and --add cannot add to rows: write new rows into the "
            "manifest and run the same command without --add, or choose another -o"
        )
    requests, then = together(held.requests, config.requests), together(held.then, config.then)
    _check_then(config, held, requests, is_shared=planned is not None)
    say(_words(held, new_in(config.requests, held.requests), new_in(config.then, held.then)))
    refinement = config.refinement.over(Refinement.from_json(facts.get("refinement")).over(Refinement(held.labels)))
    is_typed = bool(config.then) or config.pad != DEFAULT_PAD
    pad = config.pad if is_typed else held.identity.get("pad", config.pad)
    return replace(config, requests=requests, then=then, pad=pad, refinement=refinement)


def _held_in(identity: Mapping[str, Any]) -> Held | None:
    requests, then = requests_in(identity), requests_in(identity, "then")
    return None if requests is None or then is None else Held(requests, then, identity)


def _check_then(config: RunConfig, held: Held, requests: Sequence[Request], *, is_shared: bool) -> None:
    """Refuse what is asked about objects where OUTPUT cannot take it; `is_shared`: many processes are at it.

    Raises:
        OutputMismatchError: many processes share OUTPUT, whose plans are of pictures.
        UsageError: nothing in OUTPUT finds objects with boxes.
    """
    if not new_in(config.then, held.then):
        return
    if not are_followed(requests):
        raise UsageError(
            f"--then asks about each object that detect and segment find, and OUTPUT has {listed(held.requests)}; "
            "add --task detect:OBJECT"
        )
    if is_shared or config.output.address is not None or config.scale.needs_run_folder:
        raise OutputMismatchError(
            "--add in many processes adds to what is asked of pictures, not of the objects found ("
            f"{listed(new_in(config.then, held.then))}). Finish the earlier command, then add it in one process; or "
            "choose another -o"
        )


def _words(held: Held, new: Sequence[Request], new_then: Sequence[Request]) -> str:
    """Return what OUTPUT has and what is new, for people."""
    about = f"; of each object found: {listed(held.then)}" if held.then else ""
    parts = [listed(new)] if new else []
    parts += [f"of each object found: {listed(new_then)}"] if new_then else []
    return f"OUTPUT has {listed(held.requests)}{about}; " + (
        f"now added: {'; '.join(parts)}" if parts else "nothing new is asked"
    )


def in_held_order(config: RunConfig, plan: OutputPlan) -> RunConfig:
    """Return `config` asking in the order of OUTPUT, where it asks the same and a labels file lists it otherwise.

    The file's order is one of names: exports follow it, and no record depends on it.
    """
    if plan.files is None or not config.refinement.has_file or config.output.overwrite:
        return config
    facts = read_facts(plan.files.run_info, RUN_SCHEMA)
    held = requests_in(facts["identity"]) if facts else None
    return replace(config, requests=held) if held and Counter(held) == Counter(config.requests) else config


def _refuse_unknown(plan: OutputPlan) -> None:
    assert plan.files is not None
    journal = plan.files.journal
    if journal.is_file() and journal.stat().st_size:
        raise OutputMismatchError(
            f"no run.json beside {printable(str(journal))} tells what was asked, so nothing can be added; repeat the "
            "earlier command without --add, which writes it, or choose another -o"
        )
