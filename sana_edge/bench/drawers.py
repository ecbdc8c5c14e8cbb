"""Contenders that draw: this package on any backend, and diffusers, each with its stages timed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sana_edge.bench.order import Order
from sana_edge.config import DenoiserConfig, SamplerConfig
from sana_edge.errors import extra, torch_extra
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub
from sana_edge.store.folder import read_json
from sana_edge.system.threads import cpu_threads

_ENGINES = ("onnxruntime", "openvino", "tensorrt")

Tell = Callable[[str], None]


class Drawer:
    """A loaded contender. ``draw`` gives the picture, which has ``save``, and seconds by stage."""

    def draw(self, request: Request, tell: Tell) -> tuple[Any, dict[str, float]]:
        raise NotImplementedError

    facts: Mapping[str, Any]


def loaded(order: Order) -> Drawer:
    """The contender, ready to draw; errors are those of `sana_edge.Sana.load`."""
    return _Diffusers(order) if order.by == "diffusers" else _Ours(order)


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
            # each picture pays for its text
            prompt_cache=False,
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

    from sana_edge.torch_runtime.device import computes_bf16

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if computes_bf16() else "fp32"


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
