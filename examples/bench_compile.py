"""Does compile() keep its word? First request against tenth, compiled against eager, second start against plain.

    python examples/bench_compile.py [--model tiny] [--cache-home DIR] [--commands 5]
    python examples/bench_compile.py --steps mini          # or mid, full: random weights; steps alone

The first form asks about pictures of noise that were not seen before. Eager and compiled requests, and plain and
compiled commands, take turns, so that a machine that others use, too, slows both; figures are medians. `--cache-home`
is a folder in which compiled code is kept: empty it for a cold start.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from md3cli import Moondream
from md3cli.model.engine.compiled import CompiledSteps
from md3cli.model.engine.kernels import optimise
from md3cli.model.engine.machine import plan_memory
from md3cli.model.engine.passes import Passes
from md3cli.model.engine.ready import CannotCompileError, Search
from md3cli.model.weights.random_weights import CONFIGS, random_model

IMAGES = Path(__file__).parent / "images"
SIZE = (640, 480)
TURNS = 10
Ask = Callable[[Moondream, Image.Image], object]


def caption(model: Moondream, image: Image.Image) -> object:
    """Ask for a caption of at most 40 tokens."""
    return model.caption(image, settings={"max_tokens": 40})


def detect(model: Moondream, image: Image.Image) -> object:
    """Ask for at most five objects."""
    return model.detect(image, "red circle", settings={"max_objects": 5})


class Pictures:
    """Pictures of noise, each another one."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def __call__(self) -> Image.Image:
        """Return a picture that nobody has seen."""
        small = self._random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        return Image.fromarray(small).resize(SIZE)


def seconds(ask: Ask, model: Moondream, image: Image.Image) -> float:
    """Return the seconds of one request."""
    started = time.perf_counter()
    ask(model, image)
    return time.perf_counter() - started


def as_if_new(ask: Ask, model: Moondream, image: Image.Image) -> float:
    """Return the seconds of a request about a picture that was seen before, of which nothing is known any more."""
    found = []
    for _ in range(5):
        model.engine.encoder = model.engine.encoder.forgetful()
        model.engine.forget()
        found.append(seconds(ask, model, image))
    return median(found)


def bench_requests(name: str) -> None:
    """Print how long compile() took, and requests behind it."""
    model, new_picture = Moondream.load(name, device="cpu"), Pictures()
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.compile()
    print(f"compile(): {time.perf_counter() - started:.1f} s")
    for warning in said:
        print(f"  {warning.message}")
    asks: dict[str, Ask] = {"caption": caption, "detect": detect}
    pictures = {kind: new_picture() for kind in asks}
    behind = {kind: [seconds(ask, model, pictures[kind])] for kind, ask in asks.items()}  # the first two requests
    for kind, ask in asks.items():
        behind[kind] += [seconds(ask, model, new_picture()) for _ in range(TURNS)]
        first, tenth, again = behind[kind][0], median(behind[kind][-5:]), as_if_new(ask, model, pictures[kind])
        print(f"first {kind}: {first * 1e3:.0f} ms, about the tenth: {tenth * 1e3:.0f} ms ({first / tenth:.2f})")
        print(f"  the first one again: {again * 1e3:.0f} ms ({first / again:.2f}); pictures differ in what is found")
    passes = model.engine.passes
    steps = passes.decode
    if not isinstance(steps, CompiledSteps):
        return
    for kind, ask in asks.items():
        found: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(TURNS):
            for form, passes.decode in (("eager", steps.eager), ("compiled", steps)):
                found[form].append(seconds(ask, model, new_picture()))
        eager, compiled = (median(found[form]) for form in ("eager", "compiled"))
        print(f"{kind} compiled: {compiled * 1e3:.0f} ms, eager: {eager * 1e3:.0f} ms ({compiled / eager:.2f})")


def bench_commands(name: str, times: int) -> None:
    """Print the wall time of whole commands: plain, and with --compile when that was done before."""
    found: dict[str, list[float]] = {"": [], "--compile": []}
    for turn in range(times + 1):
        for option, walls in found.items():
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "records.jsonl"
                command = [sys.executable, "-m", "md3cli", "caption", str(IMAGES), "--model", name, "--device", "cpu"]
                started = time.perf_counter()
                subprocess.run([*command, "--quiet", "--no-cache", "-o", str(output), *option.split()], check=True)
                if turn:  # the first one may compile
                    walls.append(time.perf_counter() - started)
    plain, compiled = (median(walls) for walls in found.values())
    allowed = 1.5 * plain + 2
    print(f"md3 caption: plain {plain:.1f} s, second --compile {compiled:.1f} s (of {allowed:.1f} s allowed)")


@torch.inference_mode()
def bench_steps(config: str) -> None:
    """Print eager and compiled steps of a random model, or why there are no compiled ones."""
    torch.set_flush_denormal(True)
    model = random_model(CONFIGS[config], dtype=torch.float32, device=torch.device("cpu"))
    optimise(model)
    context = model.config.text.max_context
    plan = plan_memory(None, model.config, model.dtype, model.device, context)
    search, started = Search(model, min(plan.slots, 16), context, None), time.perf_counter()
    try:
        search.steps(Passes(model).decode)
    except CannotCompileError as error:
        print(f"{config}: {error}")
    print(f"found in {time.perf_counter() - started:.0f} s")
    for timing in search.timings.values():
        ratio = timing.compiled / timing.eager
        milliseconds = f"compiled {timing.compiled:.2f} ms, eager {timing.eager:.2f}"
        print(f"{config}: step of {timing.rows} rows: {milliseconds} ({ratio:.2f})")


def main() -> None:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", choices=CONFIGS, help="steps of a random model of this size, and nothing else")
    parser.add_argument("--cache-home", type=Path, help="where compiled code is kept")
    parser.add_argument("--commands", type=int, default=5, help="how often each command is run; 0 for not at all")
    options = parser.parse_args()
    if options.cache_home is not None:
        os.environ["XDG_CACHE_HOME"] = str(options.cache_home.resolve())
    if options.steps is not None:
        bench_steps(options.steps)
        return
    bench_requests(options.model)
    if options.commands:
        bench_commands(options.model, options.commands)


if __name__ == "__main__":
    main()
