"""The weights that a training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_edge.config import DenoiserConfig
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.store.weights import load_state


@torch.no_grad()
def initialise(model: Denoiser, *, seed: int, caption_norm: float) -> None:
    """Fill every parameter.

    Linear layers are Glorot's, convolutions torch's own; biases are zero. Modulation and output start at
    zero, so blocks start as the identity. The caption norm starts at a small scale, without which a language
    model's large features make training unstable (arXiv 2410.10629, section 2.3).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind == "table":
                nn.init.normal_(parameter, std=0.02)
            elif kind == "bias":
                nn.init.zeros_(parameter)
            elif kind == "weight" and parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif kind == "weight":
                nn.init.kaiming_uniform_(parameter, a=5**0.5)
            else:
                nn.init.ones_(parameter)
    model.caption_norm.fill_(caption_norm)
    for layer in (model.head, model.modulate):
        nn.init.zeros_(layer.weight)


@torch.no_grad()
def whiten_captions(model: Denoiser, encoder: TextEncoder, texts: Sequence[str]) -> None:
    """Start the caption projection on whitened features of ``texts``.

    A language model's last features tell mostly what comes next: of their variance at the word for an object,
    less than a hundredth depends on which object it is, and a denoiser takes long to find it. Behind this
    whitening it is a seventh. Directions of less than a thousandth of the mean variance stay small.
    """
    batches = [encoder.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)]
    features = torch.cat([f.embeddings[f.mask] for f in batches]).double().cpu()
    variances, axes = torch.linalg.eigh(torch.cov(features.T))
    whiten = axes * (variances + 1e-3 * variances.mean()).rsqrt() @ axes.T
    weight = model.caption_expand.weight.double() @ whiten
    model.caption_expand.weight.copy_(weight)
    model.caption_expand.bias.copy_(-weight @ features.mean(0))


def component_state(config: DenoiserConfig, folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The fp32 weights of a ``transformer/`` in diffusers layout.

    Raises:
        CheckpointError: they are missing, damaged or of another denoiser.
    """
    stored = {name: tensor.float() for name, tensor in load_state(folder, variant=variant).items()}
    return Denoiser.from_diffusers(config, stored).state_dict()
