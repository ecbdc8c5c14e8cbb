"""What batches through the denoiser save of many pictures, beside drawing them one by one.

    python benchmarks/bench_series.py --model sana-tiny --threads 2
    python benchmarks/bench_series.py --shapes 0.6b --layers 1 --size 512 --steps 1 --threads 2

Seconds of a picture, text to pixels, or of a step of the denoiser with random weights and some of its layers;
sizes of batches take turns in one run. Pixels, or velocities, are compared with those drawn one by one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers", "tqdm")

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from harness.results import ended, output_for, positive, sizes
from harness.run_tables import series
from sana_edge import Sana
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.config import LATENT_CELL
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_context import join_texts
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.request.request import Request
from sana_edge.torch_runtime.steps import make_predictor

BATCHES = (1, 2, 4, 8)
PROMPTS = ("a red house", "a blue boat", "a yellow star left of a tree", "a green fish")
TOKENS, GUIDANCE = 30, 4.5

# draws so many pictures together and returns them, as arrays of one kind
Draw = Callable[[int], list[NDArray[Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    return ended(lambda: run(_options(given), given))


def run(options: argparse.Namespace, given: Sequence[str]) -> None:
    torch.set_num_threads(options.threads)
    kind = f"-{options.shapes}" if options.shapes else f"-{Path(options.model).name}"
    output = output_for(options, f"bench_series{kind}{'-int8' if options.int8 else ''}")
    busy = load()
    if options.shapes:
        title = f"{options.shapes}, a step of {options.layers} layers at {options.size} px, fp32"
        rows = measure(random_steps(options), options.batches, options.repeat)
    else:
        how = {"int8": options.int8, "threads": options.threads, "backend": "torch", "prompt_cache": False}
        with Sana.load(options.model, **how) as sana:
            described = sana.description
            side = options.size or sana.native_size[0]
            title = f"{described['model']}, {side} px, {options.steps} steps, {described['dtype']}"
            rows = measure(pictures(sana, options, side), options.batches, options.repeat)
    data = {**header("benchmarks/bench_series.py", given), "title": title, "threads": options.threads}
    data |= {"repeat": options.repeat, "load_before": busy, "rows": rows}
    write_json(output, data)
    print(series([data]).text())
    print(output)


def measure(draw: Draw, batches: Sequence[int], repeat: int) -> list[dict[str, Any]]:
    """Median seconds of a picture by the size of its batch, and how far its values are from those alone."""
    alone = [draw(1)[0]]
    apart = {size: float(np.abs(draw(size)[0] - alone[0]).max()) for size in batches}
    found: dict[int, list[float]] = {size: [] for size in batches}
    for _ in tqdm(range(repeat), unit="turn", disable=not sys.stderr.isatty()):
        for size in batches:
            start = time.perf_counter()
            draw(size)
            found[size].append((time.perf_counter() - start) / size)
    base = found[batches[0]]
    return [
        {
            "batch": size,
            "seconds": seconds,
            "median": statistics.median(seconds),
            # turn by turn, as the machine may slow down between them
            "ratio": statistics.median(s / b for s, b in zip(seconds, base, strict=True)),
            "apart": apart[size],
        }
        for size, seconds in found.items()
    ]


def pictures(sana: Sana, options: argparse.Namespace, side: int) -> Draw:
    """Whole pictures of different prompts, as levels."""

    def draw(count: int) -> list[NDArray[Any]]:
        requests = [
            Request(PROMPTS[i % len(PROMPTS)], seed=i, steps=options.steps, size=(side, side))
            for i in range(count)
        ]
        if count == 1:
            images = [sana.generate(requests[0].prompt, seed=0, steps=options.steps, size=(side, side))]
        else:
            images = sana.batch(requests)
        return [image.pixels.astype(np.float32) for image in images]

    return draw


def random_steps(options: argparse.Namespace) -> Draw:
    """Guided steps of a denoiser with random weights: velocities."""
    torch.manual_seed(0)
    config = replace(DENOISERS[options.shapes], num_layers=options.layers)
    denoiser = Denoiser(config).requires_grad_(False).eval()
    predictor = make_predictor(denoiser, "torch", torch.device("cpu"))
    cells = options.size // LATENT_CELL
    texts, latents = [], torch.randn(max(options.batches), config.in_channels, cells, cells)
    for _ in latents:
        prompts = [torch.randn(1, length, config.caption_channels) for length in (1, TOKENS)]
        groups = [TextFeatures(p, torch.ones(p.shape[:2], dtype=torch.bool)) for p in prompts]
        texts.append(denoiser.text_context(groups))
    tables = denoiser.modulation(torch.tensor([500.0]))

    @torch.inference_mode()
    def draw(count: int) -> list[NDArray[Any]]:
        context = join_texts(texts[:count])
        velocity, _ = predictor.start(latents[:count], tables, context, GUIDANCE)
        for _ in range(options.steps):
            found = velocity(latents[:count], 0)
        return list(found.numpy())

    return draw


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sana-tiny", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--int8", action="store_true")
    shapes = "steps of a denoiser with random weights in place of a model's pictures"
    parser.add_argument("--shapes", choices=sorted(DENOISERS), help=shapes)
    parser.add_argument("--layers", type=positive, default=2, metavar="N", help="of --shapes")
    parser.add_argument("--size", type=positive, metavar="PX", help="(default: the model's own, or 512)")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batches", type=sizes, default=list(BATCHES), metavar="N,N", help="the first is 1")
    parser.add_argument("--repeat", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: in results/)")
    options = parser.parse_args(arguments)
    if options.shapes and options.size is None:
        options.size = 512
    return options


if __name__ == "__main__":
    sys.exit(main())
