"""A process of its own: it loads one contender and draws, or makes a folder that contenders draw with.

Its argument is an `Order` as JSON, its output lines of JSON: {"at": ...} as it goes on, and the result last.
The first picture is what a user waits for after the start; of the later ones nothing is known from the first
but what does not depend on the prompt.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_edge.bench.machine import BF16_PRODUCTS, instructions, versions
from sana_edge.bench.meters import DeviceMemory, Energy, nvml
from sana_edge.config import DenoiserConfig, SamplerConfig
from sana_edge.errors import SanaError, extra, torch_extra
from sana_edge.request import Plan, Request
from sana_edge.store import hub
from sana_edge.store.folder import read_json
from sana_edge.system.memory import memory_errors, peak_memory
from sana_edge.system.threads import cpu_threads

SEED = 7
# near in length, so that only their words differ
FIRST = "a red house left of a yellow star, with two blue birds above it"
LATER = "a {} boat right of a brown dog, with one white cloud below it"
COLOURS = ("green", "blue", "black", "purple", "orange", "grey")
# a process draws until it has spent so many seconds on later pictures, at most one of each colour
ENOUGH = 2.0
STAGES = ("load", "first", "picture", "text", "step", "loop", "decode", "save")
"""Of a run: seconds from the start of the process until the model is loaded, and until the first picture is
saved; then of a later picture with its file, its text, one step, all steps, the decode, and the file."""
_ENGINES = ("onnxruntime", "openvino", "tensorrt")
_PACKAGES = (
    *("sana-edge", "numpy", "torch", "transformers", "diffusers"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"),
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What a process does.

    by: "torch", an engine or "diffusers", which draw; "random", "package" or "graphs", which make ``output``;
    model: a folder, of "random" a name of `sana_edge.bench.models.RANDOM`; started: seconds of `time.time`;
    dtype: of the denoiser, "half" for 16 bit where the machine multiplies that in hardware; output: the first
    picture's file, or the folder.
    """

    by: str
    model: str
    output: str
    started: float
    size: tuple[int, int] = (0, 0)
    steps: int = 0
    threads: int | None = None
    dtype: str = "fp32"
    device: str = "auto"

    @classmethod
    def read(cls, text: str) -> Order:
        values = json.loads(text)
        return cls(**{**values, "size": tuple(values["size"])})

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def request(self, prompt: str) -> Request:
        return Request(prompt, size=self.size, exact_size=True, steps=self.steps, seed=SEED)


class Drawer:
    """A loaded contender. ``draw`` gives the picture, which has ``save``, and seconds by stage."""

    def draw(self, request: Request, tell: Tell) -> tuple[Any, dict[str, float]]:
        raise NotImplementedError

    facts: Mapping[str, Any]


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


def loaded(order: Order) -> Drawer:
    """The contender, ready to draw; errors are those of `sana_edge.Sana.load`."""
    return _Diffusers(order) if order.by == "diffusers" else _Ours(order)


def _timed(drawer: Drawer, order: Order, prompt: str, tell: Tell) -> dict[str, float]:
    start = time.perf_counter()
    picture, seconds = drawer.draw(order.request(prompt), tell)
    drawn = time.perf_counter()
    path = Path(order.output).with_suffix(".later.png")
    picture.save(path)
    end = time.perf_counter()
    path.unlink()
    return {"picture": end - start, **seconds, "save": end - drawn}


class _Ours(Drawer):
    def __init__(self, order: Order) -> None:
        from sana_edge import Sana

        engine, dtype = order.by in _ENGINES, order.dtype
        if dtype == "half":
            # engines know for themselves
            with torch_extra():
                dtype = "auto" if engine else half()
        self._sana = Sana.load(
            order.model,
            backend=order.by if engine else "auto",
            dtype=dtype,
            device=order.device,
            offline=True,
            threads=order.threads,
        )

    def draw(self, request: Request, tell: Tell) -> tuple[Any, dict[str, float]]:
        ends: list[float] = []

        def note(stage: str, done: int, count: int) -> None:
            if stage == "denoise":
                ends.append(time.perf_counter())
                tell(f"step {done} of {count}")

        image = self._sana.generate(
            request.prompt,
            size=request.size,
            exact_size=True,
            steps=request.steps,
            seed=request.seed,
            on_progress=note,
        )
        shown = {name: image.metadata.get(name) for name in ("dtype", "backend", "quantization")}
        self.facts = {**shown, "notes": list(image.notes)}
        took = image.timings
        return image, _stages(took["text"], took["denoise"], took["decode"], ends)


def _stages(text: float, loop: float, decode: float, ends: list[float]) -> dict[str, float]:
    """A step is the median of those after the first, which also prepares; of a single one the loop."""
    steps = [b - a for a, b in itertools.pairwise(ends)]
    return {"text": text, "step": statistics.median(steps) if steps else loop, "loop": loop, "decode": decode}


def half() -> str:
    """The 16 bit that torch multiplies in hardware here, else "fp32"."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    # on Apple's processors torch has no fast products of it
    fast = sys.platform != "darwin" and set(BF16_PRODUCTS) & (instructions() or set())
    return "bf16" if fast else "fp32"


def plan_of(folder: Path, request: Request) -> Plan:
    """A request's plan for a model folder, without loading the model."""
    config = DenoiserConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    sampler = SamplerConfig.from_dict(read_json(folder / "scheduler" / "scheduler_config.json"))
    return request.plan(config.native_size, sampler.kind)


# what `encode_prompt` returns, of Sprint's pipeline the first two
_ENCODED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


class _Diffusers(Drawer):
    """diffusers' own pipeline on the same weights, from the same noise and with as many threads."""

    def __init__(self, order: Order) -> None:
        with extra("bench", "diffusers", "torch", "transformers"):
            import torch
            from diffusers import DiffusionPipeline
            from diffusers.utils import logging

            from sana_edge.torch_runtime.device import DTYPES
        logging.disable_progress_bar()
        torch.set_grad_enabled(False)
        threads = cpu_threads(order.threads)
        if threads is not None:
            torch.set_num_threads(threads)
        dtype = half() if order.dtype == "half" else order.dtype
        found = hub.resolve(order.model, offline=True, progress=False)
        pipeline = DiffusionPipeline.from_pretrained(
            found.path, variant=found.component_variant("transformer"), torch_dtype=DTYPES[dtype]
        )
        if dtype == "fp16":
            # as its documentation wants it
            pipeline.text_encoder.to(torch.bfloat16)
            pipeline.vae.to(torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        self._torch, self._folder = torch, found.path
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._pipeline = pipeline.to(device if order.device == "auto" else order.device)
        self.facts = {"dtype": dtype, "backend": "diffusers", "quantization": None, "notes": []}

    def draw(self, request: Request, tell: Tell) -> tuple[Any, dict[str, float]]:
        from sana_edge.prompt import CHI

        pipeline, plan = self._pipeline, plan_of(self._folder, request)
        ends: list[float] = []

        def step(*given: Any) -> dict[str, Any]:
            ends.append(self._now())
            tell(f"step {len(ends)} of {plan.steps}")
            return {}

        # the parts of one call of the pipeline, each on its own to be timed
        times = [self._now()]
        encoded = pipeline.encode_prompt(plan.prompt, complex_human_instruction=list(CHI))
        times.append(self._now())
        options: dict[str, Any] = dict(zip(_ENCODED, encoded, strict=False))
        if len(encoded) == 4:
            options["negative_prompt"] = None
        elif plan.steps != 2:
            # Sprint's middle point is that of two steps
            options["intermediate_timesteps"] = None
        latent = pipeline(
            **options,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
            width=plan.width,
            height=plan.height,
            generator=self._torch.Generator().manual_seed(plan.seed),
            use_resolution_binning=False,
            output_type="latent",
            callback_on_step_end=step,
        ).images
        times.append(self._now())
        scaled = latent.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
        pixels = pipeline.vae.decode(scaled, return_dict=False)[0]
        (image,) = pipeline.image_processor.postprocess(pixels)
        times.append(self._now())
        text, loop, decode = (end - start for start, end in itertools.pairwise(times))
        return image, _stages(text, loop, decode, ends)

    def _now(self) -> float:
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
        return time.perf_counter()


def _make_random(order: Order, tell: Tell) -> None:
    from sana_edge.bench.models import RANDOM

    with torch_extra():
        import torch

        from sana_edge.bench.random_model import GEMMA_2_2B, write_model
        from sana_edge.bench.shapes import DENOISERS
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
    from sana_edge.errors import export_extra

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


def command(order: Order) -> list[str]:
    """What runs an order in a process of its own, also where this program is frozen."""
    program = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "sana_edge"]
    return [*program, "bench", "--worker", order.text()]


def failure(error: SanaError) -> str:
    """Why a process failed, for people: without the words that all failures share."""
    text = error.message.partition(" failed: ")[2] or error.message
    return text.removeprefix("error: ").replace(" hint:  ", "; ").strip()
