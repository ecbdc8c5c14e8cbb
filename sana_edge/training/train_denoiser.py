"""Step 3: the denoiser. `python -m sana_edge.training.train_denoiser --folder runs/dit --minutes 60`

Rectified flow (paper 3.2): x_t = (1 - sigma) x_0 + sigma noise, target velocity noise - x_0, sigma
logit-normal and shifted like the sampler's schedule. Captions are dropped for classifier-free guidance as an
empty negative prompt is: only the first token stays.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_edge.config import DenoiserConfig
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import TextEncoder, TextFeatures
from sana_edge.store.weights import load_state

from .captions import caption
from .latents import load_latents, numbered_scene
from .loop import Loop
from .muon import Muon
from .state import ema_state

CONFIG = DenoiserConfig.from_dict(
    {
        "in_channels": 32,
        "out_channels": 32,
        "num_layers": 8,
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": 192,
        "caption_channels": 128,
        "mlp_ratio": 2.5,
        "sample_size": 8,
        "patch_size": 1,
        "interpolation_scale": None,
    }
)
FLOW_SHIFT = 3.0
DROPOUT = 0.1


def initialise(model: nn.Module) -> None:
    """Matrices are Glorot's; modulation and output start at zero, so blocks start as the identity."""
    for name, p in model.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(p, std=0.02)
        elif p.ndim == 2:
            nn.init.xavier_uniform_(p)
    for name in ("head.weight", "head.bias", "modulate.weight", "modulate.bias"):
        nn.init.zeros_(model.get_parameter(name))


@torch.no_grad()
def whiten_captions(model: Denoiser, encoder: TextEncoder) -> None:
    """Starts the caption projection on whitened features, with its biases and first weights.

    A language model's last features tell mostly what comes next: of their variance at the word for an object,
    less than a hundredth depends on which object it is, and a denoiser takes long to find it. Behind this
    whitening it is a seventh. Directions of less than a thousandth of the mean variance stay small.
    """
    rng = random.Random("whitening")
    texts = [caption(numbered_scene(i), rng) for i in range(1024)]
    batches = [encoder.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]
    features = torch.cat([f.embeddings[f.mask] for f in batches]).double()
    mean = features.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(features.T))
    whiten = axes * (variances + 1e-3 * variances.mean()).rsqrt() @ axes.T
    for layer in (model.caption_expand, model.caption_mix):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    weight = model.caption_expand.weight.double() @ whiten
    model.caption_expand.weight.copy_(weight)
    model.caption_expand.bias.copy_(-weight @ mean)


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [
        p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks.") and "table" not in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, rate, weight_decay=0.01),
        torch.optim.AdamW(rest, rate / 2, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def text_features(encoder: TextEncoder, texts: list[str], device: torch.device) -> TextFeatures:
    """Features of a batch; a dropped caption ("") keeps its first token alone."""
    features = encoder.encode([t or "a" for t in texts])
    mask = features.mask.clone()
    for row, text in enumerate(texts):
        if not text:
            mask[row, 1:] = False
    return replace(features, embeddings=features.embeddings.to(device), mask=mask.to(device))


def starting_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a training folder, or of a component folder in diffusers layout, in fp32."""
    if (folder / "config.json").exists():
        stored = {name: tensor.float() for name, tensor in load_state(folder).items()}
        return Denoiser.from_diffusers(CONFIG, stored).state_dict()
    return ema_state(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="train the denoiser of a small model of the shapes")
    parser.add_argument("--folder", type=Path, default=Path("runs/dit"))
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"))
    parser.add_argument(
        "--text", type=Path, default=Path("runs/model"), help="folder with tokenizer/ and text_encoder/"
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--start", type=Path, help="training folder, or a model's transformer/, whose weights to begin with"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Denoiser(CONFIG)
    encoder = TextEncoder.load(args.text, dtype=torch.float32, device="cpu")
    if args.start:
        model.load_state_dict(starting_state(args.start))
    else:
        initialise(model)
        whiten_captions(model, encoder)
    loop = Loop(
        model, optimizers(model, args.rate), args.folder, minutes=args.minutes, ema_decay=0.998, warmup=200
    )
    device = loop.accelerator.device
    latents = load_latents(args.latents)
    scale = 1 / float(latents.float().std())
    scenes = [numbered_scene(i) for i in range(len(latents))]
    torch.manual_seed(loop.step)
    rng = random.Random(f"denoiser {loop.step}")
    print(f"{len(latents)} latents, scaling factor {scale:.5f}")

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        numbers = rng.choices(range(len(scenes)), k=args.batch)
        texts = ["" if rng.random() < DROPOUT else caption(scenes[i], rng) for i in numbers]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            features = text_features(encoder, texts, device)
        clean = latents[numbers].to(device).float() * scale
        uniform = torch.randn(args.batch, device=device).sigmoid()
        sigma = (FLOW_SHIFT * uniform / (1 + (FLOW_SHIFT - 1) * uniform))[:, None, None, None]
        noise = torch.randn_like(clean)
        context = model.text_context([features])
        modulation = model.modulation(1000 * sigma.flatten())
        velocity = model((1 - sigma) * clean + sigma * noise, modulation, context)
        return (velocity.float() - (noise - clean)).square().mean(), {}

    loop.run(loss)


if __name__ == "__main__":
    main()
