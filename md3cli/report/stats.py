"""Counts over all records of a run, in memory that does not grow with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from md3cli.records import printable
from md3cli.report.items import Item

NUM_SCORE_BINS = 20
MAX_DISTINCT = 5000  # labels, questions and answers remembered; what comes later is counted as `others`
ANSWER_CHARS = 60


@dataclass(slots=True)
class RunStats:
    """Filled item by item, then read by the plots."""

    num_images: int = 0
    num_records: int = 0
    num_objects: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)  # objects by label, in order of first appearance
    images_of_label: Counter[str] = field(default_factory=Counter)
    objects_per_image: Counter[int] = field(default_factory=Counter)  # images that were asked for objects
    score_bins: list[int] = field(default_factory=lambda: [0] * NUM_SCORE_BINS)
    caption_words: Counter[int] = field(default_factory=Counter)
    answers: dict[str, Counter[str]] = field(default_factory=dict)  # by question
    models: Counter[str] = field(default_factory=Counter)
    output_tokens: int = 0

    def add(self, item: Item) -> None:
        """Count one picture with its records."""
        self.num_images += item.first["image"] is not None
        labels = Counter(shape.label for entry in item.entries for shape in entry.shapes)
        for label, count in labels.items():
            if label in self.labels or len(self.labels) < MAX_DISTINCT:
                self.labels[label] += count
                self.images_of_label[label] += 1
        if any(entry.status != "failed" and entry.text is None for entry in item.entries):
            self.objects_per_image[labels.total()] += 1
        self.num_objects += labels.total()
        for entry in item.entries:
            self.num_records += 1
            self.tasks[entry.task] += 1
            self.statuses[entry.status] += 1
            self.models[str(entry.record.get("model") or "unknown")] += 1
            self._add_scores(entry.scores)
            if entry.status == "failed":
                self.errors[str(entry.record["error"]["type"])] += 1
            elif entry.text is not None:
                self._add_text(entry.task, entry.prompt, entry.text)
            self.output_tokens += (entry.record.get("tokens") or {}).get("output") or 0

    def _add_scores(self, scores: list[float]) -> None:
        for score in scores:
            self.score_bins[min(max(int(score * NUM_SCORE_BINS), 0), NUM_SCORE_BINS - 1)] += 1

    def _add_text(self, task: str, question: str, text: str) -> None:
        if task == "caption":
            self.caption_words[len(text.split())] += 1
            return
        if question in self.answers or len(self.answers) < MAX_DISTINCT:
            answers = self.answers.setdefault(question, Counter())
            answer = printable(" ".join(text.split()))[:ANSWER_CHARS]
            if answer in answers or len(answers) < MAX_DISTINCT:
                answers[answer] += 1
