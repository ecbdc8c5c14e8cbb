"""What the fused denoiser and the training layers launch in Triton on a GPU, found and compiled without one.

A request in JSON on stdin, what was compiled in JSON on stdout. The real callers run on CPU tensors that
nothing reads, and Triton itself derives from every launch what it would compile: types, None, sizes of 1,
multiples of 16, addresses. Only the device checks, the driver and the launch are replaced.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# the checkout's package, whatever is installed; the root does not stay on the path, see CONTRIBUTING
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sana_edge  # noqa: F401

sys.path.pop(0)

import torch
import triton
import triton.compiler
from compile_kernel import usage
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sana_edge.config import DenoiserConfig
from sana_edge.int8 import ops
from sana_edge.int8.linear import W8A8Linear
from sana_edge.kernels import triton as kernels
from sana_edge.kernels.triton import linear_tiles, w8a8_linear
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.quantize import denoiser_targets
from sana_edge.nets.text_context import TextContext
from sana_edge.torch_runtime.steps import FusedNetwork

JITFunction = triton.runtime.JITFunction
LENGTH = 300


def main() -> int:
    request = json.load(sys.stdin)
    target = GPUTarget("cuda", request["capability"], 32)
    sources = launched(request, target)
    if request["compiled"] is not None:
        sources = [source for source in sources if re.search(request["compiled"], told(source))]
    json.dump(compiled_all(sources, target), sys.stdout)
    return 0


Source = tuple[str, Any, dict[str, Any]]
# of `compiled_all`
_forked: tuple[list[Source], GPUTarget]


def launched(request: dict[str, Any], target: GPUTarget) -> list[Source]:
    """Kernels, sources, options and constants of all launches that a request describes, each once."""
    found: list[Source] = []
    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    _stand_in(modules, found, target)
    products = _recorded_products()
    for processors in request["processors"]:
        for module in modules:
            if hasattr(module, "device_of"):
                module.device_of = lambda *_, count=processors: (request["capability"], count)
        for form in request["forms"]:
            for run in steps(form, request["sizes"], request["pictures"]):
                run()
        device = request["capability"], processors
        sizes = representatives(request.get("classes", []), request["pictures"], products, device)
        for form in request.get("widest", []):
            for run in steps(form, sizes, request["pictures"]):
                run()
    if request["trained"]:
        _train(request["trained"])
    return found


def _recorded_products() -> set[tuple[int, int]]:
    """(N, K) of every product that is launched from now on."""
    seen: set[tuple[int, int]] = set()
    pick = w8a8_linear.pick_tile

    def recorded(M: int, N: int, K: int, *device: int) -> Any:
        seen.add((N, K))
        return pick(M, N, K, *device)

    w8a8_linear.pick_tile = recorded
    return seen


def representatives(
    sizes: list[list[int]], pictures: list[int], products: set[tuple[int, int]], device: tuple[int, int]
) -> list[list[int]]:
    """Sizes (h, w) of which every launch of all sizes is one, as far as Triton can tell them apart.

    A product's tile, whether it ends with a picture, and which numbers divide by 16.
    """
    kept: list[list[int]] = []
    seen: set[object] = set()
    for h, w in sizes:
        new: set[object] = {("sides", h % 16 == 0, w % 16 == 0, h * w % 16 == 0)}
        for n, (N, K) in itertools.product(pictures, products):
            tile = linear_tiles.pick_tile(n * h * w, N, K, *device)
            new.add((n > 1, N, K, tile, h * w % tile.m == 0, h * w % 16 == 0, n * h * w % 16 == 0))
        if new - seen:
            kept.append([h, w])
            seen |= new
    return kept


def _stand_in(modules: list[ModuleType], found: list[Source], target: GPUTarget) -> None:
    """Launches on CPU tensors end where Triton would compile."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    run = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = warm
    ops._triton_trains = lambda device: True
    for module in modules:
        if hasattr(module, "check_kernel"):
            module.check_kernel = lambda *_: None

    def keep(src: Any, target: Any, options: dict[str, Any], **_: Any) -> object:
        found.append((src.fn.__name__, src, options))
        return object()

    # what a kernel takes when it is launched first
    triton.compiler.compile = keep


def steps(
    form: dict[str, Any], sizes: list[list[int]], pictures: list[int]
) -> Iterator[Callable[[], object]]:
    """Steps of one layer of an INT8 denoiser at all sizes of the latent, for so many pictures."""
    config = replace(DenoiserConfig.from_dict(form["config"]), num_layers=1)
    with torch.device("meta"):
        denoiser = Denoiser(config).requires_grad_(False).eval()
    denoiser.clamp = form["clamp"]
    for name in denoiser_targets(denoiser):
        layer = denoiser.get_submodule(name)
        bias = layer.bias is not None
        with torch.device("meta"):
            empty = W8A8Linear(layer.in_features, layer.out_features, bias=bias, input_scale=form["static"])
        empty.set_static(form["static"])
        denoiser.set_submodule(name, empty)
    network = FusedNetwork(
        denoiser.to_empty(device="cpu").to_compute("cpu", getattr(torch, form["dtype"])), "triton"
    )
    # of one step
    tables = network.tables(Modulation(torch.empty(1, 1, 6, config.dim), torch.empty(1, 2, config.dim)))
    for images in pictures:
        context = texts(config, form["text"], images, getattr(torch, form["dtype"]))
        guided = len(form["text"]) == 2
        latent = torch.empty(images, config.in_channels, *sizes[0])
        structure, packed = network.pack(context, latent, guided)
        prompt = [*([torch.empty(())] if guided else []), *packed]
        for size in sizes:
            latent = torch.empty(images, config.in_channels, *size)
            function = network.function(structure, latent, guided)
            yield partial(function, [latent, *(table[0] for table in tables)], prompt)


def texts(config: DenoiserConfig, kinds: list[str], images: int, dtype: torch.dtype) -> TextContext:
    """A group for each of kinds: "keys" of a prompt per picture, or the "constant" of an empty one."""
    heads, width = config.num_cross_attention_heads, config.cross_attention_head_dim
    groups: list[KeysValues | Constant] = []
    for kind in kinds:
        if kind == "keys":
            keys = torch.zeros(images, heads, LENGTH, width, dtype=dtype)
            groups.append(KeysValues(keys, keys, torch.ones(images, 1, 1, LENGTH, dtype=torch.bool)))
        else:
            groups.append(Constant(torch.zeros(1, 1, config.dim, dtype=dtype)))
    return TextContext((tuple(groups),))


def _train(trained: list[dict[str, Any]]) -> None:
    """What has a gradient, forward and backward."""
    for asked in trained:
        dtype, (B, H, W), C = getattr(torch, asked["dtype"]), asked["size"], asked["channels"]
        qkv = torch.zeros(B, H * W, 3 * C, dtype=dtype, requires_grad=True)
        ops.relu_linear_attention(*qkv.chunk(3, dim=-1), asked["heads"]).sum().backward()
        hidden = torch.zeros(B, H * W, 2 * asked["hidden"], dtype=dtype, requires_grad=True)
        weight, bias = (
            torch.zeros(2 * asked["hidden"], *rest, requires_grad=True) for rest in ((1, 3, 3), ())
        )
        ops.glu_depthwise(hidden, weight, bias, H, W).sum().backward()


def told(source: Source) -> str:
    """A launch as its kernel, the constants of it and its options."""
    kernel, src, options = source
    names = src.fn.arg_names
    constants = {
        names[key[0]] if isinstance(key, tuple) else names[key] if isinstance(key, int) else key: value
        for key, value in src.constants.items()
    }
    return f"{kernel} {constants} {options['num_warps']} warps {options['num_stages']} stages"


def compiled_all(sources: list[Source], target: GPUTarget) -> list[dict[str, Any]]:
    """`compiled` of each, on all cores: sources cannot be sent to another process, but a fork has them."""
    global _forked
    _forked = sources, target
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        return pool.map(_compiled_number, range(len(sources)), chunksize=1)


def _compiled_number(number: int) -> dict[str, Any]:
    sources, target = _forked
    return compiled(sources[number], target)


def compiled(source: Source, target: GPUTarget) -> dict[str, Any]:
    """Which launch it is, bytes of shared memory of a block and of the stack of a thread; or the error."""
    _, src, options = source
    row: dict[str, Any] = {"launch": told(source)}
    try:
        built = triton.compile(src, target=target, options=options)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"}
    stack = re.search(r"STACK:(\d+)", usage(built))
    return {**row, "shared": built.metadata.shared, "stack": int(stack[1]) if stack else -1}


if __name__ == "__main__":
    sys.exit(main())
