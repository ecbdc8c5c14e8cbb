"""What a frozen program needs besides what PyInstaller sees: models, versions, and modules imported by name.

Training, calibration and export stay out where nothing imports them. Where torch is not installed, so do the
weights and the rooms that only torch reads.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from PyInstaller.utils.hooks import (
    collect_data_files,
    collect_dynamic_libs,
    collect_submodules,
    copy_metadata,
)

_has_torch = importlib.util.find_spec("torch") is not None
_left_out = ["training", "calib", "export", "__pyinstaller"]
if not _has_torch:
    _left_out += ["fused", "int8", "nets", "torch_runtime", "kernels"]


def _wanted(name: str) -> bool:
    return not name.startswith(tuple(f"sana_edge.{room}" for room in _left_out))


hiddenimports = collect_submodules("sana_edge", filter=_wanted, on_error="ignore")
binaries = collect_dynamic_libs("sana_edge")
datas = collect_data_files("sana_edge", excludes=[] if _has_torch else ["models/sana-tiny*/*/*.safetensors"])
# Triton compiles kernels from their sources
module_collection_mode = {"sana_edge.kernels": "pyz+py"}

# `sana-edge doctor` reads versions from it
for _name in ("sana-edge", "torch", "transformers", "onnxruntime", "openvino", "tensorrt", "triton"):
    try:
        datas += copy_metadata(_name)
    except importlib.metadata.PackageNotFoundError:
        continue
