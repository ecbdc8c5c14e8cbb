"""The Linear DiT with INT8 layers on the fused operations: on CUDA nine launches a layer and three."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sana_edge.fused import ops
from sana_edge.fused.block import FusedBlock
from sana_edge.fused.text import FusedText
from sana_edge.nets.block import Block
from sana_edge.nets.denoiser import FINAL_EPS, Denoiser, Modulation


class FusedDenoiser:
    """A `Denoiser` for inference in its dtype, with tensors as the kernels of a backend take them.

    It shares the weights. Text and schedule are digested by the denoiser; what is not INT8 runs as there.
    """

    def __init__(self, denoiser: Denoiser, backend: str) -> None:
        self.config, self.backend, self.dtype = denoiser.config, backend, denoiser.dtype
        self._denoiser = denoiser
        self._blocks = [
            FusedBlock(block, backend=backend, dtype=denoiser.dtype, clamp=denoiser.clamp)
            for block in cast("list[Block]", list(denoiser.blocks))
        ]
        patch, head = denoiser.patch, denoiser.head
        self._patch = patch.weight.detach().float().t().contiguous(), patch.bias.detach().float()
        self._head = head.weight.detach().float().contiguous(), head.bias.detach().float()

    def positions(self, height: int, width: int) -> Tensor | None:
        """What `step` adds to the tokens of a size, (height · width, dim) fp32 or None; made once."""
        return self._denoiser.positions(height, width)

    def workspace(self, images: int, tokens: int, device: torch.device) -> Tensor | None:
        """What `step` needs for a batch, for one step at a time."""
        heads = self.config.num_attention_heads
        return ops.workspace(self.backend, images, tokens, heads, device)

    @torch.no_grad()
    def step(
        self,
        latent: Tensor,
        modulation: Modulation,
        text: FusedText,
        guidance: Tensor | None,
        positions: Tensor | None,
        workspace: Tensor | None,
    ) -> Tensor:
        """Velocity of a noisy latent.

        Args:
            latent: (B, channels, H, W) fp32.
            modulation: fp32, one step's, or one whose leading dimension is the batch.
            text: of B images; with guidance of 2 B, first the unguided.
            guidance: () fp32 on the device: u + guidance · (c - u); None takes one prediction.
            positions: `positions` of the size.
            workspace: `workspace` of the batch, 2 B with guidance.

        Returns:
            (B, channels, H, W) fp32.
        """
        fused, (height, width) = ops, latent.shape[-2:]
        copies = 1 if guidance is None else 2
        x = fused.patch_embed(latent, *self._patch, positions, copies, self.dtype, backend=self.backend)
        vectors = [modulation.layer(layer) for layer in range(len(self._blocks))]
        tokens = None
        for layer, block in enumerate(self._blocks):
            after = layer + 1
            following = self._blocks[after].attention_norm(vectors[after]) if after < len(vectors) else None
            tokens = block(x, vectors[layer], text[layer], (height, width), workspace, tokens, following)
        shift, scale = modulation.head()
        velocity: Tensor = fused.velocity_head(
            x, scale, shift, FINAL_EPS, *self._head, guidance, (height, width), backend=self.backend
        )
        return velocity.contiguous()
