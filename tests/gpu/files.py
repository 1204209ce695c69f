"""Part `files`: photographs from JPEG files through md3's decode workers into the engine."""

from __future__ import annotations

from dataclasses import replace

from md3cli.bench.runs import PhotoFiles, make_engine, make_jobs, photo_files, time_run
from md3cli.model.network.moondream import Moondream3
from md3cli.run.feed import num_auto_workers

from .child import Run
from .models import BF16, model_in
from .workloads import Load, is_as_asked, loads_of, renamed, warm_up

SIZES = {"12 megapixels": (4032, 3024), "2 megapixels": (1920, 1080)}
CPU_SIZES = {"0.3 megapixels": (640, 480)}
NUM_FILES = 256  # enough that the first pictures, for which the card waits, count little


def measure(run: Run) -> None:
    """Queries a second about files, and about the same pictures decoded and cut before."""
    model, load = model_in(run, BF16), loads_of(run)[0]
    load = replace(load, num_requests=min(load.num_requests, NUM_FILES))
    crops, workers = model.config.vision.crop_config, num_auto_workers()
    run.note("decode workers", workers)
    for what, size in (SIZES if run.is_cuda else CPU_SIZES).items():
        with photo_files(load.num_requests, crops, workers, seed=0, size=size) as files:
            measure_files(run, model, load, files, what)


def measure_files(run: Run, model: Moondream3, load: Load, files: PhotoFiles, what: str) -> None:
    """Both rates in one engine, which has answered a batch before; pictures get other names for each."""
    workload, name = load.workload, f"batch {load.batch}, {BF16}"
    pictures = files.decode_all()  # which also starts the workers
    engine = make_engine(model, load.batch)
    warm_up(engine, load, pictures)
    cut_s, _ = time_run(engine, make_jobs(workload, renamed(pictures, "cut before")), workload)
    if not is_as_asked(run, engine, load.batch, name):
        return
    run.figure(f"{what}, cut before, {name}", load.num_requests / cut_s, "img/s")
    run.figure(f"{what}, crops of a picture", len(pictures[0].crops), "count")
    del pictures
    files_s, _ = time_run(engine, files.jobs(workload.request, load.num_requests), workload)
    run.figure(f"{what}, from files, {name}", load.num_requests / files_s, "img/s")
    run.figure(f"{what}, from files, {name}: of cut before", cut_s / files_s, "share")
