"""A job, the generation it becomes, and the answer: the host's side of a row of the batch.

A `Generation` is one job in flight. It collects the decisions that the network takes for its row; what the network
computes with is `state.Rows`. Nothing here touches a tensor, and the words of a record are `answers.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from md3cli.errors import RequestError
from md3cli.model.engine.prompts import Prompt, Prompts
from md3cli.model.engine.state import Event, Finish, Mode
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import SIZE_OCTAVES
from md3cli.records import Job, Task

FINISH_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture already turned into embeddings [P, D] (on the CPU); `sha256` names it."""

    embeddings: Any
    width: int
    height: int
    sha256: str


@dataclass(slots=True)
class Decisions:
    """The ids of one phase in order, and the coordinates and sizes that stand behind some of them."""

    token_ids: list[int] = field(default_factory=list)
    coords: list[float] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    finish_reason: str = "stop"
    is_closed: bool = False  # of reasoning: the answer comes next


def first_mode(task: Task | None, reasons: bool) -> Mode:
    """Return the kind of the first decision behind a prompt; a text that opens no task is a query's."""
    if task in (Task.DETECT, Task.POINT):
        return Mode.X
    if task is Task.SEGMENT:
        return Mode.SEGMENT
    return Mode.REASON if reasons else Mode.TEXT


@dataclass(slots=True)
class Generation:
    """One job in flight."""

    job: Job
    prompt: Prompt
    config: ModelConfig
    start: int  # position of the prompt's first id: behind the picture's prefix, or 0
    reasoning: Decisions | None = None
    answer: Decisions = field(default_factory=Decisions)
    choices: tuple[tuple[int, ...], ...] = ()  # ids of the only answers allowed
    masses: list[list[float]] = field(default_factory=list)  # per object: continue, x, y[, width, height]
    choice_scores: list[float] = field(default_factory=list)
    is_done: bool = False

    @classmethod
    def of(cls, job: Job, prompts: Prompts, config: ModelConfig, max_context: int) -> Generation:
        """Build the prompt of a job, and look at its length before anything is computed.

        Raises:
            RequestError: no prompt can be made of the request, or it does not fit the context.
        """
        generation = cls(
            job,
            prompts.build(job.request, has_image=job.image is not None),
            config,
            start=config.prefix_len if job.image is not None else 0,
            choices=prompts.encode_choices(job.request),
        )
        length = generation.prompt_end + max(map(len, generation.choices), default=0)
        if length > max_context:
            raise RequestError(
                f"the prompt needs {length} positions and the context holds {max_context}; "
                "shorten it or raise --max-context"
            )
        return generation

    def restart(self) -> None:
        """Forget every decision: the row starts again from its prompt."""
        self.reasoning, self.answer, self.is_done = None, Decisions(), False
        self.masses, self.choice_scores = [], []

    @property
    def image_key(self) -> str | None:
        """The key that generations about the same picture share; None without a picture."""
        return self.job.image.sha256 if self.job.image is not None else None

    @property
    def prompt_end(self) -> int:
        """Position behind the prompt's last id."""
        return self.start + len(self.prompt.ids)

    @property
    def start_mode(self) -> Mode:
        """The kind of the first decision."""
        return first_mode(self.job.request.task, self.reasons)

    @property
    def is_choosing(self) -> bool:
        """True once nothing but the choice between given answers is left."""
        has_reasoned = self.reasoning is not None and self.reasoning.is_closed
        return bool(self.choices) and not self.is_done and (has_reasoned or not self.reasons)

    def choose(self, scores: list[float], *, has_room: bool) -> None:
        """End with the most probable of the given answers, or with none where the context is full."""
        self.is_done = True
        if not has_room:
            self.answer.finish_reason = "length"
            return
        self.choice_scores = scores
        best = max(range(len(scores)), key=scores.__getitem__)
        self.answer.token_ids = list(self.choices[best])

    @property
    def reasons(self) -> bool:
        """True for a query that thinks before it answers."""
        return self.job.request.task is Task.QUERY and self.job.request.reasoning

    @property
    def limit(self) -> int:
        """Budget of the phase: objects for detect and point, tokens otherwise."""
        request = self.job.request
        return request.max_objects if request.task in (Task.DETECT, Task.POINT) else request.max_tokens

    def absorb(self, event: Event) -> None:
        """Take in one decision of this generation's row; the last one ends the generation."""
        mode, token, finish = Mode(int(event.mode)), int(event.token), Finish(int(event.finish))
        if mode is Mode.REASON:
            self._absorb_reasoning(event, token)
        elif mode is Mode.X:
            if finish is not Finish.STOP:
                self.masses.append([event.continue_mass])
                self._add_coord(self.answer, event, scored=True)
        elif mode is Mode.Y:
            self._add_coord(self.answer, event, scored=True)
        elif mode is Mode.SIZE:
            self._add_size(self.answer, event, scored=True)
        elif finish is not Finish.STOP:
            self._absorb_token(event, token, mode)
        if finish is not Finish.NO:
            self.is_done = True
            self.answer.finish_reason = FINISH_REASONS[finish]
            if mode is Mode.REASON and self.reasoning is not None and finish is Finish.LENGTH:
                self.reasoning.finish_reason = "length"  # the context is full; there was no room for an answer

    def _absorb_reasoning(self, event: Event, token: int) -> None:
        if self.reasoning is None:
            self.reasoning = Decisions()
        ids, request = self.config.tokenizer, self.job.request
        if token == ids.answer_id:
            spent = len(self.reasoning.token_ids) >= request.max_tokens
            self.reasoning.finish_reason = "length" if spent else "stop"
            self.reasoning.is_closed = True
        elif token == ids.coord_id:
            self._add_coord(self.reasoning, event, scored=False)
        else:
            self.reasoning.token_ids.append(token)

    def _absorb_token(self, event: Event, token: int, mode: Mode) -> None:
        ids = self.config.tokenizer
        if mode is Mode.SEGMENT and token == ids.coord_id:
            if not self.masses:
                self.masses.append([event.continue_mass])
            # The box alone is scored: its centre and its size come first.
            self._add_coord(self.answer, event, scored=len(self.answer.coords) < 2)
        elif mode is Mode.SEGMENT and token == ids.size_id:
            self._add_size(self.answer, event, scored=not self.answer.sizes and bool(self.masses))
        else:
            self.answer.token_ids.append(token)

    def _add_coord(self, decisions: Decisions, event: Event, *, scored: bool) -> None:
        decisions.token_ids.append(self.config.tokenizer.coord_id)
        decisions.coords.append(int(event.coord_bin) / self.config.region.coord_out_dim)
        if scored:
            self.masses[-1].append(event.coord_mass)

    def _add_size(self, decisions: Decisions, event: Event, *, scored: bool) -> None:
        decisions.token_ids.append(self.config.tokenizer.size_id)
        last_bin = self.config.region.size_out_dim // 2 - 1
        width, height = (
            2.0 ** (int(b) / last_bin * SIZE_OCTAVES - SIZE_OCTAVES) for b in (event.width_bin, event.height_bin)
        )
        decisions.sizes.append((width, height))
        if scored:
            self.masses[-1] += [event.width_mass, event.height_mass]
