"""`--add`: a command whose requests join those that OUTPUT has been asked; decided before INPUT is opened.

From then on the run is one that asks all of it: what OUTPUT has is done already, and the rest is new. Nothing is held
here: whoever locks OUTPUT later compares once more. Apart from output.py, which knows OUTPUT as it is being written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from md3cli.config import RunConfig
from md3cli.errors import OutputMismatchError, UsageError
from md3cli.finished.run_json import read_facts
from md3cli.records import Request, printable
from md3cli.refine.labels import Labels
from md3cli.refine.refinement import Refinement
from md3cli.run.asked import ask_all, listed, new_in, requests_in, together
from md3cli.run.output import OutputPlan
from md3cli.run.run_info import RUN_SCHEMA


class Held(NamedTuple):
    """What OUTPUT has been asked, and how what is found is called."""

    requests: tuple[Request, ...]
    labels: Labels


def check_may_add(config: RunConfig, plan: OutputPlan) -> None:
    """Refuse --add where it cannot mean anything.

    Raises:
        UsageError: nothing stays on disk, it is to be started over, or the command itself makes no request.
    """
    if plan.files is None:
        raise UsageError("--add adds to what stands in OUTPUT; name the file or folder with -o")
    if config.output.overwrite:
        raise UsageError("--add keeps what OUTPUT has and --overwrite does not; leave one of them out")
    if not ask_all(config.requests):
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
        return config
    held = planned.requests if planned is not None else requests_in(facts["identity"])
    if held is None:  # somebody has changed it: the comparison to come tells what
        return config
    if not ask_all(held):
        raise OutputMismatchError(
            "OUTPUT was asked what the rows of a manifest say, and --add cannot add to rows: write new rows into the "
            "manifest and run the same command without --add, or choose another -o"
        )
    requests = together(held, config.requests)
    new = new_in(config.requests, held)
    say(f"OUTPUT has {listed(held)}; " + (f"now added: {listed(new)}" if new else "nothing new is asked"))
    named = Refinement(planned.labels) if planned is not None else Refinement()
    refinement = config.refinement.over(Refinement.from_json(facts.get("refinement")).over(named))
    return replace(config, requests=requests, refinement=refinement)


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
