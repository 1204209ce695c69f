"""`Moondream3Processor`: pictures and texts to the model's inputs, and ids back to text.

The chat template turns a string or messages into one line in the model's own words (Moondream 3 specification,
section 9). `read_prompt` turns such a line back into a request, so that its ids come from `prompts.Prompts` and its
pixels from `images`, as in the commands, and a user's text never becomes a control token. `training_row` continues
a prompt with the answer of a record (`md3`'s own JSON Lines): finished, corrected records are training data as they
are. Of reasoning the text is learned, not what it points at. Users reach the processor through the package, which
alone imports this file.

Shape suffixes: B rows, T positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import load_image

from md3cli.errors import RequestError
from md3cli.images.crops import ImageLimits, PreparedImage, prepare_image
from md3cli.model.api_requests import prepare_pil, read_refs, read_request
from md3cli.model.engine.prompts import Prompt, Prompts, Tokenizer
from md3cli.model.hf.config import IMAGE_TOKEN_ID, PAD_TOKEN_ID, Moondream3Config
from md3cli.model.hf.inputs import Row, pad_rows
from md3cli.model.hf.saved_code import NamedBySavedFolders, auto_map, write_imports
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.vision import normalise_crops
from md3cli.model.weights.files import TOKENIZER_NAME, read_json
from md3cli.model.weights.hub import resolve_model
from md3cli.records import CAPTION_LENGTHS, ImageItem, Request, Task

PROCESSOR_CONFIG = "processor_config.json"
ImageInput = Image.Image | str | Path | np.ndarray | Tensor
END = "<|endoftext|>"
_OPEN, _SEPARATOR = "<|md_reserved_0|>", "<|md_reserved_1|>"
_ANSWER, _THINK = "<|md_reserved_2|>", "<|md_reserved_3|>"

# A mode is a prefix of the user's text: query: reason: caption: detect: point: segment:. An empty text is a normal
# caption, and text without a mode is a query. One space behind a mode's colon is dropped.
CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
{%- endif -%}
{%- if message['role'] == 'user' and loop.index0 == 0 -%}
{%- set mode = text.split(':', 1)[0] | trim | lower -%}
{%- set has_mode = ':' in text and mode in ['query', 'reason', 'caption', 'detect', 'point', 'segment'] -%}
{%- if text | trim == '' or mode == 'caption' -%}
{%- set length = text.split(':', 1)[1] | trim | lower if has_mode else '' -%}
{%- if length not in ['', 'short', 'normal', 'long'] -%}
{{- raise_exception('caption: takes short, normal or long') -}}
{%- endif -%}
{{- '<|endoftext|><|md_reserved_0|>describe<|md_reserved_1|>' + (length or 'normal') + '<|md_reserved_2|>' -}}
{%- else -%}
{%- set rest = text.split(':', 1)[1] if has_mode else text -%}
{%- set rest = rest[1:] if has_mode and rest[:1] == ' ' else rest -%}
{%- set skill = mode if has_mode and mode != 'reason' else 'query' -%}
{%- set space = ' ' if skill in ['detect', 'point'] else '' -%}
{%- set last = '<|md_reserved_3|>' if has_mode and mode == 'reason' else '<|md_reserved_2|>' -%}
{{- '<|endoftext|><|md_reserved_0|>' + skill + '<|md_reserved_1|>' + space + rest + last -}}
{%- endif -%}
{%- elif message['role'] == 'assistant' and loop.index0 == 1 -%}
{{- text + '<|endoftext|>' -}}
{%- else -%}
{{- raise_exception('messages are one of the user, and possibly the answer of the assistant') -}}
{%- endif -%}
{%- endfor -%}
"""

_RENDERED = re.compile(
    re.escape(END)
    + re.escape(_OPEN)
    + r"(?P<skill>\w+)"
    + re.escape(_SEPARATOR)
    + r"(?P<text>.*)"
    + f"(?P<last>{re.escape(_ANSWER)}|{re.escape(_THINK)})"
    + r"(?P<answer>.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A request, and the answer behind it where the text has one; the answer token parts reasoning from answer."""

    request: Request
    answer: str | None = None


def is_rendered(text: str) -> bool:
    """Return whether a text has been through the chat template."""
    return text.startswith(END + _OPEN)


def read_prompt(text: str) -> ReadPrompt:
    """Return what a rendered prompt asks, and its answer, which ends with the end of text.

    Raises:
        RequestError: there is no such skill, or the text has not the template's form.
    """
    body, has_answer = (text[: -len(END)], True) if text.endswith(END) and text != END else (text, False)
    match = _RENDERED.fullmatch(body)
    if match is None:
        raise RequestError("the prompt is not in the form of the chat template; use apply_chat_template")
    skill, words, last, answer = match["skill"], match["text"], match["last"], match["answer"]
    if last == _ANSWER and _THINK in words and has_answer:  # reasoning: what is between the two is the thoughts
        words, thoughts = words.split(_THINK, 1)
        last, answer = _THINK, thoughts + _ANSWER + answer
    if answer and not has_answer:
        raise RequestError("text behind the prompt is an answer, and an answer ends with the end of text")
    request = _request(skill, words, reasons=last == _THINK)
    return ReadPrompt(request, answer if has_answer else None)


def split_reasoning(answer: str) -> list[str]:
    """Return thoughts and answer, or the answer alone where nothing was thought."""
    return answer.split(_ANSWER, 1)


def _request(skill: str, words: str, *, reasons: bool) -> Request:
    if skill == "describe":
        if words not in CAPTION_LENGTHS:
            raise RequestError(f"caption length {words[:40]!r} is not one of {', '.join(CAPTION_LENGTHS)}")
        return Request(Task.CAPTION, length=words)
    if skill not in (Task.QUERY, Task.DETECT, Task.POINT, Task.SEGMENT):
        raise RequestError(f"{skill[:40]!r} is no skill of this model")
    task = Task(skill)
    if task in (Task.DETECT, Task.POINT):
        words = words.removeprefix(" ")
    return Request(task, words, reasoning=reasons)


def prompt_row(prompt: Prompt, config: ModelConfig, *, has_image: bool) -> Row:
    """Return the picture's placeholders and the prompt, spatial references filled in."""
    image = [config.tokenizer.bos_id, *[IMAGE_TOKEN_ID] * config.vision.num_patches] if has_image else []
    row, start = Row(), len(image)
    for token in (*image, *prompt.ids):
        row.add(token)
    for index, coord in prompt.coords:
        row.values[start + index] = (coord, coord)
    for index, size_wh in prompt.sizes:
        row.values[start + index] = size_wh
    return row


def training_row(
    record: Mapping[str, Any], request: Request, prompts: Prompts, tokenizer: Tokenizer, config: ModelConfig
) -> Row:
    """Return the row of a record's request and of its result, which is to be learned.

    Raises:
        RequestError: the record has no result, or nobody can learn its task from records.
    """
    if request.task is Task.SEGMENT:
        raise RequestError("segment records keep the path's numbers and not its ids; they cannot be learned from")
    has_image = record.get("image") is not None
    row = prompt_row(prompts.build(request, has_image), config, has_image=has_image)
    tokens = config.tokenizer
    if request.task in (Task.DETECT, Task.POINT):
        key = "objects" if request.task is Task.DETECT else "points"
        for item in _result(record, key):
            _learn_object(row, item, config)
    else:
        text = _result(record, "caption" if request.task is Task.CAPTION else "answer")
        if request.reasoning and request.task is Task.QUERY:
            _learn(row, [*tokenizer.encode(_result(record, "reasoning")["text"]), tokens.answer_id])
        _learn(row, tokenizer.encode(text))
    _learn(row, [tokens.eos_id])
    return row


def answered_row(row: Row, answer: str, tokenizer: Tokenizer, config: ModelConfig) -> Row:
    """Continue a prompt's row with an answer in words, and thoughts before it, to be learned."""
    *thoughts, text = split_reasoning(answer)
    for thought in thoughts:
        _learn(row, [*tokenizer.encode(thought), config.tokenizer.answer_id])
    _learn(row, [*tokenizer.encode(text), config.tokenizer.eos_id])
    return row


def _learn(row: Row, ids: Sequence[int]) -> None:
    for token in ids:
        row.add(token, label=token)


def _result(record: Mapping[str, Any], key: str) -> Any:
    if record.get(key) is None:
        raise RequestError(f"a record of task {record.get('task')} has no {key!r} to learn from")
    return record[key]


def _learn_object(row: Row, item: Mapping[str, float], config: ModelConfig) -> None:
    """Append a box or point: the first id decides that there is one, numbers follow (specification, section 11)."""
    tokens = config.tokenizer
    if "x_min" in item:
        x, y = (item["x_min"] + item["x_max"]) / 2, (item["y_min"] + item["y_max"]) / 2
    else:
        x, y = item["x"], item["y"]
    row.add(tokens.coord_id, (x, x), tokens.coord_id, (x, x))
    row.add(tokens.coord_id, (y, y), target=(y, y))
    if "x_min" in item:
        size_wh = (item["x_max"] - item["x_min"], item["y_max"] - item["y_min"])
        row.add(tokens.size_id, size_wh, target=size_wh)


class Moondream3Processor(NamedBySavedFolders, ProcessorMixin):
    """Makes the inputs of `Moondream3ForConditionalGeneration`, and texts of its ids.

    `tokenizer` is the model's, as transformers wraps it. `chat_template` may be another Jinja template, whose output
    must have the form of the default's. `model_name` decides about segment where the config says nothing about it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        config: ModelConfig,
        chat_template: str | None = None,
        model_name: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template or CHAT_TEMPLATE
        self.network = config
        self.model_name = model_name
        self.image_token_id = IMAGE_TOKEN_ID
        self.image_token = tokenizer.convert_ids_to_tokens(IMAGE_TOKEN_ID)
        # A backend of its own, which encodes the names of control tokens as text.
        self.words = Tokenizer(type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()))
        self.prompts = Prompts(config, self.words, model_name)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Name the parts that transformers saves and loads by itself; `save_pretrained` here saves them."""
        return ["tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        """The keys that a batch may have."""
        return ["input_ids", "attention_mask", "pixel_values", "tilings", "region_values"]

    # -- files ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> Self:
        """Load a processor from a checkpoint (folder, alias or repository), or a folder that `save_pretrained` wrote.

        Raises:
            CheckpointError: the tokenizer cannot be had, or does not belong to the model.
        """
        saved = Path(pretrained_model_name_or_path) / PROCESSOR_CONFIG
        document = read_json(saved) if saved.is_file() else {}
        if "network" in document:  # ours: the port's own folder has such a file, too
            config, name = ModelConfig.from_sections(document["network"]), document.get("model_name", "")
            template, file = document.get("chat_template"), saved.with_name(TOKENIZER_NAME)
        else:
            files = resolve_model(
                str(pretrained_model_name_or_path),
                revision=kwargs.get("revision") if kwargs.get("revision") != "main" else None,
                offline=bool(kwargs.get("local_files_only")),
            )
            config, name, template, file = read_network(files.path), files.name, None, files.tokenizer_file
        Tokenizer.load(file, config)  # judged before transformers sees it
        return cls(wrap_tokenizer(file, config), config, kwargs.get("chat_template") or template, name)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the tokenizer, template and sizes to a folder that loads again here; return the files' paths.

        Raises:
            RequestError: `push_to_hub` is asked for.
        """
        if push_to_hub:
            raise RequestError("save the processor to a folder and upload that; it does not push by itself")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = list(self.tokenizer.save_pretrained(str(folder)))
        document = {
            "processor_class": type(self).__name__,
            "auto_map": auto_map("AutoProcessor"),
            "model_name": self.model_name,
            "network": Moondream3Config.from_network(self.network).config,
            "chat_template": None if self.chat_template == CHAT_TEMPLATE else self.chat_template,
        }
        (folder / PROCESSOR_CONFIG).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return [*written, str(write_imports(folder)), str(folder / PROCESSOR_CONFIG)]

    # -- text -------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """Make a prompt from a string (`"detect: car"`, `""` for a caption) or from messages.

        The prompt is text unless `tokenize` is set; arguments are those of transformers.
        """
        if isinstance(conversation, str):
            conversation = [{"role": "user", "content": conversation}]
        return super().apply_chat_template(conversation, chat_template or str(self.chat_template), **kwargs)

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Return the text of one row of ids; control tokens and ids without a string become nothing."""
        if isinstance(token_ids, Tensor) and token_ids.is_floating_point():
            raise RequestError("these are coordinates, not ids; there is nothing to decode")
        ids = [int(token) for token in (token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids)]
        ids = [token for token in ids if 0 <= token < self.words.size]
        if skip_special_tokens:
            return self.words.decode(ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, **kwargs))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Decode each row."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]

    # -- inputs -----------------------------------------------------------------------------------

    def __call__(
        self,
        images: ImageInput | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        spatial_refs: Sequence[Any] | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        **ignored: Any,
    ) -> BatchFeature:
        """Make a batch of prompts of any skills about pictures of any sizes; a None in `images` stands for no picture.

        Args:
            images: one for each text; a list of lists of at most one is taken too.
            text: outputs of `apply_chat_template`, or what it takes.
            spatial_refs: for each row points [x, y] and boxes [x_min, y_min, x_max, y_max], 0-1.
            max_length: with `truncation`, the most ids of a row; those of the picture are never cut.

        Raises:
            RequestError: a prompt that makes no sense, or pictures and texts that do not go together.
            ImageError: a picture that cannot be read.
        """
        texts = [text] if isinstance(text, str) else list(text if text is not None else [""])
        pictures = self._pictures(images, len(texts))
        refs = list(spatial_refs) if spatial_refs is not None else [None] * len(texts)
        rows = [
            self._row(one, ref, has_image=picture is not None)
            for one, ref, picture in zip(texts, refs, pictures, strict=True)
        ]
        if truncation and max_length is not None:
            rows = [row.cut(max(max_length, self.network.prefix_len)) for row in rows]
        batch = pad_rows(rows, self.pad_token_id, side=padding_side, multiple=pad_to_multiple_of or 1)
        return BatchFeature(batch | self._pixels(pictures))

    def collate(self, records: Sequence[Mapping[str, Any]]) -> BatchFeature:
        """Make a training batch for Trainer from records: `image`, `task`, `prompt`, … and the result to learn.

        Raises:
            RequestError: a record without a result, or that makes no sense.
        """
        pictures = self._pictures([record.get("image") for record in records], len(records))
        rows = [training_row(record, _request_of(record), self.prompts, self.words, self.network) for record in records]
        return BatchFeature(pad_rows(rows, self.pad_token_id, side="right", with_labels=True) | self._pixels(pictures))

    @property
    def pad_token_id(self) -> int:
        """The id that stands beside short rows."""
        return int(self.tokenizer.pad_token_id)

    def _row(self, text: str, refs: Any, *, has_image: bool) -> Row:
        if text.endswith(END) and not is_rendered(text):  # an answer alone, as trl cuts it off its prompt
            return answered_row(Row(), text.removesuffix(END), self.words, self.network)
        rendered = text if is_rendered(text) else str(self.apply_chat_template(text, tokenize=False))
        read = read_prompt(rendered)
        request = replace(read.request, spatial_refs=read_refs(refs)) if refs else read.request
        row = prompt_row(self.prompts.build(request, has_image), self.network, has_image=has_image)
        return row if read.answer is None else answered_row(row, read.answer, self.words, self.network)

    def _pictures(self, images: Any, num_rows: int) -> list[PreparedImage | None]:
        if images is None:
            return [None] * num_rows
        given = list(images) if isinstance(images, list | tuple) else [images]
        if len(given) != num_rows:
            raise RequestError(f"{len(given)} pictures for {num_rows} texts; give one for each, None for a text alone")
        return [self._prepare(one) for one in given]

    def _prepare(self, image: Any) -> PreparedImage | None:
        crop_config = self.network.vision.crop_config
        if isinstance(image, list | tuple):
            if len(image) > 1:
                raise RequestError("a prompt is about one picture; give each its own row")
            return self._prepare(image[0]) if image else None
        if image is None:
            return None
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            image = load_image(image)
        if isinstance(image, str | Path):
            return prepare_image(ImageItem(str(image), str(image)), crop_config, ImageLimits(), None)
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        return prepare_pil(image, crop_config)

    def _pixels(self, pictures: Sequence[PreparedImage | None]) -> dict[str, Tensor]:
        """Return `pixel_values` [B, N, 3, S, S], padded with black crops, and `tilings` [B, 2]."""
        most = max((len(picture.crops) for picture in pictures if picture is not None), default=0)
        if not most:
            return {}
        side = self.network.vision.crop_size
        pixels = torch.zeros(len(pictures), most, self.network.vision.in_channels, side, side)
        for row, picture in enumerate(pictures):
            if picture is not None:
                pixels[row, : len(picture.crops)] = normalise_crops(torch.from_numpy(picture.crops))
        tilings = torch.tensor([(0, 0) if picture is None else tuple(picture.tiling) for picture in pictures])
        return {"pixel_values": pixels, "tilings": tilings}


def _request_of(record: Mapping[str, Any]) -> Request:
    """Return a record's request; a record's `reasoning` is what was thought, a request's whether to think."""
    keys = {key: record[key] for key in ("task", "prompt", "length", "spatial_refs") if record.get(key) is not None}
    return read_request({**keys, "reasoning": bool(record.get("reasoning"))})


def read_network(path: Path) -> ModelConfig:
    """Return the sizes of the checkpoint at `path`; the real model's where no config.json is beside it."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return Moondream3Config.from_json_file(str(file)).network if file.is_file() else ModelConfig()


def wrap_tokenizer(file: Path, config: ModelConfig) -> PreTrainedTokenizerFast:
    """Return the tokenizer.json as transformers wraps it, with its special tokens named."""
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(file), padding_side="left"
    )
    end = tokenizer.convert_ids_to_tokens(config.tokenizer.eos_id)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.tokenizer.bos_id), end
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD_TOKEN_ID) or end
    return tokenizer
