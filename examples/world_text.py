"""What can be said about a picture of the little world: names, captions, questions, reasoning, paths.

Everything is derived from the exact ground truth. Objects are listed from left to right, so that every
text has one right form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from world import COLOURS, KINDS
from world_draw import Instance, Picture, instance_outline

PATH_VIEWBOX = 960  # a path's numbers are 0-960 inside the object's box
PATH_STEP = 40  # and multiples of this; a tenth of it would say nothing more at these sizes
PATH_CURVE_POINTS = 12
CLEAR_GAP = 0.08  # left/right/above/below are asked only of centres this far apart
PLACE_MARGIN = 0.03  # and "where" only of centres this far from a border between two answers
CAPTION_LENGTHS = ("short", "normal", "long")

FACTS = (
    ("How many sides does a triangle have?", "3"),
    ("How many sides does a square have?", "4"),
    ("How many corners does a square have?", "4"),
    ("How many corners does a triangle have?", "3"),
    ("How many points does a star have?", "5"),
    ("Does a circle have corners?", "no"),
    ("Does a square have corners?", "yes"),
    ("What do you know?", "Coloured shapes: " + ", ".join(KINDS) + "."),
    ("Which colours do you know?", ", ".join(COLOURS) + "."),
    ("Who are you?", "A tiny Moondream that knows coloured shapes."),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one right answer. `kind` names the sort; references are spatial, 0-1.

    `counted` holds the instances a count question is about, from left to right, for grounded reasoning.
    """

    kind: str
    text: str
    answer: str
    point: tuple[float, float] | None = None
    box_xyxy: tuple[float, float, float, float] | None = None
    counted: tuple[Instance, ...] | None = None


def names_of(instance: Instance) -> tuple[str, str, str, str]:
    """All names that an instance answers to, from exact to general."""
    return instance.name, instance.kind, f"{instance.colour} shape", "shape"


def matching(name: str, instances: Sequence[Instance]) -> tuple[Instance, ...]:
    """The instances called `name`: "circle", "red circle", "red shape" or "shape"."""
    return tuple(instance for instance in instances if name in names_of(instance))


def plural(name: str) -> str:
    """The plural of a name: "red cross" -> "red crosses"."""
    return name + ("es" if name.endswith("s") else "s")


def listing(instances: Sequence[Instance]) -> str:
    """The objects in one phrase: "a red circle, a blue star and a green moon"."""
    parts = [f"a {instance.name}" for instance in instances]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def count_phrase(count: int) -> str:
    return "1 shape" if count == 1 else f"{count} shapes"


def place_of(x: float, y: float) -> str:
    """The ninth of the picture a point lies in: "top left", "centre", "right" …"""
    row, column = ("top", "", "bottom")[min(2, int(y * 3))], ("left", "", "right")[min(2, int(x * 3))]
    return " ".join(word for word in (row, column) if word) or "centre"


def caption(picture: Picture, length: str) -> str:
    """The short, normal or long caption."""
    instances, style = picture.instances, picture.scene.background.style
    if length == "short":
        return "A" + listing(instances)[1:] + "."
    if length == "normal":
        return f"{count_phrase(len(instances))} on a {style} background: {listing(instances)}."
    lines = [f"The picture shows {count_phrase(len(instances))} on a {style} background."]
    for instance in instances:
        lines.append(f"A {instance.name} is at the {place_of(instance.centre_x, instance.centre_y)}.")
    return " ".join(lines)


def caption_objects(text: str) -> list[str]:
    """The names in a short or normal caption, in order: the inverse of `caption` for scoring."""
    listed = text.strip().rstrip(".").split(": ")[-1].replace(" and ", ", ").split(", ")
    return [part.strip().split(" ", 1)[-1] for part in listed if part.strip()]


def random_name(rng: np.random.Generator, picture: Picture, *, present: float = 0.5) -> str:
    """A name to ask for: with probability `present` one that some instance answers to."""
    if rng.random() < present:
        instance = picture.instances[int(rng.integers(len(picture.instances)))]
        return names_of(instance)[int(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1)))]
    kind, colour = str(rng.choice(KINDS)), str(rng.choice(tuple(COLOURS)))
    return (f"{colour} {kind}", kind, f"{colour} shape")[int(rng.choice(3, p=(0.5, 0.3, 0.2)))]


def count_question(rng: np.random.Generator, picture: Picture) -> Question:
    """Ask for a number: "How many red circles are there?"."""
    name = random_name(rng, picture, present=0.75)
    counted = matching(name, picture.instances)
    return Question("count", f"How many {plural(name)} are there?", str(len(counted)), counted=counted)


def existence_question(rng: np.random.Generator, picture: Picture) -> Question:
    """Ask "Is there a red circle?"; many absent ones differ from a present shape in one word."""
    name = random_name(rng, picture)
    if rng.random() < 0.3:
        instance = picture.instances[int(rng.integers(len(picture.instances)))]
        name = f"{instance.colour} {rng.choice(KINDS)}"
    return Question("exists", f"Is there a {name}?", "yes" if matching(name, picture.instances) else "no")


def unique_questions(rng: np.random.Generator, picture: Picture) -> list[Question]:
    """Questions about a shape that its name picks out alone: its colour, kind or place."""
    spelling = "color" if rng.random() < 0.3 else "colour"
    questions = []
    for instance in picture.instances:
        if len(matching(instance.kind, picture.instances)) == 1:
            questions.append(Question("colour", f"What {spelling} is the {instance.kind}?", instance.colour))
        if len(matching(f"{instance.colour} shape", picture.instances)) == 1:
            questions.append(Question("which", f"Which shape is {instance.colour}?", instance.kind))
        name = _unique_name(instance, picture)
        borders = [abs(v - border) for v in (instance.centre_x, instance.centre_y) for border in (1 / 3, 2 / 3)]
        if name and min(borders) >= PLACE_MARGIN:
            place = place_of(instance.centre_x, instance.centre_y)
            questions.append(Question("where", f"Where is the {name}?", place))
    return questions


def _unique_name(instance: Instance, picture: Picture) -> str | None:
    names = (instance.kind, instance.name)
    return next((name for name in names if len(matching(name, picture.instances)) == 1), None)


def relation_question(rng: np.random.Generator, picture: Picture) -> Question | None:
    """Ask "Is the red circle left of the blue star?", or the first or last shape; None when nothing is clear."""
    instances = picture.instances
    if len(instances) == 1 or rng.random() < 0.3:
        side, instance = (("leftmost", instances[0]), ("rightmost", instances[-1]))[int(rng.integers(2))]
        return Question("relation", f"What is the {side} shape?", f"a {instance.name}")
    first, second = (instances[int(i)] for i in rng.choice(len(instances), 2, replace=False))
    name_a, name_b = _unique_name(first, picture), _unique_name(second, picture)
    if not name_a or not name_b:
        return None
    relation = str(rng.choice(("left of", "right of", "above", "below")))
    sideways = relation.endswith("of")
    gap = second.centre_x - first.centre_x if sideways else second.centre_y - first.centre_y
    if abs(gap) < CLEAR_GAP:
        return None
    holds = (gap > 0) == (relation in ("left of", "above"))
    return Question("relation", f"Is the {name_a} {relation} the {name_b}?", "yes" if holds else "no")


def reference_question(rng: np.random.Generator, picture: Picture) -> Question:
    """Ask "What is at this point?" with a point, "What is in this box?" with a box."""
    if rng.random() < 0.2:
        x, y = (float(v) for v in rng.uniform(0.03, 0.97, 2))
        rows, cols = picture.owners.shape
        owner = int(picture.owners[int(y * rows), int(x * cols)])
        answer = "the background" if owner < 0 else f"a {picture.scene.shapes[owner].name}"
        return Question("reference", "What is at this point?", answer, point=(x, y))
    instance = picture.instances[int(rng.integers(len(picture.instances)))]
    answer = f"a {instance.name}"
    if rng.random() < 0.5:
        return Question("reference", "What is at this point?", answer, point=instance.point)
    return Question("reference", "What is in this box?", answer, box_xyxy=instance.box_xyxy)


def all_questions(rng: np.random.Generator, picture: Picture) -> list[Question]:
    """One question of every sort that the picture allows, for scoring and for the files."""
    questions = [count_question(rng, picture), existence_question(rng, picture), reference_question(rng, picture)]
    by_kind: dict[str, list[Question]] = {}
    for question in unique_questions(rng, picture):
        by_kind.setdefault(question.kind, []).append(question)
    questions += [group[int(rng.integers(len(group)))] for group in by_kind.values()]
    relation = relation_question(rng, picture)
    return questions if relation is None else [*questions, relation]


def path_words(picture: Picture, instance: Instance) -> list[str]:
    """The outline as path words inside the visible box, in a 960 x 960 viewbox, hidden parts cut at the border."""
    width, height = picture.scene.width, picture.scene.height
    left, top, right, bottom = instance.box_xyxy
    points = instance_outline(picture, instance, PATH_CURVE_POINTS) / (width, height)
    inside = (points - (left, top)) / (right - left, bottom - top)
    steps = PATH_VIEWBOX // PATH_STEP
    numbers = np.clip(np.rint(inside * steps), 0, steps).astype(int) * PATH_STEP
    first, *others = ([str(x), str(y)] for x, y in numbers)
    return ["M", *first, "L", *(word for pair in others for word in pair), "Z"]
