"""What tiles find in large pictures made of scenes: small shapes that the whole picture hides, each once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mosaics.py"


@pytest.mark.slow
def test_tiles_find_what_is_small_and_count_what_a_seam_cuts_once() -> None:
    command = [sys.executable, str(EXAMPLE), "--pictures", "3", "--tile", "378"]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[1:]
    whole, tiled = map(json.loads, lines)
    assert tiled["AP50 of small shapes"] >= max(0.5, 3 * whole["AP50 of small shapes"])
    assert tiled["of them found"] >= 0.7 * tiled["across seams"] > 100
    assert tiled["found twice"] <= 0.02 * tiled["of them found"]
