"""Every step of `gpu_check` without a GPU: that no import, path or argument fails on the day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu import steps as gpu_steps
from harness import ROOT


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All installed packages but sana-edge, whose checkout must do."""
    folder = tmp_path_factory.mktemp("packages")
    for place in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        for entry in place.iterdir():
            link = folder / entry.name
            if "sana_edge" not in entry.name and not link.exists():
                link.symlink_to(entry)
    assert not list(folder.glob("*sana_edge*"))
    return folder


def dry_run(packages: Path, library: Path, out: Path, steps: str) -> tuple[list[dict[str, Any]], str]:
    """The steps, by a Python that sees neither installed packages nor .pth files, but these folders only."""
    command = [sys.executable, "-S", "benchmarks/gpu_check.py", "--dry-run", "--steps", steps]
    command += ["--library", str(library), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (path,) = out.glob("dry-run-*.json")
    text = path.read_text()
    assert done.returncode == 0, done.stdout + done.stderr + text
    # no folder of this machine
    for folder in (ROOT, out, Path(sys.prefix), Path.home()):
        assert f"{folder}/" not in text
    return json.loads(text)["calls"][-1]["steps"], done.stdout


@pytest.mark.ci
@pytest.mark.slow
def test_the_checks(packages: Path, emulated_library: Path, tmp_path: Path) -> None:
    steps, printed = dry_run(packages, emulated_library, tmp_path, "checks")
    assert [step["name"] for step in steps] == list(gpu_steps.SETS["checks"])
    assert {step["status"] for step in steps} == {"passed"}
    figures = {step["name"]: step["figure"] for step in steps}
    assert figures["answers"] == "2 of 2 clean"
    assert figures["operations"] == "23 of 23 right"
    assert figures["triton"] == "11 of 11 right"
    assert figures["recorded"].startswith("2 of 2 replays equal")
    assert figures["kernels"].startswith("13 kernels")
    # a line for each, and how many passed
    assert len(printed.strip().splitlines()) == len(steps) + 2


@pytest.mark.ci
@pytest.mark.slow
def test_tests_and_benchmarks(packages: Path, emulated_library: Path, tmp_path: Path) -> None:
    names = [name for name in gpu_steps.NAMES if name not in gpu_steps.SETS["checks"] or name == "library"]
    steps, _ = dry_run(packages, emulated_library, tmp_path, ",".join(names))
    assert [step["name"] for step in steps] == names
    assert {step["status"] for step in steps} == {"passed"}
    figures = {step["name"]: step["figure"] for step in steps}
    for name in ("cuda-tests", "gpu-cuda", "gpu-triton", "faults"):
        assert "skipped" in figures[name], "tests that need a GPU were collected"
    assert "sana-edge int8" in figures["loop"] and "diffusers" in figures["loop"]
    assert "diffusers compiled" in figures["compile"]
    assert "diffusers" in figures["picture"]
