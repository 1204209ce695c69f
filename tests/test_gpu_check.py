"""`gpu_check.py` on a CPU: all of it at mini size, and what crashes, hangs, budgets and wrong options do to it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import CASES
from gpu.files import SIZES
from gpu.goals import GOALS, Goal, judged
from gpu.golden import LOW_BIT_CASES, MARGINS
from gpu.lowbits import LOADS as LOW_BIT_LOADS
from gpu.parts import PARTS
from gpu.predictions import GOLDEN, TABLES, card_of, kernel_prediction, predictions
from gpu.stages import MICRO_BATCHES, PICTURES, STEPS
from gpu.steps import plural
from gpu.table import GOAL_WIDTH, NAME_WIDTH, WIDTH, table_of
from gpu.workloads import LOADS

TESTS = Path(__file__).parent
SCRIPT = TESTS / "gpu_check.py"
FORKED = TESTS / "support" / "forked_check.py"
EXAMPLES = TESTS.parent / "examples"
NAMES = [part.name for part in PARTS]
CPU = ("--device", "cpu", "--config", "mini")
pytestmark = pytest.mark.timeout(900)  # whichever test comes first waits for the run of all parts
BUDGET_SLACK_S = 15.0  # a promise to whoever rents the card by the minute


@dataclass(frozen=True)
class Ran:
    """A run that has ended."""

    status: int
    stdout: str
    stderr: str
    results: dict[str, Any]
    seconds: float

    @property
    def statuses(self) -> dict[str, str]:
        return {name: part["status"] for name, part in self.results["parts"].items()}

    def figures(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = self.results["parts"][part]["figures"]
        return found


def command(out: Path, *arguments: str, script: Path = SCRIPT) -> dict[str, Any]:
    """How `subprocess` runs the script: from anywhere, md3cli found through the script alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        "args": [sys.executable, str(script), "--out", str(out), *arguments],
        "cwd": os.sep,
        "env": environment | ({"PYTHONPATH": str(script.parent)} if script != SCRIPT else {}),
    }


def check(out: Path, *arguments: str, script: Path = SCRIPT) -> Ran:
    started = time.monotonic()
    done = subprocess.run(capture_output=True, text=True, check=False, **command(out, *arguments, script=script))
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    return Ran(done.returncode, done.stdout, done.stderr, results, time.monotonic() - started)


# -- all of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All parts; their processes are forks, where those of all other runs here are started as on a card."""
    budget = ("--budget", "840")  # a machine that does much else takes that long
    return check(tmp_path_factory.mktemp("gpu_check") / "out", *CPU, *budget, script=FORKED)


@pytest.mark.process
def test_every_part_is_ok(whole: Ran) -> None:
    assert whole.stderr == ""
    expected = dict.fromkeys(NAMES, "ok") | {"speeds": "not measured", "tiles": "skipped"}
    if importlib.util.find_spec("triton") is None:
        expected["kernels"] = "not measured"
    assert whole.statuses == expected, [part.get("errors") for part in whole.results["parts"].values()]
    assert whole.status == 0


@pytest.mark.process
def test_results_say_on_what_and_every_figure_has_its_prediction(whole: Ran) -> None:
    assert whole.results["torch"] == torch.__version__
    assert whole.results["card"] not in ("", "unknown")
    assert whole.results["config"] == "mini"
    assert list(whole.results["parts"]) == NAMES
    for name, part in whole.results["parts"].items():
        assert part["figures"] or part["status"] in ("not measured", "skipped"), name
        for figure, entry in part["figures"].items():
            assert set(entry) == {"value", "prediction", "unit"}, figure
            assert isinstance(entry["value"], (int, float)), figure
            assert entry["prediction"] is None or isinstance(entry["prediction"], (int, float)), figure
            assert entry["unit"], figure


def clear_decisions(names: tuple[str, ...], form: str) -> int:
    """Counted from the reference itself."""
    margin, moe_margin = MARGINS[form]
    count = 0
    for name in names:
        for entry in json.loads(CASES[name][2].read_text())["requests"]:
            trace = entry["result"]["trace"]
            is_clear = [t["margin"] >= margin and t["moe_margin"] >= moe_margin for t in trace]
            count += sum(1 for _ in takewhile(bool, is_clear))
    return count


@pytest.mark.process
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("what", ["float32", "bf16", "low bits, bf16"])
def test_golden_decisions_agree_all_that_are_clear(whole: Ran, what: str, batch: int) -> None:
    names = LOW_BIT_CASES if what.startswith("low bits") else tuple(CASES)
    clear = clear_decisions(names, what.removeprefix("low bits, "))
    found = whole.figures("golden")
    for figure in (f"clear decisions, {what}, batch {batch}", f"clear decisions that agree, {what}, batch {batch}"):
        assert found[figure] == {"value": clear, "prediction": clear, "unit": "count"}


def test_golden_predictions_are_what_the_reference_holds() -> None:
    assert GOLDEN["clear decisions, low bits, float32, batch 1"][0] == clear_decisions(LOW_BIT_CASES, "float32")


@pytest.mark.process
def test_figures_are_named_by_workload_batch_and_form(whole: Ran) -> None:
    assert {"decode step, 1 row, bf16", "decode step, 64 rows, bf16"} <= set(whole.figures("stages"))
    assert {"query 3 tokens, batch 8, bf16", "query 3 tokens, batch 1, bf16"} <= set(whole.figures("engine"))
    assert {"rows with other bits, alone", "crops with other bits, in another place"} <= set(whole.figures("sameness"))
    assert "decode step, 64 rows, float8 experts: over bf16's" in whole.figures("lowbits")
    assert whole.figures("lowbits")["weights, int4"]["value"] < whole.figures("stages")["weights, bf16"]["value"]


@pytest.mark.process
def test_the_table_shows_every_figure_in_100_columns(whole: Ran) -> None:
    lines = whole.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= WIDTH  # the last is the path
    shown = "\n".join(lines)
    for part in whole.results["parts"].values():
        for figure in part["figures"]:
            assert figure[: NAME_WIDTH - 1] in shown
    assert lines[-1].endswith("results.json")
    assert Path(lines[-1]).exists()


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.process
def test_only_and_skip_take_names(tmp_path: Path) -> None:
    ran = check(tmp_path / "out", *CPU, "--only", "limits,files", "--only", "engine", "--skip", "engine,files")
    assert ran.status == 0
    assert ran.statuses == dict.fromkeys(NAMES, "skipped") | {"limits": "ok"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--only", "limits,speed"), "no part 'speed'; there are limits, kernels"),
        (("--skip", "Golden"), "no part 'Golden'"),
        (("--budget", "soon"), "soon is no number of seconds"),
        (("--budget", "-1"), "no number of seconds"),
        (("--config", "huge"), "invalid choice: 'huge'"),
        (("--fast",), "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    ran = check(tmp_path / "out", *CPU, *arguments)
    assert ran.status == 2
    assert says in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = check(tmp_path / "file" / "out", *CPU)
    assert ran.status == 2
    assert ran.stderr.count("\n") == 1
    assert "choose another folder" in ran.stderr


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_says_what_to_do(tmp_path: Path) -> None:
    ran = check(tmp_path / "out")
    assert ran.status == 2
    assert ran.stderr.count("\n") == 1
    assert "--device cpu" in ran.stderr
    assert ran.results["problem"] in ran.stderr
    assert ran.statuses == dict.fromkeys(NAMES, "not measured") | {"tiles": "skipped"}


@pytest.mark.process
def test_a_cpu_without_triton_measures_no_kernels(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError\n")
    script = tmp_path / "gpu_check.py"  # beside a triton that is none, found first
    script.write_text(
        f"import runpy, sys; sys.path[0] = {str(TESTS)!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    ran = check(tmp_path / "out", *CPU, "--only", "kernels", script=script)
    assert ran.status == 0
    assert ran.statuses["kernels"] == "not measured"
    assert "is triton installed?" in ran.stdout


@pytest.mark.process
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the cases are Triton's")
def test_the_cases_of_kernels_bring_the_operators_they_call() -> None:
    """In a process that has loaded no engine: most cases have too many rows to be called without a card."""
    code = """
        import pathlib, re, torch
        from gpu import triton_cases
        called = set(re.findall(r"\\bOPS\\.(\\w+)", pathlib.Path(triton_cases.__file__).read_text()))
        print(len(called), [name for name in sorted(called) if not hasattr(torch.ops.md3, name)])
    """
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    num_called, missing = ran.stdout.split(maxsplit=1)
    assert int(num_called) > 10
    assert missing.strip() == "[]"


@pytest.mark.process
@pytest.mark.parametrize("budget", [0, 4])
def test_what_does_not_fit_the_budget_is_not_measured(tmp_path: Path, budget: int) -> None:
    ran = check(tmp_path / "out", *CPU, "--budget", str(budget))
    assert ran.status == 0
    assert ran.statuses == dict.fromkeys(NAMES, "not measured") | {"tiles": "skipped"}
    assert ran.seconds < budget + BUDGET_SLACK_S


# -- parts that go wrong ---------------------------------------------------------------------------

FAULTS = {
    "well": "run.figure('fine', 1, 'count')",
    "killed": "run.figure('before', 2, 'count'); os.kill(os.getpid(), signal.SIGKILL)",
    "raises": "run.figure('before', 3, 'count'); raise RuntimeError('CUDA error: made up')",
    "wrong": "run.figure('worse', 4, 'count'); run.fail('worse than allowed'); run.figure('after', 5, 'count')",
    "hangs": "run.note('pids', [os.getpid(), subprocess.Popen(['sleep', '600']).pid]); time.sleep(600)",
}


def fault_script(folder: Path, parts: str) -> Path:
    """The script with parts of ours in place of its own; each fault is a module that its child finds."""
    for name, body in FAULTS.items():
        text = f"import os, signal, subprocess, time\n\ndef measure(run):\n    {body}\n"
        (folder / f"fault_{name}.py").write_text(text)
    (folder / "fault_import.py").write_text("import no_such_module\n")
    script = folder / "check_with_faults.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(TESTS)!r})
            from gpu.parts import Part
            from gpu_check import main
            sys.exit(main(sys.argv[1:], [{parts}]))
        """)
    )
    return script


def fault(name: str, most_s: float = 60.0) -> str:
    return f"Part({name!r}, 'fault_{name}', 1, 1, least_cpu_s=1, most_cpu_s={most_s})"


def is_running(pid: int) -> bool:
    """True for a process that is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("faults")
    names = ("killed", "raises", "wrong", "import", "well")
    parts = [fault("hangs", most_s=40), *map(fault, names)]
    return check(folder / "out", *CPU, script=fault_script(folder, ", ".join(parts)))


@pytest.mark.process
def test_what_goes_wrong_costs_its_part_and_no_other(faulty: Ran) -> None:
    assert faulty.status == 1
    failed = dict.fromkeys(("hangs", "killed", "raises", "wrong", "import"), "failed")
    assert faulty.statuses == failed | {"well": "ok"}
    assert faulty.figures("well")["fine"]["value"] == 1


@pytest.mark.process
@pytest.mark.parametrize(
    ("part", "figures", "says"),
    [
        ("killed", {"before": 2}, "died of signal 9"),
        ("raises", {"before": 3}, "RuntimeError: CUDA error: made up"),
        ("wrong", {"worse": 4, "after": 5}, "worse than allowed"),
        ("import", {}, "No module named 'no_such_module'"),
        ("hangs", {}, "not done within 40 s"),
    ],
)
def test_a_failed_part_keeps_its_figures_and_says_why(
    faulty: Ran, part: str, figures: dict[str, float], says: str
) -> None:
    assert {name: entry["value"] for name, entry in faulty.figures(part).items()} == figures
    assert says in "\n".join(faulty.results["parts"][part]["errors"])
    assert says in faulty.stdout


@pytest.mark.process
def test_a_part_that_hangs_leaves_no_process_behind(faulty: Ran) -> None:
    assert not any(map(is_running, faulty.results["parts"]["hangs"]["pids"]))


# Three processes at once, of five kernels: one that dies, and others beside and behind it.
THREE_OF_FIVE = """
from gpu.check import Check
ask_facts = Check._ask_facts
def ask_few(self):
    ask_facts(self)
    names = [name for name in self.results.data["kernels"] if name != "down"]
    self.results.data["kernels"] = [names[0], "down", *names[1:4]]
Check._ask_facts = ask_few
Check._at_once = lambda self, part: 3 if part.is_by_kernel else 1
"""


@pytest.mark.process
def test_kernels_that_run_together_fail_alone(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "fault_together.py").write_text(
        "import os, signal\n\ndef measure(run):\n    run.figure(run.argument, 1, 'count')\n"
        "    if run.argument == 'down':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = fault_script(tmp_path, f"{fault('together')[:-1]}, is_by_kernel=True), {fault('well')}")
    text = script.read_text()
    script.write_text(text.replace("sys.exit(", f"{THREE_OF_FIVE}sys.exit(", 1))
    ran = check(tmp_path / "out", *CPU, script=script)
    assert len(ran.results["kernels"]) == 5
    assert ran.statuses == {"together": "failed", "well": "ok"}
    assert set(ran.figures("together")) == set(ran.results["kernels"])
    assert ran.results["parts"]["together"]["failed kernels"] == ["down"]


@pytest.mark.process
def test_the_end_of_the_budget_is_no_part_s_fault(tmp_path: Path) -> None:
    script = fault_script(tmp_path, ", ".join([fault("well"), fault("hangs", most_s=300), fault("killed")]))
    ran = check(tmp_path / "out", *CPU, "--budget", "45", script=script)
    assert ran.status == 0
    assert ran.statuses == {"well": "ok", "hangs": "not measured", "killed": "not measured"}
    assert ran.seconds < 45 + BUDGET_SLACK_S
    assert not any(map(is_running, ran.results["parts"]["hangs"]["pids"]))


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_what_it_had_and_no_child(tmp_path: Path, number: signal.Signals) -> None:
    script = fault_script(tmp_path, ", ".join([fault("well"), fault("hangs", most_s=300)]))
    settings = command(tmp_path / "out", *CPU, script=script)
    with subprocess.Popen(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings) as process:
        child, grandchild = wait_for_pids(tmp_path / "out" / "children" / "hangs.jsonl")
        process.send_signal(number)
    if number is signal.SIGKILL:  # nobody is left to end what a child started; the child goes with its parent
        os.kill(grandchild, signal.SIGKILL)
    wait_until(lambda: not is_running(child) and not is_running(grandchild))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["parts"]["well"]["status"] == "ok"
    assert results["parts"]["well"]["figures"]["fine"]["value"] == 1
    assert results["parts"]["hangs"]["status"] == "not measured"


def wait_for_pids(file: Path) -> tuple[int, int]:
    """The two that the part which hangs has told of."""
    wait_until(lambda: file.exists() and file.read_bytes().endswith(b"\n"))
    child, grandchild = json.loads(file.read_text().splitlines()[0])["value"]
    return child, grandchild


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("a minute was not enough")


# -- predictions -----------------------------------------------------------------------------------


def test_predictions_are_for_two_cards_at_full_size() -> None:
    assert card_of("NVIDIA H100 80GB HBM3", "full") == "h100"
    assert card_of("NVIDIA H200", "full") == "h200"
    others = ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-80GB", "Intel Xeon", "unknown")
    assert {card_of(name, "full") for name in others} == {""}
    assert card_of("NVIDIA H100 80GB HBM3", "mid") == ""
    assert predictions("stages", "h100")["vision, 9 crops, bf16"] == (12.8, "ms")
    assert predictions("stages", "") == {}


def names_with(names: Iterable[str], *endings: str) -> set[str]:
    return {f"{name}{ending}" for name in names for ending in ("", *endings)}


def test_predictions_have_the_names_that_the_parts_give() -> None:
    """What is predicted and not measured would stand in every table as a figure that nobody reached."""
    of_slots = {(64, 64): "64 rows", (8, 1): "1 row of 8", (1, 1): "1 row"}
    steps = names_with(
        (f"decode step, {of_slots[sizes]}, bf16" for sizes in STEPS), ": through the engine", ": over its read time"
    )
    prefixes = names_with((f"prefix, {plural(count, 'picture')}, bf16" for count in PICTURES), ": share of the limit")
    vision = names_with((f"vision, {count} crops, bf16" for count in MICRO_BATCHES), ": share of the limit")
    counted = ("decode step, 64 rows, bf16", "prefix, 16 pictures, bf16")
    counts = {
        f"{what}, {name}" for name in counted for what in ("launches", "copies to the device", "copies to the host")
    }
    others = {
        "weights, bf16",
        "prefix, 16 pictures, bf16: over its product time",
        "host syncs, 16 steps of 64 rows, bf16",
        "steps with other bits than launched one by one, bf16",
    }
    assert set(TABLES["stages"]) == steps | prefixes | vision | counts | others
    files = {"cut before, batch 64, bf16", *(f"{size}, crops of a picture" for size in SIZES)}
    files |= names_with((f"{size}, from files, batch 64, bf16" for size in SIZES), ": of cut before")
    assert set(TABLES["files"]) == files
    cuts = {f"cut, {size}{more}" for size in SIZES for more in ("", ", replayed", ", size not met before")}
    assert {name for name in TABLES["resizing"] if name.startswith("cut,")} == cuts


@pytest.mark.process
def test_pictures_are_cut_as_predicted_on_a_cpu_too(whole: Ran) -> None:
    found = whole.figures("resizing")
    for figure in ("faults found at load", *(name for name in TABLES["resizing"] if "differ from Pillow" in name)):
        assert found[figure]["value"] == 0
    assert found["pictures compared, random sizes"]["value"] >= 40
    assert found["pictures compared, examples"]["value"] > 40


def test_every_load_is_predicted() -> None:
    loads = names_with((load.figure_name("bf16") for load in LOADS), ": peak memory", ": card's memory")
    loads |= {f"{load.figure_name('bf16')}: device busy" for load in LOADS if load.shows_busy}
    assert loads <= set(TABLES["engine"])
    of_forms = (load.figure_name(form) for form, some in LOW_BIT_LOADS.items() for load in some)
    assert names_with(of_forms, ": peak memory", ": card's memory") <= set(TABLES["lowbits"])


@pytest.mark.process
@pytest.mark.parametrize("part", ["engine", "lowbits", "sameness", "golden"])
def test_what_a_cpu_measures_is_predicted_for_a_card(whole: Ran, part: str) -> None:
    """By the names that figures have there: larger batches, and vision in float8 besides."""
    loads = {name for name in whole.figures(part) if name.startswith(("query", "reasoning", "caption"))}
    on_cpu = {name.replace("batch 8", "batch 64") for name in set(whole.figures(part)) - loads}
    assert {name for name in on_cpu if not name.startswith(("clear", "share"))} <= set(TABLES[part])


def test_goals_are_set_for_figures_there_are() -> None:
    assert all(goal.figure in TABLES[goal.part] for goal in GOALS)


@pytest.mark.parametrize(
    ("goal", "values", "reached"),
    [
        (Goal("engine", "rate", 55, 60), (54.9, 55, 60, None), ("missed", "goal", "aim", "not measured")),
        (Goal("stages", "ratio", 1.35, 1.2, is_most=True), (1.36, 1.35, 1.2), ("missed", "goal", "aim")),
        (Goal("stages", "syncs", 0, 0, is_most=True), (1, 0), ("missed", "aim")),
    ],
)
def test_a_goal_says_what_a_value_reaches(
    goal: Goal, values: tuple[float | None, ...], reached: tuple[str, ...]
) -> None:
    assert tuple(map(goal.reached, values)) == reached


def test_a_kernel_is_predicted_from_its_bytes_and_operations() -> None:
    line = {"figure": "down plain bfloat16, 64 rows", "flops": 1e9, "bytes": 2.25e9}
    assert kernel_prediction("h100", line) == pytest.approx(1004)
    shared = kernel_prediction("h100", line | {"figure": "down plain bfloat16, 64 rows: share of the limit"})
    assert shared == pytest.approx(750 / 1004)
    assert kernel_prediction("", line) is None


def test_the_table_of_a_card_fits_100_columns_and_judges_goals() -> None:
    parts: dict[str, Any] = {
        name: {
            "status": "not measured",
            "figures": {
                figure: {"value": None, "prediction": value, "unit": unit}
                for figure, (value, unit) in predictions(name, "h100").items()
            },
        }
        for name in NAMES
    }
    ratio = "decode step, 64 rows, bf16: over its read time"
    parts["stages"]["figures"][ratio]["value"] = 1.3
    facts = {"card": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "device": "cuda", "config": "full"}
    text = table_of(facts | {"predictions": "for an H100", "parts": parts, "goals": judged(parts)})
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "~" not in text  # no name was cut
    assert [line.split()[-4:] for line in lines if line.startswith(ratio)] == [["1.35", "1.2", "1.3", "goal"]]
    assert sum(line.endswith("not measured") and len(line) > GOAL_WIDTH for line in lines) == len(GOALS) - 1


def table_rows(text: str, first: str) -> list[list[str]]:
    """The rows of the table of a section whose head begins with `first`, its head left out; its head first."""
    lines = text.splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"| {first.replace(', ', ' | ')} |")))
    head, _, *rows = takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]


def on_a_gpu() -> str:
    """The section of examples/benchmarks.md."""
    text = (EXAMPLES / "benchmarks.md").read_text(encoding="utf-8")
    return text.partition("## On a GPU\n")[2].partition("\n## ")[0]


def test_benchmarks_show_what_was_predicted_first_and_invent_no_measurement() -> None:
    """A card's column has the name of the file its results are in."""
    head, *rows = table_rows(on_a_gpu(), "part, figure, H100, H200, unit")
    predicted = json.loads((EXAMPLES / "gpu" / "predicted-2026-11-26.json").read_text(encoding="utf-8"))
    cards = [json.loads((EXAMPLES / "gpu" / name).read_text(encoding="utf-8"))["parts"] for name in head[6:]]
    assert {row[0] for row in rows} == set(predicted)
    for part, figure, h100, h200, unit, _, *measured in rows:
        assert predicted[part][figure] == [float(h100), float(h200), unit], figure
        for parts, shown in zip(cards, measured, strict=True):
            entry = parts[part]["figures"][figure]
            assert entry["prediction"] == float(h200), figure  # both were taken on an H200
            value = entry["value"]
            assert shown == "–" if value is None else float(shown) == pytest.approx(value, rel=0.05), figure


def test_benchmarks_show_every_goal_with_its_prediction() -> None:
    head, *rows = table_rows(on_a_gpu(), "part, goal, asked, aim")
    assert head[4:6] == ["predicted H100", "predicted H200"]
    cards = [json.loads((EXAMPLES / "gpu" / name).read_text(encoding="utf-8"))["goals"] for name in head[6:]]
    assert cards
    assert [(row[0], row[1]) for row in rows] == [(goal.part, goal.figure) for goal in GOALS]
    for goal, (part, figure, asked, aim, h100, h200, *measured) in zip(GOALS, rows, strict=True):
        assert asked == f"{'≤' if goal.is_most else '≥'} {goal.bound:g}"
        assert float(aim) == goal.aim
        row = TABLES[part][figure]
        assert [float(h100), float(h200)] == [row.h100, row.h200], figure
        for card, shown in zip(cards, measured, strict=True):
            [found] = [entry for entry in card if (entry["part"], entry["figure"]) == (part, figure)]
            assert float(shown.strip("*")) == pytest.approx(found["value"], rel=0.01), figure
            assert shown.startswith("**") == (found["reached"] == "missed"), figure


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_passes_of_a_card_run_on_fake_tensors(cuda_python: str) -> None:
    """Of those that are timed, none makes the host wait."""
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "support")))
    command = [cuda_python, TESTS / "support" / "fake_gpu_check.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]
    waits: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    timed = {name: count for name, count in waits.items() if name.startswith(("vision", "prefix", "step"))}
    assert timed == dict.fromkeys(timed, 0)
    assert len(timed) == len(MICRO_BATCHES) + len(PICTURES) + len(STEPS)
