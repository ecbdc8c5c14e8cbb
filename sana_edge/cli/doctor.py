"""What this machine can run, and why not: the text of ``sana-edge doctor``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sana_edge
from sana_edge.store import catalogue, snapshots

HELP = "show what this machine can run, and why not"

# distributions, and the modules that they bring
_PACKAGES = {
    **{name: name for name in ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")},
    "numpy": "numpy",
    "pillow": "PIL",
}


@dataclass(frozen=True)
class Backend:
    """A way to run the networks: usable with ``detail``, or not, and ``detail`` is the reason."""

    name: str
    usable: bool
    detail: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's option."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def run(arguments: argparse.Namespace) -> None:
    """Print `report`, or `facts` as JSON."""
    found = facts()
    print(json.dumps(found, indent=2) if arguments.json else report(found))


def facts() -> dict[str, Any]:
    """What the report says, as JSON values, sizes in bytes; uses no network. None is what is not known."""
    cache = snapshots.cache_folder()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "sana_edge": sana_edge.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        # a container or taskset may allow fewer than there are
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name, module) for name, module in _PACKAGES.items()},
        "memory": _memory(),
        "backends": [asdict(backend) for backend in backends()],
        "engines": [asdict(backend) for backend in engine_backends()],
        "models": [
            {"name": model.name, "bytes": model.size, "path": str(model.path)}
            for model in catalogue.list_models()
            if model.path is not None
        ],
        "downloads": {"path": str(cache), "free": shutil.disk_usage(existing).free},
    }


def report(found: dict[str, Any] | None = None) -> str:
    """`facts` in a few aligned lines for a person, or for the first lines of a bug report."""
    found = found or facts()
    memory = found["memory"]
    free = "this system does not tell"
    if memory is not None:
        free = f"{_gigabytes(memory['available'])} of {_gigabytes(memory['total'])} available"
    missing = "is not part of this program" if getattr(sys, "frozen", False) else "is not installed"
    packages = (f"{name} {version or missing}" for name, version in found["packages"].items())
    downloads = found["downloads"]
    models = [f"{m['name']}: {(m['bytes'] or 0) / 1e6:.0f} MB in {m['path']}" for m in found["models"]]
    cores = f"{found['usable_cores']} of {found['cores']} cores"
    sections = {
        "system": [
            f"sana-edge {found['sana_edge']}, Python {found['python']}",
            found["platform"],
            f"{found['machine']}, {cores}, {found['executable']}",
        ],
        "packages": [", ".join(packages)],
        "memory": [free],
        "backends": [_line(Backend(**backend)) for backend in found["backends"]],
        "engines": [_line(Backend(**backend)) for backend in found["engines"]],
        "models": [
            *models,
            f"downloads go to {downloads['path']}, {_gigabytes(downloads['free'])} free",
        ],
    }
    lines = []
    for title, items in sections.items():
        for number, item in enumerate(items):
            lines.append(f"{'' if number else title:10}{item}")
    return "\n".join(lines)


def _line(backend: Backend) -> str:
    return f"{backend.name}: {'ok, ' if backend.usable else 'no, '}{backend.detail}"


def engine_backends() -> Iterator[Backend]:
    """What runs exported folders, without torch."""
    from sana_edge.engines import choose

    for name, usable, detail in choose.survey():
        yield Backend(name, usable, f"{detail}, {_built()}" if usable and name == "tensorrt cuda" else detail)


def _built() -> str:
    """How many TensorRT engines this user has, as nothing runs without."""
    from sana_edge.engines.tensorrt import cache as engine_cache
    from sana_edge.errors import SanaError

    try:
        folder = engine_cache.engine_folder()
    except SanaError as error:
        return error.message
    count = len(engine_cache.entries(folder))
    if not count:
        return "no engines built yet: sana-edge build DIR"
    return f"{count} engine{'s' * (count != 1)} in {folder}"


def backends() -> list[Backend]:
    """Every backend, in the order in which they are preferred."""
    try:
        for name in ("transformers", "torch"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        return _unusable(f"{error.name} is not installed: pip install 'sana-edge[torch]'")
    # installed, but its libraries do not load
    except (ImportError, OSError) as error:
        return _unusable(f"torch does not load: {_first_line(error)}")
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    cpu = Backend("torch cpu", True, f"{threads} threads, {capability}")
    cuda = _cuda()
    return [_cuda_kernels(cuda), _triton(cuda), cuda, cpu, _int8()]


def _cuda_kernels(torch_cuda: Backend) -> Backend:
    """The library of csrc/: what it has code for, or why it cannot run."""
    from sana_edge.errors import UnsupportedDevice
    from sana_edge.kernels.cuda import library as cuda_library

    name = "cuda kernels"
    try:
        library = cuda_library.load()
    except UnsupportedDevice as error:
        return Backend(name, False, f"{error}; {error.hint}")
    what = f"{library.version} for {library.architectures}"
    refused = _refusals("cuda", torch_cuda)
    return Backend(name, not refused, f"{refused} ({what})" if refused else what)


def _triton(torch_cuda: Backend) -> Backend:
    name = "triton"
    if importlib.util.find_spec("triton") is None:
        return Backend(name, False, "not installed: pip install 'sana-edge[triton]'")
    what = f"triton {_version('triton', 'triton')}"
    refused = _refusals("triton", torch_cuda)
    return Backend(name, not refused, f"{refused} ({what})" if refused else what)


def _refusals(name: str, torch_cuda: Backend) -> str:
    """Why a backend runs on none of the GPUs; empty where it runs on one."""
    import torch

    from sana_edge.fused import backends as choice
    from sana_edge.kernels.cuda import library as cuda_library

    if not torch_cuda.usable:
        # the library may know better than torch why there is no GPU
        refused = cuda_library.refusal(torch.device("cuda", 0)) if name == "cuda" else ""
        return refused or f"torch cannot use a GPU: {torch_cuda.detail}"
    reasons = [choice.refusal(name, torch.device("cuda", n)) for n in range(torch.cuda.device_count())]
    return "" if None in reasons else "; ".join(dict.fromkeys(str(reason) for reason in reasons))


def _cuda() -> Backend:
    import torch

    from sana_edge.fused import backends as choice
    from sana_edge.torch_runtime import cuda_graph

    name, missing = "torch cuda", choice.no_gpu()
    if missing:
        return Backend(name, False, missing)
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        version = f"sm_{properties.major}{properties.minor}"
        try:
            # fails where torch has no kernels for this GPU
            torch.ones(1, device=index).add_(1)
        except RuntimeError as error:
            return Backend(name, False, f"{properties.name} ({version}): {_first_line(error)}")
        free, total = torch.cuda.mem_get_info(index)
        devices.append(f"{properties.name} ({version}, {_gigabytes(free)} of {_gigabytes(total)} free)")
    refused = cuda_graph.refusal()
    graphs = f"no CUDA graphs: {refused}" if refused else "steps are recorded as CUDA graphs"
    return Backend(name, True, "; ".join([*devices, graphs]))


def _int8() -> Backend:
    import torch

    from sana_edge.int8 import matmul, ops

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    products = [matmul.describe(device) for device in devices]
    refusal = ops.onednn_refusal()
    convolutions = f"no oneDNN convolution: {refusal}" if refusal else "oneDNN convolution on cpu"
    text = (f"text encoder on {device}: {_text(device)}" for device in devices)
    usable = any(fast for fast, _ in products)
    return Backend("int8", usable, "; ".join([*(words for _, words in products), convolutions, *text]))


def _text(device: str) -> str:
    """What an INT8 text encoder runs on."""
    import torch

    from sana_edge.fused import backends as choice
    from sana_edge.int8.text_linear import choose_product

    if device == "cpu":
        return choose_product(device).reason
    refused = choice.refusal("cuda", torch.device(device))
    own = "the CUDA kernels, recorded at a few lengths"
    return own if refused is None else f"{choose_product(device).reason}, as {refused.message}"


def _unusable(reason: str) -> list[Backend]:
    names = ("cuda kernels", "triton", "torch cuda", "torch cpu")
    return [Backend(name, False, reason) for name in names]


def _version(distribution: str, module: str) -> str | None:
    """The version of a package, "of an unknown version" where it does not tell; None: it is not there.

    A frozen program has modules without their distribution's metadata.
    """
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        return None
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    try:
        return str(getattr(importlib.import_module(module), "__version__", "of an unknown version"))
    except (ImportError, OSError):
        return None


def _memory() -> dict[str, int] | None:
    """Bytes that are available, and all of them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        # "MemTotal:       16384 kB"
        values = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
        return {"available": values["MemAvailable"], "total": values["MemTotal"]}
    except (OSError, KeyError):
        return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
