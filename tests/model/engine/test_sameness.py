"""Within one plan a request's numbers are the same to the bit: alone, in company, in another order and place.

On the CPU with oneDNN's products, where a row's place tells nothing, from embeddings on; `gpu_check.py` asks a card the
same, and of whole pictures.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from golden_cases import GoldenCase, load_case

from md3cli.model.engine.engine import Engine
from md3cli.model.engine.flight import Launch
from md3cli.model.engine.generation import EncodedImage
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.state import Event, Mode
from md3cli.records import Job, Request, Task

BATCH = {"throughput": 16, "interactive": 4}
QUERY = Request(Task.QUERY, "What is it?", reasoning=False, max_tokens=6)
REQUESTS = (
    Request(Task.CAPTION, max_tokens=8),
    replace(QUERY, spatial_refs=((0.25, 0.5), (0.1, 0.2, 0.6, 0.8))),
    replace(QUERY, prompt="What is it, and where, and what is beside it? " * 4),
    replace(QUERY, temperature=1.0, seed=3),
    replace(QUERY, reasoning=True, choices=("left", "right")),
    replace(QUERY, choices=("yes", "no", "a red square")),
    Request(Task.DETECT, "square", max_objects=3),
    Request(Task.POINT, "circle", max_objects=3),
    Request(Task.SEGMENT, "it", max_tokens=6),
)


def mixed_jobs(case: GoldenCase, is_about_one_picture_each: bool) -> list[Job]:
    """Every request about every picture, and without one; or each about a picture that no other asks for."""
    jobs: list[Job] = []
    embeddings = case.engine(1).encoder.encode(case.images)
    pictures = [
        EncodedImage(found, image.width, image.height, image.sha256)
        for image, found in zip(case.images, embeddings, strict=True)
    ]
    for request in REQUESTS:
        for index, image in enumerate([*pictures, None]):
            if image is None and (request.spatial_refs or request.task is not Task.QUERY):
                continue
            if image is not None and is_about_one_picture_each:
                image = replace(image, sha256=f"{image.sha256} {len(jobs)} {index}")
            jobs.append(Job(len(jobs), image, request))
    return jobs


def events_of(engine: Engine, jobs: Iterable[Job], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Event]]:
    """All numbers that each job's row decided, in order."""
    found: dict[int, list[Event]] = defaultdict(list)
    read = Launch.read

    def noting(launch: Launch) -> Sequence[object]:
        events = read(launch)
        for seat, event in events:
            if not seat.generation.is_done and event.mode != Mode.IDLE:
                found[seat.generation.job.key].append(event)
        return events

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "read", noting)
        answers = list(engine.run(jobs))
    assert all(answer.failure is None for answer in answers)
    return dict(found)


@pytest.mark.process
@pytest.mark.parametrize("plan", BATCH)
def test_numbers_do_not_depend_on_company_order_or_place(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("a")
    model = copy.deepcopy(case.model)
    optimise(model)
    # One picture a pass: a CPU's batched products round by where in memory a matrix begins.
    monkeypatch.setattr(Engine, "_images_per_pass", 1)

    def engine() -> Engine:
        return case.engine(BATCH[plan], model, delay=1, is_planned=True)

    # A prompt behind its own picture's prefix and one that finds the prefix there are two passes of the small plan.
    jobs = mixed_jobs(case, is_about_one_picture_each=plan == "interactive")
    together = events_of(engine(), jobs, monkeypatch)
    shuffled = random.Random(1).sample(jobs, len(jobs))
    assert events_of(engine(), shuffled, monkeypatch) == together
    one_by_one = engine()
    for job in jobs:
        assert events_of(one_by_one, [job], monkeypatch) == {job.key: together[job.key]}, job.request
