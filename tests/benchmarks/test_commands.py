"""The commands that are written down: they exist, take these options, and say what is not installed."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest

from harness import ROOT, needs

FILES = (
    *("README.md", "benchmarks/README.md", "docs/benchmarks.md", "docs/gpu.md"),
    "sana_edge/training/art/README.md",
)
COMMAND = re.compile(r"^ *python3? benchmarks/(\w+)\.py(.*)$", re.MULTILINE)
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
# they need the standard library only
BARE = ("gpu_check", "hardening", "report")


def written() -> list[tuple[str, str]]:
    """Scripts and their arguments, of Markdown files and of the scripts' own first lines."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in FILES]
    texts += [(ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS]
    # lines go on behind a backslash, of which a docstring has two
    found = [match for text in texts for match in COMMAND.findall(re.sub(r"\\{1,2}\n", " ", text))]
    return sorted({(name, rest.partition("#")[0].strip(" `")) for name, rest in found})


@pytest.mark.parametrize(("name", "arguments"), written())
def test_options(name: str, arguments: str) -> None:
    for package in ("diffusers", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    importlib.import_module(name)._options(shlex.split(arguments))


def test_every_script_is_written_down() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"{name}.py" not in text] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_by_a_python_without_packages(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", f"benchmarks/{name}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if name in BARE:
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    else:
        assert done.returncode == 1
        error, hint = done.stderr.splitlines()
        assert error.startswith("error: this needs torch") and "pip install -e '.[bench]'" in hint


def test_the_extra_brings_what_is_imported() -> None:
    text = re.sub(r"(?ms)^test = \[.*?^\]", "", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    brought = {name.lower() for name in re.findall(r'^    "([A-Za-z-]+)>=', text, re.MULTILINE)}
    brought |= {name.lower() for name in re.findall(r'[\[ ]"([A-Za-z]+)>=', text)}
    own = {"sana_edge", "harness", "works", "judge", "gpu", *SCRIPTS, *sys.stdlib_module_names}
    imported = set()
    # each peer's are in an environment that its command makes
    alone = ROOT / "benchmarks" / "works" / "peer_process.py"
    for path in {*(ROOT / "benchmarks").rglob("*.py")} - {alone}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert {"pillow" if name == "PIL" else name for name in imported - own} <= brought


def test_what_is_missing_is_named() -> None:
    needs("json", "sys")
    with pytest.raises(SystemExit, match="this needs no_such_package, which is not installed"):
        needs("json", "no_such_package")
