"""The options of all commands that read finished records: which records, under which names and thresholds.

`ReadOptions` holds the typed values and makes a `Collection` of RECORDS. One vocabulary for `select`, `stats`,
`export`, `report`, `eval` and `audit`; what the words mean is refine/'s business. Source: product contract, section 8.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from md3cli.commands.parse import checked
from md3cli.commands.shared import LabelsFile, MinScore, Nms, tell_notes
from md3cli.errors import UsageError
from md3cli.finished.guards import files_of_run
from md3cli.records import Task
from md3cli.refine.collection import Collection
from md3cli.refine.labels import Labels, read_labels
from md3cli.refine.quality import QUALITIES
from md3cli.refine.refinement import Refinement
from md3cli.refine.selection import Order, Selection

_select = functools.partial(typer.Option, rich_help_panel="Selection")

Records = Annotated[
    list[Path] | None,  # --as may bring them all
    typer.Argument(metavar="RECORDS", help="Records (.jsonl), run folders, or documents of runs.", show_default=False),
]


def _parse_as(text: str) -> tuple[str, Path]:
    """Read `NAME=RECORDS`."""
    name, _, path = text.partition("=")
    name = name.strip("/")
    if not path or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise ValueError(f"{text!r} is not NAME=RECORDS; write it like night=run2/")
    return name, Path(path)


def _parse_quality(text: str) -> str:
    """Read what a text of the model may be."""
    if text not in QUALITIES:
        raise ValueError(f"{text!r} is not one of: {', '.join(QUALITIES)}")
    return text


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What of RECORDS is taken, and how it is named and shown."""

    task: Annotated[
        list[Task] | None, _select(metavar="TASK", help="Only records of this task; each of these may be repeated.")
    ] = None
    label: Annotated[list[str] | None, _select(metavar="NAME", help="Only records of this name.")] = None
    prompt: Annotated[list[str] | None, _select(metavar="PROMPT", help="Only records of this prompt.")] = None
    image: Annotated[list[str] | None, _select(metavar="GLOB", help="Only pictures whose name matches.")] = None
    score_from: Annotated[
        float | None, _select(metavar="X", min=0, max=1, help="Only with an object of at least this score,")
    ] = None
    score_to: Annotated[
        float | None, _select(metavar="Y", min=0, max=1, help="and at most this one, as the model gave it.")
    ] = None
    ok: Annotated[bool, _select("--ok", help="Only what succeeded.")] = False
    failed: Annotated[bool, _select("--failed", help="Only what failed.")] = False
    wrong: Annotated[bool, _select("--wrong", help="Only what the ground truth (--gt) calls wrong.")] = False
    quality: Annotated[
        list[str] | None,
        _select(
            metavar="loop|refusal|cut",
            parser=checked(_parse_quality),
            help="Only texts that repeat themselves, refuse, or were cut off.",
        ),
    ] = None
    sort: Annotated[Order, _select(metavar="ORDER", help="input, least-sure, most-sure or most-objects.")] = "input"
    sample: Annotated[int | None, _select(metavar="N", min=0, help="So many records, by a hash of their ids.")] = None
    seed: Annotated[int, _select(metavar="N", help="Of the sample.")] = 0
    limit: Annotated[int | None, _select(metavar="N", min=0, help="So many records at most, the first ones.")] = None
    as_: Annotated[
        list[tuple[str, Path]] | None,
        _select(
            "--as",
            metavar="NAME=RECORDS",
            parser=checked(_parse_as),
            help="Put NAME/ before the images of RECORDS, to tell runs apart.",
        ),
    ] = None
    gt: Annotated[
        list[Path] | None,
        _select(
            "--gt",
            metavar="FILE",
            help="Ground truth: COCO, YOLO, labelme, or rows (JSON, CSV, Parquet) of answers, captions or boxes.",
        ),
    ] = None

    labels: LabelsFile = None
    min_score: MinScore = None
    nms: Nms = None
    typed: frozenset[str] = frozenset()  # names of the fields that stood in the command line

    def collection(self, records: Sequence[Path], *, uses_gt: bool = False, answer: str | None = None) -> Collection:
        """Return the records that are taken, as they are shown; tell of options that change nothing.

        Args:
            uses_gt: the command scores by `--gt` itself.
            answer: the column of `meta` that says what is wrong, with the ground truth or without one.

        Raises:
            UsageError: options contradict each other, or the labels file cannot be read.
            InputError: RECORDS or the ground truth cannot be read.
        """
        if self.ok and self.failed:
            raise UsageError("--ok and --failed leave nothing; give one of them")
        if self.wrong and not self.gt and answer is None:
            raise UsageError(
                "--wrong needs a ground truth to say what is wrong; give --gt FILE (or --answer COLUMN to md3 eval)"
            )
        if self.gt and not (self.wrong or uses_gt):
            raise UsageError("--gt is for --wrong here; md3 eval scores, md3 report shows what is wrong")
        if "seed" in self.typed and self.sample is None:
            tell_notes(["--seed changes nothing: it is of a sample, and there is no --sample"])
        whole = Collection.of(records, self.as_ or (), chosen=self.chosen())
        return replace(whole, selection=self._selection(whole, answer))

    def chosen(self) -> Refinement:
        """Return the names and thresholds as typed.

        Raises:
            UsageError: the labels file cannot be read.
        """
        listed = Labels() if self.labels is None else read_labels(self.labels)
        return Refinement(listed, self.min_score, self.nms, has_file=self.labels is not None)

    def files_read(self, records: Collection) -> list[Path]:
        """Return what a command reads that must not be written to."""
        files = [file for source in records.sources for file in files_of_run(source.path)]
        return [*files, *(self.gt or ()), *([self.labels] if self.labels is not None else [])]

    def _selection(self, whole: Collection, answer: str | None) -> Selection:
        return Selection(
            tasks=tuple(map(str, self.task or ())),
            labels=tuple(self.label or ()),
            prompts=tuple(self.prompt or ()),
            images=tuple(self.image or ()),
            score_from=self.score_from,
            score_to=self.score_to,
            outcome="ok" if self.ok else "failed" if self.failed else None,
            wrong=_wrong_ids(whole, self.gt or (), answer) if self.wrong else None,
            qualities=tuple(self.quality or ()),
            sort=self.sort,
            sample=self.sample,
            seed=self.seed,
            limit=self.limit,
        )


def _wrong_ids(records: Collection, truths: Sequence[Path], answer: str | None) -> frozenset[str]:
    from md3cli.evaluate import evaluate, load_truth

    sections = evaluate(records, [load_truth(path) for path in truths], answer=answer).sections
    return frozenset(
        record for section in sections for record, verdict in section.verdicts.items() if verdict.is_right is False
    )
