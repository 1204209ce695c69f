"""The batch engine: many requests in, answers out as they finish, every decode step as full as it can be.

One life of a request: its prompt is built when it is taken in; when slots are free its picture is encoded (`encoder`),
the picture's prefix is prefilled into a slot of the KV cache (or copied from a slot that holds it already), the prompt
is prefilled behind it, and from then on the row takes one decision a step (`state`) until it is done and its slot is
free again. Rows of all tasks mix. An answer depends on its picture, its prompt and its settings only: rows never look
at one another.

The device does everything in one order, on one stream. The host sends what an admission needs in one block
(`machine`) and reads back one small tensor an admission and one a step; nothing else waits. Knows nothing of files,
ids or records.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from md3cli.errors import EngineError, RequestError
from md3cli.images.crops import CropConfig
from md3cli.model.engine.encoder import AnyImage, ImageEncoder
from md3cli.model.engine.generation import Generation, build_answer
from md3cli.model.engine.kv_cache import KVCache, SlotsTooLargeError, SlotTable
from md3cli.model.engine.machine import is_out_of_memory, shortage
from md3cli.model.engine.passes import ChoiceRow, Group, Passes, PromptInputs, choice_probabilities, embed_prompts
from md3cli.model.engine.prompts import Prompts, Tokenizer
from md3cli.model.engine.state import Event, Mode, Step, advance, idle_rows
from md3cli.model.network.moondream import Moondream3, not_finite
from md3cli.records import Answer, Job, RowFailure, RunIdentity


@dataclass(slots=True)
class EngineStats:
    """What an engine has done, and where the host's time went, in seconds.

    A CUDA device works behind the host: what it takes for pictures, prefixes and prompts is seen where the host reads
    the rows' first decisions, in `prompt_seconds`.
    """

    prefix_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prefixes: int = 0
    num_prefixes_shared: int = 0
    num_prompt_tokens: int = 0
    num_steps: int = 0
    num_decisions: int = 0
    batch_sizes: list[int] = field(default_factory=list)  # first the planned one, then after each halving
    num_smaller_passes: int = 0  # times that passes were made smaller for want of memory, the batch left as it was


PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384, "mps": 4096}  # of one prefill pass, padding included
# Positions behind the prefix that slots start with. A CUDA device's plan has no more room for compiled ones: with the
# real model's prefix these are `machine.SLOT_POSITIONS`.
EAGER_ROOM, COMPILED_ROOM = 32, 806
IDLE_WAIT_S = 0.0005  # between two looks at a source that has nothing ready


class Sizes(NamedTuple):
    """The sizes of an engine that can be made smaller when memory runs out."""

    batch_size: int
    prefill_tokens: int
    max_crops: int

    def fewer(self, planned: Sizes) -> Sizes | None:
        """Return half the batch, which makes room for passes as `planned`; None where one generation is all of it."""
        return planned._replace(batch_size=self.batch_size // 2) if self.batch_size > 1 else None

    def smaller(self, planned: Sizes, prefix_len: int, device_type: str) -> Sizes | None:
        """Return what to try next after running out of memory; None where nothing is left to give up.

        The passes of a GPU are large, and halving them costs little: they go down to one picture's prefix and one
        crop before the batch is halved. Elsewhere first the batch is halved, then the vision micro-batch.
        """
        if device_type == "cuda":
            tokens = min(self.prefill_tokens, max(prefix_len, self.prefill_tokens // 2))
            halved = Sizes(self.batch_size, tokens, max(1, self.max_crops // 2))
            return halved if halved != self else self.fewer(planned)
        if self.batch_size > 1:
            return self._replace(batch_size=self.batch_size // 2)
        return self._replace(max_crops=self.max_crops // 2) if self.max_crops > 1 else None


class Engine:
    """Runs jobs on one device; one thread drives it."""

    def __init__(
        self,
        model: Moondream3,
        tokenizer: Tokenizer,
        prompts: Prompts,
        encoder: ImageEncoder,
        *,
        identity: RunIdentity,
        batch_size: int,
        max_context: int,
        prefill_tokens: int | None = None,
    ) -> None:
        """Allocate slots; `prefill_tokens` are the most of one prefill pass, padding included, None by the device."""
        self.model, self.tokenizer, self.prompts, self.encoder = model, tokenizer, prompts, encoder
        self.identity, self.max_context = identity, max_context
        self.config = model.config
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(model.device.type, PREFILL_TOKENS["cpu"])
        self._planned = Sizes(batch_size, self.prefill_tokens, encoder.max_crops)
        self.passes = Passes(model)
        self.stats = EngineStats()
        self._waiting: deque[Generation] = deque()
        self._finished: deque[Answer] = deque()
        self._allocate(batch_size)

    @property
    def crop_config(self) -> CropConfig:
        """How pictures must be cut for this model."""
        return self.config.vision.crop_config

    @property
    def device(self) -> str:
        """Where the engine runs, as `--device` names it."""
        return str(self.model.device)

    @property
    def encoding_bytes(self) -> int:
        """What one picture's encoding takes in the cache."""
        return self.config.vision.num_patches * self.config.text.dim * self.model.dtype.itemsize

    def stage_seconds(self) -> dict[str, float]:
        """Return where the time went so far, by stage."""
        prefill_s = self.stats.prefix_seconds + self.stats.prompt_seconds
        return {"vision": self.encoder.seconds, "prefill": prefill_s, "decode": self.stats.decode_seconds}

    @property
    def has_work(self) -> bool:
        """True while something is taken in and not answered."""
        return bool(self._waiting or self._finished or self._slots.active)

    @property
    def wants_more(self) -> bool:
        """True while taking in more jobs helps to fill the next batches."""
        return len(self._waiting) < 2 * self.batch_size

    def run(self, jobs: Iterable[Job | None]) -> Iterator[Answer]:
        """Yield answers to `jobs` as they are finished; jobs are pulled as they are needed.

        `jobs` may yield None: nothing is ready yet, the engine goes on with what it has.
        """
        source = iter(jobs)
        is_exhausted = False
        while not is_exhausted or self.has_work:
            while not is_exhausted and self.wants_more:
                try:
                    job = next(source)
                except StopIteration:
                    is_exhausted = True
                    break
                if job is None:
                    break
                self.add(job)
            if not self.has_work and not is_exhausted:
                time.sleep(IDLE_WAIT_S)
            yield from self.step()

    def add(self, job: Job) -> Generation | None:
        """Take a job in and return its generation; a job that makes no sense is answered with a failure instead."""
        try:
            generation = Generation.of(job, self.prompts, self.config, self.max_context)
        except RequestError as error:
            self._refuse(job, error.type, str(error))
            return None
        self._waiting.append(generation)
        return generation

    def step(self) -> list[Answer]:
        """Admit what fits, decode one step, and return what finished."""
        too_large, is_of_slots = None, False
        try:
            with torch.inference_mode():
                if batch := self._next_batch():
                    self.encoder.prepare(self._without_slot(batch), ahead=self._without_slot(self._waiting))
                    self._prefill_prompts(*self._place(batch))
                self._decode()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise EngineError(f"the model failed on {self.model.device}: {error}") from error
            too_large, is_of_slots = shortage(error), isinstance(error, SlotsTooLargeError)
        if too_large is not None:  # out here: inside `except` the error's frames would hold the tensors of the pass
            self._shrink(too_large, is_of_slots=is_of_slots)
        answers = list(self._finished)
        self._finished.clear()
        return answers

    def compile(self, backend: str = "inductor") -> None:
        """Compile vision, prefill and decode; slots are made large enough not to grow in ordinary runs."""
        self.encoder.compile(backend)
        self.passes.compile(backend)
        del self.cache  # there may be no room for two
        self._allocate(self.batch_size)

    # -- slots ------------------------------------------------------------------------------------

    def _allocate(self, batch_size: int) -> None:
        """Make empty slots for so many generations, or for half as many and so on where others took the memory."""
        while not self._try_to_allocate(batch_size):
            batch_size //= 2
        self.batch_size = batch_size
        if self.stats.batch_sizes[-1:] != [batch_size]:
            self.stats.batch_sizes.append(batch_size)
        self._slots = SlotTable(batch_size)

    def _try_to_allocate(self, batch_size: int) -> bool:
        model = self.model
        room = COMPILED_ROOM if self.passes.is_compiled else EAGER_ROOM
        capacity = max(min(self.max_context, self.config.prefix_len + room), self.config.prefix_len + 1)
        try:
            with torch.inference_mode():
                self.cache = KVCache(self.config, batch_size, capacity, dtype=model.dtype, device=model.device)
                self._rows = idle_rows(batch_size, model.device)
                self._next_SD = torch.zeros(batch_size, self.config.text.dim, dtype=model.dtype, device=model.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise EngineError(f"{model.device} has no memory for one sequence: {shortage(error)}") from error
            return False
        return True

    def _shrink(self, reason: str, *, is_of_slots: bool) -> None:
        """Make passes or batch smaller and start what is in flight again (answers stay the same).

        Slots that are too large are made fewer; smaller passes would leave them as large. Where nothing can be made
        smaller the next generation is to blame: it fails, and the others go on as planned.
        """
        in_flight = [generation for generation in self._slots.generations if generation is not None]
        for generation in in_flight:
            generation.restart()
        self._waiting.extendleft(reversed(in_flight))
        self.encoder.save_encoded()
        self.encoder.keep_ready(())
        del self.cache
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        now = Sizes(self.batch_size, self.prefill_tokens, self.encoder.max_crops)
        sizes = now.smaller(self._planned, self.config.prefix_len, self.model.device.type)
        if is_of_slots:
            sizes = now.fewer(self._planned)
        if sizes is None:
            sizes = self._planned
            self._fail_next(reason)
        elif sizes.batch_size == now.batch_size:
            self.stats.num_smaller_passes += 1
        self.prefill_tokens, self.encoder.max_crops = sizes.prefill_tokens, sizes.max_crops
        self._allocate(sizes.batch_size)

    def _fail_next(self, reason: str) -> None:
        """Answer the generation that would be admitted next with a failure: it does not fit even alone."""
        if not self._waiting:
            raise EngineError(f"out of memory with nothing in flight: {reason}")
        self._refuse(self._waiting.popleft().job, "model", f"out of memory even alone: {reason}")

    # -- admission --------------------------------------------------------------------------------

    def _next_batch(self) -> list[Generation]:
        """Return the generations to admit now, once enough slots are free to make a batch worth while.

        They wait on until they have their slots: an error on the way there loses none of them.
        """
        num_free = len(self._slots.free)
        is_worth_it = num_free == self.batch_size or num_free >= min(len(self._waiting), self.batch_size // 4)
        return list(islice(self._waiting, num_free)) if is_worth_it else []

    def _without_slot(self, generations: Iterable[Generation]) -> list[AnyImage]:
        """Return the pictures of `generations` whose prefix no slot holds."""
        pictures = (generation.job.image for generation in generations)
        return [picture for picture in pictures if picture is not None and picture.sha256 not in self._slots.held]

    def _place(self, batch: Sequence[Generation]) -> tuple[list[Group], list[PromptInputs]]:
        """Give each generation a slot with its picture's prefix in it: found there, copied, or prefilled.

        Return the passes that the prompts take, and what those are given, on the device already.
        """
        started = time.perf_counter()
        placement = self._slots.place(batch, wanted={generation.image_key for generation in self._waiting})
        images_per_pass = max(1, self.prefill_tokens // self.config.prefix_len)
        prefixes = self.passes.cut_prefixes(placement.to_prefill, images_per_pass)
        groups = self.passes.group(batch, placement.slots, self.prefill_tokens)
        slots, inputs = self.passes.send([[slot for slot, _ in some] for some in prefixes], groups, self.batch_size)
        for some, slots_B in zip(prefixes, slots, strict=True):
            embeddings_BPD = torch.stack([self.encoder.take(key) for _, key in some])
            self.passes.prefill_prefixes(self.cache, slots_B, embeddings_BPD)
        for donor, slot in placement.to_copy:
            self.cache.copy(donor, slot, self.config.prefix_len)
        for slot in placement.slots:
            self._slots.generations[slot] = self._waiting.popleft()
        self.encoder.keep_ready({generation.image_key for generation in self._waiting})
        self.stats.num_prefixes += len(placement.to_prefill)
        self.stats.num_prefixes_shared += placement.num_found + len(placement.to_copy)
        self.stats.prefix_seconds += time.perf_counter() - started
        return groups, inputs

    def _prefill_prompts(self, groups: Sequence[Group], inputs: Sequence[PromptInputs]) -> None:
        """Run prompts into their slots, group by group, and take each row's first decision."""
        started = time.perf_counter()
        for group in groups:
            for generation, slot in zip(group.generations, group.slots, strict=True):
                self._slots.end[slot] = generation.prompt_end
                self.stats.num_prompt_tokens += len(generation.prompt.ids)
        self.cache.fit(max(*self._slots.end, *(group.total for group in groups)))
        events = []
        for group, given in zip(groups, inputs, strict=True):
            # Padding behind a short prompt is overwritten by its answer before anything attends to it.
            x_BTD, ints = embed_prompts(self.model, given), given.ints
            total = self.cache.capacity if self.passes.is_compiled else group.total
            hidden_BD = self.passes.prefill_prompts(self.cache, ints.slots, x_BTD, ints.start, ints.last, total)
            hidden_ND = hidden_BD[: len(group.slots)]
            step = advance(self.model, given.rows(), hidden_ND, self.max_context, is_sampled=self._is_sampled())
            self._put(ints.slots[: len(group.slots)], step)
            events.append(step.events)
        self._absorb([slot for group in groups for slot in group.slots], torch.cat(events))
        self._choose()
        self.stats.prompt_seconds += time.perf_counter() - started

    # -- decoding ---------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Take one decision for every row in flight."""
        active = self._slots.active
        if not active:
            return
        started = time.perf_counter()
        self.cache.fit(1 + max(self._slots.end))
        window = slice(0, self.batch_size if self.passes.is_compiled else active[-1] + 1)
        rows, next_ND = self._rows.pick(window), self._next_SD[window]
        step = self.passes.decode(self.cache, rows, next_ND, self.max_context, is_sampled=self._is_sampled())
        for slot in active:
            self._slots.end[slot] += 1
        self._put(window, step)
        self._absorb(range(len(step.events)), step.events)
        self._choose()
        self.stats.num_steps += 1
        self.stats.num_decisions += len(active)
        self.stats.decode_seconds += time.perf_counter() - started

    def _put(self, index: Tensor | slice, step: Step) -> None:
        self._rows.put(index, step.rows)
        self._next_SD[index] = step.next_ND

    def _absorb(self, slots: Iterable[int], events: Tensor) -> None:
        """Let the generation in each of `slots` absorb its event; reading the events waits for the device."""
        self.encoder.save_encoded()  # the device still has prefixes to run while files are written
        for slot, values in zip(slots, events.tolist(), strict=True):
            generation = self._slots.generations[slot]
            if generation is None:
                continue
            event = Event(*values)
            if not event.is_finite:
                self._fail(slot, generation)
                continue
            if not generation.is_choosing:
                generation.absorb(event)
            if generation.is_done:
                self._finish(slot, generation)

    def _finish(self, slot: int, generation: Generation) -> None:
        """Free a slot; its idle row is stepped over right behind the prefix, which it keeps."""
        self._slots.leave(slot, self.config.prefix_len)
        try:
            self._finished.append(build_answer(generation, self.tokenizer))
        except RequestError as error:  # a vocabulary that cannot say it
            self._refuse(generation.job, error.type, str(error))

    def _refuse(self, job: Job, type: str, message: str) -> None:
        self._finished.append(Answer(job.key, failure=RowFailure(type, message)))

    def _fail(self, slot: int, generation: Generation) -> None:
        """Answer a generation with a failure because its numbers are not finite, and free its slot."""
        self._rows.mode[slot] = int(Mode.IDLE)
        self._rows.position[slot] = self.config.prefix_len
        self.cache.clear(slot)  # under a mask NaN is not nothing: the slot's next generation would become NaN too
        self._slots.leave(slot, self.config.prefix_len)
        self._slots.held[slot] = None
        self._refuse(generation.job, "model", not_finite(self.model.dtype))

    def _choose(self) -> None:
        """Let the generations that have nothing left but a choice choose; their rows fall idle."""
        choosing = [(slot, s) for slot, s in enumerate(self._slots.generations) if s is not None and s.is_choosing]
        if not choosing:
            return
        rows = [ChoiceRow.of(generation, slot, self._slots.end[slot]) for slot, generation in choosing]
        slots_B, scores = choice_probabilities(self.model, self.cache, rows)
        self._rows.mode.index_fill_(0, slots_B, int(Mode.IDLE))
        self._rows.position.index_fill_(0, slots_B, self.config.prefix_len)
        for (slot, generation), row, found in zip(choosing, rows, scores, strict=True):
            if any(map(math.isnan, found)):
                self._fail(slot, generation)
                continue
            generation.choose(found, has_room=row.end <= self.max_context)
            self._finish(slot, generation)

    def _is_sampled(self) -> bool:
        return any(s is not None and s.job.request.temperature > 0 for s in self._slots.generations)
