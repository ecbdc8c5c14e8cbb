"""A process of its own: it loads one contender and draws, or makes a folder that contenders draw with.

Its argument is an `Order` as JSON, its output lines of JSON: {"at": ...} as it goes on, and the result last.
The first picture is what a user waits for after the start; of the later ones nothing is known from the first
but what does not depend on the prompt.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana_edge.bench.drawers import Drawer, Tell, loaded
from sana_edge.bench.machine import versions
from sana_edge.bench.meters import DeviceMemory, Energy, nvml
from sana_edge.bench.order import Order
from sana_edge.errors import export_extra, torch_extra
from sana_edge.system.instructions import instructions
from sana_edge.system.memory import memory_errors, peak_memory

# near in length, so that only their words differ
FIRST = "a red house left of a yellow star, with two blue birds above it"
LATER = "a {} boat right of a brown dog, with one white cloud below it"
COLOURS = ("green", "blue", "black", "purple", "orange", "grey")
# a process draws until it has spent so many seconds on later pictures, at most one of each colour
ENOUGH = 2.0
STAGES = ("load", "first", "picture", "text", "step", "loop", "decode", "save")
"""Of a run: seconds from the start of the process until the model is loaded, and until the first picture is
saved; then of a later picture with its file, its text, one step, all steps, the decode, and the file."""
_PACKAGES = (
    *("sana-edge", "numpy", "torch", "transformers", "diffusers"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"),
)


def main(text: str) -> None:
    """Do what an `Order` says, and print the result.

    Raises:
        SanaError: what the library raises; out of memory too.
    """
    order = Order.read(text)

    def tell(at: str) -> None:
        print(json.dumps({"at": at}), flush=True)

    with memory_errors(f"{order.by} with {Path(order.model).name}"):
        if order.by in _MAKERS:
            start = time.perf_counter()
            _MAKERS[order.by](order, tell)
            result: dict[str, Any] = {"seconds": time.perf_counter() - start}
        else:
            result = _drawn(order, tell)
    print(json.dumps(result), flush=True)


def _drawn(order: Order, tell: Tell) -> dict[str, Any]:
    """Seconds of each of `STAGES`, bytes, joules of a picture, and what is known of the contender."""
    library = nvml()
    energy = Energy(library)
    with DeviceMemory(library) as device:
        tell("loading")
        drawer = loaded(order)
        load = time.time() - order.started
        tell("first picture")
        picture, _ = drawer.draw(order.request(FIRST), tell)
        picture.save(order.output)
        first = time.time() - order.started
        before, start, later = energy.read(), time.perf_counter(), list[dict[str, float]]()
        for colour in COLOURS:
            later.append(_timed(drawer, order, LATER.format(colour), tell))
            if time.perf_counter() - start > ENOUGH:
                break
        spent = {name: joules / len(later) for name, joules in energy.since(before).items()}
        medians = {name: statistics.median(found[name] for found in later) for name in later[0]}
        # also those that torch tells of itself
        known = instructions()
        return {
            "seconds": {"load": load, "first": first, **medians},
            "pictures": len(later),
            "peak": peak_memory(),
            "device_peak": device.most,
            "joules": spent,
            "joules_missing": energy.missing,
            "instructions": None if known is None else sorted(known),
            "versions": {name: found for name, found in versions(*_PACKAGES).items() if found},
            **drawer.facts,
        }


def _timed(drawer: Drawer, order: Order, prompt: str, tell: Tell) -> dict[str, float]:
    start = time.perf_counter()
    picture, seconds = drawer.draw(order.request(prompt), tell)
    drawn = time.perf_counter()
    path = Path(order.output).with_suffix(".later.png")
    picture.save(path)
    end = time.perf_counter()
    path.unlink()
    return {"picture": end - start, **seconds, "save": end - drawn}


def _make_random(order: Order, tell: Tell) -> None:
    from sana_edge.bench.models import RANDOM

    with torch_extra():
        import torch

        from sana_edge.bench.random_model import write_model
        from sana_edge.bench.shapes import DENOISERS
        from sana_edge.store.architectures import GEMMA_2_2B
    shapes, sprint = RANDOM[order.model]
    tell("weights")
    write_model(
        Path(order.output),
        shapes,
        dtype=torch.bfloat16 if sprint else torch.float16,
        text_layers=1 if shapes == "tiny" else int(str(GEMMA_2_2B["num_hidden_layers"])),
        text_width=DENOISERS[shapes].caption_channels,
        force=False,
        sprint=sprint,
    )


def _make_package(order: Order, tell: Tell) -> None:
    with torch_extra():
        from sana_edge.bench.random_model import write_package
    tell("INT8 weights")
    write_package(Path(order.model), Path(order.output))


def _make_graphs(order: Order, tell: Tell) -> None:
    with export_extra():
        from sana_edge.export.onnx import export
        from sana_edge.export.settings import Settings
    settings = Settings(dtype="fp16" if order.dtype == "fp16" else "fp32", verify=False)
    export(
        order.model,
        Path(order.output),
        settings,
        offline=True,
        progress=lambda name, done, count: tell(f"graphs: {name}"),
    )


_MAKERS: dict[str, Callable[[Order, Tell], None]] = {
    "random": _make_random,
    "package": _make_package,
    "graphs": _make_graphs,
}
