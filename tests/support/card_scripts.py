"""The code of the three model cards, statement for statement, and what runs it with a few words replaced."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

# https://huggingface.co/moondream/moondream3-preview: its snippets, one after the other.
ORIGINAL = """
import torch
from transformers import AutoModelForCausalLM

moondream = AutoModelForCausalLM.from_pretrained(
    "moondream/moondream3-preview",
    trust_remote_code=True,
    dtype=torch.bfloat16,
    device_map={"": "cuda"},
)
moondream.compile()

from PIL import Image

# Simple VQA
image = Image.open("photo.jpg")
result = moondream.query(image=image, question="What's in this image?")
print(result["answer"])

# Without reasoning for simple questions
result = moondream.query(
    image=image,
    question="What color is the sky?",
    reasoning=False
)
print(result["answer"])

# Streaming with custom settings
settings = {
    "temperature": 0.7,
    "top_p": 0.95,
    "max_tokens": 512
}

result = moondream.query(
    image=image,
    question="Describe what's happening in detail",
    stream=True,
    settings=settings
)

# Stream the answer
for chunk in result["answer"]:
    print(chunk, end="", flush=True)

# Text-only example (no image)
result = moondream.query(
    question="Explain the concept of machine learning in simple terms"
)
print(result["answer"])

# Different caption lengths
image = Image.open("landscape.jpg")

# Short caption
short = moondream.caption(image, length="short")
print(f"Short: {short['caption']}")

# Normal caption (default)
normal = moondream.caption(image, length="normal")
print(f"Normal: {normal['caption']}")

# Long caption
long = moondream.caption(image, length="long")
print(f"Long: {long['caption']}")

# Streaming caption with custom settings
result = moondream.caption(
    image,
    length="long",
    stream=True,
    settings={"temperature": 0.3}
)

for chunk in result["caption"]:
    print(chunk, end="", flush=True)

# Find points for specific objects
image = Image.open("crowd.jpg")
result = moondream.point(image, "person wearing a red shirt")

# Points are normalized coordinates (0-1)
for i, point in enumerate(result["points"]):
    print(f"Point {i+1}: x={point['x']:.3f}, y={point['y']:.3f}")

# Detect objects with bounding boxes
image = Image.open("street_scene.jpg")
result = moondream.detect(image, "car")

# Bounding boxes are normalized coordinates (0-1)
for i, obj in enumerate(result["objects"]):
    print(f"Object {i+1}: "
          f"x_min={obj['x_min']:.3f}, y_min={obj['y_min']:.3f}, "
          f"x_max={obj['x_max']:.3f}, y_max={obj['y_max']:.3f}")

# Control maximum number of objects
settings = {"max_objects": 10}
result = moondream.detect(image, "person", settings=settings)

# Encode image once
image = Image.open("complex_scene.jpg")
encoded = moondream.encode_image(image)

# Reuse the encoding for multiple queries
questions = [
    "How many people are in this image?",
    "What time of day was this taken?",
    "What's the weather like?"
]

for q in questions:
    result = moondream.query(image=encoded, question=q, reasoning=False)
    print(f"Q: {q}")
    print(f"A: {result['answer']}\\n")

# Also works with other skills
caption = moondream.caption(encoded, length="normal")
objects = moondream.detect(encoded, "vehicle")
"""

# https://huggingface.co/NyxKrage/moondream3-preview-hf
PORT = """
import torch
from PIL import Image
from transformers import AutoProcessor, AutoModelForCausalLM

DEVICE="cuda:0"

model = AutoModelForCausalLM.from_pretrained("NyxKrage/moondream3-preview-hf", dtype="bfloat16", device_map=DEVICE, trust_remote_code=True)
processor = AutoProcessor.from_pretrained("NyxKrage/moondream3-preview-hf", use_fast=False, trust_remote_code=True)


image1 = Image.open("image1.jpg")
image2 = Image.open("image2.jpg")
text = [processor.apply_chat_template("", tokenize=False)] * 2
inputs = processor(text=text, images=[
    image1,
    image2,
])
inputs = {k: v.to(DEVICE) for k,v in inputs.items()}

model.eval()

with torch.no_grad():
    outputs = model.generate(
        **inputs,
        use_cache=True,
    )
    outputs = [
        out_ids[len(in_ids):] for in_ids, out_ids in zip(inputs["input_ids"], outputs)
    ]
    for output in outputs:
        print(processor.decode(output))
"""  # noqa: E501

# https://huggingface.co/alecccdd/moondream3-preview-4bit
FOUR_BIT = """
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

# Load quantized model (same API as original Moondream3-preview)
moondream = AutoModelForCausalLM.from_pretrained(
    "alecccdd/moondream3-preview-4bit",
    trust_remote_code=True,
    dtype=torch.bfloat16,
    device_map={"": "cuda"},
)
moondream.compile()  # Critical for fast inference

# Load an image
image = Image.open("photo.jpg")

# Ask a question
result = moondream.query(image=image, question="What's in this image?")
print(result["answer"])
"""

FOUR_BIT_BY_HAND = """
import torch
from PIL import Image

from config import MoondreamConfig
from moondream import MoondreamModel
from weights import load_weights

# Load quantized model
model = MoondreamModel(MoondreamConfig())
load_weights("./", model, device="cuda")
model.compile()  # Critical for fast inference

# Load an image
image = Image.open("photo.jpg")

# Ask a question
result = model.query(image=image, question="What's in this image?")
print(result["answer"])
"""

# What a card's import becomes.
TRANSFORMERS = "from transformers import AutoModelForCausalLM"
IMPORTS = {
    "md3cli.original": "from md3cli.original import AutoModelForCausalLM",
    "Moondream": "from md3cli import Moondream as AutoModelForCausalLM",
    "transformers": f"import md3cli.model.hf\n{TRANSFORMERS}",
}
PICTURES = ("photo", "landscape", "crowd", "street_scene", "complex_scene", "image1", "image2")


def make_card_pictures(folder: Path) -> None:
    """Write the pictures that the cards open: of many sizes, and small."""
    for number, name in enumerate(PICTURES):
        picture = Image.radial_gradient("L").resize((60 + 17 * number, 90 - 7 * number)).convert("RGB")
        picture.save(folder / f"{name}.jpg")


def run_script(script: str, replaced: Mapping[str, str]) -> dict[str, Any]:
    """Run a script with words of it replaced, one statement after the other; return its names.

    A statement that fails is named, and a word that does not stand there is no replacement.
    """
    for old, new in replaced.items():
        assert old in script, old
        script = script.replace(old, new)
    names: dict[str, Any] = {"__name__": "card"}
    for statement in ast.parse(script).body:
        try:
            exec(compile(ast.Module([statement], []), "<card>", "exec"), names)
        except Exception as error:
            raise AssertionError(ast.unparse(statement)) from error
    return names
