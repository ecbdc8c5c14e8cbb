"""From a latent to a picture in 8 bits: decoded, again where a GPU's memory ran out, resized and cropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sana_edge.decoding import check_finite
from sana_edge.errors import OutOfMemory
from sana_edge.progress import Progress
from sana_edge.sizes import resized
from sana_edge.torch_runtime import tiling
from sana_edge.torch_runtime.memory import Memory
from sana_edge.torch_runtime.stages import Stages


def decode(
    networks: Stages,
    memory: Memory,
    latent: Tensor,
    size: tuple[int, int] | None = None,
    on_progress: Progress | None = None,
    *,
    tile: int | None = None,
    on_tiled: Callable[[int], None] | None = None,
    release: Callable[[], None] | None = None,
) -> NDArray[np.uint8]:
    """Turn a latent into (H, W, 3) uint8, resized and cropped to ``size`` (width, height).

    Tells ``on_progress`` before each block of the decoder; what that raises ends the decode. ``tile`` and
    ``on_tiled`` are those of `tiling.decode`, but that a tile of 0 is the whole picture.

    Args:
        release: lets go of memory that can be had again, for a second attempt; None: there is none.

    Raises:
        SanaError: the latent, or what the autoencoder makes of it, has NaN or infinite values.
    """
    check_finite("latent", *map(float, latent.aminmax()))
    autoencoder = networks.decoder
    if tile == 0:
        tile = max(latent.shape[2:]) * autoencoder.config.spatial_compression
    latent = latent.to(autoencoder.dtype) / autoencoder.config.scaling_factor
    on_block = None if on_progress is None else partial(on_progress, "decode")
    run = partial(
        tiling.decode,
        autoencoder,
        latent,
        tile=tile,
        on_block=on_block,
        on_tiled=on_tiled,
        memory_limit=None if memory.limit is None else memory.free(),
        graphs=networks.decodes,
    )
    pixels = _decoded(run, release)
    check_finite("decoded picture", *map(float, pixels.aminmax()))
    if size is not None and size != (pixels.shape[3], pixels.shape[2]):
        pixels = resize_and_crop(pixels, size)
    levels = pixels[0].mul_(0.5).add_(0.5).clamp_(0, 1).float().mul_(255).round_()
    result: NDArray[np.uint8] = levels.byte().permute(1, 2, 0).contiguous().cpu().numpy()
    return result


def _decoded(run: Callable[[], Tensor], release: Callable[[], None] | None) -> Tensor:
    """A decode, and a second one where the first ran out of memory."""
    try:
        return run()
    except (torch.OutOfMemoryError, OutOfMemory):
        if release is None:
            raise
    # what steps were recorded with can be had again; the error, gone by now, would have kept what failed
    release()
    return run()


def resize_and_crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """As `sana_edge.decoding.resize_and_crop`, (1, C, H, W); a copy."""
    (width, height), (left, top) = resized((pixels.shape[3], pixels.shape[2]), size)
    scaled = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    return scaled[:, :, top : top + size[1], left : left + size[0]].contiguous()
