"""What is typed, as values: sizes, counts, shares, shards, places in an image, INPUT and questions.

Each parser of one option raises ValueError with the line to read; `checked` makes typer show
it. What concerns several arguments raises UsageError with the line to type instead. Nothing is opened here.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import typer

from md3cli.config import DEFAULT_PAD, MOST_PAD, FailOn
from md3cli.errors import UsageError
from md3cli.records import AUTO_TILES, Tiles, printable
from md3cli.remote.address import is_address
from md3cli.source.walk import IMAGE_SUFFIXES, MANIFEST_SUFFIXES, STDIN

T = TypeVar("T")
Format = Literal[
    "jsonl", "coco", "parquet", "csv", "yolo", "voc", "labelstudio", "labelme", "cvat", "hf", "overlay", "crops",
    "redacted", "txt", "html",
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)

# Defaults of options with a parser, which reads them as if they had been typed; help shows them as they stand here.
AUTO: Any = "auto"
ANY_FAILURE: Any = "any"
CACHE_SIZE: Any = "20 GB"
MAX_FILE_SIZE: Any = "1G"
MAX_PIXELS: Any = str(2**28)
EXTENSION: Any = ".txt"
PAD: Any = f"{DEFAULT_PAD:.0%}"

_PICTURES_OR_TARS = IMAGE_SUFFIXES | {".tar"}

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?\s*", re.IGNORECASE)
_SET_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_SHARE = re.compile(r"[0-9]{1,9}(\.[0-9]{0,15})?|\.[0-9]{1,15}")
_EXTENSION = re.compile(r"(\.[A-Za-z0-9_-]{1,20}){1,2}")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class QueryArguments(NamedTuple):
    """INPUT of a query, None for a question without a picture, and the questions."""

    input: str | None
    questions: tuple[str, ...]


def parse_bytes(text: str) -> int:
    """Read bytes as GNU tools write them: `1G` and `1GiB` are 2**30, `20 GB` is 20 * 10**9."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 500M, 1G or 20 GB")
    number, prefix, unit = match.groups()
    base = 1000 if (unit or "").lower() == "b" else 1024
    return int(float(number) * base ** _POWERS[prefix.lower()])


def parse_count(text: str) -> int:
    """Read a number with an optional decimal prefix: `268M` is 268,000,000."""
    match = _AMOUNT.fullmatch(text)
    if match is None or match[3]:
        raise ValueError(f"{text!r} is not a number; write it like 50000, 300k or 268M")
    return int(float(match[1]) * 1000 ** _POWERS[match[2].lower()])


def parse_folder(text: str) -> Path:
    """Read the name of a folder, there or not; an empty one (`"$DIR"` without a DIR) would be the working folder."""
    if not text:
        raise ValueError("the name of the folder is empty")
    return Path(text)


def parse_fail_on(text: str) -> FailOn:
    """Read `none`, `any` or `N%`."""
    if text in ("none", "any"):
        return FailOn(1.0 if text == "none" else 0.0)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text)
    if match is None or float(match[1]) > 100:
        raise ValueError(f"{text!r} is not one of: none, any, or a share like 5%")
    return FailOn(float(match[1]) / 100)


def parse_shard(text: str) -> tuple[int, int]:
    """Read `i/n` as (i modulo n, n): counted from 0 to n - 1 or from 1 to n, the parts are the same."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or int(match[2]) < 1 or int(match[1]) > int(match[2]):
        raise ValueError(f"{text!r} is not a shard; write it like 0/4, 1/4, 2/4, 3/4")
    return int(match[1]) % int(match[2]), int(match[2])


def parse_spatial_ref(text: str) -> tuple[float, ...]:
    """Read a point `X,Y` or a box `X0,Y0,X1,Y1`, 0-1 from the top left."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (2, 4) or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{text!r} is not a point X,Y or a box X0,Y0,X1,Y1 with numbers from 0 to 1")
    if len(values) == 4 and (values[0] > values[2] or values[1] > values[3]):
        raise ValueError(f"{text!r} is no box: X0,Y0 is its top left corner, X1,Y1 its bottom right one")
    return values


def parse_pair(text: str) -> tuple[str, str]:
    """Read `COLUMN=NAME` or `COLUMN=VALUE`, split at the first `=`."""
    column, sign, value = text.partition("=")
    if not (sign and column.strip() and value.strip()):
        raise ValueError(f"{printable(text)!r} is not two names with = between, like prompt=question")
    return column.strip(), value.strip()


def parse_choices(text: str) -> tuple[str, ...]:
    """Read the answers of `yes,no,unsure`, in the order typed."""
    choices = tuple(part.strip() for part in text.split(","))
    if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
        raise ValueError(f"{text!r} is not a list of at least two different answers; write it like yes,no,unsure")
    return choices


def above_zero(value: float) -> float:
    """Refuse 0, less and what is no number: the callback of an option."""
    if not value > 0:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return `parse` as a parser for typer, which puts "Value error" before the message of a ValueError."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return read


def number_or_auto(text: str) -> int | None:
    """Read `auto` as None, or a number of at least 1."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(f"{text!r} is neither auto nor a number of at least 1")
    return int(text)


def parse_tile(text: str) -> int | str:
    """Read the side of a tile in pixels, or `auto`."""
    return Tiles(int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text).size


def parse_overlap(text: str) -> float:
    """Read the share of a tile's side that neighbours have in common."""
    try:
        return Tiles(AUTO_TILES, float(text)).overlap
    except ValueError:
        raise ValueError(f"{printable(text)!r} is no overlap; it is a number from 0 to less than 1") from None


def parse_format(text: str) -> str:
    """Read the name of a format."""
    if text not in FORMATS:
        raise ValueError(f"{text!r} is not one of: {', '.join(FORMATS)}")
    return text


def parse_split(text: str) -> tuple[tuple[str, float], ...]:
    """Read `train=0.8,val=0.2`: names of sets and their shares, which add up to 1."""
    shares = []
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        if not _SET_NAME.fullmatch(name) or not _SHARE.fullmatch(share):
            raise ValueError(f"{printable(part)!r} is no set and share; write them like train=0.8,val=0.2")
        shares.append((name, float(share)))
    if len({name.casefold() for name, _ in shares}) < len(shares):
        raise ValueError("a set stands there twice; give each one share")
    total = math.fsum(share for _, share in shares)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares add up to {total:g}, not to 1; write them like train=0.8,val=0.2")
    return tuple(shares)


def parse_pad(text: str) -> float:
    """Read `10%` or `0.1`: room around a box, as a share of its own width and height."""
    number, percent = (text[:-1], 0.01) if text.endswith("%") else (text, 1.0)
    if not _SHARE.fullmatch(number.strip()):
        raise ValueError(f"{printable(text)!r} is no share; write it like 10% or 0.1")
    pad = float(number) * percent
    if percent == 1.0 and pad > 1:
        raise ValueError(f"{text!r} would be {pad:.0%} of a box; write {text}% if that is meant")
    if pad > MOST_PAD:
        raise ValueError(f"{text!r} is more than {MOST_PAD:.0%} of a box")
    return pad


def parse_extension(text: str) -> str:
    """Read `.caption`: how the names of text files end."""
    extension = text if text.startswith(".") else f".{text}"
    if not _EXTENSION.fullmatch(extension) or extension.lower() in _PICTURES_OR_TARS:
        raise ValueError(f"{printable(text)!r} is no extension for a text; write it like .caption")
    return extension


def parse_devices(text: str) -> tuple[str, ...]:
    """Read `cuda:0,cuda:1` as two devices."""
    devices = tuple(part.strip() for part in text.split(","))
    for device in devices:
        if not _DEVICE.fullmatch(device):
            raise ValueError(
                f"{device!r} is no device; name some of cuda:0, cuda:1, ..., cpu, mps, with commas between"
            )
    if len(set(devices)) < len(devices):
        raise ValueError("a device stands there twice; --workers-per-device says how many processes each gets")
    return devices


def starting(*names: str) -> Callable[[str], list[str]]:
    """Return what the shell is to offer for the beginning of a word."""

    def offer(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return offer


def may_carry_rows(text: str) -> bool:
    """Return whether INPUT is of a kind whose rows can say what to ask."""
    return text == STDIN or PurePath(text).suffix.lower() in MANIFEST_SUFFIXES - {".txt"}


def looks_like_input(text: str) -> bool:
    """Return whether `text` is a path, glob, URL or `-`, rather than a question."""
    if text == STDIN or is_address(text) or os.path.lexists(text):
        return True
    if PurePath(text).suffix.lower() in MANIFEST_SUFFIXES | _PICTURES_OR_TARS:
        return True
    has_space = any(char.isspace() for char in text)
    return not has_space and (any(char in text for char in "*[/") or (os.sep in text))


def parse_query(
    positional: Sequence[str],
    options: Sequence[str],
    listed: Sequence[str] = (),
    may_rows_ask: Callable[[str], bool] = may_carry_rows,
) -> QueryArguments:
    """Read `[INPUT] [QUESTION...]`, the questions of `-q` and, behind them, those of `--prompts`.

    Raises:
        UsageError: no question, a lone positional that is no INPUT, or a question that is a file: the shell has
            expanded a glob.
    """
    if any(not question.strip() for question in (*positional[1:], *options)):
        raise UsageError("a question is empty; write it after -q")
    for text in options:
        _refuse_at(text, "a question", "--prompts FILE")
    if not positional:
        if not options and not listed:
            raise UsageError('no question; ask one with -q: md3 query photo.jpg -q "What is this?"')
        return QueryArguments(None, (*options, *listed))
    first = positional[0]
    if not looks_like_input(first):
        raise UsageError(_not_an_input(first, is_alone=len(positional) == 1))
    for text in positional[1:]:
        _refuse_file(text, "a question", "--prompts FILE")
    questions = (*positional[1:], *options, *listed)
    if not questions and not may_rows_ask(first):
        raise UsageError(f'no question about {printable(first)}; ask one with -q: -q "What is this?"')
    return QueryArguments(first, questions)


def _not_an_input(text: str, *, is_alone: bool) -> str:
    found = f"{printable(text)!r} is no file, folder, glob, URL or -"
    ask = f"-q {shlex.quote(printable(text))}"
    if is_alone:
        return f"{found}; if it is the question, ask it without an image: md3 query {ask}"
    return f"{found}; INPUT comes first: md3 query INPUT {ask}"


def check_objects(objects: Sequence[str]) -> None:
    """Refuse OBJECTs that are files: the shell has expanded a glob meant for INPUT.

    Raises:
        UsageError: an object is an existing file, or empty.
    """
    for name in objects:
        if not name.strip():
            raise UsageError("an OBJECT is empty; name what to look for")
        _refuse_file(name, "an OBJECT", "--labels FILE or --prompts FILE")


def _refuse_file(text: str, wanted: str, options: str) -> None:
    """Refuse a file where text is wanted: a picture that the shell has put in a glob's place, or a list of texts."""
    _refuse_at(text, wanted, options)
    if not os.path.isfile(text):
        return
    if PurePath(text).suffix.lower() in _PICTURES_OR_TARS:
        raise UsageError(
            f"{printable(text)!r} is a file, not {wanted}; quote the glob so that the shell leaves it alone: '*.jpg'"
        )
    raise UsageError(
        f"{printable(text)!r} is a file, not {wanted}; where it lists what to ask, name it with {options}; "
        "a glob is quoted so that the shell leaves it alone: '*.jpg'"
    )


def _refuse_at(text: str, wanted: str, options: str) -> None:
    if text.startswith("@") and not any(map(str.isspace, text)):
        raise UsageError(
            f"{printable(text)!r} is not {wanted}; files are not read with @: name the file with {options}"
        )
