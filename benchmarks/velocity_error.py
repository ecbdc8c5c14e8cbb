"""The error that INT8 brings into the velocity of a full-size denoiser with random weights.

    python benchmarks/velocity_error.py --shapes 0.6b

The weights are those that diffusers' class starts with: no checkpoint can be had on a machine without a
network. Weights of unit gain with large gates, as `bench_image.py` draws them, let more rounding through; its
results have their error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from record import ended, header, positive, write_json
from shapes import DENOISERS

from sana_edge.config import LATENT_CELL
from sana_edge.int8 import quant
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.sampler import make_sampler

RESULTS = Path(__file__).parent / "results"
TOKENS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


@torch.inference_mode()
def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    from diffusers import SanaTransformer2DModel

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = DENOISERS[options.shapes]
    state = SanaTransformer2DModel(**asdict(config)).state_dict()
    denoiser = Denoiser.from_diffusers(config, state).requires_grad_(False).eval()
    denoiser.clamp = True
    side = options.size // LATENT_CELL
    latent = torch.randn(1, config.in_channels, side, side).expand(2, -1, -1, -1)
    captions = torch.randn(2, TOKENS, config.caption_channels)
    groups = [
        TextFeatures(captions[:1, :1], torch.ones(1, 1)),
        TextFeatures(captions[1:], torch.ones(1, TOKENS)),
    ]
    times = torch.from_numpy(make_sampler("flow-dpm", steps=20).timesteps[[0, 10, 19]])

    def velocities() -> list[torch.Tensor]:
        texts, tables = denoiser.text_context(groups), denoiser.modulation(times)
        return [denoiser(latent, tables[step], texts) for step in range(len(times))]

    expected = velocities()
    quantize_denoiser(denoiser)
    errors = [quant.relative_error(*pair) for pair in zip(velocities(), expected, strict=True)]
    data = {
        **header("benchmarks/velocity_error.py", given),
        "shapes": options.shapes,
        "layers": config.num_layers,
        "activations": "token",
        "errors": {f"{int(time)}": round(error, 5) for time, error in zip(times, errors, strict=True)},
    }
    write_json(options.output or RESULTS / f"velocity_error-{options.shapes}.json", data)
    for time, error in data["errors"].items():
        print(f"timestep {time:>3}: relative L2 error of the velocity {100 * error:.2f} %")


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="velocity_error.py", description="Measure INT8's error.")
    add = parser.add_argument
    add("--shapes", choices=DENOISERS, default="0.6b", help="(default: %(default)s)")
    add(
        "--size", type=positive, default=1024, metavar="PX", help="side of the picture (default: %(default)s)"
    )
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and inputs (default: %(default)s)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
