"""`md3 doctor` in a process of its own, as it imports torch; and its checks one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program import clean_environment, isolate
from typer.testing import CliRunner

from md3cli.cli import app
from md3cli.commands import doctor
from md3cli.commands.doctor import Finding, Health
from md3cli.model.engine import load


@pytest.mark.process
def test_it_reports_on_this_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "md3cli", "doctor", "--device", "cpu", "--json"],
        capture_output=True,
        env=clean_environment(tmp_path),
        cwd=tmp_path,
    )
    findings = {finding["name"]: finding for finding in map(json.loads, done.stdout.splitlines())}
    assert {"md3", "python", "torch", "device", "memory", "pictures", "weights", "cache", "settings"} <= findings.keys()
    assert findings["pictures"]["health"] == "ok"
    assert findings["device"]["text"].startswith("cpu, auto dtype ")
    assert {"model tiny", "model moondream3", "extra report", "extra eval", "extra heif"} <= findings.keys()
    assert (done.returncode == 1) == any(finding["health"] == "bad" for finding in findings.values())


@pytest.mark.process
def test_an_unknown_device_is_a_finding_not_a_crash(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "md3cli", "doctor", "--device", "abacus"],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
    )
    assert done.returncode == 1
    assert "bad  device" in done.stdout
    assert "pictures" in done.stdout, "the other checks go on"


@pytest.mark.parametrize(("health", "status"), [(Health.OK, 0), (Health.NOTE, 0), (Health.BAD, 1)])
def test_only_what_is_bad_makes_the_status_1(monkeypatch: pytest.MonkeyPatch, health: Health, status: int) -> None:
    monkeypatch.setattr(
        doctor, "diagnose", lambda device, settings_error: iter([Finding("x", health, "found", "do this")])
    )
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == status
    assert result.stdout == f"{health:<5}x                    found\n{'':<26}do this\n"


@pytest.mark.parametrize(
    ("text", "health", "found"),
    [
        (None, "ok", "none besides the defaults"),
        ("model = 'tiny'", "ok", "md3.toml"),
        ("model = ", "bad", "md3.toml: not valid TOML"),
        ("modle = 'x'", "bad", "md3.toml: modle: unknown key; no command has such an option; did you mean model?"),
    ],
)
def test_settings_are_a_finding_right_or_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, health: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(doctor, "_pictures", lambda: iter(()))
    monkeypatch.setattr(doctor, "_device_of", lambda device: lambda: iter(()))
    if text is not None:
        Path("md3.toml").write_text(text)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert "unexpected" not in result.stderr, result.stderr
    finding = json.loads(result.stdout.splitlines()[-1])
    assert finding["health"] == health
    assert found in finding["text"]
    assert result.exit_code == (health == "bad")


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notes = {finding.name: finding for finding in doctor._extras()}
    assert notes["extra eval"].advice == "pip install 'md3cli[eval]'"
    assert notes["extra eval"].health is Health.NOTE


@pytest.mark.parametrize(
    ("triton", "fault", "expected"),
    [
        ("3.6.0", None, Finding("kernels", Health.OK, "triton 3.6.0")),
        ("", "the kernels need triton; pip install triton", None),
        ("3.3.0", "triton 3.3.0 is too old, the kernels need 3.4; pip install --upgrade triton", None),
        ("", None, "nothing"),  # no CUDA device
    ],
)
def test_a_cuda_devices_kernels_are_a_finding(
    triton: str, fault: str | None, expected: Finding | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = load.DeviceFacts("2.11.0", "cuda:0", "Some Card", "bfloat16", 1, 20 << 30, triton, fault)
    monkeypatch.setattr(load, "device_facts", lambda device: facts)
    findings = {finding.name: finding for finding in doctor._device_of("cuda")()}
    assert list(findings) == [name for name in ("torch", "device", "kernels", "memory") if name in findings]
    assert findings.get("kernels", "nothing") == (expected or Finding("kernels", Health.BAD, fault or ""))


def test_the_facts_of_a_cuda_device_hold_what_its_kernels_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "choose_device", lambda name: torch.device("cuda", 1))
    monkeypatch.setattr(load, "free_bytes", lambda device: 7 << 30)
    monkeypatch.setattr(load, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(load, "kernel_fault", lambda device: f"{device} is too old")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    facts = load.device_facts("cuda:1")
    assert (facts.device, facts.dtype, facts.free_bytes) == ("cuda:1", "float16", 7 << 30)
    assert (facts.triton, facts.kernel_fault) == ("3.6.0", "cuda:1 is too old")
