"""`md3 doctor`: checks, each of which says what it found and, where that is not well, what to do.

Nothing is mended here. The device's facts come from model/, which imports torch, when they are asked for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from md3cli import __version__
from md3cli.commands.help import App
from md3cli.errors import ConfigError, EngineError, ImageError, Md3Error
from md3cli.settings import CONFIG_FILE, ENV_PREFIX, read_layers, user_cache_dir

app = App()

EXTRAS = {"report": ("jinja2",), "eval": ("faster_coco_eval", "matplotlib"), "heif": ("pillow_heif",)}
LOW_DISK_BYTES = 25 * 10**9  # the real model and a little cache
IN_PACKAGE = "this package"  # where `known_models` says the embedded model comes from
GIB = 2**30


class Health(StrEnum):
    """How a check ended; only `BAD` makes the doctor's status 1."""

    OK = "ok"
    NOTE = "note"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `advice` is empty where nothing is to be done."""

    name: str
    health: Health
    text: str
    advice: str = ""


def diagnose(device: str = "auto", settings_error: ConfigError | None = None) -> Iterator[Finding]:
    """Yield each check as soon as it is done; none raises. `settings_error`: what was found wrong in the settings."""
    yield Finding("md3", Health.OK, f"{__version__} in {Path(__file__).parents[1]}")
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield Finding("python", Health.OK, f"{platform.python_version()} on {system}")
    for check in (_device_of(device), _pictures, _models, _cache, _extras):
        try:
            yield from check()
        except Md3Error as error:
            yield Finding(check.__name__.strip("_"), Health.BAD, str(error))
    yield _settings(settings_error)


def _device_of(name: str) -> Callable[[], Iterator[Finding]]:
    def device() -> Iterator[Finding]:
        """Yield what torch, the device, its kernels and its memory are, each with its health."""
        try:
            from md3cli.model.engine.load import LARGE_MODEL_BYTES, device_facts
        except ImportError as error:
            yield Finding("torch", Health.BAD, f"cannot be imported: {error}", "pip install --force-reinstall torch")
            return
        facts = device_facts(name)
        yield Finding("torch", Health.OK, facts.torch_version)
        shown = facts.device if facts.name == facts.device else f"{facts.device} ({facts.name})"
        yield Finding("device", Health.OK, f"{shown}, auto dtype {facts.dtype}, {facts.num_threads} CPU threads")
        if facts.kernel_fault is not None:
            yield Finding("kernels", Health.BAD, facts.kernel_fault)
        elif facts.triton:
            yield Finding("kernels", Health.OK, f"triton {facts.triton}")
        text = f"{facts.free_bytes / GIB:.1f} GiB free on {facts.device}"
        if facts.free_bytes >= LARGE_MODEL_BYTES:
            yield Finding("memory", Health.OK, text)
        else:
            advice = "moondream3 needs about 18 GiB in 16 bits, 7 in 4 bits (--quant int4); else take --model tiny"
            yield Finding("memory", Health.NOTE, text, advice)

    return device


def _pictures() -> Iterator[Finding]:
    """Decode a picture in a worker process, as a run does."""
    import tempfile

    from PIL import Image, features

    from md3cli.images.crops import ImageLimits
    from md3cli.images.pool import PicturePool
    from md3cli.records import ImageItem
    from md3cli.run.model_handle import REAL_CROP_CONFIG

    with tempfile.TemporaryDirectory() as folder, PicturePool(1, REAL_CROP_CONFIG, ImageLimits()) as pool:
        path = os.path.join(folder, "test.png")
        Image.new("RGB", (64, 48)).save(path)
        try:
            pool.submit(ImageItem("test.png", path)).result()
        except ImageError as error:
            yield Finding("pictures", Health.BAD, f"the decode worker failed: {error}", "reinstall pillow and numpy")
            return
        except EngineError as error:  # no worker can be started on this system
            text, _, advice = str(error).partition("; ")
            yield Finding("pictures", Health.BAD, text, advice)
            return
    kinds = [name for name in ("jpg", "webp", "avif", "libtiff") if features.check(name)]
    yield Finding("pictures", Health.OK, f"decode workers run; {', '.join(kinds)}, png, gif, bmp")


def _models() -> Iterator[Finding]:
    from md3cli.model.weights.files import lost_link
    from md3cli.model.weights.hub import known_models

    for model in known_models():
        lost = next(filter(None, map(lost_link, sorted(model.path.iterdir()))), None) if model.path else None
        if lost is not None:
            yield Finding(f"model {model.alias}", Health.BAD, lost, f"md3 models pull {model.alias}")
        elif model.path is not None:
            size = f"{(model.num_bytes or 0) / 1e9:.1f} GB" if (model.num_bytes or 0) >= 1e8 else "small"
            yield Finding(f"model {model.alias}", Health.OK, f"{size}, {model.path}")
        elif model.source == IN_PACKAGE:
            advice = "pip install --force-reinstall md3cli"
            yield Finding(f"model {model.alias}", Health.BAD, "this installation lacks it", advice)
        else:
            yield Finding(f"model {model.alias}", Health.NOTE, "not on this machine", f"md3 models pull {model.alias}")


def _cache() -> Iterator[Finding]:
    from md3cli.model.weights.hub import cache_folder

    for name, folder in (("weights", Path(cache_folder())), ("cache", user_cache_dir())):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(existing, os.W_OK):
            yield Finding(name, Health.BAD, f"{folder} cannot be written", "change its permissions, or --no-cache")
            continue
        free = shutil.disk_usage(existing).free
        text = f"{folder}, {free / 1e9:.0f} GB free"
        advice = "" if free >= LOW_DISK_BYTES else "too little for moondream3 and its cache; make room"
        yield Finding(name, Health.NOTE if advice else Health.OK, text, advice)


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            text = f"not installed ({', '.join(missing)})"
            yield Finding(f"extra {extra}", Health.NOTE, text, f"pip install 'md3cli[{extra}]'")
        else:
            yield Finding(f"extra {extra}", Health.OK, "installed")


def _settings(error: ConfigError | None) -> Finding:
    if error is not None:
        return Finding("settings", Health.BAD, str(error), f"mend {CONFIG_FILE} or the environment")
    layers = read_layers(os.environ, Path.cwd())
    origins = [layer.origin for layer in layers if layer.common or layer.tables]
    names = [f"{ENV_PREFIX}*" if origin == ENV_PREFIX else origin for origin in origins]
    return Finding("settings", Health.OK, ", ".join(names) or "none besides the defaults")


@app.command()
def doctor(
    ctx: typer.Context,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="The device to look at: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of text.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours; so does NO_COLOR=1.")] = False,
) -> None:
    """What works here, and what to do about the rest; status 1 where a run could not work.

    Examples:
        md3 doctor
        md3 doctor --device cuda --json
    """
    from md3cli.console import show_finding

    is_well = True
    for finding in diagnose(device, settings_error=ctx.obj):
        is_well &= finding.health is not Health.BAD
        if as_json:
            sys.stdout.write(json.dumps(asdict(finding), ensure_ascii=False) + "\n")
        else:
            show_finding(finding.name, finding.health, finding.text, finding.advice, has_color=not no_color)
    if not is_well:
        raise typer.Exit(1)
