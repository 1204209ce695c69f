"""How far a run is: a moving bar on a terminal, a plain line now and then elsewhere. Knows no records."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import IO, Any

PLAIN_INTERVAL_S = 10.0  # between two progress lines where there is no terminal


class Progress:
    """Images done of all, with rate and time left; call `update_to` as they are finished."""

    def __init__(self, stream: IO[str], total: int | None, *, is_bar: bool) -> None:
        self._stream, self._total = stream, total
        self._done = self._failed = 0
        self._started_at = self._told_at = time.monotonic()
        self._bar: Any = None
        if is_bar:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="img", file=stream, dynamic_ncols=True, smoothing=0.1)

    def update_to(self, num_images: int, num_failed: int) -> None:
        """So many images are finished, and so many requests failed, of all so far."""
        step, self._done, self._failed = num_images - self._done, num_images, num_failed
        if self._bar is not None:
            if num_failed:
                self._bar.set_postfix(failed=num_failed, refresh=False)
            self._bar.update(step)
        elif time.monotonic() - self._told_at >= PLAIN_INTERVAL_S:
            self._told_at = time.monotonic()
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    def restart_clock(self) -> None:
        """Rate and time left are reckoned from now on."""
        self._started_at = time.monotonic()
        if self._bar is not None:
            self._bar.start_t = self._bar.last_print_t = self._bar._time()

    def describe(self, text: str) -> None:
        """Put what is going on before the bar; empty: nothing special."""
        if self._bar is not None:
            self._bar.set_description(text)

    def line(self) -> str:
        """The state in one plain line: `1200/5000 24.1 img/s eta 2:38 failed 3`."""
        rate = self._done / max(time.monotonic() - self._started_at, 1e-9)
        parts = [f"{self._done}" if self._total is None else f"{self._done}/{self._total}", f"{rate:.1f} img/s"]
        if self._total is not None and self._done:
            parts.append(f"eta {clock((self._total - self._done) / rate)}")
        if self._failed:
            parts.append(f"failed {self._failed}")
        return " ".join(parts)

    def close(self) -> None:
        """Leave the last state of the bar standing."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def loading(progress: Progress | None) -> Iterator[None]:
    """Say that a model is being loaded, and reckon the rate from its end on."""
    if progress is None:
        yield
        return
    progress.describe("loading the model")
    try:
        yield
    finally:
        progress.describe("")
        progress.restart_clock()


def clock(seconds: float) -> str:
    """Seconds as `7.5 s`, `2:38` or `1:02:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
