"""A folder as `sana-edge export` makes it, of graphs that multiply a latent, and its engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sana_edge.config import SamplerConfig
from sana_edge.engines.tensorrt import cache
from sana_edge.engines.tensorrt.profiles import choose_sizes
from sana_edge.export import build
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
        write_graph(path / f"{name}.onnx")
    (path / "denoiser.onnx.data").write_bytes(bytes(1000))
    write_manifest(path)
    return path


def write_graph(path: Path, *names: str) -> None:
    """An ONNX file: velocity = latent * scale, whose inputs may have other names."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    helper, given = onnx.helper, names or tuple(INPUTS)
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, (_, shape) in zip((*given, "velocity"), (*INPUTS.values(), LATENT), strict=True)
    ]
    graph = helper.make_graph([helper.make_node("Mul", given, ["velocity"])], "g", ports[:2], ports[2:])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


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
    """The engines of a folder, built with the stand-in; ``options`` are those of `build_engines`."""
    exported = manifest.read(folder)
    sizes = choose_sizes(256, None, None, None)
    return build.build_engines(folder, output, exported, sizes, trt=trt, cuda=cuda, **options)
