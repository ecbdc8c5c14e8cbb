"""Builds the CUDA library into the package where nvcc is; everything else stands in pyproject.toml.

``SANA_EDGE_SKIP_CUDA=1`` leaves it out. An editable installation builds nothing: `make cuda` does that.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from compile import HERE, LIBRARY, BuildError, NoCompiler, find_nvcc, skipped  # noqa: E402
from compile import build as build_library  # noqa: E402


def why_without() -> str:
    """Why the wheel has no CUDA library; empty where it has.

    Raises CompileError where somebody wants one: SANA_EDGE_CUDA_ARCHS is set.
    """
    if skipped():
        return "SANA_EDGE_SKIP_CUDA is set"
    try:
        find_nvcc()
    except NoCompiler as error:
        if os.environ.get("SANA_EDGE_CUDA_ARCHS"):
            raise CompileError(f"SANA_EDGE_CUDA_ARCHS is set, but {error}\nhint: {error.hint}") from error
        return f"{error}; {error.hint}"
    return ""


class BuildCuda(Command):
    """csrc/ to ``libsana_edge_cuda.so`` and ``include/sana_edge.h`` in the package."""

    description = "build the CUDA library with nvcc"
    user_options = ()
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        if self.editable_mode:
            return
        library, header = (Path(path) for path in self.get_outputs())
        header.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / header.name, header)
        reason = why_without()
        if reason:
            # one that an earlier build left
            library.unlink(missing_ok=True)
            print(f"sana-edge is built without its CUDA library: {reason}", file=sys.stderr)
            return
        try:
            build_library(library)
        except BuildError as error:
            raise CompileError(f"{error}\nhint: {error.hint}") from error

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "sana_edge"
        return [str(package / LIBRARY), str(package / "include" / "sana_edge.h")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        endings = (".cu", ".h", ".cpp", ".c", ".py")
        files = (path for path in HERE.rglob("*") if path.suffix in endings)
        return [path.relative_to(ROOT).as_posix() for path in files]


class Wheel(bdist_wheel):
    """The library needs a platform, but no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class Package(Distribution):
    """Belongs to a platform if the library is in it."""

    def has_ext_modules(self) -> bool:
        return not why_without()


class Build(build):
    """Ends with the CUDA library."""

    sub_commands = [*build.sub_commands, ("build_cuda", None)]  # noqa: RUF012


setup(distclass=Package, cmdclass={"build": Build, "build_cuda": BuildCuda, "bdist_wheel": Wheel})
