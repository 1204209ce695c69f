"""Text that grows token by token, cut where it can be shown: at spaces, line ends and CJK characters.

A piece is never taken back: what could still change with the next token (an unfinished word, half
of a multi-byte character) is held until it cannot. The pieces joined are the text, up to the
decoding starting over after a line end.
Source: Moondream 3 specification, section 12; the rule is that of transformers' TextIteratorStreamer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
