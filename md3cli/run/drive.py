"""The loop that keeps an engine full: the same for a local run, a shard and a sample.

Knows nothing of journals, shards or clocks: the sink decides what becomes of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from md3cli.records import Answer, Job
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
    while True:
        stop()
        while engine.wants_more and (not engine.has_work or sink.has_room(engine.batch_size)):
            if (ready := feed.poll()) is None:
                break
            engine.load()  # before `expect`: a death while the model loads is no request's fault
            feed.serve(engine.longest_whole)
            sink.expect(ready.ticket)
            engine.add(Job(ready.ticket.key, ready.picture, ready.ticket.request))
        if engine.has_work:
            for answer in engine.step():
                sink.answer(answer)
        sink.flush()
        if not engine.has_work:
            if feed.is_exhausted:
                return
            feed.wait(WAIT_SLICE_S)
