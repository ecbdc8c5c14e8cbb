"""The index arithmetic of the CUDA INT8 product, checked on the host by tests/gemm_maps.cpp.

Copies, fragments, sums and staged rows cover a tile once and meet no bank of shared memory twice, blocks
cover a result once, and the tiles chosen are those that counting gives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("gemm_maps.cpp")


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def run(compiler: str, source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    program = folder / "gemm_maps"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DSANA_EDGE_EMULATED=890"]
    built = subprocess.run(
        [compiler, *flags, str(source), "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_maps(compiler: str, tmp_path: Path) -> None:
    done = run(compiler, SOURCE, tmp_path)
    assert done.stdout == "ok\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("right", "changed", "said"),
    [
        ("piece ^ (row & 7)", "piece", "meet a bank twice"),
        ("piece ^ (row >> 1 & 3)", "piece ^ (row & 3)", "meet a bank twice"),
        ("(piece ^ row % 4 * 2 ^ odd)", "(piece ^ row % 4 * 2)", "staging reads a bank twice"),
        ("step * 2 + thread / 8 % 2", "step * 2 + thread / 16 % 2", "another column"),
        (
            "const unsigned height = smaller(rows - first, GROUP)",
            "const unsigned height = GROUP",
            "made once",
        ),
    ],
)
def test_mistakes_are_found(compiler: str, tmp_path: Path, right: str, changed: str, said: str) -> None:
    shutil.copytree(SOURCE.parents[1] / "csrc", tmp_path / "csrc")
    maps = tmp_path / "csrc" / "gemm_maps.h"
    text = maps.read_text()
    assert text.count(right) == 1
    maps.write_text(text.replace(right, changed))
    (tmp_path / "tests").mkdir()
    source = Path(shutil.copy(SOURCE, tmp_path / "tests"))
    assert said in run(compiler, source, tmp_path).stdout
