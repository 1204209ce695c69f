"""`--missing-only`: of what is asked of a picture, only the classes that a ground truth has no label of there.

A class is known by its NAME, as in `md3 eval`; a picture or a class that the ground truth does not have is asked about.
Rows come one at a time, so pictures are looked up one at a time, too. Knows nothing of INPUT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from md3cli.errors import UsageError
from md3cli.evaluate import load_truth
from md3cli.evaluate.truth import Instances
from md3cli.finished.names import ImageNames, match_labels
from md3cli.records import Request, SourceRow, printable
from md3cli.refine.labels import Labels
from md3cli.refine.refinement import name_of


class Unlabelled:
    """Narrows rows to what a ground truth has no labels of.

    Attributes:
        num_known: rows so far whose picture is in the ground truth.
        num_unknown: the others that have a picture.
    """

    def __init__(self, truth: Instances, labels: Labels) -> None:
        """Begin with labels of `truth`; `labels` are the names of what is asked."""
        self._truth, self._labels = truth, labels
        self._images = ImageNames(truth.images)
        self._category_of = cache(self._find_category)
        self._kept: dict[tuple[Request, ...], tuple[Request, ...]] = {}  # each once: rows of a run ask the same few
        self.num_known = self.num_unknown = 0

    @classmethod
    def read(cls, path: Path, labels: Labels) -> Unlabelled:
        """Read the ground truth of `--missing-only`.

        Raises:
            InputError: it cannot be read.
            UsageError: it has no boxes.
        """
        truth = load_truth(path)
        if isinstance(truth, Instances):
            return cls(truth, labels)
        raise UsageError(
            f"--gt {printable(str(path))} has no boxes, so nothing tells what --missing-only may leave out"
        )

    def knows(self, image: str) -> bool:
        """Return whether a picture of this name is in the ground truth."""
        return self._images.find(image) is not None

    def strange(self, requests: Iterable[Request]) -> list[str]:
        """Return the names of what is asked that are no class of the ground truth: every picture is asked for them."""
        names = ((one, self._name_of(one)) for one in requests)
        return list(dict.fromkeys(name for one, name in names if name and self._category_of(one) is None))

    def narrowed(self, row: SourceRow) -> SourceRow:
        """Return a row with the requests whose class has no label there, maybe none; what failed stays as it is."""
        if row.image is None:
            return row
        image = self._images.find(row.image.name)
        self.num_known += image is not None
        self.num_unknown += image is None
        if image is None or row.failure is not None:
            return row
        kept = tuple(one for one in row.requests if (image, self._category_of(one)) not in self._truth.objects)
        return row if len(kept) == len(row.requests) else replace(row, requests=self._kept.setdefault(kept, kept))

    def _find_category(self, request: Request) -> str | None:
        name = self._name_of(request)
        return None if name is None else match_labels([name], self._truth.categories).found.get(name)

    def _name_of(self, request: Request) -> str | None:
        return name_of({"task": request.task, "prompt": request.prompt}, self._labels)
