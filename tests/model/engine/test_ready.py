"""An engine that is made ready: what pays is compiled, found again whole or not at all, and never stands in the way."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_cases import GoldenCase, assert_answer, load_case

from md3cli.file_cache import FileCache
from md3cli.model.engine import kernels, ready
from md3cli.model.engine.compiled import CompiledSteps
from md3cli.model.engine.engine import Engine
from md3cli.model.engine.passes import decode_step
from md3cli.model.engine.ready import Search, Timing, make_ready, why_not
from md3cli.model.network.moondream import Moondream3
from md3cli.records import Answer

BATCH = 12
FAST, SLOW = 4.0, 20.0  # ms of a compiled step; an eager one takes 10


class FakeCompiler:
    """Stands for the compiler and the clock: `ms` of a compiled step by rows; a form is the eager step itself."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ms: Callable[[int], float] = lambda rows: FAST
        self.compiled: list[int] = []
        self.timed: list[int] = []
        self.loaded: list[bytes] = []
        patch.setattr(ready, "compile_step", self.compile)
        patch.setattr(ready, "LoadedStep", self.load)
        patch.setattr(Search, "_time", lambda search, eager, form, size: self.time(size))
        patch.setattr(Search, "_share_outside", self.share)
        patch.setattr(ready, "_warm_up", lambda engine: None)
        self.outside = 0.8

    def compile(self, model: Moondream3, parts: Any, given: Any, max_context: int, folder: Path) -> bytes:
        assert folder.is_dir()
        self.compiled.append(len(given[-1]))
        return f"code for {len(given[-1])}".encode() * 100

    def load(self, model: Moondream3, parts: Any, package: bytes, max_context: int) -> Any:
        self.loaded.append(package)
        return lambda *given, **how: decode_step(model, *given, **how)

    def time(self, size: int) -> Timing:
        self.timed.append(size)
        return Timing(size, 10.0, self.ms(size))

    def share(self, parts: Any) -> float:
        parts.widths[:] = [1] * len(parts.widths)
        return self.outside


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    monkeypatch.setenv("CXX", sys.executable)  # some program that is there
    return FakeCompiler(monkeypatch)


def made_ready(folder: Path, *, batch_size: int = BATCH) -> Engine:
    engine = load_case("a").engine(batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_ready(engine, folder)
    return engine


def refused(folder: Path, reason: str, engine: Engine | None = None) -> Engine:
    engine = engine or load_case("a").engine(BATCH)
    before = engine.passes.decode
    with pytest.warns(UserWarning, match=f"nothing is compiled: {reason}.*; the answers are the same") as found:
        make_ready(engine, folder)
    assert len(found) == 1
    assert "\n" not in str(found[0].message)
    assert engine.passes.decode is before
    return engine


def forms(engine: Engine) -> list[tuple[int, int]]:
    assert isinstance(engine.passes.decode, CompiledSteps)
    return list(engine.passes.decode.forms)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_faster_is_compiled_once(tmp_path: Path, compiler: FakeCompiler) -> None:
    engine = made_ready(tmp_path)
    assert forms(engine) == [(1, 1), (2, BATCH)]
    assert compiler.compiled == [1, 4]
    assert compiler.timed == [1, 2, 8, BATCH]
    assert all(path.parts[-3] == "compiled" for path in files(tmp_path))
    assert forms(made_ready(tmp_path)) == [(1, 1), (2, BATCH)]
    make_ready(engine, tmp_path)  # ready already
    assert len(compiler.compiled) == 2
    assert len(compiler.timed) == 4


def test_what_is_not_faster_is_not_compiled_again(tmp_path: Path, compiler: FakeCompiler) -> None:
    compiler.ms = lambda rows: SLOW
    reason = "it would not be faster here: a compiled step took 20.00 ms, an eager one 10.00 ms"
    for _ in range(2):
        refused(tmp_path, reason)
    assert compiler.compiled == compiler.timed == [1]  # nor is the form for several tried


def test_each_size_keeps_what_is_faster(tmp_path: Path, compiler: FakeCompiler) -> None:
    compiler.ms = lambda rows: FAST if rows <= 8 else SLOW
    for _ in range(2):
        assert forms(made_ready(tmp_path)) == [(1, 1), (2, 8)]
    compiler.ms = lambda rows: FAST if rows == 1 else SLOW
    for _ in range(2):
        assert forms(made_ready(tmp_path, batch_size=13)) == [(1, 1)]
    assert compiler.compiled == [1, 4]  # code does not depend on the batch; what pays does
    assert forms(made_ready(tmp_path, batch_size=1)) == [(1, 1)]


def test_a_batch_of_one_needs_one_form(tmp_path: Path, compiler: FakeCompiler) -> None:
    assert forms(made_ready(tmp_path, batch_size=1)) == [(1, 1)]
    assert compiler.compiled == compiler.timed == [1]


def test_a_step_that_is_all_products_is_refused_before_anything_is_compiled(
    tmp_path: Path, compiler: FakeCompiler
) -> None:
    compiler.outside = 0.03
    refused(tmp_path, "products take 97% of a step, and a compiler leaves those as they are")
    assert not compiler.compiled


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "cut": lambda content: content[:-1],
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_torn_files_are_made_again(tmp_path: Path, compiler: FakeCompiler, damage: Callable[[bytes], bytes]) -> None:
    made_ready(tmp_path)
    whole, all_files = list(compiler.loaded), files(tmp_path)
    assert len(all_files) == 3
    for torn in (*([path] for path in all_files), all_files):
        for path in torn:
            path.write_bytes(damage(path.read_bytes()))
        compiler.loaded.clear()
        assert forms(made_ready(tmp_path)) == [(1, 1), (2, BATCH)]
        assert compiler.loaded == whole
    num_compiled, num_timed = len(compiler.compiled), len(compiler.timed)
    made_ready(tmp_path)
    assert (len(compiler.compiled), len(compiler.timed)) == (num_compiled, num_timed)


def test_code_that_another_user_compiled_is_not_run(
    tmp_path: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_ready(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # where that user's key lies
    monkeypatch.setattr(Search, "_kept_timings", lambda search, key: {})
    store = FileCache(tmp_path / "cache", 1 << 30, folder="compiled")
    for path in files(tmp_path / "cache"):
        store.put(path.stem, b"0" * ready.SEAL_BYTES + b"planted")  # whole, under the right name
    compiler.loaded.clear()
    assert forms(made_ready(tmp_path / "cache")) == [(1, 1), (2, BATCH)]
    assert compiler.compiled == [1, 4] * 2
    assert not any(b"planted" in code for code in compiler.loaded)
    made_ready(tmp_path / "cache")
    assert compiler.compiled == [1, 4] * 2


def test_without_a_key_nothing_is_kept(tmp_path: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    engine = load_case("a").engine(BATCH)
    with pytest.warns(UserWarning, match="not kept for the next run: .* cannot hold the key") as found:
        make_ready(engine, tmp_path / "cache")
    assert len(found) == 1
    assert forms(engine) == [(1, 1), (2, BATCH)]
    assert not files(tmp_path / "cache")


def test_code_that_cannot_be_loaded_any_more_is_compiled_again(
    tmp_path: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_ready(tmp_path)
    failed: set[bytes] = set()

    def load(model: Moondream3, parts: Any, code: bytes, max_context: int) -> Any:
        if code not in failed:
            failed.add(code)
            raise RuntimeError("version `GLIBC_2.99' not found")
        return compiler.load(model, parts, code, max_context)

    monkeypatch.setattr(ready, "LoadedStep", load)
    assert forms(made_ready(tmp_path)) == [(1, 1), (2, BATCH)]
    assert compiler.compiled == [1, 4] * 2


@pytest.mark.parametrize(
    "verdict",
    [
        b"",
        b"\xff",
        b"null",
        b"{}",
        b"[[1]]",
        b'[["x", 1, 1]]',
        b"[[1, 1, 1e999]]",
        b"[[1, -1, -2]]",
        b"[[1, NaN, 1]]",
        b"[[2, 10, 1]]",
        b"[[1, 10, 1], [99999999999999999999, 10, 1]]",
        b"[" * 100_000,
    ],
)
def test_a_strange_verdict_is_no_verdict(tmp_path: Path, compiler: FakeCompiler, verdict: bytes) -> None:
    store, kept = FileCache(tmp_path, 1 << 20, folder="compiled"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "_keep", lambda search, key, payload: kept.append((ready._digest(key), payload)))
        made_ready(tmp_path)
    key, payload = kept[-1]
    assert [row[0] for row in json.loads(payload)] == [1, 2, 8, BATCH]
    store.put(key, verdict)
    compiler.timed.clear()
    assert forms(made_ready(tmp_path)) == [(1, 1), (2, BATCH)]
    assert compiler.timed == [1, 2, 8, BATCH]


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), OSError(28, "No space left"), MemoryError(), KeyError("x")])
def test_whatever_a_compiler_raises_is_one_line(
    tmp_path: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> bytes:
        raise error

    monkeypatch.setattr(ready, "compile_step", fail)
    case, engine = load_case("a"), refused(tmp_path, rf"the compiler failed \({type(error).__name__}")
    assert_answers(case, engine)
    assert not files(tmp_path)


def test_ctrl_c_ends_compiling(tmp_path: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(ready, "compile_step", stop)
    engine = load_case("a").engine(BATCH)
    modules = list(engine.model.modules())
    with pytest.raises(KeyboardInterrupt):
        make_ready(engine, tmp_path)
    assert list(map(id, engine.model.modules())) == list(map(id, modules))
    assert_answers(load_case("a"), engine)


def test_code_that_decides_otherwise_is_refused(
    tmp_path: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(model: Moondream3, *_: Any) -> Any:
        def step(*given: Any, **how: Any) -> torch.Tensor:
            events = decode_step(model, *given, **how)
            events[:, 1] += 1
            return events

        return step

    monkeypatch.setattr(ready, "LoadedStep", load)
    refused(tmp_path, "a compiled step gave other numbers than its eager twin")


def test_a_folder_that_cannot_be_used_keeps_nothing_and_stops_nothing(tmp_path: Path, compiler: FakeCompiler) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "full"):
        engine = load_case("a").engine(BATCH)
        with pytest.MonkeyPatch.context() as patch:
            if folder.name == "full":
                patch.setattr(FileCache, "put", no_space)
            with pytest.warns(UserWarning, match="not kept for the next run") as found:
                make_ready(engine, folder)
        assert len(found) == 1
        assert forms(engine) == [(1, 1), (2, BATCH)]


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_captured_engine_has_its_steps(tmp_path: Path, compiler: FakeCompiler) -> None:
    engine = load_case("a").engine(2)
    engine._captures = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_ready(engine, tmp_path)
    assert not compiler.compiled


def test_the_compiler_that_torch_takes_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("clang++", "cl", "g++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    model = load_case("a").model
    for system, compiler in (("linux", "g++"), ("darwin", "clang++"), ("win32", "cl")):
        with monkeypatch.context() as patch:
            patch.setattr(ready, "sys", SimpleNamespace(platform=system))
            assert why_not(model) is None
            (tmp_path / compiler).unlink()
            assert f"no C++ compiler ({compiler}; CXX may name another) is installed" in str(why_not(model))
            (tmp_path / compiler).write_text("")
            (tmp_path / compiler).chmod(0o755)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = load_case("a").model
    monkeypatch.setenv("CXX", sys.executable)
    assert why_not(model) is None
    assert "rounds bfloat16 differently" in str(why_not(copy.deepcopy(model).to(torch.bfloat16)))
    assert "on meta" in str(why_not(copy.deepcopy(model).to("meta")))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "is installed" in str(why_not(model))
    assert_answers(load_case("a"), refused(tmp_path, r"no C\+\+ compiler"))


# -- made-up requests ------------------------------------------------------------------------------


def assert_answers(case: GoldenCase, engine: Engine) -> None:
    keys = [key for key in range(len(case.requests)) if case.is_certain(key)]
    for answer in engine.run([case.job(key) for key in keys]):
        assert_answer(answer, case.expected[answer.key])


def test_nothing_stays_of_made_up_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ready.WARM_UP_S, "cpu", 1e9)
    case = load_case("a")
    engine = case.engine(BATCH)
    encoder, asked = engine.encoder, []
    stats, sizes = engine.stats, list(engine.stats.batch_sizes)
    engine.add, add = lambda job: (asked.append(job), add(job))[1], engine.add  # type: ignore[method-assign]
    ready._warm_up(engine)
    assert len({job.image.tiling for job in asked if job.image}) > 1
    assert len({job.request.task for job in asked}) == 2
    assert engine.encoder is encoder
    assert engine.stats is stats
    assert (encoder.num_images, len(encoder._memory), len(encoder._ready)) == (0, 0, 0)
    assert (stats.num_steps, stats.batch_sizes) == (0, sizes)
    assert not engine.has_work
    assert not any(engine._slots.held)
    assert_answers(case, engine)


def test_made_up_requests_take_no_longer_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = load_case("a").engine(2), []
    engine.add, add = lambda job: (asked.append(job), add(job))[1], engine.add  # type: ignore[method-assign]
    monkeypatch.setitem(ready.WARM_UP_S, "cpu", 0.0)
    ready._warm_up(engine)
    assert not asked


@pytest.mark.parametrize("num_steps", [1, 5, 40])
def test_a_made_up_request_is_dropped_where_time_is_over(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    case = load_case("a")
    engine, seconds = case.engine(BATCH), 0.0
    monkeypatch.setattr(ready, "time", SimpleNamespace(perf_counter=lambda: seconds))

    def step() -> list[Answer]:
        nonlocal seconds
        seconds += ready.WARM_UP_S["cpu"] / num_steps
        return take_step()

    engine.step, take_step = step, engine.step  # type: ignore[method-assign]
    ready._warm_up(engine)
    engine.step = take_step  # type: ignore[method-assign]
    assert not engine.has_work
    assert_answers(case, engine)


# -- the real clock --------------------------------------------------------------------------------


@torch.inference_mode()
def test_shares_and_times_are_those_of_steps() -> None:
    model = copy.deepcopy(load_case("a").model)
    kernels.optimise(model)
    search = Search(model, 4, model.config.text.max_context, None)
    with ready.in_parts(model) as parts:
        share = search._share_outside(parts)
    assert 0 < share < 1
    assert all(parts.widths)
    timing = search._time(step_of(model), step_of(model), 3)
    assert timing.rows == 3
    assert timing.eager > 0
    assert timing.compiled > 0


def step_of(model: Moondream3) -> Callable[..., torch.Tensor]:
    return lambda *given, **how: decode_step(model, *given, **how)
