"""Which kind of run a command is: an estimate, a dry run, a run in this process, or one of many processes.

Each kind but the third is loaded where it is asked for. Apart from commands/, which alone knows of typer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from md3cli.config import ModelOptions, RunConfig
from md3cli.console import RunConsole
from md3cli.errors import InputError
from md3cli.finished.guards import check_not_input, files_in, has_run_schema
from md3cli.finished.names import some_of
from md3cli.images.crops import parse_background
from md3cli.records import Task, printable
from md3cli.remote.address import is_address
from md3cli.run.adding import check_may_add, grown, in_held_order
from md3cli.run.local import LocalRun
from md3cli.run.model_handle import Model, check_skills, find_model, words_beyond
from md3cli.run.output import (
    ANSWER,
    PRINTABLE_FORMATS,
    TABLE,
    OutputPlan,
    check_can_cover,
    check_replaceable,
    open_output,
    own_paths,
    plan_output,
    with_journal_aside,
)
from md3cli.settings import CONFIG_FILE, user_config_dir
from md3cli.signals import StopSignals, check_stdout
from md3cli.source.emptiness import check_not_empty
from md3cli.source.inputs import paths_of
from md3cli.source.source import Source, open_source
from md3cli.source.walk import STDIN, is_glob

if TYPE_CHECKING:
    from md3cli.evaluate.unlabelled import Unlabelled
    from md3cli.scale.folder import RunFolder

ModelFinder = Callable[[ModelOptions], Model]


def run(config: RunConfig, console: RunConsole, *, find: ModelFinder | None = None) -> int:
    """Do what `config` says; returns the exit status, 0 or 3. The model is looked for where `find` does not say how.

    Raises:
        Md3Error: the run could not be done; what was reported is on disk.
        Interrupted: a signal stopped it, in order.
        BrokenPipeError: the reader of stdout has left.
    """
    find = find or partial(find_model, tell=console.say)
    parse_background(config.model.background)
    with contextlib.ExitStack() as stack:
        if config.output.address is not None:
            from md3cli.scale.bucket import in_local_folder

            config = replace(config, output=stack.enter_context(in_local_folder(config.output)))
        plan = plan_output(config.output, is_terminal=console.is_stdout_terminal)
        config = _grown(config, plan, console)
        own_files = frozenset(os.path.realpath(path) for path in own_paths(plan))
        unlabelled = _unlabelled(config)
        source = open_source(
            replace(config.source, own_files=own_files),
            config.requests,
            then=config.then,
            defaults=config.defaults,
            narrowed=None if unlabelled is None else unlabelled.narrowed,
        )
        for note in source.first_look():
            console.warn(note)
        if unlabelled is not None:
            _check_in_common(config, source, unlabelled, console)
            stack.callback(_tell_nothing_in_common, config, console, unlabelled)
        if plan.files is None or config.estimate is not None or config.is_dry_run:
            check_stdout()
        if config.estimate is not None or config.is_dry_run:
            from md3cli.estimate import dry_run, estimate

            return estimate(config, source, console, find=find) if config.estimate else dry_run(config, source, console)
        check_not_input(own_paths(plan), _files_read(config, plan))
        check_replaceable(plan, may_overwrite=config.output.overwrite)
        check_can_cover(
            plan, config.everything.known() if config.everything else config.requests, config.refinement.labels
        )
        check_not_empty(source, config.source, is_allowed=config.allow_empty)
        if beyond := words_beyond(config.model, config.may_be_asked):
            console.warn(beyond)
        folder = _run_folder(config, plan)
        if folder is not None:
            from md3cli.scale.run import run_scaled

            return run_scaled(config, console, source, plan, folder, find)
        stop = stack.enter_context(StopSignals())
        with stop.interruptible():
            model = find(config.model)
            check_skills(model, config.may_be_asked)
        if plan.stdout == TABLE and source.has_one_row and _is_one_question(config):
            plan = replace(plan, stdout=ANSWER)
        if plan.stdout in PRINTABLE_FORMATS:
            plan = with_journal_aside(plan, stack)
        output = open_output(plan, config, console, source, model.identity)
        stack.callback(output.close)
        return LocalRun(config, console, source, model, output, stop, _replaced_run(config, plan)).to_the_end()


def _unlabelled(config: RunConfig) -> Unlabelled | None:
    """Return what narrows rows to the classes that have no labels, where `--missing-only` asks for it."""
    if config.missing_only is None:
        return None
    from md3cli.evaluate.unlabelled import Unlabelled

    return Unlabelled.read(config.missing_only, config.refinement.labels)


def _check_in_common(config: RunConfig, source: Source, unlabelled: Unlabelled, console: RunConsole) -> None:
    """Tell of classes that the ground truth does not have, and refuse one of other pictures before anything slow.

    stdin and buckets are not looked into, and that INPUT has no picture at all is told elsewhere.

    Raises:
        InputError: no picture of the whole of INPUT is in it.
    """
    if strange := unlabelled.strange(config.requests):
        console.warn(f"--gt {printable(str(config.missing_only))} has no labels called {some_of(strange)}")
    if any(typed == STDIN or is_address(typed) for typed in config.source.inputs):
        return
    if not (source.has_picture(unlabelled.knows) or source.is_empty()):
        raise InputError(f"{_others(config)}; are both about the same folder?")


def _tell_nothing_in_common(config: RunConfig, console: RunConsole, unlabelled: Unlabelled) -> None:
    """Warn of a ground truth of other pictures where that could not be known beforehand."""
    if unlabelled.num_unknown and not unlabelled.num_known:
        console.warn(f"{_others(config)}, so nothing was left out")


def _others(config: RunConfig) -> str:
    return f"no picture of INPUT is in --gt {printable(str(config.missing_only))}"


def _grown(config: RunConfig, plan: OutputPlan, console: RunConsole) -> RunConfig:
    """Return `config` with what OUTPUT has been asked in front, where --add asks for it, or in its order."""
    if config.estimate is not None or config.is_dry_run:
        return config
    if not config.output.add:
        return in_held_order(config, plan)
    check_may_add(config, plan)
    planned = None
    if config.output.address is not None or (plan.files is not None and plan.files.has_run_folder):
        from md3cli.scale.start import planned_in

        planned = planned_in(config, plan)
    return grown(config, plan, planned, console.say)


def _is_one_question(config: RunConfig) -> bool:
    """Return whether a single text is asked for that has no scores beside it, which the table shows."""
    requests = config.requests
    return (
        config.everything is None and [request.task for request in requests] == [Task.QUERY] and not requests[0].choices
    )


def _run_folder(config: RunConfig, plan: OutputPlan) -> RunFolder | None:
    """Return the folder in which many processes do this run; None where this process does it alone."""
    files = plan.files
    is_there = files is not None and files.has_run_folder
    if not (is_there or config.scale.needs_run_folder or config.output.address is not None):
        return None  # without a look into scale/
    from md3cli.scale.folder import is_run_there, run_folder_of

    folder = run_folder_of(plan, config)
    return folder if folder is not None and files is not None and is_run_there(folder, files, config) else None


@contextlib.contextmanager
def _replaced_run(config: RunConfig, plan: OutputPlan) -> Iterator[None]:
    """Remove what many processes have left of an earlier run, around the first write of records."""
    with contextlib.ExitStack() as stack:
        if plan.files is not None and plan.files.has_run_folder:
            from md3cli.scale.folder import discarded_once_written, run_folder_of

            if (folder := run_folder_of(plan, config)) is not None:
                stack.enter_context(discarded_once_written(folder))
        yield


def _files_read(config: RunConfig, plan: OutputPlan) -> Iterator[str]:
    """Yield what a run reads, however it was named: flags, environment, settings files.

    A glob names no file of an OUTPUT that an earlier start began: a walk leaves those out.
    """
    model = config.model
    is_begun = plan.files is not None and has_run_schema(plan.files.run_info)
    inputs = (path for typed in config.source.inputs for path in paths_of(typed))
    yield from (path for path in inputs if not (is_begun and is_glob(path)))
    if config.missing_only is not None:
        yield str(config.missing_only)
    yield from files_in(
        (model.model, model.adapter, model.tokenizer, CONFIG_FILE, str(user_config_dir() / CONFIG_FILE))
    )
