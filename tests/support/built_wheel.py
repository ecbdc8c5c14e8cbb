"""The wheel of this checkout, built from a copy without its CUDA library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAPPED = ("calib", "export", "kernels")


def build_wheel(source: Path, *, links: bool = True) -> Path:
    """Build in the folder ``source``; without ``links`` as a checkout without symbolic links gives it."""
    caches = shutil.ignore_patterns("__pycache__")
    for name in ("sana_edge", "csrc", *MAPPED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=caches)
    for file in (
        path for path in ROOT.iterdir() if path.suffix in (".toml", ".py", ".md") or path.name == "LICENSE"
    ):
        shutil.copy(file, source)
    for name in () if links else MAPPED:
        # what git writes in place of a link
        (source / "sana_edge" / name).unlink()
        (source / "sana_edge" / name).write_text(f"../{name}")
    # what pip calls, without pip's search for build requirements
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    # test_cuda_packaging.py has the library
    environment = {**os.environ, "SANA_EDGE_SKIP_CUDA": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, env=environment)
    (path,) = (source / "dist").glob("*.whl")
    return path
