"""Programs that PyInstaller froze, with no flags but those that keep torch out: a folder, and one file."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from built_wheel import ROOT, build_wheel
from serving import MODEL, SMALL, Client

from sana_edge import Sana, read_metadata
from sana_edge.store.known_models import BUNDLED

pytest.importorskip("PyInstaller", reason="pyinstaller is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

# what would make it gigabytes, and is not needed: the frozen program has the graphs
LEFT_OUT = (
    *("torch", "transformers", "diffusers", "datasets", "matplotlib", "triton", "openvino", "onnx"),
    *("accelerate", "bitsandbytes", "nncf", "pandas", "pyarrow", "scipy", "sklearn", "sympy", "pytest"),
    *("IPython", "PySide6"),
)
PROGRAM = "import sys\nfrom sana_edge.cli.main import main\nsys.exit(main())\n"
DOCUMENTATION = ROOT / "docs" / "embedding.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed, with its metadata, which has the entry point."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("source"))).extractall(folder)
    return folder


def freeze(program: str, folder: Path, site: Path, *options: str) -> Path:
    """Freeze a script; what comes out lies in ``folder / "dist"``."""
    (folder / "draw.py").write_text(program)
    leave_out = [word for name in LEFT_OUT for word in ("--exclude-module", name)]
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", "--log-level", "ERROR", *options, *leave_out, "draw.py"],
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])},
    )
    return folder / "dist" / "draw"


@pytest.mark.slow
def test_a_frozen_program(site: Path, tmp_path: Path) -> None:
    program = freeze(PROGRAM, tmp_path, site) / "draw"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [str(program), "generate", "a red house", "--steps", "1", "--seed", "7", "--output", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "a.png\n"), done.stderr
    assert read_metadata(tmp_path / "a.png")["backend"] == "onnxruntime"
    done = subprocess.run(
        [str(program), "doctor", "--json"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] is None
    assert all(found["packages"][name] for name in ("tokenizers", "safetensors", "huggingface_hub", "numpy"))
    assert "onnxruntime cpu" in [engine["name"] for engine in found["engines"] if engine["usable"]]


@pytest.mark.slow
def test_a_server_in_one_file(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It starts, has its page, draws what the library draws, and ends; the sidecar is in the same file."""
    text = DOCUMENTATION.read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(# serve.py\n.*?)```", text, re.DOTALL)
    program = freeze(script, tmp_path, site, "--onefile")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    started = time.monotonic()
    command = [str(program), "--port", "0", "--quiet"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        client = Client(server.stdout.readline().strip())
        times = [time.monotonic() - started]
        answer = client.post("/v1/images/generations", {**SMALL, "size": "64x64"})
        times.append(time.monotonic() - started)
        assert answer.status == 200, answer.body
        assert b"<!doctype html>" in client.get("/").body
        server.terminate()
        assert server.wait(60) == 0
    with capsys.disabled():
        address, picture = (f"{seconds:.1f} s" for seconds in times)
        size = program.stat().st_size / 1e6
        print(f"\na server in one file: {size:.0f} MB, {address} to its address, {picture} to a picture")
    with Sana.load(BUNDLED / MODEL) as sana:
        options = {name: value for name, value in SMALL.items() if name != "prompt"}
        expected = sana.generate(str(SMALL["prompt"]), size=(64, 64), **options).png()
    assert base64.b64decode(answer.json["data"][0]["b64_json"]) == expected
    ask = json.dumps({"type": "generate", "id": "a", **SMALL, "size": "64x64"})
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([str(program), "--stdio"], env=environment, text=True, **pipes) as sidecar:
        sidecar.stdin.write(f"{ask}\n")
        sidecar.stdin.flush()
        image = next(event for event in map(json.loads, sidecar.stdout) if event["type"] == "image")
        sidecar.stdin.close()
        assert sidecar.wait(60) == 0
    assert image["b64_json"] == answer.json["data"][0]["b64_json"]
