"""How two trainers find the captions of pictures: their rules, written anew from reading their code.

kohya: kohya-ss/sd-scripts at 48d368f, library/train_util.py (`read_caption`, `glob_images`), library/config_util.py
(`generate_dreambooth_subsets_config_by_subdirs`). OneTrainer: Nerogar/OneTrainer at 23df383 with Nerogar/mgds at
3a6994a (`CollectPaths`, `ModifyPath`, `LoadMultipleTexts`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# kohya's IMAGE_EXTENSIONS, in both cases; OneTrainer's list has these, too.
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def kohya_caption(picture: Path, extension: str = ".caption") -> str | None:
    """The first line of the file that has the picture's name but for the suffix; None where there is none."""
    path = Path(os.path.splitext(picture)[0] + extension)
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        lines = file.readlines()
    assert lines, f"caption file is empty: {path}"
    return lines[0].strip()


def kohya_set(folder: Path, extension: str = ".caption") -> Iterator[tuple[Path, int, str]]:
    """Yield (picture, repeats, caption) of each folder `N_words`; without a file the words are the caption."""
    for subset in sorted(path for path in folder.iterdir() if path.is_dir()):
        repeats, _, words = subset.name.partition("_")
        if not repeats.isdigit() or int(repeats) < 1:  # int() takes more, which nobody writes
            continue
        for picture in sorted(subset.iterdir()):  # sub-folders are not entered
            if picture.suffix in _SUFFIXES | {suffix.upper() for suffix in _SUFFIXES}:
                caption = kohya_caption(picture, extension)
                yield picture, int(repeats), words if caption is None else caption


def onetrainer_captions(picture: Path) -> list[str]:
    """Every line with a text of the `.txt` of the picture's name; each is a caption, and one is drawn each time."""
    path = Path(os.path.splitext(picture)[0] + ".txt")
    if not path.exists():
        return [""]
    with path.open(encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()] or [""]


def onetrainer_concept(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each picture of a concept without sub-folders, with its captions."""
    for picture in sorted(folder.iterdir()):
        if picture.suffix.lower() in _SUFFIXES:
            yield picture, onetrainer_captions(picture)
