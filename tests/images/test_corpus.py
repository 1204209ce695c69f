"""Every file of the corpus, and thousands of mutated ones, through the decode pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpus import Case, encode, picture, write_corpus

from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, ImageLimits
from md3cli.images.pool import PicturePool
from md3cli.records import MESSAGE_LIMIT_CHARS, ImageItem, is_printable

pytestmark = pytest.mark.process

CFG = CropConfig(crop_size=42, patch_size=6, overlap_margin=2, max_crops=12)
SLOWEST_S = 5.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list[Case]]:
    root = tmp_path_factory.mktemp("corpus")
    return root, write_corpus(root)


def outcome(pool: PicturePool, path: str) -> tuple[tuple[int, int] | None, str | None, str]:
    """Upright size, error type and message of one file, which must come in time."""
    try:
        got = pool.submit(ImageItem(name="x", path=path)).result(timeout=SLOWEST_S)
    except ImageError as error:
        return None, error.type, str(error)
    return (got.width, got.height), None, ""


def test_the_corpus_is_large_and_has_no_doubles(corpus):
    _, cases = corpus
    assert len(cases) >= 300
    assert len({case.path for case in cases}) == len(cases)
    kinds = {"empty", "decode", "not_an_image", "unsupported", "too_large", "not_found", "not_a_file", None}
    assert kinds <= {case.error for case in cases}


def test_every_file_has_its_one_right_outcome(corpus, capfd):
    root, cases = corpus
    wrong = {}
    with PicturePool(1, CFG, ImageLimits()) as pool:
        outcome(pool, str(root / "good/mode-L.jpg"))
        pids = pool.worker_pids()
        for case in cases:
            size, error, message = outcome(pool, str(root / case.path))
            if (size, error) != (case.size, case.error):
                wrong[case.path] = (size, error, message)
            assert len(message) <= MESSAGE_LIMIT_CHARS
            assert all(map(is_printable, message)), case.path
            assert str(root) not in message
        assert wrong == {}
        assert pool.worker_pids() == pids, "a decoder died"
        assert memory_mb(pids[0], "VmHWM") < 400
    assert capfd.readouterr() == ("", "")


def test_the_plain_path_says_the_same(corpus):
    root, cases = corpus
    plain = PicturePool(0, CFG, ImageLimits())
    got = {case.path: outcome(plain, str(root / case.path))[:2] for case in cases}
    assert got == {case.path: (case.size, case.error) for case in cases}


def test_bombs_are_refused_from_the_header(corpus):
    root, cases = corpus
    bombs = [case for case in cases if case.error == "too_large"]
    assert len(bombs) >= 8
    with PicturePool(1, CFG, ImageLimits()) as pool:
        outcome(pool, str(root / "good/mode-L.jpg"))
        before = memory_mb(pool.worker_pids()[0], "VmHWM")
        for bomb in bombs:
            assert outcome(pool, str(root / bomb.path))[1] == "too_large"
        assert memory_mb(pool.worker_pids()[0], "VmHWM") - before < 50


def memory_mb(pid: int, kind: str) -> float:
    """`kind` VmRSS is what a process holds now, VmHWM the most it ever held."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 1024


# --- mutated files --------------------------------------------------------------------------------


def mutated(count: int) -> Iterator[bytes]:
    """Pictures in 16 encodings with flipped bytes, holes, repeats and cuts; the same ones each time."""
    options = {"JPEG": [{}, {"progressive": True}], "PNG": [{}], "WEBP": [{}, {"lossless": True}], "AVIF": [{}]}
    options |= {
        "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_adobe_deflate"}]
    }
    seeds = [encode(picture(), fmt, **one) for fmt, many in options.items() for one in many]
    seeds += [
        encode(picture(mode), fmt) for mode, fmt in (("P", "GIF"), ("P", "BMP"), ("CMYK", "JPEG"), ("I;16", "PNG"))
    ]
    seeds += [encode(picture("1"), "TIFF", compression="group4"), encode(picture("RGBA"), "PNG")]
    rng = np.random.default_rng(5)
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.integers(1, 6)):
            start = int(rng.integers(len(data)))
            end = min(start + int(rng.integers(1, 40)), len(data))
            match rng.integers(5):
                case 0:
                    data[start] ^= 1 << int(rng.integers(8))
                case 1:
                    data[start:end] = rng.bytes(end - start)
                case 2:
                    del data[start:end]
                case 3:
                    data[start:start] = data[start:end]
                case 4:
                    data[start] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
            data = data or bytearray(b"\0")
        yield bytes(data)


def check_mutated(count: int, folder: Path) -> Counter[str]:
    """Every one gives a picture or an error of its own, in time, and no decoder dies or grows over it."""
    seen: Counter[str] = Counter()
    path = str(folder / "mutated.jpg")
    with PicturePool(1, CFG, ImageLimits(max_pixels=2**24)) as pool:
        outcome(pool, path)
        [pid] = pool.worker_pids()
        for number, data in enumerate(mutated(count)):
            if number == count // 10:
                early_mb = memory_mb(pid, "VmRSS")
            with open(path, "wb") as file:
                file.write(data)
            _, error, message = outcome(pool, path)
            seen[error or "ok"] += 1
            assert error in {None, "decode", "not_an_image", "unsupported", "too_large"}, message
            assert pool.worker_pids() == [pid]
            assert all(map(is_printable, message))
        assert memory_mb(pid, "VmRSS") - early_mb < 50
    return seen


def test_500_mutated_files_harm_nothing(tmp_path):
    seen = check_mutated(500, tmp_path)
    assert sum(seen.values()) == 500
    assert min(seen["ok"], seen["decode"]) > 50, "the mutations are too weak or too strong to test anything"


@pytest.mark.slow
def test_10000_mutated_files_harm_nothing(tmp_path):
    assert sum(check_mutated(10_000, tmp_path).values()) == 10_000
