"""A pool of drawn scenes on disk, for training: crops as they enter the network, and their ground truth.

Shards of 256 pictures: `crops_N.npy` (uint8, all crops of all pictures, memory-mapped when read) and
`scenes_N.json`. Shard N holds the pictures N·256 … N·256+255 of the collection's seed, so a pool is the
same whoever draws it, and a longer one begins with the shorter one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from world import Background, Scene, Shape
from world_draw import Instance, Picture, make_picture

from md3cli.images.crops import CropConfig, Tiling, cut_crops

SHARD_SIZE = 256
OWNERS_SIDE = 48  # ground truth keeps a coarse map of which shape is seen where


@dataclass(frozen=True, slots=True)
class Sample:
    """A pool entry: crops uint8 [1 + rows * cols, S, S, 3] and a picture without its pixels."""

    crops: NDArray[np.uint8]
    tiling: Tiling
    picture: Picture


def _coarse_owners(owners: NDArray[np.int8]) -> NDArray[np.int8]:
    rows, cols = (((np.arange(OWNERS_SIDE) + 0.5) / OWNERS_SIDE * side).astype(int) for side in owners.shape)
    return owners[np.ix_(rows, cols)]


def _write_shard(folder: Path, seed: int, shard: int, config: CropConfig) -> None:
    crops, entries, start = [], [], 0
    for index in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE):
        picture = make_picture(seed, index)
        cut = cut_crops(picture.image, config)
        crops.append(cut.pixels)
        entries.append(
            {
                "start": start,
                "tiling": list(cut.tiling),
                "scene": asdict(picture.scene),
                "instances": [asdict(instance) for instance in picture.instances],
                "owners": _coarse_owners(picture.owners).tobytes().hex(),
            }
        )
        start += len(cut.pixels)
    np.save(folder / f"crops_{shard}.tmp.npy", np.concatenate(crops))
    os.replace(folder / f"crops_{shard}.tmp.npy", folder / f"crops_{shard}.npy")
    partial = folder / f"scenes_{shard}.tmp"
    partial.write_text("\n".join(json.dumps(entry) for entry in entries))
    os.replace(partial, folder / f"scenes_{shard}.json")


def draw_pool(folder: Path, seed: int, num_shards: int, config: CropConfig) -> None:
    """Draw the shards that are missing; a shard appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        if not (folder / f"scenes_{shard}.json").exists():
            _write_shard(folder, seed, shard, config)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


class Pool:
    """Read access to a pool that may still be growing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._crops: list[NDArray[np.uint8]] = []
        self._lines: list[str] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self._lines)

    def refresh(self) -> None:
        """Take in the shards that were finished since the last look."""
        while (path := self._folder / f"scenes_{len(self._crops)}.json").exists():
            self._crops.append(np.load(self._folder / f"crops_{len(self._crops)}.npy", mmap_mode="r"))
            self._lines += path.read_text().split("\n")

    def __getitem__(self, index: int) -> Sample:
        entry = json.loads(self._lines[index])
        scene = entry["scene"]
        shapes = tuple(Shape(**_tuples(shape)) for shape in scene.pop("shapes"))
        background = Background(**_tuples(scene.pop("background")))
        owners = np.frombuffer(bytes.fromhex(entry["owners"]), dtype=np.int8).reshape(OWNERS_SIDE, OWNERS_SIDE)
        picture = Picture(
            scene=Scene(shapes=shapes, background=background, **scene),
            image=Image.new("RGB", (1, 1)),
            instances=tuple(Instance(**_tuples(instance)) for instance in entry["instances"]),
            owners=owners,
        )
        tiling = Tiling(*entry["tiling"])
        start, num_crops = entry["start"], 1 + tiling.rows * tiling.cols
        return Sample(self._crops[index // SHARD_SIZE][start : start + num_crops], tiling, picture)
