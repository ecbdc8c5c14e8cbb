"""`gpu_check`: what happens to steps that fail, hang or are interrupted, and what is left on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_check
from gpu import operations
from gpu import steps as gpu_steps
from gpu.results import Outcome, Results
from gpu.steps import Setting, Step, figure_own, figure_tests
from gpu_check import Runner
from harness import ROOT
from sana_edge.bench.process import run_step
from sana_edge.errors import InvalidInput

WRITES = "import json, sys; json.dump({'figure': 'right'}, open(sys.argv[1], 'w'))"
# a child that would go on, as the workers of pytest do
HANGS = """import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)"""


def step(name: str, code: str, limit: float = 60.0, estimate: float = 1.0, **options: Any) -> Step:
    def commands(setting: Setting) -> list[list[str]]:
        return [["-c", code, setting.json(name)]]

    return Step(name, estimate, limit, commands, figure_own, options.get("needs", ()))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs steps of one's own; gives what stands in the results file."""

    def run(*steps: Step, seconds: float = 600.0) -> list[dict[str, Any]]:
        monkeypatch.setattr(gpu_check, "STEPS", steps)
        setting = Setting(tmp_path, tmp_path, dry=False)
        results = Results(tmp_path / "results.json", {"machine": "here"})
        runner = Runner(setting, dict(os.environ), ("torch",), {})
        gpu_check._steps(runner, results, [each.name for each in steps], time.monotonic() + seconds)
        found: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text())["calls"][-1][
            "steps"
        ]
        return found

    return run


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody waited for counts as well."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_failing_step_is_recorded_and_passed_over(run: Any) -> None:
    failing = f"{WRITES}; print('error: a {ROOT}/sana_edge/ops.py and /opt/x/y.so'); sys.exit(3)"
    first, second = run(step("one", failing), step("two", WRITES))
    assert (first["status"], second["status"]) == ("failed", "passed")
    # what it measured before, and no folder of this machine
    assert first["figures"] == {"figure": "right"}
    assert first["tail"] == ["error: a sana_edge/ops.py and y.so"]
    assert second["figure"] == "right" and second["tail"] == []


def test_a_hanging_step_is_killed_with_its_children(run: Any, tmp_path: Path) -> None:
    first, second = run(step("one", HANGS, limit=3.0), step("two", WRITES))
    assert (first["status"], second["status"]) == ("timeout", "passed")
    assert first["seconds"] >= 3 and first["limit"] == 3
    assert gone(int((tmp_path / "one.log").read_text()))


def test_what_a_step_leaves_behind_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = HANGS.replace("time.sleep(600)\n", "").rsplit("\n", 1)[0]
    done = run_step([sys.executable, "-c", code], limit=60, log=log, environment=os.environ, folder=tmp_path)
    assert done.status == "passed"
    assert gone(int(log.read_text()))


def test_results_after_each_step(run: Any, tmp_path: Path) -> None:
    reads = (
        f"import pathlib; print(len(__import__('json').loads(pathlib.Path({str(tmp_path / 'results.json')!r})"
    )
    reads += ".read_text())['calls'][0]['steps']), 'before')"
    _, second, third = run(step("one", WRITES), step("two", reads), step("three", reads))
    assert (second["figure"], third["figure"]) == ("1 before", "2 before")


def test_what_no_longer_fits_is_skipped(run: Any) -> None:
    first, second, third = run(
        step("one", WRITES, estimate=1), step("two", WRITES, estimate=500), step("three", WRITES), seconds=60
    )
    assert [first["status"], second["status"], third["status"]] == ["passed", "skipped", "passed"]
    assert "takes about 500 s" in second["figure"]
    # nothing runs beyond the budget
    assert first["limit"] <= 60


def test_a_missing_package_is_named(run: Any) -> None:
    (only,) = run(step("one", WRITES, needs=("torch", "diffusers")))
    assert only["status"] == "failed"
    assert "diffusers not installed: carry the wheels" in only["figure"]


@pytest.mark.parametrize(("said", "status"), [("3 skipped", "failed"), ("1 passed, 2 skipped", "passed")])
def test_tests_that_all_skip_themselves_have_not_passed(said: str, status: str, tmp_path: Path) -> None:
    """As they do where torch sees no GPU."""
    tests = Step(
        *("tests", 1, 60, lambda setting: [["-c", f"print('{said} in 0.1s')"]]),
        *(figure_tests, ("pytest",)),
    )
    found = Runner(Setting(tmp_path, tmp_path), dict(os.environ), ("pytest",), {}).run(tests, 60)
    assert found.status == status
    assert said in found.figure


def test_a_later_call_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    for number in range(2):
        results = Results(path, {"number": number}, path)
        results.add(Outcome("one", "passed", 1.0, 2.0, 1.0, "right"))
    assert [call["number"] for call in json.loads(path.read_text())["calls"]] == [0, 1]
    path.write_text("{")
    Results(path, {"number": 2}, path).write()
    assert len(json.loads(path.read_text())["calls"]) == 1
    # a damaged file is kept
    assert (tmp_path / "gpu.damaged.json").read_text() == "{"


def test_wheels_are_on_the_path(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_package/__init__.py", "NUMBER = 7")
    environment = gpu_check._environment(Setting(tmp_path, tmp_path / "scratch"), tmp_path)
    code = "import carried_package, sana_edge; print(carried_package.NUMBER, sana_edge.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["7", str(ROOT / "sana_edge" / "__init__.py")], done.stderr
    with pytest.raises(InvalidInput, match="no wheels"):
        gpu_check._environment(Setting(tmp_path, tmp_path / "other"), tmp_path / "scratch")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "smok"], "unknown step 'smok'"),
        (["--limit", "picture"], "--limit 'picture'"),
        (["--limit", "nothing=3"], "--limit 'nothing=3'"),
    ],
)
def test_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(arguments) == 2
    printed = capsys.readouterr().err
    assert said in printed and "hint:" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "torch sees no CUDA device" in printed and "--dry-run" in printed


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (torch.ones(50), True),
        (torch.ones(50) * 1.02, False),
        (torch.tensor([torch.nan] * 50), False),
        (torch.ones(49), False),
        (torch.ones(50).half(), False),
    ],
    ids=["equal", "two per cent off", "NaN", "short", "another dtype"],
)
def test_a_wrong_result_is_seen(found: torch.Tensor, right: bool) -> None:
    assert (operations.compare([found], [torch.ones(50)], 2**-8) <= 1) == right


@pytest.mark.parametrize(("change", "right"), [((0, 1), True), ((0, 2), False), ((slice(None), 1), False)])
def test_wrong_levels_are_seen(change: tuple[Any, int], right: bool) -> None:
    """One of 50 may lie on the other side of a middle; none by two levels, nor all."""
    wanted = torch.full((50,), 40, dtype=torch.int8)
    found = wanted.clone()
    found[change[0]] += change[1]
    assert (operations.compare([found], [wanted], 2**-11) <= 1) == right


def test_the_library_comes_first() -> None:
    assert gpu_check.chosen("kernels") == ("library", "kernels")


def test_estimates_fit_the_time_there_is() -> None:
    """The promise of the sets, in the file's own numbers."""
    estimates = {step.name: step.estimate for step in gpu_steps.STEPS}
    assert sum(estimates[name] for name in gpu_steps.SETS["smoke"]) < 4 * 60
    assert sum(estimates.values()) < 9 * 60
    assert all(step.limit > step.estimate for step in gpu_steps.STEPS)
    assert gpu_check.chosen("loop,smoke") == (*gpu_steps.SMOKE, "loop")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_an_interruption_leaves_a_whole_file(number: int, emulated_library: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--dry-run", "--out", str(tmp_path)]
    command += ["--steps", "library,recorded", "--library", str(emulated_library)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # it says that a step begins before it does
    for line in process.stderr:
        if line.startswith("recorded"):
            break
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (path,) = tmp_path.glob("dry-run-*.json")
    steps = json.loads(path.read_text())["calls"][0]["steps"]
    assert [step["status"] for step in steps] == ["passed", "interrupted"]
    assert "1 of 2 passed" in out
