"""The tokenizer and the config.json of the embedded model.

Byte-level BPE of some 600 entries, trained on the little world's own texts: the 21 special tokens of
Moondream 3 first, then bytes and merges, then the numbers of a path (multiples of 10, 10-960) as
whole tokens, because each id of a path is decoded by itself. M, L, Z and C are bytes, hence tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from world import BACKGROUNDS, COLOURS, KINDS
from world_draw import make_picture
from world_text import CAPTION_LENGTHS, FACTS, all_questions, caption, plural

SPECIAL_TOKENS = ("<|endoftext|>", *(f"<|md_reserved_{i}|>" for i in range(20)))
EOS, SKILL, SEPARATOR, ANSWER, THINKING, COORD, SIZE, GROUND, GROUND_END = 0, 1, 2, 3, 4, 5, 6, 7, 9
PATH_NUMBERS = tuple(str(number) for number in range(10, 961, 10))
NUM_MERGED = 512  # entries before the path numbers
VOCAB_SIZE = NUM_MERGED + len(PATH_NUMBERS)
TEXT_SEED = 7


def _texts() -> Iterator[str]:
    names = [f"{colour} {kind}" for colour in COLOURS for kind in (*KINDS, "shape")] + [*KINDS, "shape"]
    for name in names:
        yield from (name, " " + name, plural(name), " " + plural(name))
    yield from BACKGROUNDS
    for word in ("caption", "describe", "short", "normal", "long", "query", "detect", "point", "segment"):
        yield from [word] * 40
    for fact in FACTS:
        yield from fact
    for index in range(400):
        picture, rng = make_picture(TEXT_SEED, index), np.random.default_rng(index)
        yield from (caption(picture, length) for length in CAPTION_LENGTHS)
        for question in all_questions(rng, picture):
            yield from (question.text, question.answer)


def train_tokenizer() -> Tokenizer:
    """The same tokenizer every time: the texts are those of a fixed seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_MERGED,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(_texts())
    random.Random(TEXT_SEED).shuffle(texts)
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() <= NUM_MERGED
    tokenizer.add_tokens([AddedToken(number, normalized=False) for number in PATH_NUMBERS])
    return tokenizer


def _template(tokenizer: Tokenizer, skill: str) -> dict[str, list[int]]:
    return {"prefix": [SKILL, *tokenizer.encode(skill).ids, SEPARATOR], "suffix": [ANSWER]}


def make_config(tokenizer: Tokenizer, *, text_dim: int, vision_dim: int, grid: int) -> dict[str, Any]:
    """config.json in the original's form, its sections under "config"."""
    captions = {}
    for length in CAPTION_LENGTHS:
        parts = _template(tokenizer, "describe")
        captions[length] = [*parts["prefix"], *tokenizer.encode(length).ids, ANSWER]
    templates: dict[str, Any] = {"caption": captions}
    templates |= {skill: _template(tokenizer, skill) for skill in ("query", "detect", "point", "segment")}
    sections = {
        "text": {
            "dim": text_dim, "ff_dim": 4 * text_dim, "n_layers": 5, "vocab_size": tokenizer.get_vocab_size(),
            "max_context": 1024, "n_heads": text_dim // 64, "n_kv_heads": text_dim // 64,
            "prefix_attn": 1 + grid * grid, "group_size": None, "rope_theta": 1500000.0,
            "moe": {"num_experts": 4, "start_layer": 1, "experts_per_token": 2, "expert_inner_dim": text_dim},
        },
        "vision": {
            "enc_dim": vision_dim, "enc_patch_size": 14, "enc_n_layers": grid, "enc_ff_dim": 4 * vision_dim,
            "enc_n_heads": vision_dim // 32, "proj_out_dim": text_dim, "crop_size": 14 * grid, "in_channels": 3,
            "max_crops": 6, "overlap_margin": 1, "proj_inner_dim": 4 * text_dim,
        },
        "region": {
            "dim": text_dim, "coord_feat_dim": 128, "coord_out_dim": 1024, "size_feat_dim": 128,
            "size_out_dim": 2048, "group_size": None,
        },
        "tokenizer": {
            "bos_id": EOS, "eos_id": EOS, "answer_id": ANSWER, "thinking_id": THINKING, "coord_id": COORD,
            "size_id": SIZE, "start_ground_points_id": GROUND, "end_ground_id": GROUND_END, "templates": templates,
        },
    }  # fmt: skip
    return {
        "architectures": ["HfMoondream"],
        "model_type": "moondream3",
        "torch_dtype": "bfloat16",
        "config": sections,
    }
