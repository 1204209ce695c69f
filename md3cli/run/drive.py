"""The loop that keeps an engine full: the same for a local run, a shard and a sample.

Knows nothing of journals, shards or clocks: the sink decides what becomes of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from md3cli.records import Answer, Job
from md3cli.refine.tiled import TiledRequests
from md3cli.run.feed import Feed, Ticket
from md3cli.run.model_handle import LazyEngine

WAIT_SLICE_S = 0.2  # of waiting for a picture, so that a wish to stop is seen soon


class Sink(Protocol):
    """Keeps book of the requests that are with the engine, and takes their answers."""

    def has_room(self, batch_size: int) -> bool: ...
    def expect(self, ticket: Ticket) -> None: ...
    def answer(self, answer: Answer) -> None: ...
    def flush(self) -> None: ...


def drive(feed: Feed, engine: LazyEngine, sink: Sink, stop: Callable[[], None]) -> None:
    """Run all requests of `feed`; `stop` is called between any two steps of the engine, and raises to end the loop."""
    try:
        tiled = TiledRequests(lambda: feed.parts)
        while True:
            stop()
            while engine.wants_more and (tiled.has_jobs or not engine.has_work or sink.has_room(engine.batch_size)):
                if (job := tiled.poll() if tiled.has_jobs else _begun(feed, engine, sink, tiled)) is None:
                    break
                engine.add(job)
            for answer in tiled.collect(engine.step() if engine.has_work else ()):
                sink.answer(answer)
            sink.flush()
            if not engine.has_work:
                if feed.is_exhausted and tiled.is_idle:
                    return
                (tiled if tiled.has_jobs else feed).wait(WAIT_SLICE_S)
    finally:
        feed.close()


def _begun(feed: Feed, engine: LazyEngine, sink: Sink, tiled: TiledRequests) -> Job | None:
    """Return the first job of the next request; None where none is ready, or it has failed."""
    if (ready := feed.poll()) is None:
        return None
    engine.load()  # before `expect`: a death while the model loads is no request's fault
    if engine.is_on_gpu:
        feed.serve_gpu(engine.cutter)
    sink.expect(ready.ticket)
    first, picture = ready.ticket, ready.picture
    if first.request.tiles is None:
        return Job(first.key, picture, first.request)
    tickets = [first]
    while (beside := feed.poll_beside(ready)) is not None:
        sink.expect(beside.ticket)
        tickets.append(beside.ticket)
    item, facts = first.image, first.facts
    assert item is not None and facts is not None and picture is not None  # noqa: PT018
    asked = [(ticket.key, ticket.request) for ticket in tickets]
    tiled.begin(asked, picture, facts, lambda: feed.parts.whole(item))
    return tiled.poll()
