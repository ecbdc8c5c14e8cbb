"""Builds the CUDA library with nvcc, or for tests the same kernels with a C++ compiler and the emulator.

    python csrc/compile.py                                     into sana_edge/, for all architectures
    python csrc/compile.py --emulated 890 --output libemulated.so

Only what changed is compiled again. nvcc is looked for in CUDA_HOME, CUDA_PATH and PATH.
SANA_EDGE_CUDA_ARCHS="89" or "80;89;ptx90" builds for these only;
with SANA_EDGE_SKIP_CUDA=1 setup.py builds none.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WINDOWS = sys.platform == "win32"
LIBRARY = "sana_edge_cuda.dll" if WINDOWS else "libsana_edge_cuda.so"
OBJECTS = ROOT / "build" / "cuda"
# the first release with sm_120
OLDEST_NVCC = (12, 8)
OLDEST_ARCHITECTURE = 75
# PTX of 75 has no code for what 80 brought, and would run there
OLDEST_PTX = 80
# Machine code for every generation that laptops have, and for Hopper. A GPU also runs code of a lower minor
# number: 8.7 runs 86, 12.1 runs 120. For 10.0, 11.0 and all to come the driver compiles PTX. That of 120
# would leave out 10.0 and 11.0, and the sources ask for nothing newer than 80.
ARCHITECTURES = ("75", "80", "86", "89", "90", "ptx90", "120")
EMULATED_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
# the emulator looks for races: it takes the place of the sanitizer's library
EMULATED_FLAGS += ["-fsanitize=thread"]
EMULATED_FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DSANA_EDGE_BUILDING"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "-DSANA_EDGE_BUILDING"]
HOST_FLAGS = ["/O2,/EHsc,/utf-8,/MD"] if WINDOWS else ["-O2,-fPIC,-fvisibility=hidden"]
# the CUDA and C++ runtimes are inside and stay out of sight: a program may have others
LINK_FLAGS = ["-shared", "-cudart", "static"]
if not WINDOWS:
    LINK_FLAGS += ["-Xcompiler", "-static-libstdc++,-static-libgcc", "-Xlinker", "--exclude-libs,ALL"]


class BuildError(Exception):
    """What went wrong; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class NoCompiler(BuildError):
    """There is no nvcc, or none that is new enough."""


@dataclass(frozen=True)
class Compilation:
    """``command`` turns ``source`` into ``target``; beside it lie what it says, and what it depended on."""

    command: tuple[str, ...]
    source: Path
    target: Path

    @property
    def log(self) -> Path:
        """What the compiler said: of nvcc registers and spills of every kernel."""
        return self.target.with_suffix(".log")

    @property
    def dependencies(self) -> Path:
        return self.target.with_suffix(".d")

    @property
    def stamp(self) -> Path:
        """Written after a success: the command, and as its time when it began."""
        return self.target.with_suffix(".command")

    def is_current(self) -> bool:
        try:
            if self.stamp.read_text(encoding="utf-8") != "\n".join(self.command):
                return False
            built = self.stamp.stat().st_mtime
            # "target: source header \<newline> header"
            text = self.dependencies.read_text(encoding="utf-8").replace("\\\n", " ").split(": ", 1)[1]
            files = [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", text.strip())]
            return self.target.exists() and all(Path(name).stat().st_mtime < built for name in files)
        except (OSError, IndexError):
            return False

    def run(self) -> None:
        """Raises BuildError with the compiler's words."""
        self.stamp.unlink(missing_ok=True)
        began = time.time()
        done = _run(self.command)
        self.log.write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            hint = "its message is above; SANA_EDGE_SKIP_CUDA=1 installs sana-edge without CUDA kernels"
            raise BuildError(f"{self.source.name} does not compile", hint)
        self.stamp.write_text("\n".join(self.command), encoding="utf-8")
        os.utime(self.stamp, (began, began))


def build(output: Path, objects: Path = OBJECTS, only: Sequence[str] | None = None) -> None:
    """The library for GPUs, for what `architectures` says.

    Raises:
        NoCompiler: no usable nvcc.
        BuildError: a source does not compile, or a variable is wrong.
    """
    names = architectures()
    nvcc = find_nvcc()
    command = [nvcc, *NVCC_FLAGS, *(flag for flags in HOST_FLAGS for flag in ("-Xcompiler", flags))]
    command += [*generate_code(names), f"-DSANA_EDGE_VERSION={_quoted(version())}"]
    command += [f"-DSANA_EDGE_ARCHITECTURES={_quoted(' '.join(names))}"]
    compiled = _compile(command, sources(only), objects)
    _link([nvcc, *LINK_FLAGS], compiled, output)


def build_emulated(output: Path, architecture: int, objects: Path, only: Sequence[str] | None = None) -> None:
    """The kernels for the CPU, as ``architecture`` (750, 890) has them."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise NoCompiler(f"there is no {compiler}", "install a C++17 compiler, or name one in CXX")
    command = [compiler, *EMULATED_FLAGS, f"-DSANA_EDGE_EMULATED={architecture}"]
    command += [f"-DSANA_EDGE_VERSION={_quoted(version())}", "-x", "c++"]
    compiled = _compile(command, [*sources(only), HERE / "emulator" / "emulator.cpp"], objects)
    _link([compiler, "-shared"], compiled, output)


def sources(only: Sequence[str] | None = None) -> list[Path]:
    """The .cu files, or those of some operations and library.cu; first the largest, which takes longest."""
    files = [file for file in HERE.glob("[!.]*.cu") if only is None or file.stem in (*only, "library")]
    return sorted(files, key=lambda file: -file.stat().st_size)


def version() -> str:
    """That of the Python package, whose import this does without."""
    text = (ROOT / "sana_edge" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise BuildError("sana_edge/__init__.py has no __version__", "restore the line")
    return found[1]


def architectures() -> list[str]:
    """SANA_EDGE_CUDA_ARCHS, or all: "89" for machine code of compute capability 8.9, "ptx90" for PTX."""
    text = os.environ.get("SANA_EDGE_CUDA_ARCHS", "")
    names = [name for name in re.split(r"[;,\s]+", text) if name] or list(ARCHITECTURES)
    for name in names:
        number = re.fullmatch(r"(?:ptx)?(\d{2,3})", name)
        if number is None or int(number[1]) < OLDEST_ARCHITECTURE:
            raise BuildError(
                f"SANA_EDGE_CUDA_ARCHS: {name!r} is no architecture of {OLDEST_ARCHITECTURE} or later",
                'write them as "89", or "80;89;ptx90"',
            )
        if name.startswith("ptx") and int(number[1]) < OLDEST_PTX:
            raise BuildError(
                f"SANA_EDGE_CUDA_ARCHS: {name!r} would run on newer GPUs, whose kernels it lacks",
                f"name the machine code {number[1]}, and PTX of {OLDEST_PTX} or later",
            )
    return names


def generate_code(names: Iterable[str]) -> list[str]:
    """nvcc's flags for the names of `architectures`."""
    flags = []
    for name in names:
        number = name.removeprefix("ptx")
        kind = "compute" if name.startswith("ptx") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def find_nvcc() -> str:
    """The nvcc to use.

    Raises:
        NoCompiler: there is none, or it is too old.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = (shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes)
    path = next(filter(None, found), None) or shutil.which("nvcc")
    needed = f"install the CUDA toolkit {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or later and put its nvcc on PATH"
    if path is None:
        raise NoCompiler("there is no nvcc", needed)
    said = _run([path, "--version"]).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise NoCompiler(f"{path} does not tell its version", needed)
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        raise NoCompiler(
            f"{path} is {release[1]}.{release[2]}, which does not know compute capability 12.0", needed
        )
    return path


def skipped() -> bool:
    """Whether SANA_EDGE_SKIP_CUDA asks for no library."""
    return os.environ.get("SANA_EDGE_SKIP_CUDA", "0") not in ("", "0")


def _compile(command: Sequence[str], files: Sequence[Path], folder: Path) -> list[Path]:
    """Objects of ``files`` in ``folder``, those made that are not there or no longer right."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for file in files:
        target = folder / f"{file.stem}.o"
        flags = ["-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(file), "-o", str(target)]
        jobs.append(Compilation((*command, *flags), file, target))
    pool = ThreadPoolExecutor(_cores())
    try:
        list(pool.map(Compilation.run, [job for job in jobs if not job.is_current()]))
    finally:
        # after a failure the others need not begin
        pool.shutdown(cancel_futures=True)
    return [job.target for job in jobs]


def _link(command: Sequence[str], objects: Iterable[Path], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    # under its own name: on Windows an import library keeps it
    with tempfile.TemporaryDirectory(prefix=".link.", dir=output.parent) as folder:
        temporary = Path(folder) / output.name
        done = _run([*command, *map(str, objects), "-o", str(temporary)])
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            raise BuildError(f"{output.name} does not link", "its message is above")
        temporary.replace(output)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quoted(text: str) -> str:
    """A C string as the value of -D."""
    return f'\\"{text}\\"' if WINDOWS else f'"{text}"'


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emulated", type=int, metavar="ARCH", help="for the CPU, as 750 or 890 is")
    parser.add_argument("--output", type=Path, help=f"default: {LIBRARY} in sana_edge/")
    parser.add_argument("--objects", type=Path, help="folder of what lies between; default: build/cuda")
    parser.add_argument("--only", nargs="*", help="names of .cu files without the ending")
    asked = parser.parse_args()
    if asked.emulated and not asked.output:
        parser.error("--emulated needs --output")
    output = asked.output or ROOT / "sana_edge" / LIBRARY
    try:
        if asked.emulated:
            objects = asked.objects or output.with_suffix(".objects")
            build_emulated(output, asked.emulated, objects, asked.only)
        else:
            build(output, asked.objects or OBJECTS, asked.only)
    except BuildError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
