"""A prompt with placeholders: taken apart, filled, and known again once it was filled.

A placeholder is the plain name of a column: nothing is evaluated, and what is put in is never looked at for more. Its
room is low, because names for what is asked need it as well as the rows it is filled from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from md3cli.errors import RequestError, UsageError
from md3cli.records import printable

PROMPT_LIMIT_CHARS = 1 << 20  # of a filled prompt; no model's context holds a tenth of it
SHOWN_CHARS = 60
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PLAIN_NAME = re.compile(r"[^\s.:!\[\]](?:[^.:!\[\]]*[^\s.:!\[\]])?")


def quoted(name: str) -> str:
    """Return the name of a column, or what stands in its place, for a message."""
    return f"'{printable(name)[:SHOWN_CHARS]}'"


class Template(NamedTuple):
    """A prompt taken apart: `texts` and, behind each but the last, one of the `names` of what is put in."""

    texts: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, prompt: str) -> Template:
        """Take apart what was typed: `{name}` is a placeholder, `{{` and `}}` are braces.

        Raises:
            UsageError: a brace without its other half, or a placeholder that is more than a plain name.
        """
        texts, names, end = [""], list[str](), 0
        for found in _BRACES.finditer(prompt):
            texts[-1] += prompt[end : found.start()]
            end = found.end()
            if found[0] in ("{{", "}}"):
                texts[-1] += found[0][0]
            elif found[1] is None:
                raise UsageError(f"{quoted(prompt)} has a lone '{found[0]}'; write {found[0] * 2} for a brace")
            elif not _PLAIN_NAME.fullmatch(found[1]):
                raise UsageError(
                    f"{quoted(prompt)}: {{{printable(found[1])[:SHOWN_CHARS]}}} is not the plain name of a column; "
                    "--map NEW=COLUMN gives a column a plain one, and {{ }} are braces"
                )
            else:
                names.append(found[1])
                texts.append("")
        texts[-1] += prompt[end:]
        return cls(tuple(texts), tuple(names))

    def filled(self, values: Mapping[str, str]) -> str:
        """Return the prompt with `values` in place of its names.

        Raises:
            RequestError: it becomes longer than PROMPT_LIMIT_CHARS.
        """
        if sum(map(len, self.texts)) + sum(len(values[name]) for name in self.names) > PROMPT_LIMIT_CHARS:
            raise RequestError(f"the filled prompt is longer than {PROMPT_LIMIT_CHARS >> 20} Mi characters")
        head = "".join(text + values[name] for text, name in zip(self.texts, self.names, strict=False))
        return head + self.texts[-1]

    def may_be(self, prompt: str) -> bool:
        """Return whether `prompt` can have come of this template; takes time in proportion to its length."""
        first, *others = self.texts
        if not others or not prompt.startswith(first):
            return prompt == first
        at = len(first)
        for text in others[:-1]:
            found = prompt.find(text, at + 1)  # a value has at least one character
            if found < 0:
                return False
            at = found + len(text)
        return len(prompt) - len(others[-1]) > at and prompt.endswith(others[-1])
