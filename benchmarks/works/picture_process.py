"""What runs in a process of its own, and where engines do it cannot import torch.

    python benchmarks/works/picture_process.py cli generate --model onnx --prompt "a red house"

is the command line without torch. With a model folder and an output it draws two pictures, of different
prompts, with a whole Sprint model, and prints one JSON object. The first is what a user waits for after the
start, the second what each later one takes: nothing of it is known from the first but what does not depend on
the prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

BLOCKED = ("torch", "transformers", "diffusers", "onnx")

# near in length, so that only their words differ
PROMPTS = {
    "first": "a red house left of a yellow star, with two blue birds above it",
    "second": "a green boat right of a brown dog, with one white cloud below it",
}
SEED = 7

Draw = Callable[[str], tuple[Any, dict[str, float]]]
"""A prompt to the picture, which has ``save``, and seconds for "text", "denoise" and "decode"."""


class _Blocked:
    """A finder that refuses `BLOCKED`, before all others."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


def block() -> None:
    """Let every later import of `BLOCKED` fail."""
    sys.meta_path.insert(0, _Blocked())


def main() -> int:
    if sys.argv[1:2] == ["cli"]:
        block()
        from sana_edge.cli.main import main as cli

        return cli(sys.argv[2:])
    options = _options()
    if options.by not in ("diffusers", "torch"):
        block()
    draw = (_diffusers if options.by == "diffusers" else _ours)(options)
    # the first picture's time begins with the process
    before = options.started
    found: dict[str, Any] = {"load": time.time() - before}
    for name, prompt in PROMPTS.items():
        picture, seconds = draw(prompt)
        picture.save(options.output / f"{name}.png")
        found |= {f"{name} {part}": spent for part, spent in seconds.items()}
        found[name], before = time.time() - before, time.time()
    from sana_edge.system.memory import peak_memory

    print(json.dumps({**found, "peak": peak_memory()}))
    return 0


def _ours(options: argparse.Namespace) -> Draw:
    from sana_edge import Sana

    backend = options.by if options.by != "torch" else "auto"
    sana = Sana.load(options.model, device="cpu", dtype=options.dtype, backend=backend, offline=True)
    size = (options.size, options.size)

    def draw(prompt: str) -> tuple[Any, dict[str, float]]:
        image = sana.generate(prompt, seed=SEED, size=size, exact_size=True, steps=options.steps)
        return image, image.timings

    return draw


def _diffusers(options: argparse.Namespace) -> Draw:
    import torch
    from diffusers import SanaSprintPipeline

    from sana_edge.prompt import CHI
    from sana_edge.torch_runtime.device import DTYPES

    pipeline = SanaSprintPipeline.from_pretrained(options.model, torch_dtype=DTYPES[options.dtype])
    pipeline.set_progress_bar_config(disable=True)
    torch.set_grad_enabled(False)

    def draw(prompt: str) -> tuple[Any, dict[str, float]]:
        # the parts of one call of the pipeline, each on its own to be timed
        times = [time.perf_counter()]
        embeddings, mask = pipeline.encode_prompt(prompt, complex_human_instruction=list(CHI))
        times.append(time.perf_counter())
        latent = pipeline(
            prompt_embeds=embeddings,
            prompt_attention_mask=mask,
            num_inference_steps=options.steps,
            # its middle point is that of two steps
            **({} if options.steps == 2 else {"intermediate_timesteps": None}),
            width=options.size,
            height=options.size,
            generator=torch.Generator().manual_seed(SEED),
            use_resolution_binning=False,
            output_type="latent",
        ).images
        times.append(time.perf_counter())
        scaled = latent.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
        pixels = pipeline.vae.decode(scaled, return_dict=False)[0]
        (image,) = pipeline.image_processor.postprocess(pixels)
        times.append(time.perf_counter())
        parts = zip(("text", "denoise", "decode"), times[:-1], times[1:], strict=True)
        return image, {name: end - start for name, start, end in parts}

    return draw


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="draw two pictures and say how long they took")
    add = parser.add_argument
    add("model", help="a model folder, or an exported one for an engine")
    add("output", type=Path, help="a folder for the pictures")
    add("--by", required=True, help="diffusers, torch, or an engine")
    add("--dtype", required=True)
    add("--size", type=int, required=True)
    add("--steps", type=int, required=True)
    add("--started", type=float, required=True, help="when this process was started, seconds of time.time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
