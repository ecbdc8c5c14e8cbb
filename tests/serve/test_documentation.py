"""What docs/embedding.md shows of server and sidecar is run, and what it lists is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Client, write_command

from sana_edge.serve.app import application
from sana_edge.serve.service import Service

TEXT = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text(encoding="utf-8")


def snippet(language: str, mark: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    (one,) = [text for text in found if mark in text]
    return str(one)


def test_routes(service: Service) -> None:
    paths = {route.path for route in application(service).routes}  # type: ignore[attr-defined]
    named = set(re.findall(r"`(?:POST |GET )?(/[\w/]+)`", TEXT)) - {"/sdapi/v1/"}
    assert named and {path.replace("/ID", "/{id}").replace("/N", "/{index}") for path in named} <= paths


def test_openai_snippet(real: Client) -> None:
    pytest.importorskip("openai")
    code = (
        snippet("python", "from openai").replace("http://127.0.0.1:8188", real.url).replace(": 20}", ": 3}")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    kinds = [line.split()[0].rpartition(".")[2] for line in done.stdout.splitlines()]
    assert kinds == ["partial_image", "partial_image", "completed"], done.stderr


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``sana-edge`` on the path."""
    write_command(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("language", ["JavaScript", "TypeScript"])
def test_javascript(command: Path, language: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    code = snippet("ts", "sidecar")
    if language == "JavaScript":
        (command / "sidecar.mjs").write_text(code.replace(": object", ""))
    else:
        compile_typescript(command / "sidecar.mts", code)
    done = subprocess.run([node, "sidecar.mjs"], cwd=command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "denoise 4 4" in done.stdout, done.stderr
    assert (command / "house.png").read_bytes().startswith(b"\x89PNG")


def compile_typescript(path: Path, code: str) -> None:
    """As strictly as it goes."""
    modules = Path(os.environ.get("SANA_EDGE_NODE_FOLDER", "nothing")) / "node_modules"
    compiler = modules / ".bin" / "tsc"
    if not compiler.exists():
        pytest.skip("SANA_EDGE_NODE_FOLDER does not say where typescript and @types/node are")
    path.write_text(code)
    options = ["--strict", "--target", "es2022", "--module", "nodenext", "--types", "node"]
    roots = ["--typeRoots", str(modules / "@types")]
    done = subprocess.run([compiler, *options, *roots, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_rust(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rustc = shutil.which("rustc", path=f"{Path.home()}/.cargo/bin:/usr/bin:/usr/local/bin")
    if rustc is None:
        pytest.skip("no rustc")
    (command / "main.rs").write_text(snippet("rust", "fn main"))
    subprocess.run([rustc, "main.rs"], cwd=command, check=True, capture_output=True)
    done = subprocess.run([command / "main"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and '"type":"image"' in done.stdout, done.stderr
