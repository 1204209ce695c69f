"""Cached embeddings are the computed ones, and only where nothing they depend on has changed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from golden_cases import assert_answer, load_case
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from md3cli.file_cache import FileCache
from md3cli.images.crops import PreparedImage, Tiling
from md3cli.model.api import Moondream
from md3cli.model.engine import encoder, plain
from md3cli.model.engine.encoder import EncodingCache, ImageEncoder, crop_sizes, micro_batches, vision_digest
from md3cli.model.engine.recaller import Recaller
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
        self.may_arrive = threading.Event()
        self.may_arrive.set()
        monkeypatch.setattr(encoder, "start_download", self.start)
        monkeypatch.setattr(encoder, "milestone", lambda device: self.arrive)

    def start(self, tensor: torch.Tensor) -> torch.Tensor:
        self.coming.append((torch.full_like(tensor, torch.nan), tensor))
        return self.coming[-1][0]

    @torch.inference_mode()
    def arrive(self) -> None:
        assert self.may_arrive.wait(30)
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
    copies.may_arrive.clear()
    engine.encoder.encode(case.images[:1])
    assert len(copies.coming) == 1
    assert cache_for("a", tmp_path).load(case.images[0].sha256) is None
    copies.may_arrive.set()
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


# -- micro-batches ---------------------------------------------------------------------------------


def test_crops_come_as_they_are_where_no_sizes_are_fixed() -> None:
    assert list(micro_batches([3, 1, 5], 4, None)) == [(0, 4, 4), (4, 4, 4), (8, 1, 1)]


def test_one_size_is_cut_from_the_crops_of_all_pictures() -> None:
    assert list(micro_batches([3, 1, 5], 4, (4,))) == [(0, 4, 4), (4, 4, 4), (8, 1, 4)]


def test_several_sizes_keep_pictures_apart() -> None:
    found = list(micro_batches([1, 3, 9, 5, 13, 14], 13, (1, 4, 9, 13)))
    assert found == [(0, 1, 1), (1, 3, 4), (4, 9, 9), (13, 5, 9), (18, 13, 13), (31, 13, 13), (44, 1, 1)]


def test_sizes_that_memory_no_longer_holds_are_left_out() -> None:
    assert list(micro_batches([5], 4, (1, 4, 9))) == [(0, 4, 4), (4, 1, 1)]
    assert list(micro_batches([30, 5], 18, (36,))) == [(0, 18, 18), (18, 17, 18)]


@given(st.lists(st.integers(1, 30), max_size=8), st.integers(1, 40), st.sampled_from([None, (36,), (1, 4, 9, 13)]))
def test_every_crop_is_in_one_micro_batch(counts: list[int], most: int, sizes: tuple[int, ...] | None) -> None:
    batches = list(micro_batches(counts, most, sizes))
    assert [crop for batch in batches for crop in range(batch.first, batch.first + batch.num_crops)] == [
        *range(sum(counts))
    ]
    for batch in batches:
        assert 1 <= batch.num_crops <= batch.size <= most


@pytest.mark.parametrize(
    ("max_crops", "expected"), [(36, (36,)), (13, (1, 4, 9, 13)), (9, (1, 4, 9)), (3, (1, 3)), (1, (1,))]
)
def test_sizes_follow_the_memory_plan(max_crops: int, expected: tuple[int, ...]) -> None:
    assert crop_sizes(max_crops, torch.device("cuda", 0)) == expected
    assert crop_sizes(max_crops, torch.device("cpu")) is None
    assert crop_sizes(None, torch.device("cuda", 0)) is None


@pytest.mark.parametrize("max_crops", [36, 9, 3])
def test_fixed_sizes_give_the_same_embeddings_and_see_no_others(max_crops: int) -> None:
    case = load_case("a")
    fixed = ImageEncoder(case.model, max_crops=max_crops, sizes=crop_sizes(max_crops, torch.device("cuda", 0)))
    encode_rows, seen = fixed.encode_rows, set()

    def encoding(rows: torch.Tensor) -> torch.Tensor:
        seen.add(len(rows))
        return encode_rows(rows)

    fixed.encode_rows = encoding
    images = [*case.images, *case.images[:1]]
    for image, found in zip(images, fixed.encode(images), strict=True):
        assert torch.allclose(found, plain.encode_image(case.model, image), atol=1e-5)
        assert found.untyped_storage().nbytes() == found.nbytes  # no other picture's memory lives as long
    assert fixed.sizes is not None
    assert seen <= set(fixed.sizes)


@pytest.mark.parametrize("tiling", [(1, 1), (2, 2), (1, 3), (3, 2), (4, 3)])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_pictures_gathered_together_are_embedded_bit_for_bit(name: str, tiling: tuple[int, int]) -> None:
    vision, tiles = load_case(name).model.vision, Tiling(*tiling)
    features = torch.randn(3, 1 + tiles.rows * tiles.cols, vision.config.num_patches, vision.config.enc_dim)
    with torch.inference_mode():
        for picture, gathered in zip(features, vision.gather(features, tiles), strict=True):
            assert torch.equal(vision.proj_mlp(gathered), vision.embed(picture, tiles))


# -- encodings read ahead --------------------------------------------------------------------------


@pytest.mark.parametrize("most_ahead", [1, 100])
def test_encodings_read_ahead_give_the_same_answers(tmp_path: Path, most_ahead: int) -> None:
    """As beside a GPU: with an empty cache and with a full one, each encoding is looked for once."""
    case = load_case("a")
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    asked = {image.sha256 for key in keys if (image := case.job(key).image) is not None}
    for is_cached in (False, True):
        engine, store, looked_for = case.engine(batch_size=2), cache_for("a", tmp_path), []

        def load(key: str, store: EncodingCache = store, looked_for: list[str] = looked_for) -> torch.Tensor | None:
            looked_for.append(key)
            return store.load(key)

        engine.encoder.store, engine.encoder._recaller = store, Recaller(load, most_ahead)
        for answer in engine.run([Job(key, case.job(key).image, case.requests[key]) for key in keys]):
            assert_answer(answer, case.expected[answer.key])
        assert engine.encoder.num_images == (0 if is_cached else len(case.images))
        assert sorted(looked_for) == sorted(asked)
