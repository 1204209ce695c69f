"""Cached embeddings are the computed ones, and only where nothing they depend on has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_cases import assert_answer, load_case
from PIL import Image

from md3cli.file_cache import FileCache
from md3cli.images.crops import PreparedImage
from md3cli.model.api import Moondream
from md3cli.model.engine import encoder, plain
from md3cli.model.engine.encoder import EncodingCache, vision_digest
from md3cli.records import Job, Request, Task


def cache_for(
    case_name: str, folder: Path, dtype: torch.dtype = torch.float32, background: str = "none"
) -> EncodingCache:
    return EncodingCache(FileCache(folder, 10**8), load_case(case_name, dtype).model, background=background)


@pytest.mark.process
def test_a_second_run_does_no_vision_work_and_says_the_same(tmp_path: Path) -> None:
    case = load_case("a")
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    for is_cached in (False, True):
        engine = case.engine(batch_size=4)
        engine.encoder.store = cache_for("a", tmp_path)
        jobs = [Job(k, case.job(k).image, case.requests[k]) for k in keys]
        for answer in engine.run(jobs):
            assert_answer(answer, case.expected[answer.key])
        assert engine.encoder.num_images == (0 if is_cached else len(case.images))


def test_what_values_depend_on_is_in_the_key(tmp_path: Path) -> None:
    image = load_case("a").images[0]
    embeddings = torch.zeros(cache_for("a", tmp_path).shape)
    cache_for("a", tmp_path).save(image.sha256, embeddings)
    assert cache_for("a", tmp_path).load(image.sha256) is not None
    assert cache_for("a", tmp_path, background="white").load(image.sha256) is None
    assert cache_for("a", tmp_path, dtype=torch.bfloat16).load(image.sha256) is None
    assert cache_for("b", tmp_path).load(image.sha256) is None


def test_another_pictures_file_under_a_pictures_name_is_not_used(tmp_path: Path) -> None:
    cache = cache_for("a", tmp_path)
    cache.save("one", torch.ones(cache.shape))
    cache.save("two", torch.zeros(cache.shape))
    one, two = sorted(tmp_path.rglob("*.enc"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert cache.load("one") is None
    assert cache.load("two") is None


def test_weights_are_part_of_the_key() -> None:
    case = load_case("c")
    before = vision_digest(case.model)
    weight = case.model.vision.patch_emb.weight
    kept = weight.clone()
    weight.view(-1)[0] += 1
    changed = vision_digest(case.model)
    weight.copy_(kept)
    assert changed != before
    assert vision_digest(case.model) == before


def test_a_tensor_of_another_shape_is_not_used(tmp_path: Path) -> None:
    cache = cache_for("a", tmp_path)
    cache.save("picture", torch.zeros(3, 3))
    assert cache.load("picture") is None
    assert cache.num_misses == 1


def test_a_full_disk_ends_keeping_not_the_run(tmp_path: Path) -> None:
    cache = cache_for("a", tmp_path)

    def no_space(key: str, payload: bytes) -> None:
        raise OSError(28, "No space left on device")

    cache.files.put = no_space  # type: ignore[method-assign]
    cache.save("picture", torch.zeros(cache.shape))
    assert not cache.is_writable
    cache.save("picture", torch.zeros(cache.shape))


class LateCopies:
    """Copies to the host as a CUDA device makes them: what they bring is there only once it was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.coming: list[tuple[torch.Tensor, torch.Tensor]] = []
        monkeypatch.setattr(encoder, "start_download", self.start)
        monkeypatch.setattr(encoder, "milestone", lambda device: self.arrive)

    def start(self, tensor: torch.Tensor) -> torch.Tensor:
        self.coming.append((torch.full_like(tensor, torch.nan), tensor))
        return self.coming[-1][0]

    @torch.inference_mode()
    def arrive(self) -> None:
        for target, source in self.coming:
            target.copy_(source)
        self.coming.clear()


def assert_kept(cache: EncodingCache, images: list[PreparedImage]) -> None:
    case = load_case("a")
    for image in images:
        found = cache.load(image.sha256)
        assert found is not None
        assert torch.allclose(found, plain.encode_image(case.model, image), atol=1e-5)


def test_an_encode_outside_the_engine_is_kept_at_once(tmp_path: Path) -> None:
    case = load_case("a")
    engine = case.engine(batch_size=2)
    engine.encoder.store = cache_for("a", tmp_path)
    engine.encoder.encode(case.images)
    assert_kept(cache_for("a", tmp_path), case.images)


def test_what_comes_late_is_kept_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("a")
    copies = LateCopies(monkeypatch)
    engine = case.engine(batch_size=2)
    engine.encoder.store = cache_for("a", tmp_path)
    engine.encoder.encode(case.images[:1])
    assert len(copies.coming) == 1
    assert cache_for("a", tmp_path).load(case.images[0].sha256) is None
    engine.encoder.save_encoded()
    assert_kept(cache_for("a", tmp_path), case.images[:1])


@pytest.mark.process
def test_a_run_leaves_nothing_that_comes_late_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("a")
    copies = LateCopies(monkeypatch)
    engine = case.engine(batch_size=4)
    engine.encoder.store = cache_for("a", tmp_path)
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    for answer in engine.run(case.job(key) for key in keys):
        assert_answer(answer, case.expected[answer.key])
    assert not copies.coming
    assert_kept(cache_for("a", tmp_path), case.images)


def test_what_comes_late_survives_running_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("a")
    copies = LateCopies(monkeypatch)
    engine = case.engine(batch_size=1)
    engine.encoder.max_crops = 1
    engine.encoder.store = cache_for("a", tmp_path)

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("out of memory (made up)")

    engine.passes.prefill_prefixes = fail  # type: ignore[method-assign]
    (answer,) = engine.run([Job(0, case.images[0], Request(Task.CAPTION))])
    assert answer.failure is not None
    assert not copies.coming
    assert_kept(cache_for("a", tmp_path), case.images[:1])


def test_an_image_encoded_for_a_caller_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("a")
    LateCopies(monkeypatch)
    engine = case.engine(batch_size=1)
    engine.encoder.store = cache_for("a", tmp_path)
    picture = Image.new("RGB", (64, 48), "red")
    encoded = Moondream(engine).encode_image(picture)
    found = cache_for("a", tmp_path).load(encoded.sha256)
    assert found is not None
    assert torch.equal(found, encoded.embeddings)
