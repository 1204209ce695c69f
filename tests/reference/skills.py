"""All skills of Moondream 3, greedy, with a trace of every decision (specification, sections 9 to 13).

A request is a dict as in the golden cases: `skill`, its arguments, `max_tokens` or `max_objects`. An
answer is a dict with the skill's own keys, `prompt_ids`, `token_ids`, `finish`, `trace` and the
`sequence` itself. The context is taken to be wide enough: nothing here looks at `max_context`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from reference import network as net
from reference.network import Network
from reference.preprocess import crops_of

PATH_COMMANDS = frozenset("MmLlHhVvCcSsQqTtAaZz")
LAST_SPECIAL_ID = 20
VIEWBOX = 960

Answer = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A picture as the decoder sees it; the intermediate values are kept for inspection."""

    features: Tensor
    tiling: tuple[int, int]
    embedding: Tensor


@dataclass(frozen=True)
class Model:
    """A network with its tokenizer."""

    network: Network
    tokenizer: Tokenizer

    @property
    def ids(self) -> dict[str, int]:
        return self.network.config["tokenizer"]

    def tokens_of(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_image(self, image: Image.Image) -> Encoded:
        crops, tiling = crops_of(image, self.network.config)
        pixels = (torch.from_numpy(crops).float() / 255 - 0.5) / 0.5
        features = torch.stack([net.encode_crop(self.network, crop) for crop in pixels.permute(0, 3, 1, 2)])
        return Encoded(features, tiling, net.image_embedding(self.network, features, tiling))


@dataclass
class Sequence:
    """One growing input sequence; `look` recomputes it from position 0."""

    model: Model
    inputs: Tensor  # [T, D]
    prefix_len: int
    trace: list[dict] = field(default_factory=list)
    hidden: Tensor = field(init=False)  # [D], last position, before the final LayerNorm
    logits: Tensor = field(init=False)
    moe_margin: float = field(init=False)

    def feed(self, rows: Tensor) -> None:
        self.inputs = torch.cat([self.inputs, rows.reshape(-1, self.inputs.shape[1])])
        self.look()

    def feed_ids(self, ids: list[int]) -> None:
        self.feed(self.model.network.tensors["text.wte"][ids])

    def look(self) -> None:
        decoded = net.decode(self.model.network, self.inputs, self.prefix_len)
        self.hidden, self.moe_margin = decoded.hidden[-1], decoded.moe_margin
        self.logits = net.token_logits(self.model.network, self.hidden)

    def decide(self, kind: str, logits: Tensor, banned: Iterable[int] = ()) -> int:
        """Argmax of what is allowed (lowest id on a tie); noted in the trace."""
        allowed = logits.clone()
        allowed[list(banned)] = -math.inf
        choice = int(allowed.argmax())
        best, second = allowed.topk(2).values.tolist()
        self.note(kind, choice, best - second, best)
        return choice

    def note(self, kind: str, choice: int, margin: float, top: float) -> None:
        position = len(self.inputs) - 1
        self.trace.append(
            {
                "kind": kind,
                "choice": choice,
                "margin": margin,
                "top": top,
                "pos": position,
                "moe_margin": self.moe_margin,
            }
        )

    def decide_token(self, banned: Iterable[int] = ()) -> int:
        return self.decide("token", self.logits, banned)

    def decide_coord(self) -> float:
        logits = net.coord_logits(self.model.network, self.hidden)
        return net.coord_of_bin(self.decide("coord", logits), len(logits))

    def decide_size(self) -> tuple[float, float]:
        wide, high = net.size_logits(self.model.network, self.hidden)
        width = net.size_of_bin(self.decide("size_w", wide), len(wide))
        return width, net.size_of_bin(self.decide("size_h", high), len(high))

    def decide_coord_or_eos(self) -> int:
        coord_id, eos_id = self.model.ids["coord_id"], self.model.ids["eos_id"]
        coord, eos = self.logits[coord_id].item(), self.logits[eos_id].item()
        choice = coord_id if coord >= eos else eos_id
        self.note("coord_or_eos", choice, abs(coord - eos), max(coord, eos))
        return choice


# -- prompts (sections 9 and 13) -------------------------------------------------------------------


def references(model: Model, refs: list[list[float]]) -> tuple[list[int], list[Tensor]]:
    """Placeholder ids of spatial references and the embeddings that replace them, one each."""
    network, ids = model.network, model.ids
    placeholders: list[int] = []
    embeddings: list[Tensor] = []
    for ref in refs:
        if len(ref) == 2:
            centre = ref
        else:
            x_min, y_min, x_max, y_max = ref
            centre = [(x_min + x_max) / 2, (y_min + y_max) / 2]
        placeholders += [ids["coord_id"]] * 2
        embeddings += [net.encode_coord(network, value) for value in centre]
        if len(ref) == 4:
            placeholders.append(ids["size_id"])
            embeddings.append(net.encode_size(network, x_max - x_min, y_max - y_min))
    return placeholders, embeddings


def start(model: Model, encoded: Encoded | None, head: list[int], refs: list, tail: list[int]) -> tuple[Sequence, list]:
    """The sequence with prefix and prompt fed, and the prompt's ids (BOS among them without an image)."""
    table = model.network.tensors["text.wte"]
    bos = model.ids["bos_id"]
    placeholders, embeddings = references(model, refs)
    prompt = torch.cat([table[head], *(row[None] for row in embeddings), table[tail]])
    if encoded is None:
        sequence = Sequence(model, table[[bos]], prefix_len=0)
        prompt_ids = [bos, *head, *placeholders, *tail]
    else:
        prefix = torch.cat([table[[bos]], encoded.embedding])
        sequence = Sequence(model, prefix, prefix_len=model.network.prefix_len)
        prompt_ids = [*head, *placeholders, *tail]
    sequence.feed(prompt)
    return sequence, prompt_ids


def template(model: Model, skill: str) -> dict:
    return model.ids["templates"][skill]


def object_prompt(model: Model, request: dict, encoded: Encoded | None, lead: str) -> tuple[Sequence, list]:
    form = template(model, request["skill"])
    tail = model.tokens_of(lead + request["object"]) + form["suffix"]
    return start(model, encoded, form["prefix"], request.get("spatial_refs", []), tail)


# -- text (sections 10 and 11) ---------------------------------------------------------------------


def generate_text(sequence: Sequence, max_tokens: int) -> tuple[list[int], str]:
    """Ids until eos, and the finish reason; answer_id is banned but for the first token."""
    ids = sequence.model.ids
    emitted: list[int] = []
    while len(emitted) < max_tokens:
        token = sequence.decide_token(banned=[ids["answer_id"]] if emitted else [])
        if token == ids["eos_id"]:
            return emitted, "stop"
        emitted.append(token)
        if len(emitted) == max_tokens:
            break
        sequence.feed_ids([token])
    return emitted, "length"


def caption(model: Model, request: dict, encoded: Encoded | None) -> Answer:
    head = template(model, "caption")[request["length"]]
    sequence, prompt_ids = start(model, encoded, head, [], [])
    token_ids, finish = generate_text(sequence, request["max_tokens"])
    return {
        "caption": model.text_of(token_ids),
        "prompt_ids": prompt_ids,
        "token_ids": token_ids,
        "finish": finish,
        "trace": sequence.trace,
        "sequence": sequence,
    }


def query(model: Model, request: dict, encoded: Encoded | None) -> Answer:
    form = template(model, "query")
    ids = model.ids
    end = [ids["thinking_id"] if request["reasoning"] else ids["answer_id"]]
    tail = model.tokens_of(request["question"]) + end
    sequence, prompt_ids = start(model, encoded, form["prefix"], request.get("spatial_refs", []), tail)
    thoughts = {}
    if request["reasoning"]:
        thoughts = {"reasoning": think(sequence, request["max_tokens"])}
        sequence.feed_ids([ids["answer_id"]])
    token_ids, finish = generate_text(sequence, request["max_tokens"])
    return thoughts | {
        "answer": model.text_of(token_ids),
        "prompt_ids": prompt_ids,
        "token_ids": token_ids,
        "finish": finish,
        "trace": sequence.trace,
        "sequence": sequence,
    }


def think(sequence: Sequence, max_tokens: int) -> dict:
    """The reasoning phase: text with grounded chunks. Every emitted token is fed, the last one too."""
    model, ids = sequence.model, sequence.model.ids
    borders = (ids["start_ground_points_id"], ids["end_ground_id"])
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    emitted: list[int] = []
    finish = "length"
    while len(emitted) < max_tokens:
        token = sequence.decide_token(banned=[ids["eos_id"], ids["size_id"]] if emitted else [])
        if token == ids["answer_id"]:
            finish = "stop"
            break
        if token in borders:
            chunks.append(([], []))
        chunks[-1][0].append(token)
        emitted.append(token)
        if token == ids["coord_id"]:
            value = sequence.decide_coord()
            chunks[-1][1].append(value)
            sequence.feed(net.encode_coord(model.network, value))
        else:
            sequence.feed_ids([token])
    return {"token_ids": emitted, "finish": finish, **grounded(model, chunks)}


def grounded(model: Model, chunks: list[tuple[list[int], list[float]]]) -> dict:
    """Text of the chunks and, for each with at least one pair of coordinates, where it lies in the text."""
    text, grounding = "", []
    for chunk_ids, coords in chunks:
        piece = model.text_of(chunk_ids)
        if len(coords) >= 2:
            points = [[coords[i], coords[i + 1]] for i in range(0, len(coords) - 1, 2)]
            grounding.append({"start_idx": len(text), "end_idx": len(text) + len(piece), "points": points})
        text += piece
    return {"text": text, "grounding": grounding}


# -- detect, point, segment (section 11) -----------------------------------------------------------


def locate(model: Model, request: dict, encoded: Encoded | None) -> Answer:
    """detect and point: the same loop, with and without a size."""
    network, ids = model.network, model.ids
    with_size = request["skill"] == "detect"
    sequence, prompt_ids = object_prompt(model, request, encoded, lead=" ")
    argmax_is_eos = int(sequence.logits.argmax()) == ids["eos_id"]
    eos_above_coord = bool(sequence.logits[ids["eos_id"]] > sequence.logits[ids["coord_id"]])
    found: list[dict] = []
    finish = "stop"
    token = sequence.decide_token()
    while token != ids["eos_id"]:
        x = sequence.decide_coord()
        sequence.feed(net.encode_coord(network, x))
        y = sequence.decide_coord()
        last_input = net.encode_coord(network, y)
        if with_size:
            sequence.feed(last_input)
            w, h = sequence.decide_size()
            found.append({"x_min": x - w / 2, "y_min": y - h / 2, "x_max": x + w / 2, "y_max": y + h / 2})
            last_input = net.encode_size(network, w, h)
        else:
            found.append({"x": x, "y": y})
        if len(found) == request["max_objects"]:
            finish = "length"
            break
        sequence.feed(last_input)
        token = sequence.decide_coord_or_eos()
    one = [ids["coord_id"], ids["coord_id"], ids["size_id"]] if with_size else [ids["coord_id"]] * 2
    return {
        "objects" if with_size else "points": found,
        "prompt_ids": prompt_ids,
        "token_ids": one * len(found),
        "first_choice": {"argmax_is_eos": argmax_is_eos, "eos_above_coord": eos_above_coord},
        "finish": finish,
        "trace": sequence.trace,
        "sequence": sequence,
    }


def segment(model: Model, request: dict, encoded: Encoded | None) -> Answer:
    network, ids = model.network, model.ids
    sequence, prompt_ids = object_prompt(model, request, encoded, lead="")
    token_ids: list[int] = []
    text_ids: list[int] = []
    coords: list[float] = []
    sizes: list[list[float]] = []
    finish = "length"
    while len(token_ids) < request["max_tokens"]:
        token = sequence.decide_token()
        if token == ids["eos_id"]:
            finish = "stop"
            break
        token_ids.append(token)
        if token == ids["coord_id"]:
            coords.append(sequence.decide_coord())
            following = net.encode_coord(network, coords[-1])
        elif token == ids["size_id"]:
            sizes.append(list(sequence.decide_size()))
            following = net.encode_size(network, *sizes[-1])
        else:
            text_ids.append(token)
            following = network.tensors["text.wte"][token]
        if len(token_ids) == request["max_tokens"]:
            break
        sequence.feed(following)
    path = svg_path(model, token_ids) | clamped_box(coords, sizes)
    return path | {
        "coords": coords,
        "sizes": sizes,
        "text_ids": text_ids,
        "text": model.text_of(text_ids),
        "prompt_ids": prompt_ids,
        "token_ids": token_ids,
        "finish": finish,
        "trace": sequence.trace,
        "sequence": sequence,
    }


def clamped_box(coords: list[float], sizes: list[list[float]]) -> dict:
    if len(coords) < 2 or not sizes:
        return {}
    (x, y), (w, h) = coords[:2], sizes[0]
    corners = {"x_min": x - w / 2, "y_min": y - h / 2, "x_max": x + w / 2, "y_max": y + h / 2}
    return {"bbox": {name: min(max(value, 0.0), 1.0) for name, value in corners.items()}}


def svg_path(model: Model, token_ids: list[int]) -> dict:
    """The path a token list spells, in units of the box; an invalid one is empty with its error."""
    decoded = [model.text_of([token]).strip() for token in token_ids if token > LAST_SPECIAL_ID]
    words = [word for word in decoded if word]
    try:
        return {"svg_path": spelled(words), "path_tokens": words}
    except ValueError as error:
        return {"svg_path": "", "path_tokens": words, "parse_error": str(error)}


def spelled(words: list[str]) -> str:
    out: list[str] = []
    at = 0
    while at < len(words):
        if words[at] not in PATH_COMMANDS:
            raise ValueError(f"unexpected path token {words[at]!r}")
        out.append(words[at])
        at += 1
        numbers: list[int] = []
        while at < len(words) and words[at] not in PATH_COMMANDS:
            sign = 1
            if words[at] == "-":
                if at + 1 == len(words):
                    raise ValueError("unexpected path token '-'")
                sign, at = -1, at + 1
            numbers.append(sign * int(words[at]))
            at += 1
        out += [f"{n / VIEWBOX:.3f}".rstrip("0").rstrip(".") for n in numbers[: len(numbers) // 2 * 2]]
    return " ".join(out)


# -- streaming (section 12) ------------------------------------------------------------------------


def is_cjk(char: str) -> bool:
    code = ord(char)
    return 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x2F800 <= code <= 0x2FA1F


def stream_pieces(model: Model, token_ids: list[int]) -> list[str]:
    """The pieces in which a stream yields the text of `token_ids`."""
    pieces: list[str] = []
    cache: list[int] = []
    shown = 0
    for token in token_ids:
        cache.append(token)
        text = model.text_of(cache)
        if text.endswith("\n"):
            pieces.append(text[shown:])
            cache, shown = [], 0
        elif text:
            end = len(text) if is_cjk(text[-1]) else text.rfind(" ") + 1
            if end > shown:
                pieces.append(text[shown:end])
                shown = end
    pieces.append(model.text_of(cache)[shown:])
    return [piece for piece in pieces if piece]


SKILLS = {"caption": caption, "query": query, "detect": locate, "point": locate, "segment": segment}


@torch.no_grad()
def answer(model: Model, request: dict, encoded: Encoded | None) -> Answer:
    """Carry out one request; `encoded` None is a text-only query."""
    return SKILLS[request["skill"]](model, request, encoded)
