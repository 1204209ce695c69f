"""The Python face: `Moondream`, with the names, arguments and results of the original model's class.

Scripts written for the original run unchanged. One difference is on purpose: the default temperature is 0 (the
original's is 0.5), so that the same picture gives the same labels. `api_requests.py` reads what a caller hands in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch

from md3cli.config import ModelOptions
from md3cli.errors import ConfigError, ImageError, RequestError, UsageError
from md3cli.images.crops import PreparedImage
from md3cli.model.api_annotate import Annotating
from md3cli.model.api_loading import read_device_map, read_dtype
from md3cli.model.api_requests import (
    ImageLike,
    Settings,
    SpatialRefs,
    describe_picture,
    describe_value,
    prepare_picture,
    read_argument,
    read_flag,
    read_prompt,
    read_refs,
    read_settings,
)
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.generation import EncodedImage, Generation, reasoning_result
from md3cli.model.engine.load import load_engine
from md3cli.model.engine.ready import make_ready
from md3cli.records import Answer, Job, RecordDict, Request, Task

SEGMENT_SHAPES = ("md3", "vendor")
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None
_CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x2F800, 0x2FA1F))


class TextStream:
    """Text that grows token by token, cut where it can be shown: at spaces, line ends and CJK characters.

    A piece is never taken back: text that the next token could change (an unfinished word, half of a multi-byte
    character) is held back. The pieces joined are the text, except that decoding starts over after a line end.
    Source: Moondream 3 specification, section 12; the rule is that of transformers' TextIteratorStreamer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_shown = 0  # characters of the decoded ids already given out

    def push(self, token: int) -> str:
        """Take the next id; return the text that is safe to show now, which is often empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\n"):
            piece = text[self._num_shown :]
            self._ids, self._num_shown = [], 0
            return piece
        is_cjk = bool(text) and any(first <= ord(text[-1]) <= last for first, last in _CJK)
        end = len(text) if is_cjk else text.rfind(" ") + 1
        piece = text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return piece

    def finish(self) -> str:
        """Return the text that was held back; the stream is empty afterwards."""
        piece = self._decode(self._ids)[self._num_shown :]
        self._ids, self._num_shown = [], 0
        return piece


class Skills:
    """The original class's methods; `_face` gives the `Moondream` that answers them."""

    def _face(self) -> Moondream:
        raise NotImplementedError

    def encode_image(self, image: ImageLike, settings: Settings = None) -> EncodedImage:
        """Encode an image once, to ask about it often; the result can be given wherever an image can."""
        read_settings(settings)
        return self._face()._encode(image)

    def caption(
        self, image: ImageLike, length: str = "normal", stream: bool = False, settings: Settings = None
    ) -> dict[str, Any]:
        """Return `{"caption": text}`; with `stream` the text comes as a generator of pieces."""
        wanted = read_argument("length", length)
        request = Request(Task.CAPTION, length=wanted, **read_settings(settings))
        return self._face()._text(image, request, "caption", stream)

    def query(
        self,
        image: ImageLike | None = None,
        question: str | None = None,
        reasoning: bool = True,
        spatial_refs: SpatialRefs | None = None,
        stream: bool = False,
        settings: Settings = None,
    ) -> dict[str, Any]:
        """Return `{"answer": text}`, and with `reasoning` `"reasoning": {"text", "grounding", …}`.

        Without an image the model answers from the text alone.
        """
        refs, words = read_refs(spatial_refs), read_prompt("question", question)
        thinks = read_flag("reasoning", reasoning)
        request = Request(Task.QUERY, words, reasoning=thinks, spatial_refs=refs, **read_settings(settings))
        return self._face()._text(image, request, "answer", stream)

    def detect(self, image: ImageLike, object: str, settings: Settings = None) -> dict[str, Any]:
        """Return `{"objects": [{"x_min", "y_min", "x_max", "y_max", …}]}`, 0-1 of the picture, unclamped."""
        return self._find(Task.DETECT, image, object, settings)

    def point(
        self, image: ImageLike, object: str, settings: Settings = None, spatial_refs: SpatialRefs | None = None
    ) -> dict[str, Any]:
        """Return `{"points": [{"x", "y", …}]}`."""
        return self._find(Task.POINT, image, object, settings, spatial_refs)

    def segment(
        self,
        image: ImageLike,
        object: str,
        settings: Settings = None,
        spatial_refs: SpatialRefs | None = None,
        shape: str = "md3",
    ) -> dict[str, Any]:
        """Return `{"segments": [{"svg_path", "bbox", …}]}`, one segment or none; the path is in units of its box.

        With `shape="vendor"` the result is that of the vendor's client `moondream`: `{"path", "bbox"}` of the segment,
        and `{"path": "", "bbox": None}` where nothing is found.
        """
        if shape not in SEGMENT_SHAPES:
            raise RequestError(f"shape is {describe_value(shape)}, expected {' or '.join(SEGMENT_SHAPES)}")
        result = self._find(Task.SEGMENT, image, object, settings, spatial_refs)
        if shape == "md3":
            return result
        found = result["segments"][0] if result["segments"] else {"svg_path": "", "bbox": None}
        return {"path": found["svg_path"], "bbox": found["bbox"]}

    def _find(
        self, task: Task, image: ImageLike, object: str, settings: Settings, spatial_refs: SpatialRefs | None = None
    ) -> dict[str, Any]:
        refs = read_refs(spatial_refs)
        request = Request(task, read_prompt("object", object), spatial_refs=refs, **read_settings(settings))
        return self._face()._answer(image, request)


def _option(name: str, value: object) -> str | None:
    """Return the text of an option of `Moondream.load`; None where it is left out."""
    if value is not None and not isinstance(value, str | Path):
        raise ConfigError(f"{name} is {describe_value(value)}, expected text")
    return None if value is None else str(value)


def _batch_size(value: object) -> int | None:
    """Return the batch size given to `Moondream.load`; None where it is left out."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"batch_size is {describe_value(value)}, expected a whole number from 1 on")
    return value


class Moondream(Skills):
    """A loaded model that answers one question at a time, or many through `annotate`.

    A PIL image is used as it is (no rotation by EXIF, alpha dropped); a path is opened as the
    commands open it. `settings` takes temperature, top_p, max_tokens, max_objects and seed.
    Every method raises `RequestError` for a request that makes no sense, and `ImageError` for a
    picture that cannot be read.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._keys = itertools.count()
        self._answers: dict[int, Answer] = {}  # of calls still open: a stream may be read between other calls

    @classmethod
    def load(
        cls,
        model: str | Path = "moondream3",
        *,
        device: str = "auto",
        dtype: str = "auto",
        quant: str | None = None,
        quant_vision: str = "none",
        adapter: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """Load weights by alias (`moondream3`, `moondream3.1`, `tiny`), repository id or local path.

        `batch_size` is the most requests in flight at a time, None what memory holds, which is best for `annotate`. A
        GPU answers questions that come one by one sooner with 8: passes are as large as the batch asks for.

        Raises:
            CheckpointError: the weights cannot be had, or do not fit.
            ConfigError: this machine has no such device, dtype or setting.
        """
        options = ModelOptions(
            model=_option("model", model) or "",
            revision=_option("revision", revision),
            tokenizer=_option("tokenizer", tokenizer),
            adapter=_option("adapter", adapter),
            device=_option("device", device) or "auto",
            dtype=_option("dtype", dtype) or "auto",
            quant=_option("quant", quant) or "stored",
            quant_vision=_option("quant_vision", quant_vision) or "none",
            batch_size=_batch_size(batch_size),
            cache=False,
        )
        return cls(load_engine(options))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = "moondream3",
        *,
        trust_remote_code: bool = False,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: DeviceMap = None,
        **options: Any,
    ) -> Self:
        """Load weights with transformers' arguments, as the model's card does; further ones are those of `load`.

        Args:
            trust_remote_code: changes nothing: whether True or False, no code of a checkpoint is run.
            dtype: `"bfloat16"`, `torch.bfloat16`, …; `"auto"` and None are as `load`'s `auto`.
            torch_dtype: the older name of `dtype`.
            device_map: one device for the whole model: `"cuda"`, `{"": "cuda:1"}`, `{"": 0}`; None and `"auto"` are
                the first GPU, or the CPU.

        Raises:
            UsageError: an argument is unknown, or said twice.
            CheckpointError: the weights cannot be had, or do not fit.
            ConfigError: this machine has no such device, dtype or setting, or `device_map` names several devices.
        """
        known = [name for name in signature(cls.load).parameters if name != "model"]
        unknown = [name for name in options if name not in known]
        if unknown:
            taken = ", ".join(["trust_remote_code", "device_map", *known])
            raise UsageError(f"from_pretrained takes no {', '.join(unknown)}; it takes {taken}")
        if dtype is not None and torch_dtype is not None:
            raise UsageError("dtype and torch_dtype are one setting; give dtype alone")
        if device_map is not None:
            if "device" in options:
                raise UsageError("device and device_map are one setting; give one of them")
            options["device"] = read_device_map(device_map)
        return cls.load(
            pretrained_model_name_or_path, dtype=read_dtype(torch_dtype if dtype is None else dtype), **options
        )

    def annotate(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[RecordDict]:
        """Yield records for many requests, batched, in the order of the requests.

        Each request is a mapping: `image` (anything an image can be, or None), `task`, `prompt`, and
        optionally `length`, `reasoning`, `spatial_refs`, the settings, `name` (what the record calls
        the picture) and `meta`. A request that fails becomes an error record. `then` of a detect or
        segment is asked about each object found, as `--then` is: a SPEC such as
        `"query:What colour is the {label}?"`, or a list of them; `pad` is the room around an object, 0.1
        of its own width and height. Those records follow that of the request. `tile` of a detect or point
        is as `--tile` is: the side in pixels (at least 378) of overlapping squares in which it looks at the
        picture, too, or `"auto"`; `overlap`, from 0 to less than 1, is the share of it that neighbours have in
        common (0.2).

        Raises:
            RequestError: `requests` is no series of requests.
        """
        if isinstance(requests, Mapping | str | bytes) or not isinstance(requests, Iterable):
            raise RequestError(
                f"requests are {describe_value(requests)}, expected a list or another series of mappings"
            )
        run = Annotating(requests, self._keys, self.engine.identity, self.engine.crop_config)

        def take() -> None:
            for key in [key for key in self._answers if run.is_mine(key)]:
                run.take(self._answers.pop(key))

        for answer in self.engine.run(run.jobs(take)):
            self._answers[answer.key] = answer
            take()
            yield from run.finished()
        take()  # answers that came while something else was asked of the engine
        yield from run.finished()  # failures, too, that no answer came after

    def compile(self) -> None:
        """Make the model ready: when this returns, the next request is as fast as the hundredth.

        On a CPU the decode step of a float32 model is compiled where that is faster on this machine, which takes a
        minute or two; what was found is kept in the user's cache folder, and the next time it takes a second. Where
        it is not faster a warning says so, and nothing is compiled. On a GPU steps are captured already. Requests that
        were begun, as streams that are still read, are answered first. No answer changes.
        """
        while self.engine.has_work:
            self._step()
        make_ready(self.engine, None)

    def _face(self) -> Moondream:
        return self

    def _prepare(self, image: ImageLike) -> PreparedImage | EncodedImage:
        if isinstance(image, EncodedImage):
            return image
        background = self.engine.identity.background
        return prepare_picture(image, self.engine.crop_config, None if background == "none" else background)

    def _encode(self, image: ImageLike) -> EncodedImage:
        prepared, encoder = self._prepare(image), self.engine.encoder
        if isinstance(prepared, EncodedImage):
            return prepared
        found = encoder.find(prepared)
        embeddings = found if found is not None else encoder.encode([prepared])[0]
        on_host = embeddings.cpu()
        encoder.save_encoded()
        return EncodedImage(on_host, prepared.width, prepared.height, prepared.sha256)

    # -- one request ------------------------------------------------------------------------------

    def _answer(self, image: ImageLike | None, request: Request) -> dict[str, Any]:
        job = self._job(image, request)
        self.engine.add(job)
        return self._result(job.key)

    def _job(self, image: ImageLike | None, request: Request) -> Job:
        try:
            return Job(next(self._keys), None if image is None else self._prepare(image), request)
        except ImageError as error:
            raise ImageError(error.type, f"{describe_picture(image)}: {error}") from error

    def _step(self) -> None:
        self._answers.update((answer.key, answer) for answer in self.engine.step())

    def _result(self, key: int) -> dict[str, Any]:
        """Step until the job is answered, and return its result; raise what it failed with."""
        while key not in self._answers:
            self._step()
        answer = self._answers.pop(key)
        if answer.failure is not None:
            raise RequestError(answer.failure.message, answer.failure.type)
        assert answer.result is not None
        return answer.result

    def _text(self, image: ImageLike | None, request: Request, key: str, stream: bool) -> dict[str, Any]:
        """Answer with a text under `key`: whole, or, once it begins, as a generator of the rest."""
        if not read_flag("stream", stream):
            return self._answer(image, request)
        job = self._job(image, request)
        generation = self.engine.add(job)
        if generation is None:
            return self._result(job.key)  # raises: what is not taken in has failed
        while job.key not in self._answers and not generation.answer.token_ids:
            self._step()
        if job.key in self._answers and self._answers[job.key].failure is not None:
            return self._result(job.key)
        result: dict[str, Any] = {key: self._pieces(job.key, generation)}
        if generation.reasoning is not None:
            result["reasoning"] = reasoning_result(generation, self.engine.tokenizer)
        return result

    def _pieces(self, key: int, generation: Generation) -> Iterator[str]:
        text, num_shown = TextStream(self.engine.tokenizer.decode), 0
        is_done = False
        try:
            while not is_done:
                is_done = key in self._answers
                new = generation.answer.token_ids[num_shown:]  # none while a row that was started again catches up
                num_shown += len(new)  # before the pieces go out: other calls may step the engine meanwhile
                yield from filter(None, map(text.push, new))
                if not is_done:
                    self._step()
        except GeneratorExit:  # nobody reads on
            if not self.engine.cancel(key):
                self._answers.pop(key, None)
            raise
        self._result(key)
        if piece := text.finish():
            yield piece
