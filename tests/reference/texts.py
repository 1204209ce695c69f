"""What token ids become for the reader: grounded text, paths, stream pieces (specification, sections 11, 12)."""

from __future__ import annotations

from reference.sequence import Model

PATH_COMMANDS = frozenset("MmLlHhVvCcSsQqTtAaZz")
LAST_SPECIAL_ID = 20
VIEWBOX = 960


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
