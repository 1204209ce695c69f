"""`md3 bench`: workloads give the tokens they speak of, nothing is reused, and what does not fit is said.

The GPU's runs are driven on the CPU here, with its memory and its profiler stood in for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from md3cli.bench import bench, device, runs, stages
from md3cli.bench.bench import GpuBenchResult, GpuRun, gpu_workload, run_workloads
from md3cli.bench.device import GpuMemory, busy_seconds, covered
from md3cli.bench.runs import PHOTO, WORKLOADS, Workload, make_engine, make_images, make_jobs, time_run
from md3cli.commands import bench as command
from md3cli.errors import EngineError
from md3cli.images.crops import ImageLimits, PreparedImage, Tiling, prepare_image
from md3cli.model.engine import plain
from md3cli.model.engine.engine import Engine
from md3cli.model.network.moondream import Moondream3
from md3cli.model.weights.random_weights import CONFIGS, forbid_end, random_model, show_places
from md3cli.records import ImageItem, Task

CPU = torch.device("cpu")
MEMORY = GpuMemory(3 * 10**9, 4 * 10**9, 5 * 10**8)
STAGES = ("vision", "prefill", "decode", "decode_16")
ONE_TILE = Tiling(1, 1)


@cache
def mini() -> Moondream3:
    model = random_model(CONFIGS["mini"], dtype=torch.float32, device=CPU)
    forbid_end(model)
    show_places(model)
    return model


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every engine that is made, in order; a GPU's memory and profiler are stood in for."""
    made: list[Engine] = []

    def make(model: Moondream3, batch_size: int, *, cuts: bool = False) -> Engine:
        made.append(make_engine(model, batch_size, cuts=cuts))
        return made[-1]

    def busy(run: Any) -> float:
        run()
        return 0.25

    monkeypatch.setattr(bench, "make_engine", make)
    monkeypatch.setattr(bench, "reset_gpu_peak", lambda device: None)
    monkeypatch.setattr(bench, "gpu_memory", lambda device: MEMORY)
    monkeypatch.setattr(bench, "busy_seconds", busy)
    monkeypatch.setattr(bench, "NUM_REQUESTS", dict.fromkeys(bench.NUM_REQUESTS, (2, 3)))
    monkeypatch.setattr(bench, "CAPTION_TOKENS", 40)
    return made


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and reads that take no time."""
    monkeypatch.setattr(stages, "GEMM_SIDE", 64)
    monkeypatch.setattr(stages, "READ_BYTES", 1 << 16)


def run_gpu(*names: str, batch_sizes: tuple[int, ...] = (1, 2)) -> GpuBenchResult:
    found = GpuBenchResult("", {})
    run_workloads(found, mini(), names, batch_sizes, num_workers=2, seed=0)
    return found


# -- workloads -------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("query", 3), ("reasoning", 30), ("captions", 150), ("detect", 24), ("point", 16), ("segment", 150)],
)
def test_answers_have_the_tokens_of_their_workload(name: str, tokens: int) -> None:
    workload = replace(gpu_workload(name, 2), tilings=(PHOTO,) * 3)
    assert workload.answer_tokens == tokens
    jobs = make_jobs(workload, make_images(mini(), workload, seed=0))
    answers = list(make_engine(mini(), 2).run(jobs))
    assert [answer.output_tokens for answer in answers] == [tokens] * 3
    for answer in answers:
        assert answer.result is not None
        assert ("reasoning" in answer.result) == (name == "reasoning")
        assert answer.finish_reason == "length"
        for found in ("objects", "points"):
            assert len(answer.result.get(found, range(8))) == 8


@pytest.mark.process
def test_segments_begin_with_a_box_and_thoughts_with_a_point() -> None:
    """On the engine as on the plain path, where the heads for places are asked only when a place is due."""
    ids = mini().config.tokenizer
    for name, places in (("segment", [5, 5, 6]), ("reasoning", [7, 5, 5, 9])):
        workload = replace(WORKLOADS[name], tilings=(ONE_TILE,))
        (job,) = make_jobs(workload, make_images(mini(), workload, seed=0))
        assert isinstance(job.image, PreparedImage)
        prompt = runs.FixedPrompts(mini()).build(job.request, has_image=True)
        written = plain.answer(mini(), job.image, workload.task, prompt, max_tokens=12, max_objects=1)
        phase = written.reasoning or written
        assert phase.token_ids[: len(places)] == places
        assert {ids.coord_id, ids.size_id}.isdisjoint(phase.token_ids[len(places) :])
        assert phase.coord_bins == [0, 512]
        (answer,) = make_engine(mini(), 1).run([job])
        assert answer.result is not None
        if name == "segment":
            (segment,) = answer.result["segments"]
            assert segment["bbox"]["x_max"] > 0
        else:
            assert [chunk["points"] for chunk in answer.result["reasoning"]["grounding"]] == [[[0.0, 0.5]]]


def test_an_answer_that_ends_early_ends_the_benchmark() -> None:
    model = random_model(CONFIGS["mini"], dtype=torch.float32, device=CPU)
    model.text.lm_head.bias[model.config.tokenizer.eos_id] = 1e4
    workload = replace(WORKLOADS["query"], tilings=(ONE_TILE,))
    with pytest.raises(EngineError, match="has 0 tokens, not 3"):
        time_run(make_engine(model, 1), make_jobs(workload, make_images(model, workload, seed=0)), workload)


def test_a_request_that_fails_ends_the_benchmark() -> None:
    workload = replace(WORKLOADS["query"], tilings=(ONE_TILE,))
    engine = make_engine(mini(), 1)
    engine.max_context = mini().config.prefix_len
    with pytest.raises(EngineError, match="failed: the prompt needs"):
        time_run(engine, make_jobs(workload, make_images(mini(), workload, seed=0)), workload)


def test_a_gpu_gets_full_batches_of_different_photos() -> None:
    for name in bench.NUM_REQUESTS:
        for batch_size in bench.BATCH_SIZES:
            workload = gpu_workload(name, batch_size)
            assert workload.num_requests % batch_size == 0
            assert workload.num_requests >= 2 * batch_size
            assert set(workload.tilings) == {PHOTO}
    assert gpu_workload("query", 1).num_requests == 64
    assert gpu_workload("photos", 64) == WORKLOADS["photos"]
    images = make_images(mini(), gpu_workload("query", 1), seed=0)
    assert len({image.sha256 for image in images}) == len({image.crops.tobytes() for image in images}) == 64
    assert {len(image.crops) for image in images} == {9}


@pytest.mark.process
def test_a_cpu_runs_all_that_is_asked(small_limits: None) -> None:
    found = bench.run_bench(
        mini_source(), workloads=("point", "query"), batch_size=2, has_baseline=False, num_workers=1
    ).as_dict()
    assert [(run["workload"], run["batch_size"]) for run in found["runs"]] == [("point", 2), ("query", 2)]
    assert found["engine"] == found["runs"][0]["engine"]
    assert "baseline" not in found
    assert "baseline_ratio" not in found["runs"][0]


def test_what_a_cpu_runs_has_not_changed() -> None:
    captions = WORKLOADS["captions"]
    assert captions == Workload((ONE_TILE,) * 8, Task.CAPTION, 1, max_tokens=32, max_objects=1)
    assert WORKLOADS["photos"].num_requests == 80


# -- a GPU's runs ----------------------------------------------------------------------------------


@pytest.mark.process
def test_every_workload_at_every_batch_size(engines: list[Engine]) -> None:
    tokens = {"query": 3, "reasoning": 30, "captions": 40, "detect": 24, "point": 16, "segment": 40}
    found = run_gpu(*tokens)
    assert [(run.workload, run.batch_size) for run in found.runs] == [
        (name, size) for name in tokens for size in (1, 2)
    ]
    for run in found.runs:
        assert run.requests == {1: 3, 2: 4}[run.batch_size]
        assert run.output_tokens == run.requests * tokens[run.workload]
        assert run.seconds > 0
        # the profiled batch is a part of the requests; the share is of the run that was timed
        assert run.busy_seconds == 0.25 * run.requests / run.batch_size
        assert run.as_dict()["gpu_busy_share"] == run.busy_seconds / run.seconds
        assert run.as_dict()["requests_per_second"] == run.requests / run.seconds
        assert run.as_dict()["tokens_per_second"] == run.output_tokens / run.seconds
    assert not found.notes
    assert not any(engine.encoder.num_reused or engine.stats.num_prefixes_shared for engine in engines)


@pytest.mark.process
def test_files_stand_beside_the_same_pictures_cut_before(engines: list[Engine]) -> None:
    found = run_gpu("files", batch_sizes=(2,))
    cut, files = found.runs
    assert (cut.workload, files.workload) == ("files, cut before", "files")
    assert cut.requests == files.requests == 4
    assert cut.output_tokens == files.output_tokens == 12
    assert cut.busy_seconds == files.busy_seconds
    (engine,) = engines
    assert engine.encoder.num_reused == 0
    assert engine.encoder.num_images == 2 + 4 + 2 + 4  # warm, timed, profiled, from files


@pytest.mark.process
def test_a_batch_that_memory_does_not_hold_is_said(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench.make_engine
    monkeypatch.setattr(bench, "make_engine", lambda model, asked, **more: make(model, min(asked, 3), **more))
    found = run_gpu("query", batch_sizes=(1, 2, 4, 8))
    assert [run.batch_size for run in found.runs] == [1, 2, 3]  # what fits is measured once
    assert found.notes == [f"query, batch {asked}: memory holds a batch of 3" for asked in (4, 8)]


@pytest.mark.process
def test_memory_that_runs_out_at_the_start_is_said(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench.make_engine

    def make_small(model: Moondream3, asked: int, **options: bool) -> Engine:
        if asked > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        return make(model, asked, **options)

    monkeypatch.setattr(bench, "make_engine", make_small)
    found = run_gpu("query", "captions")
    assert [run.workload for run in found.runs] == ["query", "captions"]
    assert found.notes == [
        f"{name}, batch 2: CUDA out of memory. Tried to allocate 9 GiB" for name in ("query", "captions")
    ]


@pytest.mark.process
def test_memory_that_runs_out_on_the_way_is_said(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = mini().vision.encode_rows, iter(range(10**6))

    def encode_once_too_much(crops: torch.Tensor) -> torch.Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(crops)

    monkeypatch.setattr(mini().vision, "encode_rows", encode_once_too_much)
    found = run_gpu("query", batch_sizes=(4,))
    assert len(found.runs) == 1
    (note,) = found.notes
    assert note.startswith("query, batch 4: out of memory on the way")
    assert "ended with a batch of 2" in note


def test_other_faults_are_not_taken_for_memory(engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(crops: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(mini().vision, "encode_rows", fail)
    with pytest.raises(EngineError, match="illegal memory access"):
        run_gpu("query")


def test_spans_that_overlap_count_once() -> None:
    assert covered([]) is None
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == pytest.approx(4e-6)


def test_only_the_device_counts_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(kind: str, start: float, end: float, *, is_user_annotation: bool = False) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            device_type=SimpleNamespace(name=kind), time_range=span, is_user_annotation=is_user_annotation
        )

    events = [event("CUDA", 0, 2), event("CPU", 0, 50), event("CUDA", 0, 90, is_user_annotation=True)]
    ran = []

    @contextlib.contextmanager
    def profile(activities: Any, acc_events: bool) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(device, "profile", profile)
    assert busy_seconds(lambda: ran.append(1)) == pytest.approx(2e-6)
    assert ran == [1]


@pytest.mark.filterwarnings("error")
def test_the_profiler_says_what_is_asked_of_it() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.ones(3).sum()
    assert profiler.events()
    for event in profiler.events():
        assert event.device_type.name == "CPU"
        assert event.time_range.end >= event.time_range.start
        assert event.is_user_annotation in (True, False)


# -- stages ----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_decode_step_stands_beside_the_copy_where_that_was_measured() -> None:
    read = stages.bench_decode(mini(), 1, {"read_gbytes": 8.0})
    copy = stages.bench_decode(mini(), 1, {"read_gbytes": 8.0, "copy_gbytes": 2.0})
    assert read["share"] == pytest.approx(read["gbytes"] / 8)
    assert copy["share"] == pytest.approx(copy["gbytes"] / 2)


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "best_seconds", lambda run, device: run() is None or 2.0)
    assert stages.copy_rate(torch.ones(1000)) == 4000


@pytest.mark.process
def test_a_stage_that_memory_does_not_hold_is_said(
    engines: list[Engine], small_limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = bench.bench_decode

    def decode_few(model: Moondream3, batch_size: int, limits: dict[str, float]) -> dict[str, float]:
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 19 GiB")
        return decode(model, batch_size, limits)

    monkeypatch.setattr(bench, "bench_decode", decode_few)
    found = bench._bench_gpu(mini_source(), ("query",), (1, 2, 3), num_workers=1, seed=0)
    assert list(found.stages) == ["vision", "prefill", "prefill_16", "decode", "decode_2"]
    assert found.notes[0] == "decode_3: CUDA out of memory. Tried to allocate 19 GiB"
    assert [run.batch_size for run in found.runs] == [1, 2, 3]


@pytest.mark.process
@pytest.mark.parametrize(
    ("workloads", "batch_size", "names", "sizes"),
    [
        ((), None, ("query", "reasoning", "captions", "files"), (1, 8, 64, 128)),
        (("photos", "point"), 32, ("photos", "point"), (32,)),
    ],
)
def test_a_gpu_runs_all_that_is_not_narrowed(
    workloads: tuple[str, ...],
    batch_size: int | None,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    engines: list[Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def measure(source: bench.ModelSource, *rest: Any) -> bench.GpuBenchResult:
        asked.append(rest)
        return bench.GpuBenchResult("GPU", {})

    monkeypatch.setattr(bench, "_bench_gpu", measure)
    source = replace(mini_source(), device=torch.device("cuda"))
    found = bench.run_bench(
        source, workloads=workloads, batch_size=batch_size, has_baseline=True, baseline_images=1, num_workers=3, seed=5
    )
    assert asked == [(names, sizes, 3, 5)]
    assert found.baseline is not None
    assert list(found.baseline) == list(names)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("free_gb", "last", "notes"), [(30, 128, 0), (1.5, 86, 1)])
def test_a_device_that_is_not_there_runs_all_of_it(cuda_python: str, free_gb: float, last: int, notes: int) -> None:
    """Fake tensors: sizes planned from what is free, nothing on a wrong device; numbers mean nothing."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [cuda_python, root / "tests" / "support" / "fake_bench.py", str(free_gb)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    decode = ["decode", *(f"decode_{size}" for size in (8, 64, 128))]
    assert list(found["stages"]) == ["vision", "prefill", "prefill_16", *decode]
    assert found["limits"]["copy_gbytes"] == 2 * found["limits"]["read_gbytes"]
    assert [run["batch_size"] for run in found["runs"]] == [1, 8, 64, last]
    assert all(run["output_tokens"] == 3 * run["requests"] for run in found["runs"])
    assert {run["gpu_outside_bytes"] for run in found["runs"]} == {6000}  # of 10,000 that are not free
    assert len(found["notes"]) == notes


# -- on a CPU --------------------------------------------------------------------------------------


def mini_source() -> bench.ModelSource:
    return bench.ModelSource(CPU, lambda: random_model(CONFIGS["mini"], dtype=torch.float32, device=CPU), threads=1)


@pytest.mark.process
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_cpu_measures_what_it_always_did(name: str, small_limits: None) -> None:
    found = bench.run_bench(
        mini_source(), workloads=(name,), batch_size=None, has_baseline=True, baseline_images=1, num_workers=2
    ).as_dict()
    keys = ["device", "limits", "stages", "engine", "cached", "memory", "baseline", "runs"]
    assert [key for key in found if key != "files"] == keys
    assert ("files" in found) == (name == "files")
    assert tuple(found["stages"]) == STAGES
    assert list(found["limits"]) == ["gemm_gflops", "vision_gemm_gflops", "read_gbytes"]
    assert list(found["memory"]) == ["weights_bytes", "kv_bytes", "activation_bytes", "peak_rss_bytes", "ratio"]
    workload = WORKLOADS[name]
    tokens = workload.answer_tokens * workload.num_requests
    assert found["engine"]["output_tokens"] == found["cached"]["output_tokens"] == tokens
    (run,) = found["runs"]
    assert (run["workload"], run["requests"], run["images"]) == (name, workload.num_requests, len(workload.tilings))
    assert run["images_per_second"] == run["images"] / found["engine"]["seconds"]
    assert run["tokens_per_second"] == tokens / found["engine"]["seconds"]
    assert run["baseline_ratio"] == found["baseline"]["seconds"] / found["engine"]["seconds"]
    assert all(run[part] == found[part] for part in ("engine", "cached", "memory", "baseline"))
    if name == "files":
        assert found["files"]["pictures_per_second"] == pytest.approx(8 / found["files"]["seconds"])
        assert found["files"]["decode_workers"] == 2


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.process
def test_files_are_decoded_by_workers_in_order() -> None:
    crop_config = CONFIGS["mini"].vision.crop_config
    request = WORKLOADS["files"].request
    with runs.photo_files(6, crop_config, num_workers=2, seed=0) as files:
        cut = files.decode_all()
        jobs = [job for job in files.jobs(request, 5) if job is not None]
    assert [job.key for job in jobs] == list(range(5))
    assert [job.image.sha256 for job in jobs if job.image] == [image.sha256 for image in cut[:5]]
    assert len({image.sha256 for image in cut}) == 6
    assert {len(image.crops) for image in cut} == {9}
    assert {job.request for job in jobs} == {request}


@pytest.mark.process
def test_photos_are_pictures_that_any_reader_takes(tmp_path: Path) -> None:
    paths = runs.write_photos(tmp_path, 5, seed=1)
    crop_config = CONFIGS["full"].vision.crop_config
    first, again = (
        prepare_image(ImageItem(path.name, str(path)), crop_config, ImageLimits(), None)
        for path in (paths[0], paths[4])
    )
    assert first.tiling == PHOTO
    assert (first.width, first.height) == runs.SIZE
    assert (first.crops == again.crops).all()  # the same scene in other bytes
    assert first.sha256 != again.sha256
    assert 250_000 < paths[0].stat().st_size < 1_000_000


# -- the command -----------------------------------------------------------------------------------


def run_command(*args: str) -> str:
    done = CliRunner().invoke(command.app, [*args], env={"COLUMNS": "80"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.process
@pytest.mark.usefixtures("small_limits")
def test_the_command_prints_numbers_or_tables() -> None:
    found = json.loads(run_command("--config", "mini", "--device", "cpu", "--workload", "files", "--json"))
    assert found["files"]["pictures_per_second"] > 0
    lines = run_command("--config", "mini", "--device", "cpu").splitlines()
    assert [line.split()[0] for line in lines if line.split()[0] in STAGES] == list(STAGES)
    assert any("a forward pass was" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_command_runs_several_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    engine, cached, memory = {"seconds": 2.0, "output_tokens": 256.0}, {"seconds": 0.5}, {"peak_rss_bytes": 5.4e8}
    segment = bench.HostRun("segment", 4, 4, 4, engine, cached, memory, baseline={"seconds": 6.2, "images_run": 4.0})
    decoded = {"seconds": 1.0, "pictures_per_second": 4.0, "share": 0.5, "decode_workers": 2.0}
    files = replace(segment, workload="files", files=decoded, baseline=None)
    limits = {"gemm_gflops": 211.0, "read_gbytes": 20.8}

    def run(*args: Any, workloads: list[str], **more: Any) -> bench.BenchResult:
        asked.append(tuple(workloads))
        return bench.BenchResult("a CPU", limits, {}, [segment, files])

    monkeypatch.setattr(bench, "run_bench", run)
    place = ("--config", "mini", "--device", "cpu")
    lines = run_command(*place, "--workload", "segment", "--workload", "point", "--workload", "segment").splitlines()
    found = json.loads(run_command(*place, "--workload", "all", "--workload", "files", "--json"))
    assert asked[0] == ("segment", "point")
    assert sorted(asked[1]) == sorted(WORKLOADS)
    assert max(map(len, lines)) <= 80
    words = [" ".join(line.split()) for line in lines]
    assert "workload batch requests/s images/s tokens/s memory cached plain path" in words
    assert "segment 4 2.00 2.00 128.00 0.54 GB 4.0x 3.1x" in words
    assert "files 4 2.00 2.00 128.00 0.54 GB 4.0x not run" in words
    assert words[-2].startswith("files: 1.0 s, 4.00 pictures/s through 2 decode workers")
    assert [run["workload"] for run in found["runs"]] == ["segment", "files"]


def test_a_workload_that_there_is_none_of_is_refused() -> None:
    done = CliRunner().invoke(command.app, ["--workload", "gaze"])
    assert done.exit_code == 2
    assert "point" in done.output


@pytest.mark.process
@pytest.mark.usefixtures("small_limits")
def test_the_model_of_the_package_is_measured() -> None:
    """Its vocabulary of 608 ids is smaller than the word that prompts are made of for others."""
    text = run_command(
        "--model", "tiny", "--device", "cpu", "--workload", "query", "--baseline", "--baseline-images", "1"
    )
    assert "plain path: " in text
    assert "+ the rest " in " ".join(text.split())


def gpu_result() -> dict[str, Any]:
    run = GpuRun("files, cut before", 128, 512, 512, 8.0, 1536, 7.2, 18 * 10**9, 30 * 10**9, MEMORY)
    runs = [run, replace(run, workload="query", batch_size=1, seconds=123.456, busy_seconds=None)]
    stage = {"seconds": 0.00123, "tokens_per_second": 104_000.0, "gbytes": 2900.0, "share": 0.97}
    product = {"seconds": 0.0123, "crops_per_second": 5000.0, "gflops": 650_000.0, "share": 0.82}
    limits = {"gemm_gflops": 790_000.0, "vision_gemm_gflops": 700_000.0, "read_gbytes": 3000.0, "copy_gbytes": 2990.0}
    notes = ["captions, batch 128: memory holds a batch of 98"]
    plain = {"query": {"requests_per_second": 3.25, "images_run": 64.0}}
    stages = {"vision": product, "decode_128": stage}
    return bench.GpuBenchResult("NVIDIA H100 80GB HBM3", limits, stages, runs, notes, plain).as_dict()


def test_a_gpus_table_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command._show(gpu_result())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = [" ".join(line.split()) for line in lines]
    assert "workload batch requests/s images/s tokens/s GPU memory GPU busy" in words
    assert "files, cut before 128 64.00 64.00 192.00 3.00 GB 90%" in words
    assert "query 1 4.15 4.15 12.44 3.00 GB not seen" in words
    assert "decode_128 0.00123 104,000.0 tokens 2,900.0 GB/s 97%" in words
    assert "did not fit: captions, batch 128: memory holds a batch of 98" in words
    assert "plain path, query: 3.25 requests/s; the engine's best is 1.3 times that" in words


def test_a_gpus_numbers_are_plain_and_named_after_the_gpu() -> None:
    found = json.loads(json.dumps(gpu_result()))
    assert list(found) == ["device", "limits", "stages", "runs", "notes", "baseline"]
    run = found["runs"][0]
    assert {key for key in run if key.startswith("gpu_")} == {
        "gpu_peak_bytes",
        "gpu_reserved_bytes",
        "gpu_outside_bytes",
        "gpu_busy_share",
    }
    assert not any("rss" in key for key in run)
