"""A program that PyInstaller froze, with no flags but those that keep torch out, draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from built_wheel import build_wheel

from sana_edge import read_metadata

pytest.importorskip("PyInstaller", reason="pyinstaller is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

# what would make it gigabytes, and is not needed: the frozen program has the graphs
LEFT_OUT = (
    *("torch", "transformers", "diffusers", "datasets", "matplotlib", "triton", "openvino", "onnx"),
    *("accelerate", "bitsandbytes", "nncf", "pandas", "pyarrow", "scipy", "sklearn", "sympy", "pytest"),
)
PROGRAM = "import sys\nfrom sana_edge.cli.main import main\nsys.exit(main())\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    installed = folder / "site"
    # with its metadata, which has the entry point
    zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("source"))).extractall(installed)
    (folder / "draw.py").write_text(PROGRAM)
    leave_out = [word for name in LEFT_OUT for word in ("--exclude-module", name)]
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", "--log-level", "ERROR", *leave_out, "draw.py"],
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])},
    )
    return folder / "dist" / "draw" / "draw"


@pytest.mark.slow
def test_a_frozen_program(program: Path, tmp_path: Path) -> None:
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
