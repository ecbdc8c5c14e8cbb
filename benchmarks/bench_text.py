"""What INT8 costs a prompt's features, and the pictures drawn from them, by how activations are rounded.

    python benchmarks/bench_text.py --prompts 12 --threads 1

Against the float model in fp32: the library in bf16; INT8 weights with activations in two digits, as the
CUDA kernels and the CPU multiply them; the same with one digit, as the denoiser's products have it.
Features of sana-tiny and of Gemma-2-2B's widths with random weights, cut to --layers; pictures of sana-tiny,
all else fp32.
Everything is computed by the definitions in torch: this is about numbers, not about time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from harness import needs

needs("torch", "transformers")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench_tokens import cut_encoder
from harness.results import ended, output_for, positive, say
from harness.study_tables import text_features
from sana_edge import Sana
from sana_edge.bench.results import header, write_json
from sana_edge.fused import gemma
from sana_edge.image_metrics import psnr
from sana_edge.int8.text_linear import WeightOnlyLinear, quantize_weight
from sana_edge.kernels import reference_gemma
from sana_edge.nets.text_encoder import EncodedTexts, TextEncoder, TextFeatures
from sana_edge.nets.text_weights import text_targets
from sana_edge.prompt import CHI
from sana_edge.store.hub import resolve
from sana_edge.store.known_models import BUNDLED
from sana_edge.torch_runtime.cuda_graph import eager
from sana_edge.torch_runtime.load import load_decoder, load_denoiser
from sana_edge.torch_runtime.runtime import TorchRuntime
from sana_edge.torch_runtime.text import RecordedGemma
from sana_edge.training.train_text_encoder import captions

# a text encoder with random weights has words of its own: any numbers will do
SEED = 4711
# a float encoder in a dtype
Make = Callable[[torch.dtype], TextEncoder]
WAYS = ("bf16", "INT8, two digits", "INT8, one digit")


def quantized(encoder: TextEncoder) -> TextEncoder:
    """The same encoder with INT8 projections on the fused operations' definitions; it keeps fp32."""
    model = encoder.model
    for name in text_targets(len(model.layers)):
        layer = model.get_submodule(name)
        values, scales = quantize_weight(layer.weight.detach(), name)
        model.set_submodule(name, WeightOnlyLinear(values, scales, layer.bias))
    encoder.network = RecordedGemma(gemma.FusedGemma(model, "torch"), eager)
    return encoder


def one_digit(x: Tensor) -> tuple[Tensor, Tensor]:
    """`split_digits` without its low digit."""
    digits, steps = reference_gemma.split_digits(x)
    digits[..., 1, :] = 0
    return digits, steps


def features(make: Make, way: str, prompts: Sequence[str]) -> list[Tensor]:
    """Of each prompt, in fp32; ``way`` of `WAYS`, or fp32."""
    encoder = make(torch.bfloat16 if way == "bf16" else torch.float32)
    if not way.startswith("INT8"):
        return [encoder.encode([prompt]).embeddings.float() for prompt in prompts]
    digits = one_digit if way.endswith("one digit") else reference_gemma.split_digits
    with mock.patch.object(reference_gemma, "split_digits", digits):
        encoder = quantized(encoder)
        return [encoder.encode([prompt]).embeddings for prompt in prompts]


def compare(
    name: str, make: Make, prompts: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, list[Tensor]]]:
    """Each way's relative error over all prompts, and of the worst one; and the features."""
    found = {"fp32": features(make, "fp32", prompts)}
    rows = []
    for way in WAYS:
        say(name, way)
        found[way] = features(make, way, prompts)
        pairs = list(zip(found[way], found["fp32"], strict=True))
        errors = [float((ours - exact).norm() / exact.norm()) for ours, exact in pairs]
        off = sum(float((ours - exact).square().sum()) for ours, exact in pairs)
        size = sum(float(exact.square().sum()) for _, exact in pairs)
        rows.append({"encoder": name, "way": way, "error": (off / size) ** 0.5, "worst": max(errors)})
    return rows, found


class Given(EncodedTexts):
    """Features that stand for prompts."""

    def put(self, prompt: str, embeddings: Tensor) -> None:
        """Those of a prompt behind the instruction, one row and no padding."""
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
        self._known[prompt, tuple(CHI)] = TextFeatures(embeddings, mask)


def pictures(prompts: Sequence[str], found: dict[str, list[Tensor]], steps: int) -> list[dict[str, Any]]:
    """PSNR of sana-tiny's pictures from each way's features to those from fp32's, of each prompt.

    None is that of equal pictures.
    """
    device, model = torch.device("cpu"), resolve("sana-tiny")
    denoiser = load_denoiser(model, device=device, dtype="fp32")[0]
    decoder = load_decoder(model, device=device, dtype=torch.float32)
    encoder = TextEncoder.load(model.path, dtype=torch.float32, device="cpu")

    def draw(way: str) -> list[NDArray[np.uint8]]:
        say("pictures", way)
        texts = Given()
        texts.add(encoder, "", instruction=None)
        for prompt, embeddings in zip(prompts, found[way], strict=True):
            texts.put(prompt, embeddings)
        runtime = TorchRuntime.of_networks(model, texts, denoiser, decoder, device)
        with Sana(runtime) as sana:
            return [sana.generate(prompt, seed=SEED, steps=steps).pixels for prompt in prompts]

    exact, rows = draw("fp32"), []
    for way in WAYS:
        near = [psnr(ours, theirs) for ours, theirs in zip(draw(way), exact, strict=True)]
        rows.append({"way": way, "psnr": [value if math.isfinite(value) else None for value in near]})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


@torch.inference_mode()
def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    output = output_for(options, "bench_text")
    prompts = list(itertools.islice(captions(SEED), options.prompts))
    data = {**header("benchmarks/bench_text.py", given), "layers": options.layers, "steps": options.steps}
    data |= {"prompts": len(prompts), "threads": options.threads}
    wide = f"Gemma-2-2B's widths, {options.layers} of 26 layers"

    def tiny(dtype: torch.dtype) -> TextEncoder:
        return TextEncoder.load(BUNDLED / "sana-tiny", dtype=dtype, device="cpu")

    def cut(dtype: torch.dtype) -> TextEncoder:
        encoder = cut_encoder(options.layers)
        encoder.model.to(dtype)
        return encoder

    rows, found = compare("sana-tiny", tiny, prompts)
    data["features"] = rows
    data["pictures"] = pictures(prompts, found, options.steps)
    write_json(output, data)
    data["features"] = [*rows, *compare(wide, cut, prompts[:2])[0]]
    write_json(output, data)
    print(text_features(data).text())
    print(output)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_text.py", description="What INT8 costs a prompt's features.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--prompts", type=positive, default=12, metavar="N", help="(default: %(default)s)")
    add("--layers", type=positive, default=4, metavar="N", help="of Gemma-2-2B (default: %(default)s)")
    add("--steps", type=positive, default=8, metavar="N", help="of a picture (default: %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_text.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
