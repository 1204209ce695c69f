"""A single answer on a terminal while it grows: the engine of a run with one question about one picture.

`LiveEngine` does what any run's engine does, and after each step prints what the model has said since. The record is
made, counted and failed as always; what is printed is the record's own text in pieces. Apart from local.py and
model_handle.py, because all other runs go without it. The pieces are cut as `Moondream`'s streams are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from md3cli.console import LiveText
from md3cli.records import Answer, Job
from md3cli.run.model_handle import LazyEngine, Model

if TYPE_CHECKING:
    from md3cli.model.api import TextStream
    from md3cli.model.engine.generation import Decisions, Generation


class LiveEngine(LazyEngine):
    """An engine that is given one job, and whose answer is printed as `text` while it is made."""

    def __init__(
        self, model: Model, while_loading: Callable[[], AbstractContextManager[object]], text: LiveText
    ) -> None:
        super().__init__(model, while_loading)
        self._text = text
        self._generation: Generation | None = None  # None: not taken in, or an engine that shows nothing on its way
        self._thought = self._answer = _Growing(None)

    def add(self, job: Job) -> None:
        """Take the job in."""
        from md3cli.model.api import TextStream

        engine = self.load()
        self._generation = engine.add(job)
        if self._generation is not None:
            decode = engine.tokenizer.decode
            self._thought, self._answer = _Growing(TextStream(decode)), _Growing(TextStream(decode))
        self._text.wait("looking" if job.image is not None else "thinking")

    def step(self) -> Sequence[Answer]:
        """Do the next piece of work, print what is new, and return what finished."""
        answers = super().step()
        if self._generation is not None:
            self._print_new(self._generation)
        for answer in answers:
            self._print_rest(answer)
        return answers

    def _print_new(self, generation: Generation) -> None:
        if generation.reasoning is not None:
            self._text.think(self._thought.piece(generation.reasoning))
        if generation.answer.token_ids and not generation.choices:
            self._text.think(self._thought.rest())
            self._text.answer(self._answer.piece(generation.answer))

    def _print_rest(self, answer: Answer) -> None:
        self._text.think(self._thought.rest())
        if answer.result is not None:
            is_shown = self._answer.num_ids > 0
            self._text.answer(self._answer.rest() if is_shown else answer.result["answer"])
        self._text.end()
        if answer.result is not None and answer.finish_reason == "length":
            self._text.note("the answer was cut (finish_reason length); a greater --max-tokens makes room")
        elif answer.result is not None and not answer.result["answer"]:
            self._text.note("the model's answer is empty")


class _Growing:
    """A text of which only the part that is new is given out."""

    def __init__(self, stream: TextStream | None) -> None:
        self._stream = stream
        self.num_ids = 0

    def piece(self, decisions: Decisions) -> str:
        """Return the text of ids that came since; none while a row that was started again catches up."""
        assert self._stream is not None
        new = decisions.token_ids[self.num_ids :]
        self.num_ids += len(new)
        return "".join(map(self._stream.push, new))

    def rest(self) -> str:
        """Return what was held back, once nothing more comes."""
        return self._stream.finish() if self._stream is not None else ""
