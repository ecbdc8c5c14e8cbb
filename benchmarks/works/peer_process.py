"""One contender of `bench_peers.py` in a process of its own, by the Python of its environment.

    ENVIRONMENT/bin/python benchmarks/works/peer_process.py JOB

reads a job of JSON, draws the same picture several times and prints what it took as one object of JSON. It
imports nothing of this project but for the contenders that are this project's. A job with "make" writes that
folder instead, which later jobs load.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "sdnq",
    "bitsandbytes",
    "torchao",
    "optimum-intel",
    "openvino",
)

Job = dict[str, Any]
Draw = Callable[[Callable[[], None]], Any]
"""Draws the picture, with a call after each step, and returns it: it has ``save``."""


def main() -> int:
    job: Job = json.loads(sys.argv[1])
    began = time.perf_counter()
    if job["by"] != "sana-edge":
        import torch

        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
    draw = _DRAWERS[job["by"]](job)
    if draw is None:
        print(json.dumps({"made": time.perf_counter() - began}))
        return 0
    loaded = time.perf_counter()
    # the first one compiles, and makes what is kept
    first = _timed(draw, job["output"])
    runs = [_timed(draw, job["output"]) for _ in range(job["pictures"])]
    seconds = {name: statistics.median(run[name] for run in runs) for name in first}
    found = {"load": loaded - began, "first": first["picture"], **seconds, "peak": _peak()}
    print(json.dumps({**found, "versions": _versions()}))
    return 0


def _timed(draw: Draw, output: str) -> dict[str, float]:
    """Seconds of a picture without its file, of a step after the first, and from the last one to pixels."""
    ends = []
    start = time.perf_counter()
    picture = draw(lambda: ends.append(time.perf_counter()))
    end = time.perf_counter()
    # this project's pictures replace no file
    Path(output).unlink(missing_ok=True)
    picture.save(output)
    steps = [b - a for a, b in itertools.pairwise(ends)]
    return {"picture": end - start, "step": statistics.median(steps), "decode": end - ends[-1]}


def _diffusers(job: Job) -> Draw:
    return _drawer(_pipeline(job), job)


def _compiled(job: Job) -> Draw:
    pipeline = _pipeline(job)
    pipeline.transformer.compile()
    pipeline.vae.decoder.compile()
    return _drawer(pipeline, job)


def _sdnq(job: Job) -> Draw:
    """As its documentation has it, with the products of convolutions, which are off unless asked for."""
    from sdnq import sdnq_post_load_quant

    pipeline = _pipeline(job)
    how = {"weights_dtype": "int8", "quant_conv": True}
    how |= {"use_quantized_matmul": True, "use_quantized_matmul_conv": True}
    pipeline.transformer = sdnq_post_load_quant(pipeline.transformer, **how)
    pipeline.vae.decoder = sdnq_post_load_quant(pipeline.vae.decoder, **how)
    return _drawer(pipeline, job)


def _bitsandbytes(job: Job) -> Draw:
    """Linear layers of the denoiser: what its quantizer knows, and all that diffusers lets it have."""
    import torch
    from diffusers import BitsAndBytesConfig, SanaTransformer2DModel

    transformer = SanaTransformer2DModel.from_pretrained(
        f"{job['folder']}/transformer",
        variant=job["variant"],
        torch_dtype=getattr(torch, job["dtype"]),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    return _drawer(_pipeline(job, transformer=transformer), job)


def _torchao(job: Job) -> Draw:
    """Linear layers of the denoiser, weights and activations in INT8."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    pipeline = _pipeline(job)
    quantize_(pipeline.transformer, Int8DynamicActivationInt8WeightConfig())
    return _drawer(pipeline, job)


def _optimum(job: Job) -> Draw | None:
    from optimum.intel import OVSanaPipeline

    if job["make"]:
        made = OVSanaPipeline.from_pretrained(
            job["folder"], export=True, load_in_8bit=job["int8"], compile=False, **_variant(job)
        )
        made.save_pretrained(job["make"])
        return None
    threads = {"INFERENCE_NUM_THREADS": str(job["threads"])}
    return _drawer(OVSanaPipeline.from_pretrained(job["made"], ov_config=threads), job)


def _ours(job: Job) -> Draw:
    from sana_edge import Sana

    how = {name: job[name] for name in ("backend", "dtype", "int8", "threads")}
    sana = Sana.load(job["folder"], device="cpu", offline=True, prompt_cache=False, **how)
    asked = {name: job[name] for name in ("steps", "guidance", "seed", "size")}

    def draw(step: Callable[[], None]) -> Any:
        def note(stage: str, done: int, count: int) -> None:
            if stage == "denoise":
                step()

        return sana.generate(job["prompt"], exact_size=True, on_progress=note, **asked)

    return draw


def _pipeline(job: Job, **components: Any) -> Any:
    import torch
    from diffusers import SanaPipeline

    return SanaPipeline.from_pretrained(
        job["folder"], torch_dtype=getattr(torch, job["dtype"]), **_variant(job), **components
    )


def _variant(job: Job) -> dict[str, str]:
    return {"variant": job["variant"]} if job["variant"] else {}


def _drawer(pipeline: Any, job: Job) -> Draw:
    import numpy as np
    import torch

    pipeline.set_progress_bar_config(disable=True)
    width, height = job["size"]
    latents = torch.from_numpy(np.load(job["latents"], allow_pickle=False))

    def draw(step: Callable[[], None]) -> Any:
        def ended(*given: Any) -> dict[str, Any]:
            step()
            return {}

        return pipeline(
            job["prompt"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            width=width,
            height=height,
            latents=latents.clone(),
            complex_human_instruction=job["instruction"],
            use_resolution_binning=False,
            callback_on_step_end=ended,
        ).images[0]

    return draw


_DRAWERS: dict[str, Callable[[Job], Draw | None]] = {
    "diffusers": _diffusers,
    "compiled": _compiled,
    "sdnq": _sdnq,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "optimum": _optimum,
    "sana-edge": _ours,
}


def _peak() -> int | None:
    """The process's highest resident size in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
