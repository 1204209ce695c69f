"""A whole run of the embedded model whose pictures are cut beside the engine: the same records, byte for byte.

The cutter's plain twin stands in for a GPU's; workers, memory shared with them, feed and engine are the real ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import encode, picture
from PIL import Image
from program import isolate
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.images import pool as pool_module
from md3cli.images.crops import Crops
from md3cli.images.pool import PicturePool
from md3cli.model.engine import load
from md3cli.model.engine.cutting import DeviceCutter
from md3cli.run.model_handle import LazyEngine

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.process


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for source in sorted((EXAMPLES / "scenes").glob("*[0-9].*"))[:3]:
        shutil.copy(source, folder)
    shutil.copy(EXAMPLES / "images" / "china.jpg", folder)
    Image.open(EXAMPLES / "images" / "china.jpg").transpose(Image.Transpose.ROTATE_90).save(folder / "tall.png")
    (folder / "torn.jpg").write_bytes(encode(picture(), "JPEG")[:200])
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("1", (3000, 3000)).save(folder / "huge.png")
    (folder / "again.jpg").write_bytes((folder / "china.jpg").read_bytes())
    return folder


def run(folder: Path, output: Path) -> bytes:
    words = ["detect", str(folder), "shape", "circle", "-o", str(output), "--model", "tiny", "--device", "cpu"]
    limits = ["--workers", "2", "--max-pixels", "5000000", "--no-cache", "--batch-size", "3"]
    result = CliRunner().invoke(app, [*words, *limits], prog_name="md3")
    assert result.exit_code == 3, result.output  # some records failed
    return output.read_bytes()


def test_records_are_the_same_when_the_device_cuts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures: Path
) -> None:
    isolate(monkeypatch, tmp_path / "home")
    expected = run(pictures, tmp_path / "cut.jsonl")
    assert expected.count(b"\n") == 2 * len(list(pictures.iterdir()))
    assert expected.count(b'"too_large"') == 2
    monkeypatch.setattr(load, "make_cutter", lambda device, config: DeviceCutter(device, config.vision.crop_config))
    monkeypatch.setattr(LazyEngine, "is_on_gpu", True)
    monkeypatch.setattr(pool_module, "arena_bytes", lambda num_workers: 1 << 19)  # smaller than the photographs
    seen: list[tuple[int, int]] = []
    plain = DeviceCutter.crops_of

    def see(self: DeviceCutter, pixels: np.ndarray) -> Crops:
        seen.append((pixels.shape[1], pixels.shape[0]))
        return plain(self, pixels)

    monkeypatch.setattr(DeviceCutter, "crops_of", see)
    assert run(pictures, tmp_path / "mixed.jsonl") == expected
    # The first pictures were cut before the model was there, and photographs by their workers.
    assert (640, 427) not in seen
    seen.clear()
    monkeypatch.setattr(pool_module, "arena_bytes", lambda num_workers: 8 << 20)
    prepare = PicturePool.__init__

    def from_the_start(self: PicturePool, *given: object, **named: object) -> None:
        prepare(self, *given, **named)  # type: ignore[arg-type]  # whatever it is given
        self.serve_gpu(DeviceCutter(torch.device("cpu"), self.crop_config))

    monkeypatch.setattr(PicturePool, "__init__", from_the_start)
    assert run(pictures, tmp_path / "whole.jsonl") == expected
    assert len(seen) == len(list(pictures.iterdir())) - 3, "all but a torn, an empty and a huge one"
    assert {(640, 427), (427, 640)} <= set(seen)
