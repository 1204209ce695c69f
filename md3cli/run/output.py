"""OUTPUT as the user named it: which files a run writes, and the formats made from its records at the end.

The records come first and are the truth; a run that was stopped leaves them, never half a document.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from md3cli.config import OutputOptions, RunConfig
from md3cli.console import RunConsole, print_bytes
from md3cli.errors import MissingExtraError, OutputMismatchError, UsageError
from md3cli.exporters import RUN_FOLDER_NAMES, ExportOptions, export_records, format_of
from md3cli.exporters.early import EarlyDrawings
from md3cli.exporters.files import REPORT_NAME, adopt_older, remove_leftovers
from md3cli.files import STAGED, remove_stale_temps, scratch_folder, translate_errors
from md3cli.finished.guards import RUN, check_documents, check_not_foreign_run, marker_format, write_marker
from md3cli.finished.guards import written_paths as listed_paths
from md3cli.finished.run_json import RUN_INFO_NAME, change_since, read_facts
from md3cli.records import RecordDict, Request, RunIdentity, printable
from md3cli.refine.collection import as_collection
from md3cli.refine.labels import Labels
from md3cli.refine.refinement import RefinedStream, Refinement
from md3cli.run.journal import Journal, encode_record
from md3cli.run.log import damage_words, damaged_path
from md3cli.run.order import WAITING_SUFFIX, WaitingRecords
from md3cli.run.run_info import RUN_SCHEMA, OutputPaths, RunDocument, check_first_record, identity_of, output_paths
from md3cli.source.source import Source

TABLE, ANSWER, JSONL, HTML = "table", "answer", "jsonl", "html"
FOLDER_FORMATS = frozenset(
    {"yolo", "voc", "labelstudio", "labelme", "cvat", "hf", "overlay", "crops", "redacted", "txt"}
)
PRINTABLE_FORMATS = frozenset({"coco", "csv", HTML})  # one text, so that stdout can take it
_FOLDER_NAMES = {**RUN_FOLDER_NAMES, HTML: REPORT_NAME}
_LONGEST_WRITE_S = 60.0  # of run.json, by far
_MOST_OWN_FILES = 1000  # on the list of a run folder; one that is longer is not ours


@dataclass(frozen=True, slots=True)
class Document:
    """A format made from the records once they are complete; `path` is its file or folder."""

    format: str
    path: Path


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """What a run writes.

    `files` None: nothing stays on disk, `stdout` says what is printed: `table`, `jsonl`, `answer` (one
    answer, while it grows; a failure is a table) or, once the run is complete, one of PRINTABLE_FORMATS.
    """

    files: OutputPaths | None
    documents: tuple[Document, ...] = ()
    stdout: str | None = None


def plan_output(options: OutputOptions, *, is_terminal: bool) -> OutputPlan:
    """Decide from `-o` and `-f` what is written where.

    Raises:
        UsageError: they do not say, or contradict each other.
        MissingExtraError: a format needs a part that is not installed.
    """
    formats = tuple(dict.fromkeys(options.formats))
    if options.path is None:
        plan = OutputPlan(None, stdout=_stdout_format(formats, is_terminal))
    elif _is_run_folder(options, formats):
        if options.path.exists() and not options.path.is_dir():
            what = f"{_listing(formats)} needs" if formats else "a run folder needs"
            raise UsageError(f"{printable(str(options.path))} is a file; {what} a folder; name another -o")
        plan = _folder_plan(options.path, formats)
    else:
        format = formats[0] if formats else _format_of(options.path, options.shown)
        files = output_paths(options.path, is_folder=False, is_journal=format == JSONL)
        plan = OutputPlan(files, () if format == JSONL else (Document(format, options.path),))
    has_page = HTML in (plan.stdout, *(document.format for document in plan.documents))
    if has_page and importlib.util.find_spec("jinja2") is None:
        raise MissingExtraError("the HTML report", "report")
    return plan


def _stdout_format(formats: Sequence[str], is_terminal: bool) -> str:
    if not formats:
        return TABLE if is_terminal else JSONL
    if len(formats) > 1:
        raise UsageError(f"{_listing(formats)} cannot share stdout; name a folder with -o")
    if formats[0] != JSONL and formats[0] not in PRINTABLE_FORMATS:
        raise UsageError(f"{formats[0]} cannot be printed; name a file or folder with -o")
    return formats[0]


def _is_run_folder(options: OutputOptions, formats: Sequence[str]) -> bool:
    assert options.path is not None
    if options.is_folder or len(formats) > 1 or options.path.is_dir() or set(formats) & FOLDER_FORMATS:
        return True
    return not formats and not options.path.suffix


def _folder_plan(folder: Path, formats: Sequence[str]) -> OutputPlan:
    documents = tuple(Document(format, folder / _FOLDER_NAMES[format]) for format in formats if format != JSONL)
    return OutputPlan(output_paths(folder, is_folder=True, is_journal=False), documents)


def _format_of(path: Path, shown: str) -> str:
    format = HTML if path.suffix.lower() in (".html", ".htm") else format_of(path)
    if format is None:
        raise UsageError(
            f"{printable(shown)}: no format has the suffix {printable(path.suffix)}; use .jsonl .json .parquet "
            ".csv or .html, a folder, or say which with --format"
        )
    return format


def _listing(formats: Sequence[str]) -> str:
    return " and ".join(formats)


def check_replaceable(plan: OutputPlan, *, may_overwrite: bool) -> None:
    """Refuse documents that stand there and were not made by an earlier start of this run, and foreign files.

    Raises:
        OutputMismatchError: one is there without a journal beside it, or is not md3's (then --overwrite does not help).
        UsageError: a folder holds what md3 did not write.
    """
    if plan.files is None:
        return
    check_not_foreign_run(plan.files.journal, plan.files.run_info)
    is_run_folder = plan.files.run_info.name == RUN_INFO_NAME
    documents = [(document.format, document.path) for document in plan.documents]
    adopt_older(plan.files.run_info, documents)
    check_documents(documents, plan.files.run_info, is_run_folder=is_run_folder)
    if may_overwrite:
        return
    for document in plan.documents:
        is_there = any(document.path.iterdir()) if document.path.is_dir() else document.path.exists()
        if is_there and not plan.files.journal.exists():  # in this order: a rank makes the journal first
            raise OutputMismatchError(
                f"{printable(str(document.path))} is there already and no records of it beside it; "
                "choose another -o, or --overwrite to replace it"
            )


def check_can_cover(plan: OutputPlan, requests: Sequence[Request], labels: Labels) -> None:
    """Refuse to write redacted pictures where what is asked has no extent; a manifest's rows are not known yet.

    Raises:
        UsageError: something is asked with point alone, or nothing is looked for.
    """
    if not requests or all(document.format != "redacted" for document in plan.documents):
        return
    from md3cli.exporters.coverage import Questions

    questions = Questions(labels)
    for request in requests:
        questions.add({"task": str(request.task), "prompt": request.prompt})
    questions.required(())


def own_paths(plan: OutputPlan) -> tuple[Path, ...]:
    """Return every file that a run writes; a document may be a folder."""
    if plan.files is None:
        return ()
    files = plan.files
    waiting = files.journal.with_name(files.journal.name + WAITING_SUFFIX)
    return (
        files.journal,
        files.run_info,
        files.lock,
        waiting,
        damaged_path(files.journal),
        *(d.path for d in plan.documents),
    )


@dataclass(slots=True)
class Output:
    """Where the records go: the journal of a run on disk, or stdout."""

    plan: OutputPlan
    console: RunConsole
    journal: Journal | None = None
    document: RunDocument | None = None
    waiting: WaitingRecords | None = None
    stream: RefinedStream = field(default_factory=lambda: RefinedStream(Refinement()))  # of what is printed

    @property
    def is_replacing(self) -> bool:
        """Whether a former run's records still stand there, which the first new one replaces."""
        return self.document is not None and self.document.is_held

    def write(self, records: Sequence[RecordDict]) -> None:
        """Write a batch of records; the first one takes the place of a former run that stands there."""
        if self.journal is None:
            self._print(self.stream.add(records))
            return
        is_first = self.is_replacing and bool(records)
        if self.document is not None and records:
            self.document.note_added()
        self.journal.append(records)
        if is_first:
            assert self.plan.files is not None
            assert self.document is not None
            remove_leftovers(self.plan.files.run_info, [document.path for document in self.plan.documents])
            self.document.release()

    def print_rest(self) -> None:
        """Print the records that waited for more of their picture."""
        self._print(self.stream.rest())

    def _print(self, records: Sequence[RecordDict]) -> None:
        if self.plan.stdout == JSONL:
            print_bytes(b"".join(map(encode_record, records)))
            return
        for record in records:
            if self.plan.stdout != ANSWER or record["error"] is not None:
                self.console.show_record(record)

    def close(self) -> None:
        """Sync and unlock what stays."""
        if self.waiting is not None:
            self.waiting.close()
        if self.journal is not None:
            self.journal.close()


def with_journal_aside(plan: OutputPlan, stack: contextlib.ExitStack) -> OutputPlan:
    """Have a document for stdout made in a temporary folder, from a journal like any other; `stack` removes it."""
    aside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="print-", dir=scratch_folder())))
    assert plan.stdout is not None
    files = output_paths(aside, is_folder=True, is_journal=False)
    return replace(plan, files=files, documents=(Document(plan.stdout, aside / "document"),))


def remove_temps(plan: OutputPlan, *, is_shared: bool = False) -> None:
    """Remove what killed writers of OUTPUT's files left behind; the caller holds the output's lock.

    `is_shared`: ranks share OUTPUT, and one that adds to the plan may be writing run.json just now.
    """
    assert plan.files is not None
    remove_stale_temps(plan.files.run_info, older_than_s=_LONGEST_WRITE_S if is_shared else 0.0)
    for path in (plan.files.journal, *(document.path for document in plan.documents)):
        remove_stale_temps(path)
        remove_stale_temps(path / STAGED)


def open_output(
    plan: OutputPlan, config: RunConfig, console: RunConsole, source: Source, identity: RunIdentity
) -> Output:
    """Begin to write, or go on where an earlier start of the same run stopped.

    Raises:
        OutputMismatchError: OUTPUT was begun by another command.
        OutputError: it cannot be written, or another process writes it.
    """
    if plan.files is None:
        console.begin_table(config.requests)
        return Output(plan, console, stream=RefinedStream(config.refinement))
    options = config.output
    earlier = {} if options.overwrite else read_facts(plan.files.run_info, RUN_SCHEMA)
    is_there, is_new_folder = plan.files.journal.is_file(), _is_new_folder(plan.files)
    journal = Journal.open(
        plan.files.journal,
        mode="overwrite" if options.overwrite else "resume",
        lock_path=plan.files.lock,
        is_ours=bool(earlier),
    )
    remove_temps(plan)
    try:
        _list_own_files(plan, is_new_folder=is_new_folder)
        with translate_errors(journal.path):
            change = change_since(earlier, journal.path)
        document = _begin(plan.files, journal, config, source, identity, is_known=bool(earlier))
    except BaseException:
        journal.close()
        raise
    if not journal.is_locked:
        console.warn(f"{plan.files.lock} cannot be locked on this file system; start no second run on this OUTPUT")
    if journal.cut_bytes:
        console.warn(f"repaired {plan.files.journal}: a torn end of {journal.cut_bytes:,} bytes was cut")
    if damage := damage_words(journal.path, journal.damaged):
        console.warn(damage)
    elif change and not journal.cut_bytes:
        console.warn(
            f"{printable(str(journal.path))} was changed by something else: {change}; its whole records are kept as "
            "they are, and md3 verify goes on to say so until the run writes to it again"
        )
    waiting = WaitingRecords(
        journal.path,
        is_done=lambda record_id: journal.state(record_id) == "ok",
        is_fresh=options.overwrite or not is_there,
    )
    return Output(plan, console, journal, document, waiting)


def _is_new_folder(files: OutputPaths) -> bool:
    """Return whether OUTPUT is a run folder that is not there or empty, so that all in it will be md3's."""
    folder = files.run_info.parent
    is_run_folder = files.run_info.name == RUN_INFO_NAME
    return is_run_folder and not (folder.is_dir() and any(folder.iterdir()))


def _list_own_files(plan: OutputPlan, *, is_new_folder: bool) -> None:
    """Note in the list of a run folder that md3 made what this start writes, beside what earlier ones wrote."""
    assert plan.files is not None
    folder = plan.files.run_info.parent
    if plan.files.run_info.name != RUN_INFO_NAME or not (is_new_folder or marker_format(folder) == RUN):
        return
    earlier = set(islice(listed_paths(folder), _MOST_OWN_FILES))
    new = {path.name for path in own_paths(plan)}
    if not is_new_folder and new <= earlier:
        return
    with translate_errors(folder):
        write_marker(folder, RUN, iter(sorted(earlier | new)))


def _begin(
    files: OutputPaths, journal: Journal, config: RunConfig, source: Source, identity: RunIdentity, *, is_known: bool
) -> RunDocument:
    """Note the start in run.json, if the records there are this command's; `is_known`: run.json can say so."""
    if journal.first_record is not None and not is_known:
        is_filled = config.source.columns.fills_prompts  # then a record's prompt is none of the command's
        check_first_record(journal.first_record, () if is_filled else config.requests, identity)
    return RunDocument.begin(
        files.run_info,
        identity=identity_of(config.requests, identity, source.root, config.identity_of_rows(), config.defaults),
        arguments=config.argv,
        root=source.root,
        is_resume=not config.output.overwrite,
        num_records_found=journal.num_ok + sum(journal.num_failed.values()),
        is_held=journal.is_replacing,
        may_add=config.output.add,
        may_ask_then=source.may_ask_then,
        refinement=config.refinement,
    )


def written_paths(plan: OutputPlan) -> list[str]:
    """Return what a finished run has written, for people; a document that had nothing to hold is not there."""
    assert plan.files is not None
    paths = [*(document.path for document in plan.documents), plan.files.journal]
    return [printable(str(path)) for path in paths if path.exists()]


def words_of_others(plan: OutputPlan) -> str | None:
    """Say which formats of earlier starts stand in a run folder and are not made now; None where none do."""
    assert plan.files is not None
    folder, made = plan.files.run_info.parent, {document.path for document in plan.documents}
    if plan.files.run_info.name != RUN_INFO_NAME:
        return None
    ours = set(islice(listed_paths(folder), _MOST_OWN_FILES)) or set(_FOLDER_NAMES.values())  # many keep no list
    formats = [format for format, name in _FOLDER_NAMES.items() if name in ours and (folder / name).exists()]
    if not (others := [format for format in formats if folder / _FOLDER_NAMES[format] not in made]):
        return None
    again = " ".join(f"-f {format}" for format in others)
    paths = " and ".join(printable(str(folder / _FOLDER_NAMES[format])) for format in others)
    them = "it" if len(others) == 1 else "them"
    return f"without what is new: {paths}; the same command with {again} makes {them} again"


def publish(
    document: Document,
    records: Path,
    config: RunConfig,
    root: str,
    console: RunConsole,
    early: EarlyDrawings | None = None,
) -> tuple[str, ...]:
    """Make a document from the records, whole or not at all, and return what the user should know about it.

    The console shows how far it is; `early` has overlays that were drawn already.

    Raises:
        ExportError, OutputError: it cannot be made; the records are untouched.
    """
    with console.told_progress(document.format) as told:
        if document.format == HTML:
            return _write_report(document.path, records, config, root, told)
        drawn = None if early is None else early.folder
        options = replace(export_options(config, root), told=told, early=drawn)
        return export_records(records, document.format, document.path, options).notes


def say_once(notes: Iterable[tuple[str, str]], console: RunConsole) -> None:
    """Print notes about documents, each once, behind the formats that it is about."""
    formats: dict[str, list[str]] = {}
    for format, note in notes:
        formats.setdefault(note, []).append(format)
    for note, about in formats.items():
        console.say(f"{', '.join(about)}: {note}")


def export_options(config: RunConfig, root: str) -> ExportOptions:
    """Return how a run's documents are made."""
    return ExportOptions(
        root=Path(root),
        overwrite=True,  # what stands there came from an earlier start of this run
        is_confined=config.source.root is not None,
        background=config.model.background,
        max_pixels=config.decode.max_pixels,
        max_file_size=config.decode.max_file_size,
        hides_unsure=config.hides_unsure,
        is_run_done=True,
    )


def _write_report(
    path: Path, records: Path, config: RunConfig, root: str, told: Callable[[int, int | None], object]
) -> tuple[str, ...]:
    from md3cli.report.build import ReportOptions, write_report

    if records.stat().st_size == 0:
        return ("no records, so no page",)
    limits = config.decode
    write_report(
        replace(as_collection(records), told=told),
        path,
        ReportOptions(
            root=Path(root),
            is_confined=config.source.root is not None,
            overwrite=True,
            max_pixels=limits.max_pixels,
            max_file_size=limits.max_file_size,
        ),
    )
    return ()
