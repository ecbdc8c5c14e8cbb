"""What a command does outside: no name is looked up, nothing is connected to, nothing is written elsewhere.

A library that is loaded into each child process (support/watch.cpp) writes down what it does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "support" / "watch.cpp"
# devices, and a folder that torch makes among the system's temporary ones whatever TMPDIR says
OWN = ("/dev/", "/proc/", "/tmp/torchinductor_")


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    library = tmp_path_factory.mktemp("watch") / "libwatch.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


class Child:
    """A home of its own, and what a process in it did: lines of "look-up", "connect", "send" and "write"."""

    def __init__(self, watch: Path, place: Path) -> None:
        self.place, self._log, self._watch = place, place / "log", watch
        for name in ("home", "cache", "tmp", "out"):
            (place / name).mkdir()

    def run(self, *command: str, input: str = "y\n") -> list[str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SANA"))
        }
        environment |= {
            "HOME": str(self.place / "home"),
            "SANA_EDGE_CACHE": str(self.place / "cache"),
            "HF_HOME": str(self.place / "cache" / "hf"),
            "TMPDIR": str(self.place / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LD_PRELOAD": str(self._watch),
            "WATCH_LOG": str(self._log),
        }
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.place / "out",
            env=environment,
            input=input,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return self._log.read_text().splitlines() if self._log.exists() else []

    def outside(self, lines: Sequence[str]) -> list[str]:
        """Lines of what is written elsewhere than in the output, the cache and the temporary folder."""
        allowed = tuple(str(self.place / name) for name in ("cache", "tmp", "out"))
        written = (line.removeprefix("write ") for line in lines if line.startswith("write "))
        paths = map(os.path.normpath, written)
        return sorted({path for path in paths if not path.startswith((*allowed, *OWN))})


@pytest.fixture
def child(watch: Path, tmp_path: Path) -> Child:
    return Child(watch, tmp_path)


def network(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.split(maxsplit=1)[0] in ("look-up", "connect", "send")]


def test_the_watch_sees(child: Child) -> None:
    code = """
import socket
try:
    socket.create_connection(("localhost", 9), timeout=1)
except OSError:
    pass
open("../home/file", "w").close()
"""
    lines = child.run("-c", code)
    assert "look-up localhost" in lines and any(line.startswith("connect ") for line in lines)
    assert child.outside(lines) == [str(child.place / "home" / "file")]


@pytest.fixture(scope="session")
def tiny_onnx(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sana_edge.export.onnx import export
    from sana_edge.export.settings import Settings

    pytest.importorskip("onnx", reason="onnx is not installed")
    output = tmp_path_factory.mktemp("trust") / "onnx"
    export(str(tiny_folder), output, Settings(verify=False))
    return output


DRAW = ("generate", "--prompt", "a", "--steps", "1")
COMMANDS = {
    "doctor": ("doctor",),
    "models": ("models", "list"),
    "torch": (*DRAW, "--model", "TINY"),
    "int8": (*DRAW, "--model", "TINY", "--int8", "--backend", "torch"),
    "onnxruntime": (
        "generate",
        "--prompt",
        "a",
        "--steps",
        "1",
        "--model",
        "ONNX",
        "--backend",
        "onnxruntime",
    ),
    "openvino": ("generate", "--prompt", "a", "--steps", "1", "--model", "ONNX", "--backend", "openvino"),
    "export": ("export", "TINY", "--output", "onnx"),
    "quantize": ("quantize", "TINY", "--output", "int8", "--no-calibration"),
}


SLOW = ("int8", "export", "quantize")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, command in COMMANDS.items()
    ],
)
def test_a_command_keeps_to_itself(
    child: Child, tiny_folder: Path, tiny_onnx: Path, command: Sequence[str]
) -> None:
    for package in ("onnxruntime", "openvino"):
        if package in command:
            pytest.importorskip(package, reason=f"{package} is not installed")
    named = {"TINY": str(tiny_folder), "ONNX": str(tiny_onnx)}
    lines = child.run("-m", "sana_edge", *(named.get(word, word) for word in command))
    assert network(lines) == []
    assert child.outside(lines) == []


def test_no_code_of_a_folder_runs(child: Child, tiny_folder: Path) -> None:
    """Not where its configs name classes of its own, or attention kernels of the hub, and stdin says yes."""
    folder = child.place / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer" / "own.py").write_text("open('../home/ran', 'w')\nclass Own: pass\n")
    (folder / "text_encoder" / "own.py").write_text("open('../home/ran', 'w')\nclass Own: pass\n")
    for name, keys in (
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}),
        (
            "text_encoder/config.json",
            {"auto_map": {"AutoModel": "own.Own"}, "attn_implementation": "a/b"},
        ),
        ("text_encoder/config.json", {"_attn_implementation": "a/b", "quantization_method": "own"}),
        ("transformer/config.json", {"auto_map": {"AutoModel": "own.Own"}}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys, "tokenizer_class": "Own"}))
    lines = child.run("-m", "sana_edge", *DRAW, "--model", str(folder))
    assert network(lines) == [] and child.outside(lines) == []
    assert not (child.place / "home" / "ran").exists()
