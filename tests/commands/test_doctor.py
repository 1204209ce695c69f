"""`md3 doctor` in a process of its own, as it imports torch; and its checks one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from program import clean_environment, isolate
from typer.testing import CliRunner

from md3cli import diagnosis
from md3cli.cli import app
from md3cli.diagnosis import Finding, Health


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
    monkeypatch.setattr(diagnosis, "diagnose", lambda device: iter([Finding("x", health, "found", "do this")]))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == status
    assert result.stdout == f"{health:<5}x                    found\n{'':<26}do this\n"


def test_settings_that_are_wrong_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    isolate(monkeypatch, tmp_path)
    (finding,) = diagnosis._settings()
    assert finding.text == "none besides the defaults"
    Path("md3.toml").write_text("model = 'tiny'")
    (finding,) = diagnosis._settings()
    assert (finding.health, finding.text) == (Health.OK, f"{tmp_path}/md3.toml")
    Path("md3.toml").write_text("model = ")
    (finding,) = diagnosis._settings()
    assert (finding.health, finding.advice) == (Health.BAD, "mend md3.toml")


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notes = {finding.name: finding for finding in diagnosis._extras()}
    assert notes["extra eval"].advice == "pip install 'md3cli[eval]'"
    assert notes["extra eval"].health is Health.NOTE
