"""The picture pool: same pictures as the plain path, and nothing that happens to a worker is lost or shared."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from corpus import encode, picture, tiff, turned_exif
from PIL import Image
from watched_cutter import WatchedCutter

from md3cli import child
from md3cli.errors import EngineError, ImageError, InputError, UsageError
from md3cli.images import decoder
from md3cli.images import pool as pool_module
from md3cli.images.crops import CropConfig, ImageLimits, PreparedImage, prepare_image
from md3cli.images.pool import PicturePool
from md3cli.records import ImageItem

CFG = CropConfig(crop_size=42, patch_size=6, overlap_margin=2, max_crops=12)
LIMITS = ImageLimits()
PATIENCE_S = 60.0

# A worker that does what the picture's *name* says. Only these tests can start one.
OBEDIENT = """
import json, sys; sys.path[:] = json.loads(sys.argv[1])
import os, resource, signal, time
from md3cli.images import worker
real = worker.read_image
def obey(item, *args, **kwargs):
    if item.name == "sleep": time.sleep(999)
    if item.name == f"sleep-in-{os.getpid()}": time.sleep(999)
    if item.name == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if item.name == "exit": os._exit(7)
    if item.name == "starve": resource.setrlimit(resource.RLIMIT_AS, (1 << 28, -1))
    if item.name == "write": os.write(2, b"a decoder's own words")
    return real(item, *args, **kwargs)
worker.read_image = obey
worker.HUGE_PIXELS = 2000
worker.serve()
"""


WORKER = child.code_of(decoder._WORKER)


def run_instead(monkeypatch, code: str) -> None:
    """Have every child interpreter run `code`."""
    monkeypatch.setattr(child, "code_of", lambda entry: code)


@pytest.fixture
def obedient(monkeypatch):
    run_instead(monkeypatch, OBEDIENT)


@pytest.fixture
def files(tmp_path) -> list[ImageItem]:
    """Good pictures of many kinds, and a few bad ones."""
    contents = {
        "a.jpg": encode(picture(size=(300, 200)), "JPEG", exif=turned_exif(6)),
        "b.png": encode(picture("RGBA", size=(64, 48)), "PNG"),
        "c.tif": encode(picture("I;16", size=(500, 40)), "TIFF"),
        "d.webp": encode(picture(size=(1, 1)), "WEBP"),
        "e.gif": encode(picture("P", size=(90, 90)), "GIF"),
        "wide.png": encode(picture(size=(2000, 45)), "PNG"),
        "bad.jpg": encode(picture(), "JPEG")[:200],
        "text.jpg": b"no picture",
        "empty.jpg": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return [ImageItem(name=name, path=str(tmp_path / name)) for name in contents]


@pytest.fixture
def good(files) -> ImageItem:
    return files[0]


def told(item: ImageItem, what: str) -> ImageItem:
    return ImageItem(name=what, path=item.path)


def outcome(future):
    error = future.exception(timeout=PATIENCE_S)
    if error is not None:
        return type(error), getattr(error, "type", None), str(error)
    got = future.result()
    return got.width, got.height, got.tiling, got.sha256, got.crops.tobytes()


def error_type(future) -> str:
    error = future.exception(timeout=PATIENCE_S)
    assert isinstance(error, ImageError)
    return error.type


def wait_until(is_true) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- the same as the plain path ---------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("background", [None, "teal"])
def test_workers_give_what_the_plain_path_gives(files, background):
    plain = PicturePool(0, CFG, LIMITS, background=background)
    expected = [outcome(plain.submit(item)) for item in files]
    with PicturePool(2, CFG, LIMITS, background=background) as pool:
        for _ in range(3):
            assert [outcome(future) for future in [pool.submit(item) for item in files]] == expected


@pytest.mark.process
def test_results_belong_to_the_caller(good, files):
    with PicturePool(1, CFG, LIMITS) as pool:
        first = pool.submit(good).result(PATIENCE_S)
        copy = first.crops.copy()
        for item in files:
            pool.submit(item).exception(PATIENCE_S)
    np.testing.assert_array_equal(first.crops, copy)
    assert first.crops.flags.writeable


@pytest.mark.process
def test_odd_names_and_members_of_archives_reach_the_worker(tmp_path, good):
    data = Path(good.path).read_bytes()
    odd = tmp_path / os.fsdecode(b"line\nfeed \xff\xed\xa0\x80.jpg")
    odd.write_bytes(b"before" + data + b"behind")
    with PicturePool(1, CFG, LIMITS) as pool:
        member = pool.submit(ImageItem("x", str(odd), offset=6, size=len(data)))
        assert outcome(member) == outcome(pool.submit(good))


@pytest.mark.process
def test_workers_start_one_by_one(good):
    with PicturePool(4, CFG, LIMITS) as pool:
        assert pool.worker_pids() == []
        for _ in range(3):
            pool.submit(good).result(PATIENCE_S)
        assert len(pool.worker_pids()) == 1


@pytest.mark.process
def test_a_background_that_is_no_colour_is_refused_at_once():
    with pytest.raises(UsageError):
        PicturePool(1, CFG, LIMITS, background="nonsense")


# --- what happens to a worker costs one picture -------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize(("deed", "message"), [("crash", "signal 11"), ("exit", "status 7")])
def test_a_decoder_that_dies_costs_one_picture(obedient, good, deed, message):
    with PicturePool(2, CFG, LIMITS) as pool:
        whole = outcome(pool.submit(good))
        futures = [pool.submit(told(good, deed) if n % 5 == 2 else good) for n in range(20)]
        for number, future in enumerate(futures):
            if number % 5 == 2:
                assert error_type(future) == "decoder_crash"
                assert message in str(future.exception())
            else:
                assert outcome(future) == whole


@pytest.mark.process
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_picture_whose_worker_is_killed_gets_a_second_try(obedient, good, signum):
    with warnings.catch_warnings(record=True, action="always") as told_words, PicturePool(1, CFG, LIMITS) as pool:
        whole = outcome(pool.submit(good))
        for _ in range(3):
            [pid] = pool.worker_pids()
            stuck = pool.submit(told(good, f"sleep-in-{pid}"))
            waiting = pool.submit(good)
            time.sleep(0.2)
            os.kill(pid, signum)
            assert outcome(stuck) == whole
            assert outcome(waiting) == whole
            assert is_gone(pid)
    [words] = told_words  # once
    assert "tried once more" in str(words.message)


@pytest.mark.process
def test_the_second_try_is_alone(monkeypatch, tmp_path, good):
    """A picture that kills its worker while another one is decoded is decoded when it is alone."""
    busy = tmp_path / "busy"
    busy.mkdir()
    deeds = f"""    if item.name in ("fussy", "other"):
        mine = {str(busy)!r} + f"/{{os.getpid()}}"
        open(mine, "w").close()
        time.sleep(0.3)
        if item.name == "fussy" and len(os.listdir({str(busy)!r})) > 1:
            os.unlink(mine)
            os.kill(os.getpid(), signal.SIGKILL)
        os.unlink(mine)
"""
    run_instead(monkeypatch, OBEDIENT.replace("    return real(item", f"{deeds}    return real(item"))
    with warnings.catch_warnings(action="ignore"), PicturePool(3, CFG, LIMITS) as pool:
        whole = outcome(pool.submit(good))
        names = ["other", "fussy", "other"] * 4
        assert [outcome(future) for future in [pool.submit(told(good, name)) for name in names]] == [whole] * 12


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_picture_that_kills_twice_fails_and_the_pool_goes_on(obedient, good, num_workers):
    with warnings.catch_warnings(action="ignore"), PicturePool(num_workers, CFG, LIMITS) as pool:
        whole = outcome(pool.submit(good))
        futures = [pool.submit(told(good, "crash") if n % 3 == 1 else good) for n in range(12)]
        for number, future in enumerate(futures):
            if number % 3 == 1:
                assert error_type(future) == "decoder_crash"
            else:
                assert outcome(future) == whole


@pytest.mark.process
def test_a_worker_that_is_stopped_is_replaced_and_its_picture_times_out(obedient, good):
    with PicturePool(1, CFG, LIMITS, timeout_s=2.0) as pool:
        whole = outcome(pool.submit(good))
        [pid] = pool.worker_pids()
        stuck, waiting = pool.submit(told(good, "sleep")), pool.submit(good)
        time.sleep(0.2)
        os.kill(pid, signal.SIGSTOP)
        assert error_type(stuck) == "timeout"
        assert outcome(waiting) == whole
        assert is_gone(pid)


@pytest.mark.process
def test_a_decoder_that_never_ends_is_stopped_in_time(obedient, good):
    with PicturePool(1, CFG, LIMITS, timeout_s=1.0) as pool:
        whole = outcome(pool.submit(good))
        started = time.monotonic()
        error = pool.submit(told(good, "sleep")).exception(PATIENCE_S)
        assert time.monotonic() - started > 0.9
        assert isinstance(error, ImageError)
        assert (error.type, str(error)) == ("timeout", "not decoded within 1 s (--decode-timeout)")
        assert outcome(pool.submit(good)) == whole


@pytest.mark.process
def test_an_idle_worker_that_dies_costs_nothing(good):
    with PicturePool(1, CFG, LIMITS) as pool:
        whole = outcome(pool.submit(good))
        [pid] = pool.worker_pids()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_gone(pid))
        assert outcome(pool.submit(good)) == whole


@pytest.mark.process
def test_running_out_of_memory_is_too_large_and_no_crash(obedient, tmp_path, good):
    big = tmp_path / "big.png"
    big.write_bytes(encode(Image.new("1", (9000, 9000)), "PNG"))
    with PicturePool(1, CFG, LIMITS) as pool:
        assert error_type(pool.submit(ImageItem("starve", str(big)))) == "too_large"
        assert pool.submit(good).result(PATIENCE_S).width == 200


@pytest.mark.process
def test_nothing_of_a_decoder_reaches_stderr(obedient, tmp_path, good, capfd):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(tiff(40, 40, 8, bytes(20)))
    with PicturePool(1, CFG, LIMITS) as pool:
        pool.submit(told(good, "write")).result(PATIENCE_S)
        assert error_type(pool.submit(ImageItem("b", str(broken)))) == "decode"
    assert capfd.readouterr() == ("", "")


@pytest.mark.process
@pytest.mark.parametrize(
    "answer",
    [
        'send({"type": "made up", "message": ""})',
        'send({"type": "decode"})',
        "send({})",
        'send({"width": -3, "height": -3, "sha256": "0" * 64})',
        'send({"width": 10**9, "height": 10**9, "sha256": "0" * 64})',
        'send({"width": "a", "height": None, "sha256": "0" * 64})',
        'send({"width": 1, "height": 1, "sha256": "<script>"})',
        'send_bytes(memoryview(b"\\xff\\xff\\xff\\xff"))',
        'send_bytes(memoryview(b"\\0\\0\\0\\2[]"))',
        'send_bytes(memoryview(b"\\0\\0\\0\\2{{"))',
    ],
)
def test_a_worker_that_talks_nonsense_is_not_believed(monkeypatch, good, answer):
    code = WORKER.replace("serve()", "")
    code += f"\nimport md3cli.images.worker as w\nw._serve_one = lambda channel, *told: channel.{answer}\nserve()"
    run_instead(monkeypatch, code)
    with PicturePool(1, CFG, LIMITS) as pool:
        assert error_type(pool.submit(good)) == "decoder_crash"


@pytest.mark.process
def test_many_replacements_leave_nothing_open(obedient, good):
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    with PicturePool(1, CFG, LIMITS) as pool:
        pool.submit(good).result(PATIENCE_S)
        before = num_open()
        for _ in range(8):
            assert error_type(pool.submit(told(good, "crash"))) == "decoder_crash"
        pool.submit(good).result(PATIENCE_S)
        assert num_open() <= before
    assert num_open() < before


# --- one huge picture at a time -----------------------------------------------------------------------


@pytest.mark.process
def test_huge_pictures_wait_for_each_other_without_losing_their_time(obedient, files):
    huge, small = files[0], files[3]  # OBEDIENT calls more than 2000 pixels huge
    with PicturePool(3, CFG, LIMITS, timeout_s=1.0) as pool:
        with pool._huge:  # as if another one were in memory
            waiting = [pool.submit(huge) for _ in range(2)]
            assert pool.submit(small).result(PATIENCE_S).width == 1
            time.sleep(2.0)
            assert not any(future.done() for future in waiting)
        assert [future.result(PATIENCE_S).width for future in waiting] == [200, 200]


@pytest.mark.process
def test_a_huge_picture_that_kills_its_decoder_lets_the_next_one_in(monkeypatch, good):
    late = "if item.name == 'late': kwargs['on_header'](9999); os._exit(1)"
    dies_late = OBEDIENT.replace("    return real(item", f"    {late}\n    return real(item")
    run_instead(monkeypatch, dies_late)
    with PicturePool(2, CFG, LIMITS) as pool:
        assert error_type(pool.submit(told(good, "late"))) == "decoder_crash"
        assert pool.submit(good).result(PATIENCE_S).width == 200


# --- beginning and end ----------------------------------------------------------------------------------


@pytest.mark.process
def test_close_ends_what_is_running_and_cancels_the_rest(obedient, good):
    pool = PicturePool(2, CFG, LIMITS)
    futures = [pool.submit(told(good, "sleep")) for _ in range(6)]
    wait_until(lambda: len(pool.worker_pids()) == 2)
    pids = pool.worker_pids()
    pool.close()
    pool.close()
    assert all(map(is_gone, pids))
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)


@pytest.mark.process
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_leave_stopping_to_the_run(good, signum):
    with PicturePool(1, CFG, LIMITS) as pool:
        pool.submit(good).result(PATIENCE_S)
        pids = pool.worker_pids()
        os.kill(pids[0], signum)
        time.sleep(0.1)
        assert pool.submit(good).result(PATIENCE_S).width == 200
        assert pool.worker_pids() == pids


@pytest.mark.process
def test_a_signal_to_the_terminals_group_does_not_reach_workers(good):
    with PicturePool(1, CFG, LIMITS) as pool:
        pool.submit(good).result(PATIENCE_S)
        assert os.getpgid(pool.worker_pids()[0]) != os.getpgid(0)


@pytest.mark.process
def test_no_worker_outlives_a_run_that_was_killed(good):
    script = f"""
        import time
        from md3cli import child
        from md3cli.images import pool as decode
        from md3cli.records import ImageItem
        from md3cli.images.crops import CropConfig, ImageLimits
        child.code_of = lambda entry: {OBEDIENT!r}
        pool = decode.PicturePool(2, CropConfig(42, 6, 2, 12), ImageLimits())
        futures = [pool.submit(ImageItem(name, {good.path!r})) for name in ("sleep", "idle")]
        while not futures[1].done() or len(pool.worker_pids()) < 2: time.sleep(0.01)
        print(*pool.worker_pids(), flush=True)
        time.sleep(999)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2
        run.kill()
    wait_until(lambda: all(map(is_gone, pids)))


@pytest.mark.process
def test_a_worker_that_is_killed_while_it_starts_is_started_again(monkeypatch, tmp_path, good):
    first = tmp_path / "first"
    dies = f"import os, pathlib, signal\nif not pathlib.Path({str(first)!r}).exists():\n"
    dies += f"    pathlib.Path({str(first)!r}).touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    run_instead(monkeypatch, dies + WORKER)
    with PicturePool(1, CFG, LIMITS) as pool:
        assert pool.submit(good).result(PATIENCE_S).width == 200
    assert first.exists()


@pytest.mark.process
def test_where_no_worker_starts_the_run_is_told_why(monkeypatch, good):
    run_instead(monkeypatch, "raise SystemExit('no such thing as numpy')")
    with PicturePool(1, CFG, LIMITS) as pool:
        for _ in range(2):
            with pytest.raises(InputError, match="could not start \\(no such thing as numpy\\)"):
                pool.submit(good).result(PATIENCE_S)


@pytest.mark.process
def test_files_in_the_working_folder_are_not_imported(tmp_path, good, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported from the pictures folder')")
    (tmp_path / "PIL.py").write_text("raise SystemExit('imported from the pictures folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with PicturePool(1, CFG, LIMITS) as pool:
        assert pool.submit(good).result(PATIENCE_S).width == 200


@pytest.mark.process
def test_a_file_size_limit_of_the_run_does_not_touch_pictures(good):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with PicturePool(1, CFG, LIMITS) as pool:
            assert pool.submit(good).result(PATIENCE_S).crops.nbytes > 1000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- what decoding in processes costs ------------------------------------------------------------


REAL_CFG = CropConfig(crop_size=378, patch_size=14, overlap_margin=4, max_crops=12)
PHOTO = Path(__file__).parents[2] / "examples" / "images" / "china.jpg"
NUM_WORKERS = 2


def cpu_seconds(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def drain(submit: Callable[[ImageItem], Future[PreparedImage]], items: list[ImageItem]) -> None:
    waiting: deque[Future[PreparedImage]] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) > 4 * NUM_WORKERS:
            waiting.popleft().result()
    for future in waiting:
        future.result()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [((640, 427), 60), ((1920, 1280), 20), ((4000, 3000), 6)])
def test_processes_cost_at_most_15_percent_more_than_threads(tmp_path, size, count):
    """In processor time, which other work on the machine disturbs less than the clock."""
    path = tmp_path / "photo.jpg"
    Image.open(PHOTO).resize(size, Image.Resampling.BICUBIC).save(path, quality=88)
    items = [ImageItem("photo.jpg", str(path))] * count
    best = {"threads": float("inf"), "processes": float("inf")}
    with (
        PicturePool(NUM_WORKERS, REAL_CFG, LIMITS) as pool,
        ThreadPoolExecutor(NUM_WORKERS) as threads,
    ):
        ways = {
            "threads": lambda item: threads.submit(prepare_image, item, REAL_CFG, LIMITS, None),
            "processes": pool.submit,
        }
        for submit in ways.values():
            drain(submit, items[: 4 * NUM_WORKERS])
        for _ in range(5):
            for name, submit in ways.items():
                before = cpu_seconds(pool.worker_pids())
                drain(submit, items)
                best[name] = min(best[name], cpu_seconds(pool.worker_pids()) - before)
    assert best["processes"] <= 1.15 * best["threads"], best


@pytest.mark.slow
def test_a_200_megapixel_photograph_on_its_side_takes_less_than_1_5_gb(tmp_path):
    path = tmp_path / "huge.jpg"
    Image.new("RGB", (16320, 12240), "teal").save(path, exif=turned_exif(6))
    with PicturePool(1, REAL_CFG, LIMITS, timeout_s=120) as pool:
        got = pool.submit(ImageItem("huge.jpg", str(path))).result()
        assert (got.width, got.height) == (12240, 16320)
        status = Path(f"/proc/{pool.worker_pids()[0]}/status").read_text()
        peak, now = (int(status.split(kind)[1].split()[0]) * 1024 for kind in ("VmHWM:", "VmRSS:"))
        assert peak < 1.5e9
        assert now < 0.2e9


# --- pictures that a GPU cuts ---------------------------------------------------------------------------


@pytest.fixture
def gpu() -> WatchedCutter:
    return WatchedCutter(CFG)


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("background", [None, "teal"])
def test_a_gpu_gets_whole_pictures_and_gives_what_workers_give(files, gpu, background, num_workers):
    plain = PicturePool(0, CFG, LIMITS, background=background)
    expected = {item.name: outcome(plain.submit(item)) for item in files}
    with PicturePool(num_workers, CFG, LIMITS, background=background) as pool:
        assert [outcome(pool.submit(item)) for item in files] == [expected[item.name] for item in files]
        assert not gpu.seen
        pool.serve_gpu(gpu)
        futures = {item.name: pool.submit(item) for item in files}
        assert {name: outcome(future) for name, future in futures.items()} == expected
        good = [future.result() for future in futures.values() if future.exception() is None]
        assert sorted(gpu.sizes) == sorted((picture.width, picture.height) for picture in good)
        pool.serve_gpu(None)
        gpu.seen.clear()
        assert outcome(pool.submit(files[0])) == expected[files[0].name]
        assert not gpu.seen


@pytest.mark.process
def test_a_picture_that_is_too_long_or_too_large_is_cut_by_the_worker(monkeypatch, files):
    monkeypatch.setattr(pool_module, "arena_bytes", lambda num_workers: 8192)
    plain = PicturePool(0, CFG, LIMITS)
    gpu = WatchedCutter(CFG, longest_side=80)
    with PicturePool(1, CFG, LIMITS) as pool:
        pool.serve_gpu(gpu)
        for item in files[:4]:
            assert outcome(pool.submit(item)) == outcome(plain.submit(item))
    # 200 x 300 is too large and too long, 64 x 48 does not fit (9,216 bytes), 500 x 40 is too long
    small = plain.submit(next(item for item in files if item.name == "d.webp")).result()
    assert gpu.sizes == [(small.width, small.height)]


@pytest.mark.process
def test_without_shared_memory_pictures_are_cut_by_the_worker(monkeypatch, files, gpu):
    monkeypatch.setattr(decoder, "make_arena", lambda num_bytes: None)
    plain = PicturePool(0, CFG, LIMITS)
    with PicturePool(1, CFG, LIMITS) as pool:
        pool.serve_gpu(gpu)
        assert [outcome(pool.submit(item)) for item in files] == [outcome(plain.submit(item)) for item in files]
    assert not gpu.seen


@pytest.mark.process
def test_many_pictures_go_through_memory_for_one(monkeypatch, files, gpu):
    """However many results are held: a picture has its memory only until it is cut."""
    monkeypatch.setattr(pool_module, "arena_bytes", lambda num_workers: 200_000)
    plain = PicturePool(0, CFG, LIMITS)
    good = [item for item in files if plain.submit(item).exception() is None]
    with PicturePool(2, CFG, LIMITS) as pool:
        pool.serve_gpu(gpu)
        futures = [pool.submit(item) for item in good * 10]
        assert [outcome(future) for future in futures] == [outcome(plain.submit(item)) for item in good * 10]
    sizes = [(picture.width, picture.height) for picture in (plain.submit(item).result() for item in good)]
    assert sorted(gpu.sizes) == sorted(size for size in sizes if 3 * size[0] * size[1] <= 200_000 for _ in range(10))


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "expected", "said"),
    [
        (EngineError, EngineError, "made up"),
        (MemoryError, ImageError, "needs more memory"),
        (ValueError, ValueError, "made up"),
    ],
)
def test_what_goes_wrong_in_cutting_is_no_fault_of_the_decoder(monkeypatch, good, gpu, kind, expected, said):
    def fail(pixels):
        raise kind("made up")

    with PicturePool(1, CFG, LIMITS) as pool:
        pool.serve_gpu(gpu)
        pool.submit(good).result(PATIENCE_S)
        pids = pool.worker_pids()
        monkeypatch.setattr(gpu, "crops_of", fail)
        with pytest.raises(expected, match=said):
            pool.submit(good).result(PATIENCE_S)
        monkeypatch.undo()
        assert isinstance(pool.submit(good).result(PATIENCE_S), PreparedImage)
        assert pool.worker_pids() == pids


# A worker that says in a file that it is in the middle of writing a picture; the first one to do so ends there.
TORN = OBEDIENT.replace(
    "worker.serve()",
    """
copy = worker.copy_pixels
def torn(image, target):
    target[: len(target) // 2] = 99
    open(os.path.join(FOLDER, str(os.getpid())), "w").close()
    if os.environ.get("TORN") == "sleep": time.sleep(999)
    if len(os.listdir(FOLDER)) == 1: os.kill(os.getpid(), signal.SIGKILL)
    copy(image, target)
worker.copy_pixels = torn
worker.serve()
""",
)


def processes_sharing() -> set[str]:
    """The processes that have memory of ours mapped."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"memfd:md3" in (process / "maps").read_bytes():
                found.add(process.name)
    return found


@pytest.mark.process
def test_a_worker_that_is_killed_while_it_writes_costs_nothing(monkeypatch, tmp_path, good, gpu):
    torn = tmp_path / "torn"
    torn.mkdir()
    run_instead(monkeypatch, TORN.replace("FOLDER", repr(str(torn))))
    expected = outcome(PicturePool(0, CFG, LIMITS).submit(good))
    num_open = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(action="ignore"), PicturePool(1, CFG, LIMITS) as pool:
        pool.serve_gpu(gpu)
        assert outcome(pool.submit(good)) == expected
        assert not gpu.seen, "memory may be what ran out: the worker cuts"
        # the first file is still there: this one is written whole
        assert outcome(pool.submit(good)) == expected
        assert len(gpu.seen) == 1
    del pool
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= num_open
    assert str(os.getpid()) not in processes_sharing()


@pytest.mark.process
def test_a_worker_without_memory_to_copy_a_picture_says_so(monkeypatch, files, gpu):
    """What stands in the shared memory is the picture before, then, and not this one."""
    code = OBEDIENT.replace("worker.serve()", "tell = worker.copy_pixels\ndef starve(image, target):\n")
    code += "    if image.size == (64, 48): raise MemoryError\n    tell(image, target)\nworker.copy_pixels = starve\n"
    run_instead(monkeypatch, code + "worker.serve()")
    first, starved = files[:2]
    with PicturePool(1, CFG, LIMITS) as pool:
        pool.serve_gpu(gpu)
        good = outcome(pool.submit(first))
        assert error_type(pool.submit(starved)) == "too_large"
        assert outcome(pool.submit(first)) == good
    assert len(gpu.sizes) == 2


@pytest.mark.process
@pytest.mark.parametrize("starved_band", [1, 2, 3])
def test_a_worker_without_memory_to_send_a_picture_says_so_at_once(monkeypatch, tmp_path, starved_band):
    path = tmp_path / "a.png"
    picture(size=(50, 40)).save(path)  # 16, 16 and 8 rows
    code = OBEDIENT.replace(
        "worker.serve()",
        f"""
numpy, bands = worker.np, []
class Starving:
    def __getattr__(self, name):
        return getattr(numpy, name)
    def ascontiguousarray(self, band):
        bands.append(band)
        if len(bands) == 3 + {starved_band}: raise MemoryError
        return numpy.ascontiguousarray(band)
worker.np = Starving()
worker.serve()
""",
    )
    run_instead(monkeypatch, code)
    item = ImageItem("a", str(path))
    with PicturePool(1, CFG, LIMITS) as pool:
        first, pids = pool.whole(item).result(PATIENCE_S), pool.worker_pids()
        with pytest.raises(ImageError, match="needs more memory") as caught:
            pool.whole(item).result(PATIENCE_S)
        assert caught.value.type == "too_large"
        assert (pool.whole(item).result(PATIENCE_S).pixels == first.pixels).all()
        assert pool.worker_pids() == pids, "a worker that says so is asked on"


@pytest.mark.process
@pytest.mark.parametrize(
    "last", ["[]", '{"type": "made up", "message": ""}', '{"width": 2, "height": 2, "sha256": "0" * 64}']
)
def test_what_a_worker_says_behind_pixels_is_not_believed(monkeypatch, good, last):
    code = WORKER.replace("serve()", "")
    code += "\nimport md3cli.images.worker as w\ndef lie(channel, *told):\n"
    code += '    channel.send({"width": 2, "height": 2, "sha256": "0" * 64})\n'
    code += "    channel.send_bytes(memoryview(bytes(12)))\n"
    run_instead(monkeypatch, code + f"    channel.send({last})\nw._serve_one = lie\nserve()")
    with warnings.catch_warnings(action="ignore"), PicturePool(1, CFG, LIMITS) as pool:
        assert error_type(pool.whole(good)) == "decoder_crash"


@pytest.mark.process
def test_the_memory_of_pictures_goes_with_the_pool(good, gpu):
    with PicturePool(1, CFG, LIMITS) as pool:
        pool.serve_gpu(gpu)
        got = pool.submit(good).result(PATIENCE_S)
        assert str(os.getpid()) in processes_sharing()
    del pool
    gc.collect()
    assert str(os.getpid()) not in processes_sharing()
    assert got.crops.shape[1:] == (42, 42, 3)


@pytest.mark.process
def test_a_run_that_is_killed_while_a_worker_writes_leaves_no_memory(tmp_path, good):
    torn = tmp_path / "torn"
    torn.mkdir()
    script = f"""
        import time
        from md3cli import child
        from md3cli.images import pool as decode
        from md3cli.records import ImageItem
        from md3cli.images.crops import CropConfig, ImageLimits
        from types import SimpleNamespace
        child.code_of = lambda entry: {TORN.replace("FOLDER", repr(str(torn)))!r}
        pool = decode.PicturePool(1, CropConfig(42, 6, 2, 12), ImageLimits())
        pool.serve_gpu(SimpleNamespace(longest_side=65_535))  # which will cut nothing
        future = pool.submit(ImageItem("x", {good.path!r}))
        time.sleep(999)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, env=os.environ | {"TORN": "sleep"}) as run:
        wait_until(lambda: any(torn.iterdir()))
        [worker] = [path.name for path in torn.iterdir()]
        assert {worker, str(run.pid)} <= processes_sharing()
        run.kill()
    wait_until(lambda: not {worker, str(run.pid)} & processes_sharing())


@pytest.mark.process
@pytest.mark.parametrize(
    ("longest", "answers"),
    [
        (9, ['{"width": 9, "height": 9, "sha256": "0" * 64, "is_whole": True}', "[]"]),
        (8, ['{"width": 9, "height": 9, "sha256": "0" * 64, "is_whole": True}', '{"type": "made up", "message": ""}']),
        (9, ['{"width": 10**9, "height": 10**9, "sha256": "0" * 64, "is_whole": True}']),
        (9, ['{"width": 9, "height": -9, "sha256": "0" * 64, "is_whole": True}']),
        (0, ['{"width": 9, "height": 9, "sha256": "0" * 64, "is_whole": True}']),
    ],
)
def test_a_worker_that_talks_nonsense_of_whole_pictures_is_not_believed(monkeypatch, good, longest, answers):
    code = WORKER.replace("serve()", "")
    code += "\nimport md3cli.images.worker as w\ndef lie(channel, *told):\n"
    code += "".join(f"    channel.send({answer})\n" for answer in answers) + "w._serve_one = lie\nserve()"
    run_instead(monkeypatch, code)
    with warnings.catch_warnings(action="ignore"), PicturePool(1, CFG, LIMITS) as pool:
        if longest:
            pool.serve_gpu(WatchedCutter(CFG, longest_side=longest))
        assert error_type(pool.submit(good)) == "decoder_crash"


@pytest.mark.process
def test_beside_a_gpu_fewer_decode_at_once(monkeypatch, tmp_path, good):
    busy = tmp_path / "busy"
    busy.mkdir()
    deeds = f"""    mine = {str(busy)!r} + f"/{{os.getpid()}}"
    open(mine, "w").close()
    time.sleep(0.1)
    open({str(tmp_path / "most")!r}, "a").write(str(len(os.listdir({str(busy)!r}))))
    os.unlink(mine)
"""
    run_instead(monkeypatch, OBEDIENT.replace("    return real(item", f"{deeds}    return real(item"))
    with PicturePool(3, CFG, LIMITS, num_beside_gpu=1) as pool:
        pool.serve_gpu(None)
        for future in [pool.submit(good) for _ in range(6)]:
            future.result(PATIENCE_S)
    assert (tmp_path / "most").read_text() == "111111"
