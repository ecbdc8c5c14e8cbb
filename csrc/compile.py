"""Builds the CUDA library with nvcc, or for tests the same kernels with a C++ compiler and the emulator.

python csrc/compile.py --emulated 890 --output libsana_edge_emulated.so
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
EMULATED_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
                  "-Wno-unknown-pragmas", "-Werror", "-DSANA_EDGE_BUILDING"]  # fmt: skip


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cu"))


def build_emulated(output: Path, architecture: int, folder: Path, only: list[str] | None = None) -> None:
    """Compile the kernels for the CPU, as ``architecture`` (750, 890), with objects in ``folder``."""
    compiler = os.environ.get("CXX", "g++")
    folder.mkdir(parents=True, exist_ok=True)
    files = [f for f in sources() if only is None or f.stem in (*only, "library")]
    jobs = [(f, folder / f"{f.stem}.o") for f in [*files, HERE / "emulator" / "emulator.cpp"]]

    def compile_one(job: tuple[Path, Path]) -> None:
        source, target = job
        subprocess.run(
            [
                compiler,
                *EMULATED_FLAGS,
                f"-DSANA_EDGE_EMULATED={architecture}",
                "-x",
                "c++",
                "-c",
                str(source),
                "-o",
                str(target),
            ],  # fmt: skip
            check=True,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    subprocess.run([compiler, "-shared", *(str(o) for _, o in jobs), "-o", str(output)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulated", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of .cu files without the ending")
    arguments = parser.parse_args()
    build_emulated(
        arguments.output, arguments.emulated, arguments.output.with_suffix(".objects"), arguments.only
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
