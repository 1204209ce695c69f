"""All skills of Moondream 3, greedy, with a trace of every decision (specification, sections 9 to 13).

A request is a dict as in the golden cases: `skill`, its arguments, `max_tokens` or `max_objects`. An
answer is a dict with the skill's own keys, `prompt_ids`, `token_ids`, `finish`, `trace` and the
`sequence` itself. The context is taken to be wide enough: nothing here looks at `max_context`.
"""

from __future__ import annotations

from typing import Any

import torch

from reference import network as net
from reference.sequence import Encoded, Model, Sequence, start
from reference.texts import grounded, svg_path

Answer = dict[str, Any]


def template(model: Model, skill: str) -> dict:
    return model.ids["templates"][skill]


def object_prompt(model: Model, request: dict, encoded: Encoded | None, lead: str) -> tuple[Sequence, list]:
    form = template(model, request["skill"])
    tail = model.tokens_of(lead + request["object"]) + form["suffix"]
    return start(model, encoded, form["prefix"], request.get("spatial_refs", []), tail)


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


SKILLS = {"caption": caption, "query": query, "detect": locate, "point": locate, "segment": segment}


@torch.no_grad()
def answer(model: Model, request: dict, encoded: Encoded | None) -> Answer:
    """Carry out one request; `encoded` None is a text-only query."""
    return SKILLS[request["skill"]](model, request, encoded)
