"""From a request to the token ids the network is fed, and from ids back to text (Moondream 3 specification, 3, 9, 13).

`Tokenizer` wraps the vocabulary: text never becomes a control token, control tokens never become text. `Prompts` knows
the templates of a model and puts a request together; it knows nothing of images or of the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from md3cli.errors import CheckpointError, RequestError
from md3cli.model.network.config import DEFAULT_TEMPLATES, SEGMENT_TEMPLATE, ModelConfig
from md3cli.model.weights.files import misfit
from md3cli.records import CAPTION_LENGTHS, Request, Task
from md3cli.signals import silenced_stderr

SEGMENTING_MODEL = "moondream3.1"  # models of this name segment although their config.json has no template for it

_CONTROL_IDS = {  # as messages call them -> the field of `TokenizerConfig`
    "bos": "bos_id",
    "eos": "eos_id",
    "answer": "answer_id",
    "thinking": "thinking_id",
    "coord": "coord_id",
    "size": "size_id",
    "start of points": "start_ground_points_id",
    "end of grounding": "end_ground_id",
}
_TASKS_WITH_REFS = frozenset({Task.QUERY, Task.POINT, Task.SEGMENT})
_TASKS_WITH_LEADING_SPACE = frozenset({Task.DETECT, Task.POINT})


class Tokenizer:
    """Text to ids and back; plain encoding, no ids added around the text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        # "<|endoftext|>" typed by a user is text: without this it would become the control token.
        backend.encode_special_tokens = True
        self._backend = backend
        self._can_run_away = _has_patterns(backend)
        self._special = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def load(cls, file: Path, config: ModelConfig) -> Tokenizer:
        """Read a tokenizer.json for this model.

        Raises:
            CheckpointError: no such file, damaged, or not the tokenizer of this model.
        """
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file; a Moondream 3 tokenizer is moondream/starmie-v1's tokenizer.json"
            )
        try:
            with silenced_stderr():
                tokenizer = cls(tokenizers.Tokenizer.from_file(str(file)))
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise CheckpointError(
                misfit(file) or f"{file} is no tokenizer.json that can be read: {error!s:.200}"
            ) from error
        tokenizer._check(file, config)
        return tokenizer

    def _check(self, file: Path, config: ModelConfig) -> None:
        control = {name: getattr(config.tokenizer, field) for name, field in _CONTROL_IDS.items()}
        lacking = [f"{name} {id}" for name, id in control.items() if id not in self._special]
        if lacking:
            raise CheckpointError(
                f"{file} lacks special tokens the model needs ({', '.join(lacking)}); give the model's own tokenizer "
                "(moondream/starmie-v1) with --tokenizer"
            )
        if self.size > config.text.vocab_size:
            raise CheckpointError(
                f"{file} has {self.size} entries and the model {config.text.vocab_size}; they do not belong together"
            )

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; a special token's name inside it is encoded as the characters it is made of.

        Raises:
            RequestError: the text is no valid Unicode (half of a surrogate pair), or the vocabulary fails on it.
        """
        try:
            ids = self._encode(text)
            if not self._special.isdisjoint(ids):  # a vocabulary that looks whole words up before it merges
                ids = [id for char in text for id in self._encode(char)]
            return ids
        except (UnicodeError, TypeError) as error:
            raise RequestError("the prompt is no valid Unicode text") from error
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise RequestError(
                f"the tokenizer fails on this prompt ({error!s:.120}); word it otherwise, or give the model's own "
                "tokenizer with --tokenizer"
            ) from error

    def _encode(self, text: str) -> list[int]:
        with self._quiet():
            return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens and ids the vocabulary does not have become nothing.

        Raises:
            RequestError: of type `model`, the vocabulary fails on them.
        """
        try:
            with self._quiet():
                return self._backend.decode(list(ids), skip_special_tokens=True)
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise RequestError(f"the tokenizer cannot put the answer into words ({error!s:.120})", "model") from error

    def _quiet(self) -> AbstractContextManager[None]:
        return silenced_stderr() if self._can_run_away else nullcontext()


def _is_library_error(error: BaseException) -> bool:
    """Return True for what the library raises: exceptions, and panics of Rust, which are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _has_patterns(backend: tokenizers.Tokenizer) -> bool:
    """Return True where a part of the vocabulary searches with regular expressions of the file's own."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    return any(b'"Regex"' in bytes(part.__getstate__()) for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids behind the image prefix or, of a text-only query, all ids with their BOS.

    Where `ids` holds placeholders of spatial references, `coords` (index, value 0-1) and `sizes`
    (index, (width, height)) say what is embedded there instead of the id.
    """

    ids: list[int]
    coords: tuple[tuple[int, float], ...] = ()
    sizes: tuple[tuple[int, tuple[float, float]], ...] = ()


@dataclass(frozen=True, slots=True)
class _Template:
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    reasoning_suffix: tuple[int, ...]


def templates_of(config: ModelConfig, model_name: str) -> dict[str, Any]:
    """Return the templates a model has, by skill, unread: config.json's, the defaults, and what its name stands for.

    A default, taken because config.json says nothing, goes where this vocabulary does not have its words.
    """

    def is_foreign(skill: str, template: Any) -> bool:
        is_default = template is not None and template == DEFAULT_TEMPLATES.get(skill)
        return is_default and any(id >= config.text.vocab_size for ids in template.values() for id in ids)

    found = {skill: given for skill, given in config.tokenizer.templates.items() if not is_foreign(skill, given)}
    if SEGMENTING_MODEL in model_name.lower():
        found.setdefault(Task.SEGMENT, SEGMENT_TEMPLATE)
    return found


class Prompts:
    """The templates of one model, ready to be filled.

    `model_name` decides one thing: whether a config.json that is silent about segment means that
    the model can do it.

    Raises:
        CheckpointError: a template in config.json that is no list of ids of the vocabulary.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, model_name: str = "") -> None:
        self._ids = config.tokenizer
        self._vocab_size = config.text.vocab_size
        self._tokenizer = tokenizer
        raw = templates_of(config, model_name)
        self._captions = self._read_captions(raw.get(Task.CAPTION))
        self._templates = {
            task: self._read_template(task, raw[task])
            for task in Task
            if task is not Task.CAPTION and raw.get(task) is not None
        }
        self._check_words()

    def _check_words(self) -> None:
        """Refuse a vocabulary that lacks words of the templates: it would put every answer into other words."""
        prefixes = [template.prefix for template in self._templates.values()]
        ids = [id for words in (*self._captions.values(), *prefixes) for id in words]
        if max(ids, default=0) >= self._tokenizer.size:
            raise CheckpointError(
                f"the tokenizer has {self._tokenizer.size} entries and the model's prompts use number {max(ids)}: they "
                "do not belong together; give the model's own tokenizer (moondream/starmie-v1) with --tokenizer"
            )

    def build(self, request: Request, has_image: bool) -> Prompt:
        """Build the prompt of `request`.

        Raises:
            RequestError: empty prompt, a skill or length this model does not have, a missing image,
                or spatial references that make no sense.
        """
        task = request.task
        if not has_image and task is not Task.QUERY:
            raise RequestError(f"{task} needs an image")
        if request.spatial_refs and task not in _TASKS_WITH_REFS:
            raise RequestError(f"{task} takes no spatial references; query, point and segment do")
        if request.spatial_refs and not has_image:
            raise RequestError("spatial references need an image to refer to")
        self.check_skill(request)
        if task is Task.CAPTION:
            return Prompt(list(self._captions[request.length]))
        return self._fill(self._templates[task], request, has_image)

    def check_skill(self, request: Request) -> None:
        """Refuse a task, or a caption's length, that this model has no template for.

        Raises:
            RequestError: there is none.
        """
        task = request.task
        if not self._captions if task is Task.CAPTION else task not in self._templates:
            hint = " (moondream3.1 segments)" if task is Task.SEGMENT else ""
            raise RequestError(f"{task} is not supported by this model: its config.json has no template for it{hint}")
        if task is Task.CAPTION and request.length not in self._captions:
            raise RequestError(f"caption length {request.length[:40]!r} is not one of {', '.join(self._captions)}")

    def encode_choices(self, request: Request) -> tuple[tuple[int, ...], ...]:
        """Return the ids of the only answers a query allows; empty allows all.

        Raises:
            RequestError: choices of another task, fewer than two, an empty or a repeated one.
        """
        if not request.choices:
            return ()
        if request.task is not Task.QUERY:
            raise RequestError(f"{request.task} takes no choices; query does")
        encoded = tuple(tuple(self._tokenizer.encode(choice)) for choice in request.choices)
        if len(encoded) < 2 or not all(encoded) or len(set(encoded)) < len(encoded):
            raise RequestError("choices are at least two different answers, none of them empty")
        return encoded

    def _fill(self, template: _Template, request: Request, has_image: bool) -> Prompt:
        text = request.prompt or ""
        if not text.strip():
            raise RequestError(f"{request.task} needs a prompt that is not empty")
        if request.task in _TASKS_WITH_LEADING_SPACE:
            text = f" {text}"
        reasons = request.task is Task.QUERY and request.reasoning
        ids = [*(() if has_image else (self._ids.bos_id,)), *template.prefix]
        coords: list[tuple[int, float]] = []
        sizes: list[tuple[int, tuple[float, float]]] = []
        for ref in request.spatial_refs:
            centre, size_wh = read_spatial_ref(ref)
            for value in centre:
                coords.append((len(ids), value))
                ids.append(self._ids.coord_id)
            if size_wh is not None:
                sizes.append((len(ids), size_wh))
                ids.append(self._ids.size_id)
        ids += self._tokenizer.encode(text)
        ids += template.reasoning_suffix if reasons else template.suffix
        return Prompt(ids, tuple(coords), tuple(sizes))

    # -- templates --------------------------------------------------------------------------------

    def _read_captions(self, raw: Any) -> dict[str, tuple[int, ...]]:
        fields = {} if raw is None else self._object(Task.CAPTION, raw)
        given = {length: fields.get(length) for length in CAPTION_LENGTHS}
        return {length: self._ids_of(f"caption.{length}", ids) for length, ids in given.items() if ids is not None}

    def _read_template(self, task: Task, raw: Any) -> _Template:
        """Read `prefix` and `suffix`; Kestrel's query has `answer_prefix` and `reasoning_prefix` behind the text."""
        fields = self._object(task, raw)
        suffix = fields.get("suffix", fields.get("answer_prefix", [self._ids.answer_id]))
        return _Template(
            prefix=self._ids_of(f"{task}.prefix", fields.get("prefix")),
            suffix=self._ids_of(f"{task}.suffix", suffix),
            reasoning_suffix=self._ids_of(
                f"{task}.reasoning_prefix", fields.get("reasoning_prefix", [self._ids.thinking_id])
            ),
        )

    def _object(self, task: Task, raw: Any) -> Mapping[str, Any]:
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"config.json: tokenizer.templates.{task} is no object")
        return raw

    def _ids_of(self, name: str, raw: Any) -> tuple[int, ...]:
        if not isinstance(raw, list) or not all(type(id) is int and 0 <= id < self._vocab_size for id in raw):
            raise CheckpointError(
                f"config.json: tokenizer.templates.{name} is {str(raw)[:60]}, expected ids below {self._vocab_size}"
            )
        return tuple(raw)


def read_spatial_ref(ref: Iterable[float]) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """Read a reference as what is embedded for it: (x, y) of its centre, and a box's (width, height).

    Raises:
        RequestError: neither a point nor a box, not finite, outside 0-1, or corners in the wrong order.
    """
    values = tuple(ref)
    if len(values) not in (2, 4) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise RequestError("a spatial reference is x,y or x_min,y_min,x_max,y_max")
    if not all(0 <= v <= 1 for v in values):  # neither is NaN
        raise RequestError("the numbers of a spatial reference are from 0 to 1, in parts of the image's size")
    if len(values) == 2:
        return (float(values[0]), float(values[1])), None
    x_min, y_min, x_max, y_max = values
    if x_min > x_max or y_min > y_max:
        raise RequestError("a spatial reference to a box is x_min,y_min,x_max,y_max, the smaller number first")
    return ((x_min + x_max) / 2, (y_min + y_max) / 2), (x_max - x_min, y_max - y_min)
