"""The Python face: `Moondream`, with the names, arguments and results of the original model's class.

Scripts written for the original run unchanged. One difference is on purpose: the default
temperature is 0 (the original's 0.5), so that the same picture gives the same labels.

Text that grows token by token, cut where it can be shown: at spaces, line ends and CJK characters.

A piece is never taken back: what could still change with the next token (an unfinished word, half
of a multi-byte character) is held until it cannot. The pieces joined are the text, up to the
decoding starting over after a line end.
Source: Moondream 3 specification, section 12; the rule is that of transformers' TextIteratorStreamer.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from md3cli.config import ModelOptions
from md3cli.errors import ConfigError, EngineError, ImageError, RequestError
from md3cli.images.crops import PreparedImage
from md3cli.model.api_requests import (
    Asked,
    ImageLike,
    SpatialRefs,
    picture_words,
    prepare_picture,
    read_argument,
    read_flag,
    read_prompt,
    read_refs,
    read_request,
    read_settings,
    result_of,
    shown,
)
from md3cli.model.engine.answers import reasoning_result
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.generation import EncodedImage, Generation
from md3cli.model.engine.load import load_engine
from md3cli.records import Answer, ImageFacts, Job, RecordDict, Request, RowFailure, Task
from md3cli.source.requests import check_request

_CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x2F800, 0x2FA1F))


def _is_cjk(char: str) -> bool:
    code = ord(char)
    return any(first <= code <= last for first, last in _CJK)


class TextStream:
    """Feed ids with `push`, take the pieces it returns, and the rest from `finish`."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # characters of the decoded ids already given out

    def push(self, token: int) -> str:
        """The text that is safe to show now; often empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\n"):
            piece = text[self._shown :]
            self._ids, self._shown = [], 0
            return piece
        end = len(text) if text and _is_cjk(text[-1]) else text.rfind(" ") + 1
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def finish(self) -> str:
        """What was held back; the stream is empty afterwards."""
        piece = self._decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return piece


def _option(name: str, value: object) -> str | None:
    """The text of an option of `Moondream.load`; None where it is left out."""
    if value is not None and not isinstance(value, str | Path):
        raise ConfigError(f"{name} is {shown(value)}, expected text")
    return None if value is None else str(value)


class Moondream:
    """A loaded model that answers one question at a time, or many through `annotate`.

    A PIL image is used as it is (no rotation by EXIF; alpha dropped); a path is opened like the
    commands open it. `settings` takes temperature, top_p, max_tokens, max_objects and seed.
    Every method raises `RequestError` for a request that makes no sense and `ImageError` for a
    picture that cannot be read.
    """

    def __init__(self, engine: Engine, options: ModelOptions | None = None) -> None:
        self.engine = engine
        self._options = options
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
    ) -> Self:
        """Load weights by alias (`moondream3`, `moondream3.1`, `tiny`), repository id or local path.

        Raises:
            CheckpointError: they cannot be had or do not fit.
            ConfigError: a device, dtype or setting that is not to be had here.
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
            cache=False,
        )
        return cls(load_engine(options), options)

    def encode_image(self, image: ImageLike, settings: Mapping[str, Any] | None = None) -> EncodedImage:
        """Encode once, ask often: the result can be given wherever an image can."""
        read_settings(settings)
        prepared = self._prepare(image)
        if isinstance(prepared, EncodedImage):
            return prepared
        found = self.engine.encoder.find(prepared)
        embeddings = found if found is not None else self.engine.encoder.encode([prepared])[0]
        on_host = embeddings.cpu()
        self.engine.encoder.save_encoded()
        return EncodedImage(on_host, prepared.width, prepared.height, prepared.sha256)

    def caption(
        self,
        image: ImageLike,
        length: str = "normal",
        stream: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`{"caption": text}`; with `stream` the text is a generator of pieces."""
        wanted = read_argument("length", length)
        request = Request(Task.CAPTION, length=wanted, **read_settings(settings))
        return self._text(image, request, "caption", stream)

    def query(
        self,
        image: ImageLike | None = None,
        question: str | None = None,
        reasoning: bool = True,
        spatial_refs: SpatialRefs | None = None,
        stream: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`{"answer": text}`, and with `reasoning` `"reasoning": {"text", "grounding", …}`; no image is text only."""
        refs = read_refs(spatial_refs)
        request = Request(
            Task.QUERY,
            read_prompt("question", question),
            reasoning=read_flag("reasoning", reasoning),
            spatial_refs=refs,
            **read_settings(settings),
        )
        return self._text(image, request, "answer", stream)

    def detect(self, image: ImageLike, object: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`{"objects": [{"x_min", "y_min", "x_max", "y_max", …}]}`, 0-1 of the picture, unclamped."""
        return self._answer(image, Request(Task.DETECT, read_prompt("object", object), **read_settings(settings)))

    def point(
        self,
        image: ImageLike,
        object: str,
        settings: Mapping[str, Any] | None = None,
        spatial_refs: SpatialRefs | None = None,
    ) -> dict[str, Any]:
        """`{"points": [{"x", "y", …}]}`."""
        refs = read_refs(spatial_refs)
        return self._answer(
            image, Request(Task.POINT, read_prompt("object", object), spatial_refs=refs, **read_settings(settings))
        )

    def segment(
        self,
        image: ImageLike,
        object: str,
        settings: Mapping[str, Any] | None = None,
        spatial_refs: SpatialRefs | None = None,
    ) -> dict[str, Any]:
        """`{"segments": [{"svg_path", "bbox", …}]}`; the path is in units of its box."""
        refs = read_refs(spatial_refs)
        return self._answer(
            image, Request(Task.SEGMENT, read_prompt("object", object), spatial_refs=refs, **read_settings(settings))
        )

    def annotate(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[RecordDict]:
        """Records for many requests, batched, in the order of the requests.

        Each request is a mapping: `image` (anything an image can be, or None), `task`, `prompt`, and
        optionally `length`, `reasoning`, `spatial_refs`, the settings, `name` (what the record calls
        the picture) and `meta`. A request that fails becomes an error record.

        Raises:
            RequestError: `requests` is no series of requests.
        """
        if isinstance(requests, Mapping | str | bytes) or not isinstance(requests, Iterable):
            raise RequestError(f"requests are {shown(requests)}, expected a list or another series of mappings")
        asked: dict[int, Asked] = {}
        order: deque[int] = deque()
        repeats: Counter[str] = Counter()
        for answer in self.engine.run(self._jobs(requests, asked, order)):
            self._answers[answer.key] = answer
            yield from self._finished_records(asked, order, repeats)
        yield from self._finished_records(asked, order, repeats)  # failures that no answer came after

    def compile(self) -> None:
        """Compile the forward passes; worth it for long runs on a GPU. Without a compiler it warns and goes on.

        Weights are read again: those of an eager engine may lie in a form no compiler can follow. What was begun,
        as streams that are still read, is answered first.

        Raises:
            EngineError: the model was not made by `Moondream.load`.
        """
        if self._options is None:
            raise EngineError("only a model that was made by Moondream.load can be compiled")
        if self._options.compile:
            return
        while self.engine.has_work:
            self._step()
        self._options = replace(self._options, compile=True)
        del self.engine  # most GPUs hold one model, not two
        self.engine = load_engine(self._options)

    # -- one request ------------------------------------------------------------------------------

    def _prepare(self, image: ImageLike) -> PreparedImage | EncodedImage:
        if isinstance(image, EncodedImage):
            return image
        background = self.engine.identity.background
        return prepare_picture(image, self.engine.crop_config, None if background == "none" else background)

    def _answer(self, image: ImageLike | None, request: Request) -> dict[str, Any]:
        job = self._job(image, request)
        self.engine.add(job)
        return result_of(self._finish(job.key))

    def _job(self, image: ImageLike | None, request: Request) -> Job:
        try:
            return Job(next(self._keys), None if image is None else self._prepare(image), request)
        except ImageError as error:
            raise ImageError(error.type, f"{picture_words(image)}: {error}") from error

    def _step(self) -> None:
        self._answers.update((answer.key, answer) for answer in self.engine.step())

    def _finish(self, key: int) -> Answer:
        while key not in self._answers:
            self._step()
        return self._answers.pop(key)

    def _text(self, image: ImageLike | None, request: Request, key: str, stream: bool) -> dict[str, Any]:
        if not read_flag("stream", stream):
            return self._answer(image, request)
        return self._stream(self._job(image, request), key)

    def _stream(self, job: Job, key: str) -> dict[str, Any]:
        """Run until the answer begins, then hand out a generator for the rest."""
        generation = self.engine.add(job)
        if generation is None:
            return result_of(self._finish(job.key))  # raises: what is not taken in has failed
        while job.key not in self._answers and not generation.answer.token_ids:
            self._step()
        if job.key in self._answers and self._answers[job.key].failure is not None:
            return result_of(self._answers.pop(job.key))
        result: dict[str, Any] = {key: self._pieces(job.key, generation)}
        if generation.reasoning is not None:
            result["reasoning"] = reasoning_result(generation, self.engine.tokenizer)
        return result

    def _pieces(self, key: int, generation: Generation) -> Iterator[str]:
        text, num_shown = TextStream(self.engine.tokenizer.decode), 0
        is_done = False
        while not is_done:
            is_done = key in self._answers
            ids = generation.answer.token_ids
            new = ids[num_shown:]  # none while a row that was started again says the same once more
            num_shown += len(new)  # before the pieces go out: other calls may step the engine meanwhile
            yield from filter(None, map(text.push, new))
            if not is_done:
                self._step()
        result_of(self._answers.pop(key))
        if piece := text.finish():
            yield piece

    # -- many requests ----------------------------------------------------------------------------

    def _jobs(self, requests: Iterable[Mapping[str, Any]], asked: dict[int, Asked], order: deque[int]) -> Iterator[Job]:
        for row in requests:
            entry, key = Asked(row), next(self._keys)
            asked[key] = entry
            order.append(key)
            try:
                entry.request = read_request(row)
                check_request(entry.request, has_image=entry.item is not None)
                image = None if entry.item is None else self._prepare(row["image"])
            except (RequestError, ImageError) as error:
                self._answers[key] = Answer(key, failure=RowFailure(error.type, str(error)))
                continue
            if image is not None:
                entry.facts = ImageFacts(image.width, image.height, image.sha256)
            yield Job(key, image, entry.request)

    def _finished_records(
        self, asked: dict[int, Asked], order: deque[int], repeats: Counter[str]
    ) -> Iterator[RecordDict]:
        while order and order[0] in self._answers:
            key = order.popleft()
            yield asked.pop(key).record(self._answers.pop(key), self.engine.identity, repeats)
