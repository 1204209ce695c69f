"""What a prompt looks like as text, between the chat template and the ids.

The template turns a string or messages into one line in the model's own words (Moondream 3
specification, section 9); `read_prompt` turns such a line back into a request, so that its ids come from
`prompts.Prompts` like those of the commands, and what a user typed never becomes a control token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from md3cli.errors import RequestError
from md3cli.records import CAPTION_LENGTHS, Request, Task

END = "<|endoftext|>"
_OPEN, _SEPARATOR = "<|md_reserved_0|>", "<|md_reserved_1|>"
_ANSWER, _THINK = "<|md_reserved_2|>", "<|md_reserved_3|>"

# Modes are prefixes of the user's text: query: reason: caption: detect: point: segment:. Nothing at all is a
# normal caption, text without a mode a query. Of the space behind a mode's colon one is dropped.
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
    """A request, and the answer behind it where the text has one (reasoning and answer parted by the answer token)."""

    request: Request
    answer: str | None = None


def is_rendered(text: str) -> bool:
    """Whether a text has been through the chat template."""
    return text.startswith(END + _OPEN)


def read_prompt(text: str) -> ReadPrompt:
    """What a rendered prompt asks; an answer ends with the end of text.

    Raises:
        RequestError: no such skill, or not in the template's form.
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
    """An answer as thoughts and answer; one part where nothing was thought."""
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
