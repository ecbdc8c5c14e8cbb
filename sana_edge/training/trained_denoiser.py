"""The denoiser as it is trained: all of it in one call, block by block, under the same parameter names.

`nets.denoiser.Denoiser` digests text and schedule before its loop. Here a block reads the text itself, so
that its call uses all of its parameters: they can be sharded by the block (FSDP), and its activations can be
computed again in the backward pass. On a CUDA device `int8.ops` takes Triton's kernels, which have
gradients, for linear attention and the middle of the Mix-FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana_edge.config import DenoiserConfig
from sana_edge.int8 import ops
from sana_edge.nets.block import RMS_EPS, Block
from sana_edge.nets.denoiser import FINAL_EPS, Denoiser
from sana_edge.nets.text_encoder import TextFeatures


class TrainedBlock(Block):
    """A block that gets the batch's modulation and projected captions, and digests them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shared: Tensor, caption: Tensor, mask: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """x (B, N, dim), shared modulation (B, 6, dim), caption (B, L, dim), mask (B, L), L at least 2."""
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.table + shared).unsqueeze(2).unbind(1)
        vectors = (shift, 1 + scale, gate, shift_ffn, 1 + scale_ffn, gate_ffn)
        return super().forward(x, vectors, (self.read(self.cross_kv(caption), mask),), size, False)


class TrainedDenoiser(Denoiser):
    """A `Denoiser` with fp32 weights, not initialised, whose call computes a whole prediction."""

    def __init__(self, config: DenoiserConfig, *, checkpointing: bool = False) -> None:
        """``checkpointing``: recompute each block in the backward pass instead of keeping its activations."""
        with torch.device("meta"):
            super().__init__(config)
            self.blocks = nn.ModuleList(TrainedBlock(config) for _ in range(config.num_layers))
        self.to_empty(device="cpu")
        self.checkpointing = checkpointing

    def forward(  # type: ignore[override]
        self, latent: Tensor, timesteps: Tensor, features: TextFeatures
    ) -> Tensor:
        """Velocity (B, C, H, W) of latents (B, C, H, W) at timesteps (B,), one row of text for each."""
        B, _, H, W = latent.shape
        x = self.patch(latent.to(self.dtype).flatten(2).transpose(1, 2))
        if self.config.interpolation_scale is not None:
            x = self._add_positions(x, H, W)
        embedded = self.time(timesteps * self.config.timestep_scale, self.dtype)
        shared = self.modulate(F.silu(embedded)).view(B, 6, -1)
        # under autocast the token stream stays in fp32
        x = x.to(self.dtype)
        caption, mask = self._project(features)
        for block in self.trained_blocks():
            if self.checkpointing:
                x = cast(Tensor, checkpoint(block, x, shared, caption, mask, (H, W), use_reentrant=False))
            else:
                x = block(x, shared, caption, mask, (H, W))
        shift, scale = (self.table + embedded[:, None]).unsqueeze(2).unbind(1)
        velocity: Tensor = self.head(ops.norm_modulate(x, 1 + scale, shift, FINAL_EPS))
        # no view, which the hooks of FSDP do not follow through changes in place
        return velocity.transpose(1, 2).reshape(B, -1, H, W).contiguous()

    def trained_blocks(self) -> Iterator[TrainedBlock]:
        """The blocks in their order."""
        return iter(cast("list[TrainedBlock]", list(self.blocks)))

    def _project(self, features: TextFeatures) -> tuple[Tensor, Tensor]:
        embeddings, mask = features.embeddings.to(self.dtype), features.mask
        # one token alone would not use the queries, and their gradient is waited for
        spare = max(0, 2 - mask.shape[1])
        embeddings, mask = F.pad(embeddings, (0, 0, 0, spare)), F.pad(mask, (0, spare))
        caption = self.caption_mix(F.gelu(self.caption_expand(embeddings), approximate="tanh"))
        return ops.rms_norm(caption, self.caption_norm, RMS_EPS), mask
