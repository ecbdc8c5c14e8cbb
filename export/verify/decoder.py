"""The decoder: its graph and those of its parts run beside the torch module, on small latents."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sana_edge.engines.strips import Tail, decode_strips
from sana_edge.export.graph.decoder_parts import decoder_parts
from sana_edge.export.verify.agreement import Agreement
from sana_edge.export.verify.denoiser import Latents
from sana_edge.export.verify.float_activations import let_activations_be
from sana_edge.export.verify.runner import Array, GraphRunner
from sana_edge.image_metrics import psnr
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.manifest import Manifest
from sana_edge.torch_runtime.load import load_decoder

GRAPH = "decoder"
# cells of a side: of more only the corner is decoded, by graphs that take any size
_CELLS = 8


class Decoding:
    """The torch decoder of a model, and the graphs that should do the same."""

    def __init__(
        self, model: ResolvedModel, described: Manifest, graphs: GraphRunner, agreement: Agreement
    ) -> None:
        self._graphs, self._agreement, self._parts = graphs, agreement, described.decoder_parts
        self._decoder = load_decoder(model, device=torch.device("cpu"), dtype=torch.float32)
        if not graphs.rounded:
            let_activations_be(self._decoder)
        sides = graphs.sides(GRAPH, "latent")
        self._h, self._w = (side if isinstance(side, int) else _CELLS for side in sides[2:])

    def compare(self, latent: Tensor) -> None:
        """Compare the pixels of a latent (1, C, h, w), and what each part makes of what the one before did.

        Raises:
            SanaError: too far off.
        """
        expected = self._decode(latent)
        self._agreement.check(GRAPH, {"pixels": self._run(latent)}, pixels=expected)
        y = self._corner(latent).numpy()
        for part, right in zip(self._parts, self._outputs(latent), strict=True):
            run = partial(self._run_part, part.graph)
            if part.halo is None:
                y = run(y)
            else:
                # as narrow as strips can be
                tail = Tail(run, part.halo, part.scale, part.values)
                y = decode_strips(y, lambda x: x, [tail], strip_bytes=0)
            self._agreement.check(part.graph, {"y": y}, y=right)

    def picture(self, latents: Latents) -> dict[str, float]:
        """Compare the pictures of the last latents; see `Agreement.picture`."""
        right, found = _levels(self._decode(latents.expected)), _levels(self._run(latents.found))
        itself = None if latents.moved is None else psnr(_levels(self._decode(latents.moved)), right)
        return self._agreement.picture(found, right, itself)

    def _corner(self, latent: Tensor) -> Tensor:
        return latent[..., : self._h, : self._w].contiguous()

    def _decode(self, latent: Tensor) -> Array:
        pixels: Array = self._decoder.decode(
            self._corner(latent) / self._decoder.config.scaling_factor
        ).numpy()
        return pixels

    def _outputs(self, latent: Tensor) -> list[Array]:
        """What each part should give: of the torch decoder's last stage in it; of the last one, pixels."""
        if not self._parts:
            return []
        found: list[Array] = []

        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            found.append(output.numpy().copy())

        *before, _ = decoder_parts(self._decoder)
        last = [self._decoder.stage_end(min(part.stages)) for part in before]
        hooks = [block.register_forward_hook(keep) for block in last]
        pixels = self._decode(latent)
        for hook in hooks:
            hook.remove()
        return [*found, pixels]

    def _run(self, latent: Tensor) -> Array:
        return self._graphs.run(GRAPH, latent=self._corner(latent).numpy())["pixels"]

    def _run_part(self, name: str, x: Array) -> Array:
        return self._graphs.run(name, x=x)["y"]


def _levels(pixels: Array) -> NDArray[np.uint8]:
    """(1, 3, H, W) from about -1 to 1, as (H, W, 3) uint8."""
    levels: Array = np.rint((pixels[0].transpose(1, 2, 0) * 0.5 + 0.5).clip(0, 1) * 255)
    return levels.astype(np.uint8)
