"""The benchmark beside other projects: turns, what fails is named, and an environment is made once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bench_peers
from harness import study_tables
from sana_edge.bench.process import Ended
from sana_edge.errors import SanaError
from works import peer_process, peers


def drawn(job: dict[str, Any], value: int, seconds: float) -> Ended:
    """What a process leaves: a picture, and its numbers."""
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(job["output"])
    found = dict.fromkeys(bench_peers.COLUMNS, seconds) | {"peak": 10**9, "versions": {"torch": "1"}}
    return Ended("passed", 0, 1.0, None, f"noise\n{json.dumps(found)}\n")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """The commands of processes and what they were asked; sdnq does not install, torchao does not run."""
    asked: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], name: str, *, threads: int, limit: float) -> Ended:
        job = json.loads(command[-1])
        asked.append((command, job))
        if job["by"] == "torchao":
            raise SanaError(f"{name} failed: no such operation in {job['output']}", "")
        if job["make"]:
            Path(job["make"]).mkdir(parents=True)
            return Ended("passed", 0, 1.0, None, '{"made": 1.0}')
        return drawn(job, 200 if job["int8"] else 201, 2.0 if job["int8"] else 4.0)

    def environment(packages: tuple[str, ...], scratch: Path, say: Any) -> Path:
        if packages == peers.SDNQ:
            raise SanaError("pip: no such release", "")
        return Path("python-of-" + "-".join(packages) if packages else sys.executable)

    monkeypatch.setattr(bench_peers, "run", run)
    monkeypatch.setattr(bench_peers, "environment", environment)
    return asked


def test_turns(
    tmp_path: Path, jobs: list[tuple[list[str], dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    names = ["diffusers", "sdnq int8", "torchao int8", "optimum-intel int8", "sana-edge int8"]
    options = ["--scratch", str(tmp_path / "scratch"), "--repeat", "2", "--steps", "3", "--threads", "2"]
    assert bench_peers.main([*options, "--contenders", ",".join(names), "--output", str(output)]) == 0
    data = json.loads(output.read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == names and str(tmp_path) not in output.read_text()
    assert rows["sdnq int8"]["failure"] == "pip: no such release"
    assert rows["torchao int8"]["failure"].startswith("no such operation in ")
    ours = rows["sana-edge int8"]
    assert len(ours["runs"]) == 2 and ours["median"]["picture"] == 2.0
    # one of 255 everywhere
    assert ours["reference"] == "diffusers" and ours["psnr"] == pytest.approx(20 * np.log10(255))
    # the optimum's folder is made once; torchao is asked once
    assert [job["by"] for _, job in jobs] == [
        *("diffusers", "torchao", "optimum", "optimum", "sana-edge"),
        *("diffusers", "optimum", "sana-edge"),
    ]
    commands = {job["by"]: command for command, job in jobs}
    assert commands["torchao"][0].startswith("python-of-torchao") and commands["torchao"][1] == "-I"
    assert commands["sana-edge"][0] == sys.executable and "-I" not in commands["sana-edge"]
    shared = ("latents", "prompt", "instruction", "size", "steps", "guidance", "seed", "threads")
    assert all(job[name] == jobs[0][1][name] for _, job in jobs for name in shared)
    text = study_tables.peers(data).markdown()
    assert "| sana-edge int8 | 2 s | 2 s | 2 s | 0.50 | 1.00 GB | 48.1 dB |" in text
    assert "| sdnq int8 | does not run here |" in text and "sdnq int8: pip: no such release." in text


def test_what_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = ["--scratch", str(tmp_path)]
    for options, said in (
        (["--contenders", "nunchaku"], "unknown contender 'nunchaku'"),
        (["--steps", "1"], "one step has no time"),
    ):
        assert bench_peers.main([*scratch, *options, "--output", str(tmp_path / "out.json")]) == 1
        assert said in capsys.readouterr().err


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(peers.subprocess, "run", run)
    told: list[str] = []
    first = peers.environment(("a-peer==1.0",), tmp_path, told.append)
    assert peers.environment(("a-peer==1.0",), tmp_path, told.append) == first
    assert len(commands) == len(told) == 1 and "a-peer==1.0" in commands[0]
    held = Path(commands[0][commands[0].index("--constraint") + 1]).read_text()
    assert held.startswith(f"torch=={peers.versions('torch')['torch']}")
    (above,) = tmp_path.rglob("above.pth")
    assert above.parent.name == "site-packages" and all(
        map(Path.is_dir, map(Path, above.read_text().split()))
    )
    assert peers.environment((), tmp_path, told.append) == Path(sys.executable)


def test_an_environment_that_is_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: slow\nERROR: No matching distribution found for a-peer==1.0\n"

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(peers.subprocess, "run", run)
    with pytest.raises(SanaError, match="No matching distribution found for a-peer"):
        peers.environment(("a-peer==1.0",), tmp_path, lambda line: None)
    assert not list(tmp_path.rglob("made.json"))


def test_every_peer_is_known_and_pinned() -> None:
    for peer in peers.PEERS.values():
        assert peer.by in peer_process._DRAWERS
        assert all("==" in package for package in peer.packages)
        assert (peer.by == "sana-edge") <= (peer.packages == ())
    assert peers.job(peers.PEERS["sana-edge"])["dtype"] == "fp32"
    # it runs where nothing of this project is installed
    text = peers.SCRIPT.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith(("from sana", "import sana"))] == []


@pytest.mark.slow
def test_two_contenders_draw_the_same(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    options = ["--scratch", str(tmp_path / "scratch"), "--repeat", "1", "--steps", "2", "--pictures", "1"]
    options += ["--contenders", "diffusers,sana-edge", "--output", str(output)]
    assert bench_peers.main(options) == 0
    theirs, ours = json.loads(output.read_text())["rows"]
    # the same noise, text and weights in fp32: pictures within 1 of 255
    assert theirs["failure"] is ours["failure"] is None
    assert ours["psnr"] is None or ours["psnr"] > 48
