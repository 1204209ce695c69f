"""Names for what is asked: `NAME=PROMPT` as typed, and the files of `--labels`.

A label is a name that exports and reports show, with the prompts that are asked for it and the limits of its own.
Files may come from a stranger: they are small (1 MB), hold plain values only, and what cannot be read in full is
refused. Knows nothing of records. Source: product contract, section 8.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from md3cli.errors import UsageError
from md3cli.records import printable
from md3cli.refine.template import Template

FILE_LIMIT_BYTES = 10**6
COUNT_LIMIT = 2**31 - 1  # of ids and of objects
SUFFIXES = (".toml", ".txt", ".yaml", ".yml")
_DEPTH_LIMIT = 20  # of lists and maps in YAML
_MOST_DOTS = 100  # outside quotes, in a line of TOML: the time for a key grows with the square of its parts
_QUOTED = re.compile(r""""(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'""")
_SHOWN_CHARS = 80  # of a name or a prompt in a message
_NUMBER = re.compile("[0-9]{1,10}")
_KEYS = frozenset({"name", "prompts", "min_score", "nms", "max_objects", "id"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A name, the prompts asked for it, and its own limits; None leaves a limit to the command's option.

    `min_score` and `nms` are 0-1, `id` is the class's number in COCO files. `templates` are further prompts, which are
    filled from each row before they are asked.
    """

    name: str
    prompts: tuple[str, ...]
    min_score: float | None = None
    nms: float | None = None
    max_objects: int | None = None
    id: int | None = None
    templates: tuple[str, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether several prompts have the name."""
        return len(self.prompts) + len(self.templates) > 1

    def to_json(self) -> dict[str, Any]:
        """Return the label as the table of a labels file: its name, its prompts, and the limits that it has."""
        limits = {key: getattr(self, key) for key in ("min_score", "nms", "max_objects", "id")}
        found = {"name": self.name, "prompts": list(self.prompts)} | {k: v for k, v in limits.items() if v is not None}
        return found | {"templates": list(self.templates)} if self.templates else found


@dataclass(frozen=True)
class Labels:
    """Labels in the order that all exports keep; no name and no prompt comes twice."""

    labels: tuple[Label, ...] = field(default=())

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(label.name for label in self.labels)

    @cached_property
    def by_prompt(self) -> Mapping[str, Label]:
        """The label of each prompt."""
        return {prompt: label for label in self.labels for prompt in label.prompts}

    @cached_property
    def by_name(self) -> Mapping[str, Label]:
        """The label of each name."""
        return {label.name: label for label in self.labels}

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Everything that is asked, in order."""
        return tuple(self.by_prompt)

    @cached_property
    def place_of(self) -> Mapping[str, int]:
        """The place of each prompt in the order in which all are asked, from 0."""
        return {prompt: place for place, prompt in enumerate(self.by_prompt)}

    @cached_property
    def by_template(self) -> Mapping[str, Label]:
        """The label of each template."""
        return {text: label for label in self.labels for text in label.templates}

    @cached_property
    def _templates(self) -> tuple[tuple[Template, Label], ...]:
        return tuple((Template.parse(text), label) for text, label in self.by_template.items())

    def may_be_of(self, prompt: str) -> Label | None:
        """Return the label of the first template that a prompt can have come of; None where there is none."""
        return next((label for template, label in self._templates if template.may_be(prompt)), None)

    def as_templates(self) -> Labels:
        """Return the labels of prompts that are filled from rows; one that has only its template for a name goes.

        Raises:
            UsageError: a prompt is no template.
        """
        return Labels(tuple(filled for label in self.labels if (filled := _as_template(label)) is not None))

    def name_of(self, prompt: str) -> str:
        """Return the name given for a prompt, else the prompt."""
        label = self.by_prompt.get(prompt)
        return prompt if label is None else label.name

    def followed_by(self, others: Labels) -> Labels:
        """Return these labels, and behind them what `others` say of prompts that are not named here.

        A prompt of `others` joins the label of its name where that is here; ids are kept only where all have one.
        """
        merged = {label.name: label for label in self.labels}
        for label in others.labels:
            prompts = tuple(prompt for prompt in label.prompts if prompt not in self.by_prompt)
            templates = tuple(text for text in label.templates if text not in self.by_template)
            known = merged.get(label.name)
            if known is not None:
                prompts, templates = (*known.prompts, *prompts), (*known.templates, *templates)
            if prompts or templates:
                merged[label.name] = _changed(known or label, prompts=prompts, templates=templates)
        return Labels(_with_ids_of_all(tuple(merged.values())))

    def in_order_of(self, others: Labels) -> Labels:
        """Return these labels in the order of `others`, those that are not there last.

        A label with another name takes the place of the first whose prompts it has: a new name changes no number.
        """
        places = {name: place for place, name in enumerate(others.names)}

        def place_of(label: Label) -> int:
            taken = (places[others.name_of(prompt)] for prompt in label.prompts if prompt in others.by_prompt)
            return places.get(label.name, min(taken, default=len(places)))

        return Labels(tuple(sorted(self.labels, key=place_of)))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the tables of a labels file that says the same."""
        return [label.to_json() for label in self.labels]


def _changed(label: Label, **values: Any) -> Label:
    known = {field.name: getattr(label, field.name) for field in fields(Label)}
    return Label(**(known | values))


def _as_template(label: Label) -> Label | None:
    parsed = {prompt: Template.parse(prompt) for prompt in label.prompts}
    texts = {prompt: template.filled({}) for prompt, template in parsed.items() if not template.names}
    name = texts.get(label.name, label.name) if label.prompts == (label.name,) else label.name
    templates = tuple(prompt for prompt in parsed if prompt not in texts and prompt != label.name)
    if not texts and not templates:
        return None
    return _changed(label, name=name, prompts=tuple(texts.values()), templates=templates)


def _with_ids_of_all(labels: tuple[Label, ...]) -> tuple[Label, ...]:
    """Give labels that follow those of a file ids behind the file's, where the file gives any."""
    given = [label.id for label in labels if label.id is not None]
    if not given or len(given) == len(labels) == len(set(given)):
        return labels
    numbers = iter(range(max(given) + 1, max(given) + 1 + len(labels)))
    seen: set[int] = set()
    whole = []
    for label in labels:
        is_free = label.id is not None and label.id not in seen
        number = label.id if is_free and label.id is not None else next(numbers)
        seen.add(number)
        whole.append(_changed(label, id=number))
    return tuple(whole)


def shown_text(text: str) -> str:
    """Return what a file says as a message can hold it."""
    return printable(text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…")


def parse_object(text: str) -> tuple[str, str]:
    """Read an OBJECT: return (name, prompt) of `NAME=PROMPT`, of `=PROMPT`, which is taken as it is, or of a prompt.

    Raises:
        UsageError: the prompt is empty.
    """
    name, has_name, prompt = text.partition("=")
    name, prompt = (name.strip(), prompt.strip()) if has_name else ("", text.strip())
    if not prompt:
        example = f" after {shown_text(name)}=" if name else ""
        raise UsageError(f"an OBJECT is empty{example}; name what to look for")
    return name or prompt, prompt


def fits_in_file(label: Label) -> bool:
    """Return whether a labels file can say a label: it takes blanks around a text away."""
    return all(text and text == text.strip() for text in (label.name, *label.prompts))


def toml_of(labels: Labels) -> str:
    """Return the text of a labels file (`.toml`) that `read_labels` reads as these labels, which must fit in one.

    Raises:
        UsageError: it would be too long to be read.
    """
    tables = ("\n".join(f"{key} = {_toml(value)}" for key, value in table.items()) for table in labels.to_json())
    text = "\n".join(f"[[label]]\n{table}\n" for table in tables)
    if len(text.encode()) > FILE_LIMIT_BYTES:
        raise UsageError(f"{len(labels.labels):,} labels do not fit in the {FILE_LIMIT_BYTES:,} bytes of a labels file")
    return text


def _toml(value: Any) -> str:
    """Return a text, a number or a list in TOML: JSON but for the one character that TOML forbids in a text."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def prompts_of(objects: Sequence[str], listed: Labels) -> list[str]:
    """Return what OBJECTs ask: of one that is a listed name all its prompts; without OBJECTs all that is listed.

    Raises:
        UsageError: an OBJECT is empty.
    """
    if not objects:
        return list(listed.prompts)
    return [prompt for text in objects for prompt in _prompts_of(text, listed)]


def _prompts_of(text: str, listed: Labels) -> tuple[str, ...]:
    _, prompt = parse_object(text)
    label = listed.by_name.get(prompt) if "=" not in text else None
    return (prompt,) if label is None else label.prompts


def labels_with(objects: Iterable[str], listed: Labels, where: str = "--labels") -> Labels:
    """Return the listed labels, and behind them those of OBJECTs as typed; several of one name are one label.

    `where` they are listed is for the message.

    Raises:
        UsageError: an OBJECT is empty, or its prompt has two names.
    """
    typed = []
    for text in objects:
        name, prompt = parse_object(text)
        known = listed.by_prompt.get(prompt)
        if "=" not in text and (known is not None or prompt in listed.by_name):
            continue
        if known is not None and known.name != name:
            raise UsageError(
                f"{shown_text(prompt)!r} is asked as {shown_text(name)!r}, and {where} calls it "
                f"{shown_text(known.name)!r}; give it one name"
            )
        typed.append((name, prompt))
    return listed.followed_by(_gathered(typed, "OBJECTs"))


def _gathered(pairs: Iterable[tuple[str, str]], where: str) -> Labels:
    prompts: dict[str, dict[str, None]] = {}
    for name, prompt in pairs:
        prompts.setdefault(name, {})[prompt] = None
    return _checked([Label(name=name, prompts=tuple(asked)) for name, asked in prompts.items()], where)


def _checked(labels: Sequence[Label], where: str) -> Labels:
    """Return `labels`, or refuse what comes twice; `where` they stand is for the message.

    Raises:
        UsageError: a name, a prompt or an id comes twice, or some have an id and others none.
    """
    for what, values in (
        ("name", [label.name for label in labels]),
        ("prompt", [prompt for label in labels for prompt in label.prompts]),
        ("id", [str(label.id) for label in labels if label.id is not None]),
    ):
        twice = next((value for value, count in Counter(values).items() if count > 1), None)
        if twice is not None:
            names = [label.name for label in labels if twice in label.prompts]
            under = f" (as {' and '.join(map(shown_text, names))})" if what == "prompt" and len(names) > 1 else ""
            raise UsageError(f"{where}: the {what} {shown_text(twice)!r} comes twice{under}; leave one out")
    if 0 < sum(label.id is not None for label in labels) < len(labels):
        bare = next(label.name for label in labels if label.id is None)
        raise UsageError(f"{where}: {shown_text(bare)!r} has no id and others have; give all an id, or none")
    return Labels(tuple(labels))


def read_labels(path: Path) -> Labels:
    """Read a labels file: `.toml` with tables `[[label]]`, `.txt` with an OBJECT a line, or the `names` of a YOLO file.

    Raises:
        UsageError: it cannot be read in full; says where and why.
    """
    where = printable(str(path))
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"--labels {where}: a labels file ends in .toml, .txt or .yaml")
    text = read_text(path, "--labels")
    if suffix == ".toml":
        labels = _of_toml(text, where)
    elif suffix == ".txt":
        labels = _of_lines(lines_of(text), f"--labels {where}")
    else:
        labels = _of_yaml(text, f"--labels {where}")
    if not labels.labels:
        raise UsageError(f"--labels {where} names no label")
    return labels


def read_text(path: Path, option: str) -> str:
    """Return the text of a small file that `option` names: UTF-8, with a byte order mark or without.

    Raises:
        UsageError: it is not there, no regular file, larger, or not UTF-8.
    """
    where = printable(str(path))
    try:
        if not path.is_file():
            what = "is a folder or a pipe, not a file" if path.exists() else "no such file"
            raise UsageError(f"{option} {where}: {what}")
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT_BYTES + 1)
        if len(content) > FILE_LIMIT_BYTES:
            raise UsageError(f"{option} {where} has more than {FILE_LIMIT_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{option} {where} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {where} is not UTF-8 (byte {error.start:,}); save it as UTF-8") from error


def lines_of(text: str) -> list[str]:
    """Return the lines that say something: without blanks around, blank lines and lines that begin with `#`."""
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _of_lines(lines: Iterable[str], where: str) -> Labels:
    try:
        pairs = [parse_object(line) for line in lines]
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return _gathered(pairs, where)


def _of_toml(text: str, where: str) -> Labels:
    if any(line.count(".") > _MOST_DOTS for line in _QUOTED.sub("", text).split("\n")):
        raise UsageError(f"--labels {where}: it is nested too deep; labels are tables [[label]]")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number with too many digits to be read
        raise UsageError(f"--labels {where} is not TOML: {shown_text(str(error))}") from error
    tables = document.get("label")
    unknown = next((key for key in document if key != "label"), None)
    if unknown is not None:
        raise UsageError(f"--labels {where}: unknown key {shown_text(unknown)!r}; labels are tables [[label]]")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"--labels {where} has no tables [[label]]")
    return labels_of_tables(tables, f"--labels {where}")


def labels_of_tables(tables: Sequence[Mapping[str, Any]], where: str, *, may_fill: bool = False) -> Labels:
    """Return the labels of tables as a `.toml` file has them, whoever wrote them; `where` begins each message.

    `may_fill`: the tables are those of a run, which may have templates as well.

    Raises:
        UsageError: a key that is not known, a value that is not of its kind, or something that comes twice.
    """
    keys = _KEYS | {"templates"} if may_fill else _KEYS
    return _checked([_of_table(table, f"{where}, label {n}", keys) for n, table in enumerate(tables, 1)], where)


def _of_table(table: Mapping[str, Any], where: str, keys: frozenset[str]) -> Label:
    unknown = next((key for key in table if key not in keys), None)
    if unknown is not None:
        raise UsageError(f"{where}: unknown key {shown_text(str(unknown))!r}; one of {', '.join(sorted(keys))}")
    name = table.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{where}: a name is missing")
    here = f"{where} ({shown_text(name)})"
    prompts, templates = table.get("prompts", [name.strip()]), table.get("templates", [])
    if not _is_texts(prompts) or not _is_texts(templates) or not (prompts or templates):
        raise UsageError(f"{here}: prompts is a list of texts")
    for text in templates:
        Template.parse(text)
    limits: dict[str, Any] = {key: _share(table[key], f"{here}: {key}") for key in ("min_score", "nms") if key in table}
    limits |= {key: _count(table[key], f"{here}: {key}") for key in ("max_objects", "id") if key in table}
    if limits.get("max_objects") == 0:
        raise UsageError(f"{here}: max_objects is at least 1")
    prompts = tuple(prompt.strip() for prompt in prompts)
    return Label(name=name.strip(), prompts=prompts, templates=tuple(templates), **limits)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def _share(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN is not
        raise UsageError(f"{where} is a number from 0 to 1")
    return float(value)


def _count(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= COUNT_LIMIT:
        raise UsageError(f"{where} is a whole number from 0 to {COUNT_LIMIT:,}")
    return value


def _of_yaml(text: str, where: str) -> Labels:
    names = names_by_number(yaml_document(text, where), where).values()
    return _checked([Label(name=name, prompts=(name,)) for name in names], where)


def names_by_number(document: Mapping[str, Any], where: str) -> dict[int, str]:
    """Return the `names` of a YOLO file in the order of their numbers: of a list, or a map from numbers.

    Raises:
        UsageError: there are none, or they are no names; its message begins with `where`.
    """
    names = document.get("names")
    if isinstance(names, dict):
        odd = next((key for key in names if not _NUMBER.fullmatch(key)), None)
        if odd is not None:
            raise UsageError(f"{where}: {shown_text(odd)!r} in names is not the number of a class")
        by_number = {int(key): name for key, name in names.items()}
        if len(by_number) < len(names):
            raise UsageError(f"{where}: the number of a class comes twice in names; leave one out")
    else:
        by_number = dict(enumerate(names)) if isinstance(names, list) else {}
    if not isinstance(names, dict | list) or not all(
        isinstance(name, str) and name.strip() for name in by_number.values()
    ):
        raise UsageError(f"{where} has no names of classes (names: a list, or a map from numbers)")
    return {number: by_number[number].strip() for number in sorted(by_number)}


def yaml_document(text: str, where: str) -> dict[str, Any]:
    """Parse YAML in which each scalar is a text; an alias, which could make a small file a huge one, is refused.

    Raises:
        UsageError: it is no map, or cannot be read so; its message begins with `where`.
    """
    import yaml

    base = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

    class OnceLoader(base):  # type: ignore[misc,valid-type]  # whichever of the two is there
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise yaml.YAMLError("a key comes twice")
            return found

    try:
        depth = 0
        for event in yaml.parse(text, Loader=base):
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{where}: aliases (*name) are not read; write the names out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH_LIMIT:  # the parser takes minutes, and the stack of the C library is not guarded
                raise yaml.YAMLError("it is nested too deep")
        document = yaml.load(text, Loader=OnceLoader)  # noqa: S506 - a BaseLoader makes texts, lists and maps only
    except (yaml.YAMLError, RecursionError) as error:
        reason = shown_text(" ".join(str(error).split()))
        raise UsageError(f"{where} is not YAML that can be read: {reason}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{where} has no names of classes")
    return document
