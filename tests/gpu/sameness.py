"""Part `sameness`: a row's bits do not depend on its company, nor on where it or its picture lies.

64 rows of all kinds run together, then in another order (and so in other slots, passes and places of a pass), then
some of them alone, all in one engine: the promise is for one plan of sizes. Compared are every event, whose masses
are probabilities of the logits, and all keys and values of the slot, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from md3cli.bench.runs import ANSWER_ID, THINKING_ID, WORD_ID, Workload, make_engine, make_images
from md3cli.images.crops import PreparedImage, Tiling
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.flight import Launch, Seat
from md3cli.model.engine.prompts import Prompt
from md3cli.model.network.moondream import Moondream3
from md3cli.records import Job, Request, Task

from .child import Run
from .models import BF16, model_in
from .steps import same_bits

TILINGS = tuple(Tiling(*sides) for sides in ((1, 1), (2, 2), (2, 4), (1, 2), (3, 4), (4, 2), (1, 4), (3, 3)))
LENGTHS = (6, 9, 15, 16, 17, 31, 40, 70)  # of prompts, in ids: around a block's end, and of several blocks
KINDS: tuple[dict[str, Any], ...] = (
    {"task": Task.QUERY, "reasoning": False, "max_tokens": 12},
    {"task": Task.DETECT, "max_objects": 4},
    {"task": Task.CAPTION, "max_tokens": 9},
    {"task": Task.QUERY, "reasoning": True, "max_tokens": 5},
    {"task": Task.POINT, "max_objects": 3},
    {"task": Task.QUERY, "reasoning": False, "max_tokens": 12, "temperature": 0.7, "seed": 5},
)
NO_PICTURE_EVERY = 7  # rows
NUM_ALONE = 12
CPU_BATCH = 16  # the least that is planned as a large one
MICRO_BATCH = 36
_HASH = -7046029254386353131  # odd, so that no bit of a factor is lost


class MixedPrompts:
    """A stand-in for `Prompts`: of as many ids as the request's prompt says."""

    def build(self, request: Request, has_image: bool) -> Prompt:
        reasons = request.task is Task.QUERY and request.reasoning
        count = int(request.prompt or LENGTHS[0])
        words = (WORD_ID + (7 * i + count) % 97 for i in range(count - 2))
        return Prompt([1, *words, THINKING_ID if reasons else ANSWER_ID])

    def encode_choices(self, request: Request) -> tuple[tuple[int, ...], ...]:
        return ()


@dataclass(frozen=True)
class Traces:
    """What rows did, by their job's key: their events in order, and a digest of their slot's keys and values."""

    events: dict[int, list[tuple[float, ...]]]
    digests: dict[int, int]

    def other_than(self, wanted: Traces) -> list[int]:
        """The keys of rows that are here and had other bits there."""
        return [
            key
            for key, events in self.events.items()
            if _bits(events) != _bits(wanted.events[key]) or self.digests[key] != wanted.digests[key]
        ]


def measure(run: Run) -> None:
    """Rows with other bits than together, crops and pictures with other bits in another place; captures on the way."""
    model = model_in(run, BF16)
    with run.if_it_fits("places of crops and pictures"):
        measure_vision_places(run, model)
    engine = make_engine(model, 64 if run.is_cuda else CPU_BATCH, is_planned=True)
    engine.prompts = MixedPrompts()  # type: ignore[assignment]  # a stand-in
    captures, jobs = engine.stats.num_captures, mixed_jobs(model, engine.batch_size)
    together = trace(engine, jobs, "together")
    report_other(run, "in another order", trace(engine, jobs[::-1], "turned"), together)
    alone = [
        trace(engine, [job], f"alone {job.key}") for job in jobs[:: len(jobs) // (NUM_ALONE if run.is_cuda else 2)]
    ]
    one_by_one = Traces(
        {key: events for found in alone for key, events in found.events.items()},
        {key: digest for found in alone for key, digest in found.digests.items()},
    )
    report_other(run, "alone", one_by_one, together)
    run.figure("captures after the start", engine.stats.num_captures - captures, "count")


def report_other(run: Run, how: str, found: Traces, wanted: Traces) -> None:
    other = found.other_than(wanted)
    run.figure(f"rows with other bits, {how}", len(other), "count")
    if other and run.is_cuda:  # on a CPU a library may round a row by its place
        events = [key for key in other if _bits(found.events[key]) != _bits(wanted.events[key])]
        run.fail(f"{len(other)} of {len(found.events)} rows have other bits {how} (events: {len(events)}): {other[:8]}")


def _bits(events: Sequence[tuple[float, ...]]) -> list[list[str]]:
    """Numbers written so that NaN equals itself and no two others are equal."""
    return [[float(value).hex() for value in event] for event in events]


# -- rows ------------------------------------------------------------------------------------------


def mixed_jobs(model: Moondream3, count: int) -> list[Job]:
    """Jobs of all kinds about pictures of all tilings, and about none; every fourth picture is asked about twice."""
    workload = Workload(tuple(TILINGS[i % len(TILINGS)] for i in range(count)), Task.QUERY, 1, 1, 1)
    images = make_images(model, workload, seed=2)
    jobs = []
    for key in range(count):
        request = Request(prompt=str(LENGTHS[key % len(LENGTHS)]), **KINDS[key % len(KINDS)])
        image = images[key - 1] if key % 4 == 3 else images[key]
        has_none = key % NO_PICTURE_EVERY == NO_PICTURE_EVERY - 1 and request.task is Task.QUERY
        jobs.append(Job(key, None if has_none else image, request))
    return jobs


def trace(engine: Engine, jobs: Sequence[Job], name: str) -> Traces:
    """Run jobs; pictures are renamed, so that nothing of an earlier run is found."""
    found = Traces({job.key: [] for job in jobs}, {})
    absorb = engine._absorb

    def listening(launch: Launch) -> Any:
        for seat, event in launch.read():
            if event.mode:  # 0: the row had ended before
                found.events[seat.generation.job.key].append(tuple(event))
        choosing = absorb(launch)
        for seat in launch.seats:  # before its slot is another's
            key = seat.generation.job.key
            if seat.generation.is_done and key not in found.digests:
                found.digests[key] = _digest(engine, seat, len(found.events[key]))
        return choosing

    engine._absorb = listening  # type: ignore[method-assign]
    try:
        for job in jobs:
            engine.add(replace(job, image=_renamed(job.image, name)))
        while engine.has_work:
            for answer in engine.step():
                assert answer.failure is None, answer.failure
    finally:
        engine._absorb = absorb  # type: ignore[method-assign]
    return found


def _renamed(image: Any, name: str) -> Any:
    return replace(image, sha256=f"{name} {image.sha256}") if isinstance(image, PreparedImage) else image


@torch.inference_mode()
def _digest(engine: Engine, seat: Seat, num_events: int) -> int:
    """A number of all bits that a row wrote into its slot: prefix, prompt, and one position for each further decision.

    On a CPU an idle row is stepped along right behind the prefix, and what comes behind it is not the row's.
    """
    end = seat.generation.prompt_end + num_events - 1
    if engine.model.device.type != "cuda":
        end = min(end, engine.config.prefix_len)
    total = torch.zeros((), dtype=torch.int64, device=engine.model.device)
    for layer, tensors in enumerate(zip(engine.cache.keys, engine.cache.values, strict=True)):
        for which, tensor in enumerate(tensors):
            bits = tensor[seat.slot, :, :end].contiguous().view(torch.int16).flatten().long()
            place = torch.arange(1, len(bits) + 1, device=bits.device) * 2 + 2 * layer + which
            total += ((bits ^ place) * _HASH ^ place * _HASH).mul(place | 1).sum()
    return int(total)


# -- vision ----------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_vision_places(run: Run, model: Moondream3) -> None:
    """One crop at every place of a micro-batch; pictures of several tilings in one order, turned, and alone."""
    count = MICRO_BATCH if run.is_cuda else 3
    side = model.config.vision.crop_size
    crop = torch.randint(256, (1, side, side, 3), dtype=torch.uint8, device=run.device)
    others = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, device=run.device)
    found: list[Tensor] = []
    for place in range(0, count, max(1, count // 9)):
        batch = others.clone()
        batch[place] = crop[0]
        found.append(model.vision.encode_rows(model.vision.patch_rows(batch))[place].clone())
    report_places(run, "crops", sum(not same_bits(one, found[0]) for one in found))

    images = make_images(model, Workload(TILINGS[: 8 if run.is_cuda else 3], Task.QUERY, 1, 1, 1), seed=3)
    encoder = make_engine(model, 64 if run.is_cuda else CPU_BATCH, captures=False).encoder
    in_order, turned = encoder.encode(images), encoder.encode(images[::-1])[::-1]
    alone = [encoder.encode([image])[0] for image in images]
    num_other = sum(
        not (same_bits(one, other) and same_bits(one, single))
        for one, other, single in zip(in_order, turned, alone, strict=True)
    )
    report_places(run, "pictures", num_other)


def report_places(run: Run, what: str, num_other: int) -> None:
    run.figure(f"{what} with other bits, in another place", num_other, "count")
    if num_other and run.is_cuda:
        run.fail(f"{num_other} {what} have other bits in another place")
