"""Cached embeddings are the computed ones, and only where nothing they depend on has changed."""

from __future__ import annotations

from pathlib import Path

import torch
from golden_cases import assert_answer, load_case

from md3cli.file_cache import FileCache
from md3cli.model.encoding_cache import EncodingCache, vision_digest
from md3cli.model.tasks import Job


def cache_for(
    case_name: str, folder: Path, dtype: torch.dtype = torch.float32, background: str = "none"
) -> EncodingCache:
    return EncodingCache(FileCache(folder, 10**8), load_case(case_name, dtype).model, background=background)


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
