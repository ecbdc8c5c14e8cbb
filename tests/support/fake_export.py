"""A folder as `sana-edge export` makes it, with graphs that `fake_tensorrt.py` reads, and its engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sana_edge.config import SamplerConfig
from sana_edge.engines.tensorrt import cache
from sana_edge.engines.tensorrt.profiles import choose_sizes
from sana_edge.export import build
from sana_edge.export.tensorrt import Options
from sana_edge.store import manifest, package
from sana_edge.store.manifest import (
    GRAPHS,
    INSTRUCTION,
    TOKENIZER,
    Graph,
    Manifest,
    Source,
    StoredFile,
    TextShape,
)

LATENT = ("float32", ("B", 4, "h", "w"))
INPUTS = {"latent": LATENT, "scale": ("float32", (1,))}


def write_folder(path: Path) -> Path:
    """Make the folder ``path`` with all files."""
    (path / "tokenizer").mkdir(parents=True)
    (path / TOKENIZER).write_text("{}")
    save_file({"ids": np.zeros(210, np.int64)}, path / INSTRUCTION)
    for name in GRAPHS:
        (path / f"{name}.onnx").write_text(json.dumps(list(INPUTS)))
    (path / "denoiser.onnx.data").write_bytes(bytes(1000))
    write_manifest(path)
    return path


def write_manifest(path: Path, **changed: Any) -> Manifest:
    """Describe the files that are there now; ``changed`` are fields of the manifest."""
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name != manifest.FILE)
    files = {
        file.relative_to(path).as_posix(): StoredFile(package.digest([file]), file.stat().st_size)
        for file in found
    }
    values: dict[str, Any] = {
        "sana_edge": "0.1",
        "name": "sana-tiny",
        "source": Source("sana-tiny", {}),
        "dtype": "fp16",
        "quantization": None,
        "native_size": 256,
        "size": None,
        "latent_channels": 4,
        "cell": 32,
        "guidance_embeds": False,
        "sampler": SamplerConfig(flow_shift=3.0),
        "text": TextShape(channels=8, layers=2, kv_heads=2, head_dim=4),
        "graphs": {name: Graph(f"{name}.onnx", INPUTS, {"velocity": LATENT}) for name in GRAPHS},
        "files": files,
        "verification": None,
    }
    made = Manifest(**{**values, **changed})
    manifest.write(made, path)
    return made


def built(folder: Path, output: Path, trt: Any, cuda: Any, **options: Any) -> list[cache.Entry]:
    """The engines of a folder, built with the stand-in; ``options`` are those of `Options`."""
    exported = manifest.read(folder)
    sizes = choose_sizes(256, None, None, None)
    return build.build_engines(folder, output, exported, sizes, Options(**options), trt=trt, cuda=cuda)
