"""csrc/compile.py and setup.py with a stand-in for nvcc: what it is asked; what is in wheels and sdists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import sana_edge

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvcc is a shell script")
LIBRARY = "sana_edge/libsana_edge_cuda.so"
HEADER = "sana_edge/include/sana_edge.h"
# answers --version; otherwise notes what it is asked, writes the output and what that depends on
NVCC = r"""#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release $RELEASE, V$RELEASE.1"; exit 0;; esac
echo "$@" >> "$ASKED"
if [ -n "$FAILS" ]; then echo "error: expected a ;"; exit 1; fi
while [ $# -gt 0 ]; do
  case $1 in -o) output=$2;; -MF) depends=$2;; -c) source=$2;; esac
  shift
done
echo built > "$output"
if [ -n "$depends" ]; then
  printf '%s : %s \\\n  %s\n' "$output" "$source" "$(dirname "$source")/sana_edge.h" |
    sed 's/a source/a\\ source/g' > "$depends"
fi
"""


@dataclass
class Checkout:
    """A copy of what a wheel is made from, without the models; an environment with a stand-in for nvcc."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "ASKED": str(self.folder / "asked")}
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, capture_output=True, text=True, env=environment
        )

    def build(self, kind: str = "wheel") -> tuple[Path, str]:
        """The file, and what was said on stderr."""
        shutil.rmtree(self.folder / "dist", ignore_errors=True)
        # what pip calls, without pip's search for build requirements
        done = self.run("-c", f"from setuptools.build_meta import build_{kind}; build_{kind}('dist')")
        assert done.returncode == 0, done.stderr
        (path,) = (self.folder / "dist").iterdir()
        return path, done.stderr

    def asked(self) -> list[str]:
        """The calls of nvcc since the last time."""
        file = self.folder / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    source, toolkit = tmp_path / "a source", tmp_path / "toolkit"
    leave = shutil.ignore_patterns("__pycache__", "models")
    project = (ROOT / "pyproject.toml").read_text()
    mapped = re.findall(r'^"sana_edge\.\w+" = "(\w+)"$', project, re.MULTILINE)
    for name in ("sana_edge", "csrc", *mapped):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave)
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "pyproject.toml").write_text(project)
    # of an earlier `make cuda`
    (source / LIBRARY).write_text("of this machine only")
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").write_text(NVCC)
    (toolkit / "bin" / "nvcc").chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "SANA_EDGE_"))
    }
    return Checkout(source, {**environment, "CUDA_HOME": str(toolkit), "RELEASE": "13.0"})


def test_wheel_with_the_library(checkout: Checkout) -> None:
    path, _ = checkout.build()
    assert path.name == f"sana_edge-{sana_edge.__version__}-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read(LIBRARY) == b"built\n"
        assert wheel.read(HEADER) == (ROOT / "csrc" / "sana_edge.h").read_bytes()
    *compilations, link = checkout.asked()
    assert len(compilations) == len(list((ROOT / "csrc").glob("*.cu")))
    for architecture in (75, 80, 86, 89, 90, 120):
        flag = f"-gencode=arch=compute_{architecture},code=sm_{architecture} "
        assert all(flag in line for line in compilations)
    assert all("-gencode=arch=compute_90,code=compute_90 " in line for line in compilations)
    assert all(f'-DSANA_EDGE_VERSION="{sana_edge.__version__}"' in line for line in compilations)
    assert all('-DSANA_EDGE_ARCHITECTURES="75 80 86 89 90 ptx90 120"' in line for line in compilations)
    assert "-cudart static" in link and "--exclude-libs,ALL" in link


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"SANA_EDGE_SKIP_CUDA": "1"}, "SANA_EDGE_SKIP_CUDA is set"),
        (
            {"RELEASE": "12.6"},
            "is 12.6, which does not know compute capability 12.0; install the CUDA toolkit 12.8",
        ),
        ({"CUDA_HOME": "", "PATH": "/nowhere"}, "there is no nvcc; install the CUDA toolkit 12.8 or later"),
    ],
    ids=["skipped", "too old", "no nvcc"],
)
def test_wheel_without_the_library(checkout: Checkout, change: dict[str, str], reason: str) -> None:
    # one that an earlier build left must not slip in
    checkout.build()
    checkout.asked()
    checkout.environment |= change
    path, said = checkout.build()
    assert path.name == f"sana_edge-{sana_edge.__version__}-py3-none-any.whl"
    assert "sana-edge is built without its CUDA library: " in said and reason in said
    names = zipfile.ZipFile(path).namelist()
    assert LIBRARY not in names and HEADER in names
    assert not checkout.asked()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"FAILS": "1"}, ("error: expected a ;", "does not compile", "hint:", "SANA_EDGE_SKIP_CUDA=1")),
        (
            {"SANA_EDGE_CUDA_ARCHS": "89;fast"},
            ("SANA_EDGE_CUDA_ARCHS: 'fast' is no", 'hint: write them as "89"'),
        ),
        ({"SANA_EDGE_CUDA_ARCHS": "70"}, ("'70' is no architecture of 75 or later",)),
        (
            {"SANA_EDGE_CUDA_ARCHS": "75;ptx75"},
            ("'ptx75' would run on newer GPUs", "hint: name the machine code 75, and PTX of 80"),
        ),
        (
            {"SANA_EDGE_CUDA_ARCHS": "89", "RELEASE": "12.0"},
            ("SANA_EDGE_CUDA_ARCHS is set, but", "hint: install"),
        ),
    ],
    ids=["compiler error", "no number", "too old", "old PTX", "asked for without nvcc"],
)
def test_failures_end_the_build(checkout: Checkout, change: dict[str, str], words: tuple[str, ...]) -> None:
    checkout.environment |= change
    done = checkout.run("-c", "from setuptools.build_meta import build_wheel; build_wheel('dist')")
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr
    assert not list((checkout.folder / "build").rglob("*.so*"))


def test_editable_installation_builds_nothing(checkout: Checkout) -> None:
    checkout.build("editable")
    assert not checkout.asked()


def test_sdist_holds_the_sources(checkout: Checkout) -> None:
    path, _ = checkout.build("sdist")
    top = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
        archive.extractall(checkout.folder / "unpacked", filter="data")
    csrc = ROOT / "csrc"
    files = [file for file in csrc.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {f"csrc/{file.relative_to(csrc).as_posix()}" for file in files} <= names
    assert LIBRARY not in names
    unpacked = Checkout(checkout.folder / "unpacked" / top, checkout.environment)
    assert LIBRARY in zipfile.ZipFile(unpacked.build()[0]).namelist()


def test_only_what_changed_is_compiled(checkout: Checkout) -> None:
    def compiled() -> list[str]:
        done = checkout.run("csrc/compile.py")
        assert done.returncode == 0, done.stderr
        *compilations, _ = checkout.asked()
        return [line.split(" -c ")[1].split(" -o ")[0].rpartition("/")[2] for line in compilations]

    count = len(list((checkout.folder / "csrc").glob("*.cu")))
    assert len(compiled()) == count
    assert (checkout.folder / LIBRARY).read_text() == "built\n"
    assert compiled() == []
    (checkout.folder / "csrc" / "library.cu").touch()
    assert compiled() == ["library.cu"]
    (checkout.folder / "csrc" / "sana_edge.h").touch()
    assert len(compiled()) == count
    checkout.environment["SANA_EDGE_CUDA_ARCHS"] = "80;ptx90"
    assert len(compiled()) == count
    checkout.environment["FAILS"] = "1"
    (checkout.folder / "csrc" / "library.cu").touch()
    done = checkout.run("csrc/compile.py")
    assert done.returncode == 1
    assert "\nerror: library.cu does not compile\nhint: " in done.stderr
    # what was there stays, and the next build makes what failed
    assert (checkout.folder / LIBRARY).read_text() == "built\n"
    checkout.asked()
    checkout.environment["FAILS"] = ""
    assert compiled() == ["library.cu"]


def test_nothing_partial_stays(checkout: Checkout) -> None:
    nvcc = Path(checkout.environment["CUDA_HOME"]) / "bin" / "nvcc"
    nvcc.write_text(NVCC + 'case "$output" in *.so*) exit 1;; esac\n')
    done = checkout.run("csrc/compile.py")
    assert done.returncode == 1
    assert "error: libsana_edge_cuda.so does not link" in done.stderr
    assert (checkout.folder / LIBRARY).read_text() == "of this machine only"
    assert [path.name for path in (checkout.folder / "sana_edge").glob("*.so*")] == [Path(LIBRARY).name]
