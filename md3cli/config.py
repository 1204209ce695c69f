"""What a run is to do: one frozen `RunConfig`, made at the edge and passed down by piece.

Plain values only: no parser, no environment, nothing heavy to import. Where the values come from
is settings.py's business (files, environment) and the commands' (flags, defaults).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from md3cli.records import Request, RunIdentity, request_fields
from md3cli.refine.refinement import Refinement

DEFAULT_MODEL = "moondream3"
DEFAULT_PAD, MOST_PAD = 0.1, 10.0  # room around a region, as a share of its width and height


@dataclass(frozen=True, slots=True)
class ColumnOptions:
    """What is made of what a row brings: `--map`, `--const`, `--template` and `--regions`, the values as typed.

    `renamed` has (COLUMN, NAME): the manifest's NAME is known as COLUMN. `constants` has (COLUMN, VALUE).
    `is_template`: the command's prompts are filled from the row. `region_pad`: each box of a COCO file is asked about,
    with so much room around it, a share of its own size; None: pictures are.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, str], ...] = ()
    is_template: bool = False
    region_pad: float | None = None

    @property
    def fills_prompts(self) -> bool:
        """Whether a record's prompt may be none of the command's."""
        return self.is_template or self.region_pad is not None

    def identity(self) -> dict[str, Any]:
        """Return what a resume must share, by the options' names; nothing of an option that is not used."""
        parts = {
            "map": [f"{column}={name}" for column, name in self.renamed],
            "const": [f"{column}={value}" for column, value in self.constants],
            "template": self.is_template,
            "regions": self.region_pad is not None,
        }
        return {name: value for name, value in parts.items() if value}


@dataclass(frozen=True, slots=True)
class Everything:
    """What `--everything` does with a list of what is there: the names in it, `most_names` at most, are detected.

    `listing` asks for the list; its answer or caption is taken apart. `template` is asked of each name, which is its
    prompt then. `vocabulary`: the only names; None: all. `may_rows_ask`: rows may ask for names, or for lists, of their
    own.
    """

    listing: Request
    template: Request
    vocabulary: tuple[str, ...] | None = None
    most_names: int = 20
    may_rows_ask: bool = False

    def asking(self, name: str) -> Request:
        """Return the request that looks for a name."""
        return replace(self.template, prompt=name)

    def known(self) -> tuple[Request, ...]:
        """Return the requests that may come of a list as far as they are known: those of the vocabulary."""
        return tuple(map(self.asking, self.vocabulary or ()))

    def identity(self) -> dict[str, Any]:
        """Return what a resume must share beside the request of the list, by the options' names."""
        names = None if self.vocabulary is None else list(self.vocabulary)
        asked = request_fields(self.template)
        settings: dict[str, Any] = {name: asked[name] for name in ("max_objects", "tiles") if name in asked}
        return {"everything": True, "vocabulary": names, "max_names": self.most_names, **settings}


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Which pictures: INPUT as typed (none for a text-only query) and what narrows it.

    `shard` (i, n) keeps the images whose name hashes to i modulo n. `limit` counts rows. `root` is a folder or an
    address; `remote` lets manifests on the disk name addresses. `own_files` are the files that the command writes
    (links followed), which a walk passes over.
    """

    inputs: tuple[str, ...] = ()
    recursive: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int | None = None
    shard: tuple[int, int] | None = None
    root: Path | str | None = None
    remote: bool = False
    offline: bool = False
    follow_links: bool = False
    own_files: frozenset[str] = frozenset()
    columns: ColumnOptions = ColumnOptions()


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which weights, on what, and how they are run; values as the options of the same names.

    `batch_size` None fits memory, `compile` None is no, `max_context` None is config.json's. `device`, `dtype` and
    `quant` stay as given (`auto`, `stored`).
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quant: str = "stored"
    quant_vision: str = "none"
    batch_size: int | None = None
    compile: bool | None = None
    cache: bool = True
    cache_dir: Path | None = None
    cache_size: int = 20 * 10**9
    max_context: int | None = None
    offline: bool = False
    background: str = "none"

    def identity(self, model: str) -> RunIdentity:
        """Return what of the options goes into every record's id; `model` is name@revision."""
        quant = self.quant if self.quant_vision == "none" else f"{self.quant}, vision {self.quant_vision}"
        return RunIdentity(model, self.dtype, quant, self.adapter or "", self.background)


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How pictures are opened: what is refused unread, how long one may take, how many at a time (None: the cores).

    Of remote ones: how long an attempt to fetch may take, and who may be spoken to inside private networks, those
    `named_hosts` or everybody; `root` is a --root that is an address, which no server may send out of.
    """

    max_pixels: int = 2**28
    max_file_size: int = 2**30
    timeout_s: float = 20.0
    workers: int | None = None
    fetch_timeout_s: float = 30.0
    named_hosts: tuple[str, ...] = ()
    may_fetch_private: bool = False
    root: str = ""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where records go. `formats` empty leaves the choice to `path`'s suffix; `is_folder`: typed with a slash.

    `address` is OUTPUT in a bucket; then `path` is where its files are made on this machine. `add`: what is asked joins
    what OUTPUT has.
    """

    path: Path | None = None
    is_folder: bool = False
    formats: tuple[str, ...] = ()
    overwrite: bool = False
    retry_failed: bool = False
    add: bool = False
    address: str | None = None

    @property
    def shown(self) -> str:
        """Return OUTPUT as the user knows it; empty for stdout."""
        return self.address or str(self.path or "")


@dataclass(frozen=True, slots=True)
class FailOn:
    """When failed records make the exit status 3: above `share` (0-1) of all; `none` is above 1."""

    share: float = 0.0

    def is_met(self, failed: int, total: int) -> bool:
        return failed > self.share * total

    def __str__(self) -> str:
        return "none" if self.share >= 1 else "any" if self.share == 0 else f"{self.share:.4%}"


@dataclass(frozen=True, slots=True)
class EstimateOptions:
    """How `md3 estimate` samples, and the prices it reckons with; `num_opened` bounds the pictures opened to count."""

    num_opened: int = 2000
    sample_per_bucket: int = 16
    price_per_gpu_hour: float | None = None
    price_per_1000: float | None = None
    is_json: bool = False


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """How many processes run it, where. All at their defaults: this process alone, without a run folder.

    `workers_per_device` None is one. `rank` of `world_size` processes that a scheduler started shares one run
    folder with the others. `engine` None is `local`; naming one asks for a run folder.
    """

    devices: tuple[str, ...] = ()
    workers_per_device: int | None = None
    rank: int = 0
    world_size: int = 1
    engine: str | None = None
    shard_size: int | None = None
    ray_address: str | None = None

    @property
    def needs_run_folder(self) -> bool:
        return bool(self.devices or self.workers_per_device or self.world_size > 1 or self.engine or self.shard_size)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything one annotating run needs to know.

    `command` and `argv` (with the program's name) are for `run.json` and the line that says how to go
    on; `requests` is what is asked of every image; a manifest may override it row by row, with the
    settings of `defaults` where the command makes no request of its own. With `estimate` nothing is
    written: the run's time and size are told instead. `then` is asked about each object that is found, with `{label}`
    in its prompts, and `pad` of room around it. `allow_empty`: an INPUT without anything in it is no error.
    `refinement` names what is found and says what of it is shown; no id depends on it. `hides_unsure`: its least score
    stood in the command line, so that redacted pictures may leave objects bare. `missing_only` is a ground truth: of a
    picture only classes without labels there are asked. Like what else narrows INPUT, it is nothing that a resume must
    share. `everything`: the names in the answers of its request are asked next.
    """

    command: str
    source: SourceSpec
    requests: tuple[Request, ...]
    defaults: Request
    model: ModelOptions = field(default_factory=ModelOptions)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    fail_on: FailOn = field(default_factory=FailOn)
    scale: ScaleOptions = field(default_factory=ScaleOptions)
    allow_empty: bool = False
    is_dry_run: bool = False
    estimate: EstimateOptions | None = None
    then: tuple[Request, ...] = ()
    pad: float = DEFAULT_PAD
    refinement: Refinement = field(default_factory=Refinement)
    hides_unsure: bool = False
    missing_only: Path | None = None
    everything: Everything | None = None
    argv: tuple[str, ...] = ()

    @property
    def may_be_asked(self) -> tuple[Request, ...]:
        """The requests of the command, and those that may come of their records as far as they are known."""
        listed = () if self.everything is None else self.everything.known()
        return (*self.requests, *self.then, *listed)

    def identity_of_rows(self) -> dict[str, Any]:
        """Return what, beside requests and model, a resume must share; nothing of an option that is not used."""
        parts = self.source.columns.identity()
        if self.then:
            parts["then"] = [request_fields(request) for request in self.then]
        if self.then or self.pad != DEFAULT_PAD:
            parts["pad"] = self.pad
        if self.everything is not None:
            parts |= self.everything.identity()
        return parts
