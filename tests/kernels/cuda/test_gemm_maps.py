"""The index arithmetic of the CUDA INT8 product, checked on the host by gemm_maps.cpp.

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
CSRC = Path(__file__).parents[3] / "csrc"


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def run(compiler: str, folder: Path, csrc: Path = CSRC) -> subprocess.CompletedProcess[str]:
    program = folder / "gemm_maps"
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-DSANA_EDGE_EMULATED=890",
        f"-I{csrc}",
    ]
    built = subprocess.run(
        [compiler, *flags, str(SOURCE), "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_maps(compiler: str, tmp_path: Path) -> None:
    done = run(compiler, tmp_path)
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
    shutil.copytree(CSRC, tmp_path / "csrc")
    maps = tmp_path / "csrc" / "gemm_maps.h"
    text = maps.read_text()
    assert text.count(right) == 1
    maps.write_text(text.replace(right, changed))
    assert said in run(compiler, tmp_path, tmp_path / "csrc").stdout
