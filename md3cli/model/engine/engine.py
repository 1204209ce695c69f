"""The batch engine: many requests in, answers out as they finish, every decode step as full as it can be.

One life of a request: its prompt is built when it is taken in; when slots are free its picture is encoded (`encoder`),
the picture's prefix is prefilled into a slot of the KV cache (or copied from a slot that holds it already), the prompt
is prefilled behind it, and from then on the row takes one decision a step (`stepper`) until it is done and its slot is
free again. Rows of all tasks mix. An answer depends on its picture, its prompt and its settings only: rows never look
at one another.

The device does everything in one order, on one stream. The host sends what an admission needs in one block
(`machine`), and reads what a launch decided only after it has launched what comes next (`flight`): the device need not
wait for the host. A row that has ended is idle on the device by itself, so a step that the host launches for it in
ignorance changes nothing. Knows nothing of files, ids or records.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from md3cli.errors import EngineError, RequestError
from md3cli.images.crops import CropConfig, Cutter
from md3cli.model.engine.choices import ChoiceRow, choice_probabilities
from md3cli.model.engine.encoder import ImageEncoder
from md3cli.model.engine.flight import InFlight, Launch, Seat
from md3cli.model.engine.generation import Generation, build_answer
from md3cli.model.engine.kv_cache import (
    GROWTH,
    KVCache,
    Placement,
    SlotsTooLargeError,
    SlotsTooShortError,
    SlotTable,
    round_up,
)
from md3cli.model.engine.machine import SLOT_POSITIONS, Sizes, is_out_of_memory, shortage
from md3cli.model.engine.passes import Group, Passes, PromptInputs, ShapePlan, embed_prompts
from md3cli.model.engine.prompts import Prompts, Tokenizer
from md3cli.model.engine.state import Mode
from md3cli.model.engine.stepper import Stepper
from md3cli.model.network.moondream import Moondream3, not_finite
from md3cli.records import Answer, Job, RowFailure, RunIdentity


@dataclass(slots=True)
class EngineStats:
    """What an engine has done, and where the host's time went, in seconds.

    A CUDA device works behind the host: what it takes for pictures, prefixes and prompts is seen where the host reads
    the rows' first decisions, in `prompt_seconds`. `num_decisions` are those that generations absorbed.
    """

    prefix_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prefixes: int = 0
    num_prefixes_shared: int = 0
    num_steps: int = 0
    num_decisions: int = 0
    batch_sizes: list[int] = field(default_factory=list)  # first the planned one, then after each halving
    num_smaller_passes: int = 0  # times that passes were made smaller for want of memory, the batch left as it was
    num_captures: int = 0  # CUDA graphs: two or three when slots are made, none afterwards


PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384, "mps": 4096}  # of one prefill pass, padding included
ROOM = 32  # positions behind the prefix that slots start with, where they may grow
DELAYS = {"cuda": 1}  # launches that results are read behind; elsewhere a launch is done when it returns
IDLE_WAIT_S = 0.0005  # between two looks at a source that has nothing ready


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
        delay: int | None = None,
        is_planned: bool | None = None,
    ) -> None:
        """Allocate slots; what is None follows from the device.

        Args:
            prefill_tokens: the most of one prefill pass, padding included.
            delay: how many launches are under way before the results of the oldest are read.
            is_planned: whether every pass has one size (`ShapePlan`) and slots do not grow, as on CUDA.
        """
        self.model, self.tokenizer, self.prompts, self.encoder = model, tokenizer, prompts, encoder
        self.identity, self.max_context = identity, max_context
        self.cutter: Cutter | None = None  # of this device, for whoever decodes pictures; set by whoever loads
        self.config = model.config
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(model.device.type, PREFILL_TOKENS["cpu"])
        self._planned = Sizes(batch_size, self.prefill_tokens, encoder.max_crops)
        self.passes = Passes(model)
        self.delay = DELAYS.get(model.device.type, 0) if delay is None else delay
        self._is_planned = model.device.type == "cuda" if is_planned is None else is_planned
        self._captures = False
        self._slot_positions = SLOT_POSITIONS
        self._is_torn = False  # in the middle of a step, or for ever after one that did not come to its end
        self._in_flight = InFlight(model.device)
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
        return bool(self._waiting or self._finished or self._slots.active or self._in_flight)

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

    @torch.inference_mode()
    def cancel(self, key: int) -> bool:
        """Stop what was taken in under a job's key: it is not answered, and its slot serves the next.

        Return False where nothing is under way under this key.
        """
        for place, waiting in enumerate(self._waiting):
            if waiting.job.key == key:
                del self._waiting[place]
                return True
        for slot, seated in enumerate(self._slots.generations):
            if seated is not None and seated.job.key == key:
                seated.is_done = True  # launches that are under way are absorbed without it
                self._stepper.fall_idle(slot, self.config.prefix_len)
                self._slots.leave(slot, self.config.prefix_len)
                return True
        return False

    def step(self) -> list[Answer]:
        """Admit what fits, launch a decode step, and return what is known to have finished.

        After a step that Ctrl-C or an error ended half-way, what is in flight starts again.
        """
        if self._is_torn:
            self._start_again()
            self._allocate(self.batch_size)
        self._is_torn = True
        kind, reason = None, ""
        try:
            with torch.inference_mode():
                self._launch()
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, SlotsTooShortError) or (is_out_of_memory(error) and not self.model.is_shared)):
                raise EngineError(f"the model failed on {self.model.device}: {error}") from error
            kind, reason = type(error), shortage(error)
        # Out here: the error's frames, and those of what caused it, would hold the cache and the tensors of the pass.
        if kind is SlotsTooShortError:
            self._lengthen()
        elif kind is not None:
            self._shrink(reason, is_of_slots=kind is SlotsTooLargeError)
        answers = list(self._finished)
        self._finished.clear()
        if not self.has_work:
            self.encoder.save_encoded()
        self._is_torn = False
        return answers

    def _launch(self) -> None:
        """Launch what there is to do, then absorb what was launched before."""
        num_before = len(self._in_flight)
        self.encoder.expect(self._slots.lacking(self._waiting))
        if batch := self._slots.next_batch(self._waiting, self.passes.plan.pictures if self.passes.plan else 1):
            self.encoder.prepare(self._slots.lacking(batch), ahead=self._slots.lacking(self._waiting))
            self._admit(batch)
            self._absorb_arrivals(self.delay)
        self._decode()
        self._look_ahead()
        is_waiting_only = len(self._in_flight) <= num_before
        self._absorb_arrivals(0 if is_waiting_only else self.delay)

    def capture(self) -> None:
        """Capture the decode step as CUDA graphs, now and whenever slots are made anew; before the first job."""
        self._captures = True
        self._free_slots()
        self._allocate(self.batch_size)

    @property
    def is_captured(self) -> bool:
        """True where a decode step is a CUDA graph."""
        return self._captures

    def forget(self) -> None:
        """Drop whatever is under way, unanswered, and let no slot's prefix be found again."""
        self._in_flight.drop()
        self._waiting.clear()
        self._finished.clear()
        self._slots = SlotTable(self.batch_size)

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
        model, prefix_len = self.model, self.config.prefix_len
        wanted = self._slot_positions if self._is_planned else prefix_len + ROOM
        capacity = max(min(self.max_context, wanted), prefix_len + 1)
        if self._is_planned:
            self.passes.plan = ShapePlan.of(batch_size, self._images_per_pass)
        try:
            with torch.inference_mode():
                config, fixed, places = self.config, self._is_planned, model.cache_places
                self.cache = KVCache(
                    config, batch_size, capacity, dtype=model.dtype, device=model.device, is_fixed=fixed, places=places
                )
                self._stepper = Stepper(self.passes, self.cache, batch_size)
                if self._captures:
                    self.stats.num_captures += self._stepper.capture(self.max_context)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._free_slots()
            if batch_size == 1 or model.is_shared:
                raise EngineError(f"{model.device} has no memory for {batch_size} slots: {shortage(error)}") from error
            return False
        return True

    def _free_slots(self) -> None:
        """Let go of the cache, and of the rows and graphs that point into it."""
        self.__dict__.pop("_stepper", None)
        self.__dict__.pop("cache", None)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _images_per_pass(self) -> int:
        return max(1, self.prefill_tokens // self.config.prefix_len)

    def _start_again(self) -> None:
        """Put every generation in flight back in front of those that wait, and let go of the slots.

        A stream that is read meanwhile gets no token twice; where sizes change what comes behind may be another text.
        """
        self._in_flight.drop()
        in_flight = [generation for generation in self._slots.generations if generation is not None]
        for generation in in_flight:
            generation.restart()
        self._waiting.extendleft(reversed(in_flight))
        self._slots = SlotTable(self.batch_size)  # nobody sits in two places if this ends half-way
        self.encoder.save_encoded()
        self.encoder.keep_ready(())
        self._free_slots()

    def _lengthen(self) -> None:
        """Make slots of a fixed size as long as the context, and as many as the same memory holds."""
        num_slots, capacity = self.cache.num_slots, self.cache.capacity
        self._start_again()
        self._slot_positions = self.max_context
        self._allocate(max(1, num_slots * capacity // round_up(self.max_context, GROWTH)))

    def _shrink(self, reason: str, *, is_of_slots: bool) -> None:
        """Make passes or batch smaller and start what is in flight again (answers stay the same).

        Slots that are too large are made fewer; smaller passes would leave them as large. Where nothing can be made
        smaller the next generation is to blame: it fails, and the others go on as planned.
        """
        self._start_again()
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

    def _look_ahead(self) -> None:
        """Launch the encoding of a few pictures that are asked next, where the device works behind the host.

        It has them to do while the host reads what the others decided, and turns answers into records.
        """
        if self.passes.plan is not None and self._in_flight:
            waiting = self._slots.lacking(self._waiting)
            self.encoder.prepare((), ahead=waiting, most_ready=self.passes.plan.pictures)

    def _admit(self, batch: Sequence[Generation]) -> None:
        """Give each generation a slot, run prefixes and prompts there, and launch each row's first decision."""
        started = time.perf_counter()
        placement = self._slots.place(batch, wanted={generation.image_key for generation in self._waiting})
        prefixes = self.passes.cut_prefixes(placement.to_prefill, self._images_per_pass)
        groups = self.passes.group(batch, placement.slots, self.prefill_tokens, placement.to_prefill)
        slots, inputs = self.passes.send([[slot for slot, _ in some] for some in prefixes], groups, self.batch_size)
        self.cache.fit(max(self._furthest(), *map(self.passes.last_written, groups)))
        for some, slots_B in zip(prefixes, slots, strict=True):
            embeddings_BPD = torch.stack([self.encoder.take(key) for _, key in some])
            padding = len(slots_B) - len(some)
            self.passes.prefill_prefixes(self.cache, slots_B, F.pad(embeddings_BPD, (0, 0, 0, 0, 0, padding)))
        self.stats.prefix_seconds += time.perf_counter() - started
        self._prefill_prompts(list(zip(groups, inputs, strict=True)), placement)
        self.stats.num_prefixes += len(placement.to_prefill)
        self.stats.num_prefixes_shared += placement.num_found + len(placement.to_copy)

    def _prefill_prompts(self, passes: Sequence[tuple[Group, PromptInputs]], placement: Placement) -> None:
        """Run prompts into their slots, those first that have their picture's prefix before them."""
        started = time.perf_counter()
        with_prefix = [one for one in passes if one[0].picture is not None]
        decided = [self._prefill_group(*one) for one in with_prefix]
        for donor, slot in placement.to_copy:  # of prefixes that are there by now
            self.cache.copy(donor, slot, self.config.prefix_len)
        decided += [self._prefill_group(*one) for one in passes[len(with_prefix) :]]
        for slot in placement.slots:
            self._slots.sit(slot, self._waiting.popleft())
        self.encoder.keep_ready({generation.image_key for generation in self._waiting})
        seats: list[Seat] = []
        num_rows = 0
        for (group, _), events in zip(passes, decided, strict=True):
            seats += group.seats(num_rows)
            num_rows += len(events)
        self._in_flight.add(torch.cat(decided), seats, is_step=False)
        self.stats.prompt_seconds += time.perf_counter() - started

    def _prefill_group(self, group: Group, given: PromptInputs) -> Tensor:
        """Run one pass of prompts, and take the first decision of each that ends in it: events [N, len(Event)]."""
        # Padding behind a short prompt is overwritten by its answer before anything attends to it.
        x_BTD, ints = embed_prompts(self.model, given), given.ints
        if group.picture is not None:
            embeddings_1PD = self.encoder.take(group.picture)[None]
            hidden_BD = self._stepper.prefill_picture(ints.slots, embeddings_1PD, x_BTD, ints.last)
        else:
            total = self.cache.capacity if self.passes.steps_all_slots else group.total
            hidden_BD = self.passes.prefill_prompts(self.cache, ints.slots, x_BTD, ints.start, ints.last, total)
        is_sampled = any(generation.job.request.temperature > 0 for generation in group.generations)
        hidden_ND = hidden_BD.index_select(0, ints.ends_at)
        return self._stepper.seat(ints.seat, given.rows(), hidden_ND, self.max_context, is_sampled=is_sampled)

    def _furthest(self, ahead: int = 0) -> int:
        """Positions that slots must have for the rows in flight, and for `ahead` more of each; none leaves the context.

        A row ends there on the device, however many steps are launched for it before the host hears of that.
        """
        return min(max(self._slots.end) + ahead, max(self.max_context, self.config.prefix_len + 1))

    # -- decoding ---------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Launch one decision for every row in flight, unless all of them are over for certain."""
        active = self._slots.active
        if not any(self._slots.may_go_on(slot) for slot in active):
            return
        started = time.perf_counter()
        self.cache.fit(self._furthest(ahead=1))
        num_rows = self.batch_size if self.passes.steps_all_slots else active[-1] + 1
        events = self._stepper.step(num_rows, self.max_context, is_sampled=self._is_sampled())
        self._in_flight.add(events, [self._slots.launch(slot) for slot in active], is_step=True)
        self.stats.num_steps += 1
        self.stats.decode_seconds += time.perf_counter() - started

    def _absorb_arrivals(self, most_left: int) -> None:
        """Absorb the oldest launches until no more than `most_left` are under way; reading one waits for the device."""
        for launch in self._in_flight.arrivals(most_left):
            started = time.perf_counter()
            self._choose(self._absorb(launch))
            seconds = time.perf_counter() - started
            if launch.is_step:
                self.stats.decode_seconds += seconds
            else:
                self.stats.prompt_seconds += seconds

    def _absorb(self, launch: Launch) -> list[Seat]:
        """Let the generations of a launch absorb its events; return those that have nothing left but a choice."""
        choosing = []
        for seat, event in launch.read():
            generation = seat.generation
            # Its row may have ended in a launch before, which the host learned after this one had gone out.
            had_ended = generation.is_done or event.mode == Mode.IDLE
            if had_ended or self._slots.generations[seat.slot] is not generation:
                continue
            self.stats.num_decisions += 1
            if not event.is_finite:
                self._fail(seat.slot, generation)
                continue
            if not generation.is_choosing:
                generation.absorb(event)
            if generation.is_done:
                self._finish(seat.slot, generation)
            elif generation.is_choosing:
                choosing.append(seat)
        return choosing

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
        generation.is_done = True
        self.cache.clear(slot)  # under a mask NaN is not nothing: the slot's next generation would become NaN too
        self._slots.leave(slot, self.config.prefix_len)
        self._slots.held[slot] = None
        self._refuse(generation.job, "model", not_finite(self.model.dtype))

    def _choose(self, choosing: Sequence[Seat]) -> None:
        """Let generations that have nothing left but a choice choose; their rows are idle already."""
        if not choosing:
            return
        rows = [ChoiceRow.of(seat.generation, seat.slot, seat.end) for seat in choosing]
        slots_B, scores = choice_probabilities(self.model, self.cache, rows, self.max_context, self.passes.plan)
        self._stepper.rows.position.index_fill_(0, slots_B, self.config.prefix_len)
        for seat, row, found in zip(choosing, rows, scores, strict=True):
            if any(map(math.isnan, found)):
                self._fail(seat.slot, seat.generation)
                continue
            seat.generation.choose(found, has_room=row.end <= self.max_context)
            self._finish(seat.slot, seat.generation)

    def _is_sampled(self) -> bool:
        return any(s is not None and s.job.request.temperature > 0 for s in self._slots.generations)
