"""The model of a run, found but not loaded: the road's one way into model/.

`find_model` reads headers only, so a dry run, and a run whose records are all there, load neither weights nor torch.
Knows nothing of pictures, journals or shards.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

from md3cli.config import ModelOptions
from md3cli.errors import CheckpointError, RequestError
from md3cli.images.crops import CropConfig, Cutter
from md3cli.records import Answer, Job, Request, RunIdentity

if TYPE_CHECKING:
    from md3cli.model.engine.engine import Engine
    from md3cli.model.engine.prompts import Prompts
    from md3cli.model.network.config import ModelConfig
    from md3cli.model.weights.hub import ModelFiles

TINY_KINDS = "circle, square, triangle, star, cross, heart, moon, diamond"
_TINY_WORDS = f"""{TINY_KINDS}, shape, circles, squares, triangles, stars, crosses, hearts, moons, diamonds, shapes
    red yellow green cyan blue purple black white coloured colored colour color colours colors
    a an and any are at does do have how in is it know many of on or the there these this that what where which who you
    above below left leftmost right rightmost box corner corners point points side sides image picture background
"""  # all that the embedded model was asked in its training, and small words
_WORD, _PLACEHOLDER = re.compile(r"[^\W\d_]+"), re.compile(r"\{\w*\}")

REAL_CROP_CONFIG = CropConfig(crop_size=378, patch_size=14, overlap_margin=4, max_crops=12)


class Model:
    """A model whose headers have been read.

    Attributes:
        identity: what it adds to the ids of records.
        crop_config: how it wants pictures cut.
    """

    def __init__(self, options: ModelOptions, identity: RunIdentity, config: ModelConfig, files: ModelFiles) -> None:
        self.identity, self.crop_config = identity, config.vision.crop_config
        self._options, self._config, self._files = options, config, files

    def refusal_of(self, request: Request) -> str | None:
        """Say why this model can do a request for no picture at all; None where it can."""
        try:
            self._prompts.check_skill(request)
        except RequestError as error:
            return str(error)
        return None

    @cached_property
    def _prompts(self) -> Prompts:
        from md3cli.model.engine.prompts import Prompts, Tokenizer

        tokenizer = Tokenizer.load(self._files.tokenizer_file, self._config)
        return Prompts(self._config, tokenizer, self._files.name)

    def load(self) -> Engine:
        """Load the weights.

        Raises:
            Md3Error: it cannot be loaded, or cannot run here.
        """
        from md3cli.model.engine.load import load_engine

        engine = load_engine(self._options)
        assert engine.crop_config == self.crop_config
        assert engine.identity == self.identity
        return engine


class LazyEngine:
    """The engine of a model, loaded when the first request is ready.

    Attributes:
        loaded: the engine; None before `load`.
        batch_sizes: the planned one, then each smaller one that memory asked for; empty before `load`.
        is_loading: whether `load` is under way; other threads may ask.
        load_s: seconds that loading took.
    """

    def __init__(self, model: Model, while_loading: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        """`while_loading` is entered around the loading."""
        self.loaded: Engine | None = None
        self.batch_sizes: list[int] = []
        self.is_loading = False
        self.load_s = 0.0
        self._model, self._while_loading = model, while_loading

    def load(self) -> Engine:
        """Return the engine, loaded now if it was not."""
        if self.loaded is None:
            started = time.monotonic()
            self.is_loading = True
            with self._while_loading():
                self.loaded = self._model.load()
            self.is_loading = False
            self.load_s = time.monotonic() - started
            self.batch_sizes.append(self.loaded.batch_size)
        return self.loaded

    @property
    def batch_size(self) -> int:
        """Requests in flight at a time; 0 before it is loaded."""
        return self.batch_sizes[-1] if self.batch_sizes else 0

    @property
    def is_on_gpu(self) -> bool:
        """Whether it is loaded, and on a CUDA device, whose work needs cores of the host, too."""
        return self.loaded is not None and self.loaded.device.startswith("cuda")

    @property
    def cutter(self) -> Cutter | None:
        """What cuts pictures where it runs; None where decode workers do, or it is not loaded."""
        return self.loaded.cutter if self.loaded is not None else None

    @property
    def wants_more(self) -> bool:
        """Whether taking in more helps to fill the next batches."""
        return self.loaded is None or self.loaded.wants_more

    @property
    def has_work(self) -> bool:
        """Whether something is taken in and not answered."""
        return self.loaded is not None and self.loaded.has_work

    def add(self, job: Job) -> None:
        """Take a job in."""
        self.load().add(job)

    def step(self) -> Sequence[Answer]:
        """Do the next piece of work and return what finished, in any order."""
        engine = self.load()
        answers = engine.step()
        if engine.batch_size != self.batch_size:
            self.batch_sizes.append(engine.batch_size)
        return answers

    def stage_seconds(self) -> Mapping[str, float]:
        """Return where the time went so far; nothing before it is loaded."""
        return self.loaded.stage_seconds() if self.loaded is not None else {}


def find_model(options: ModelOptions, tell: Callable[[str], None] | None = None) -> Model:
    """Find the model named by `options`, fetched where that is needed and allowed; `tell` hears of that before it is.

    Raises:
        CheckpointError: there is none, or its headers make no model.
        OutputError: there is too little room for it.
    """
    from md3cli.model.weights.hub import resolve_model
    from md3cli.model.weights.plan import plan_checkpoint

    files = resolve_model(
        options.model, revision=options.revision, tokenizer=options.tokenizer, offline=options.offline, tell=tell
    )
    identity = options.identity(files.identity)
    return Model(options, identity, plan_checkpoint(files.path).config, files)


def check_skills(model: Model, requests: Sequence[Request]) -> None:
    """Refuse before anything is written what `model` would fail for every picture alike.

    Raises:
        CheckpointError: it cannot do one of the `requests`.
    """
    for request in requests:
        refusal = model.refusal_of(request)
        if refusal is not None:
            raise CheckpointError(f"{refusal}; choose another --model")


def words_beyond(options: ModelOptions, requests: Sequence[Request]) -> str | None:
    """Say which words of the `requests` the embedded model cannot know; None for other models, and where it may."""
    from md3cli.model.weights.hub import DEFAULT_MODEL, TINY

    if options.model != TINY:
        return None
    prompts = (_PLACEHOLDER.sub("", request.prompt or "") for request in requests)
    words = dict.fromkeys(word for prompt in prompts for word in _WORD.findall(prompt.lower()))
    known = frozenset(_WORD.findall(_TINY_WORDS))
    unknown = [f"'{word}'" for word in words if word not in known]
    if not unknown:
        return None
    more = f" and {len(unknown) - 3} more words" if len(unknown) > 3 else ""
    return (
        f"{TINY} knows coloured shapes ({TINY_KINDS}), not {', '.join(unknown[:3])}{more}; "
        f"real pictures need --model {DEFAULT_MODEL}"
    )


def crop_config_without_network(options: ModelOptions) -> CropConfig:
    """Return how the model named by `options` cuts pictures where its files are here, else how the real one does."""
    from md3cli.model.weights.files import find_weight_files
    from md3cli.model.weights.hub import resolve_model
    from md3cli.model.weights.plan import read_config

    try:
        files = resolve_model(options.model, revision=options.revision, offline=True)
        return read_config(find_weight_files(files.path)).vision.crop_config
    except CheckpointError:
        return REAL_CROP_CONFIG
