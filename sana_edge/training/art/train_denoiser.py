"""The denoiser: `python -m sana_edge.training.art.train_denoiser --minutes 600`

Rectified flow as in `training.train_denoiser`, on stored latents and stored features of captions.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor

from sana_edge.nets.denoiser import Denoiser

from ..loop import Loop
from ..train_denoiser import CONFIG, DROPOUT, FLOW_SHIFT, initialise, optimizers, starting_state
from .latents import CAPTIONS, Captions, load, scale_of


@torch.no_grad()
def whiten(model: Denoiser, features: Tensor) -> None:
    """Starts the caption projection on whitened features (tokens, C), as `train_denoiser.whiten_captions`."""
    features = features.double()
    mean = features.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(features.T))
    whitening = axes * (variances + 1e-3 * variances.mean()).rsqrt() @ axes.T
    for layer in (model.caption_expand, model.caption_mix):
        torch.nn.init.xavier_uniform_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    weight = model.caption_expand.weight.double() @ whitening
    model.caption_expand.weight.copy_(weight)
    model.caption_expand.bias.copy_(-weight @ mean)


def starting_model(start: Path | None, captions: Captions) -> Denoiser:
    """A denoiser with the weights of `start`, if any, and the caption projection begun on these features."""
    model = Denoiser(CONFIG)
    if start:
        model.load_state_dict(starting_state(start))
    else:
        initialise(model)
    whiten(model, captions.features[torch.randperm(len(captions.features))[:65536]])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="train the denoiser of sana-tiny on stored latents")
    parser.add_argument("--folder", type=Path, default=Path("runs/dit"))
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"))
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="training folder, or a model's transformer/")
    args = parser.parse_args()

    torch.manual_seed(0)
    latents, captions = load(args.latents)
    model = starting_model(args.start, captions)
    loop = Loop(
        model,
        optimizers(model, args.rate),
        args.folder,
        minutes=args.minutes,
        precision="no",
        ema_decay=0.998,
        warmup=200,
    )
    scale = scale_of(latents)
    torch.manual_seed(loop.step)
    rng = random.Random(f"denoiser {loop.step}")
    print(f"{len(latents)} latents, scaling factor {scale:.5f}")

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        numbers = rng.choices(range(len(latents)), k=args.batch)
        rows = [CAPTIONS * i + rng.randrange(CAPTIONS) for i in numbers]
        features = captions.batch(rows, [rng.random() < DROPOUT for _ in rows])
        clean = latents[numbers].float() * scale
        uniform = torch.randn(args.batch).sigmoid()
        sigma = (FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform))[:, None, None, None]
        noise = torch.randn_like(clean)
        context = model.text_context([features])
        velocity = model(
            (1 - sigma) * clean + sigma * noise, model.modulation(1000 * sigma.flatten()), context
        )
        return (velocity - (noise - clean)).square().mean(), {}

    loop.run(loss)


if __name__ == "__main__":
    main()
