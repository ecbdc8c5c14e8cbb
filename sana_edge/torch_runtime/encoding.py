"""Encoding within the memory there is: a picture at once where that fits, else its first stages in strips.

Those stages are convolutions, which see a few rows around each row: strips with these rows give the map of
the whole picture, up to rounding in float. An INT8 convolution without a calibrated scale takes that of what
it is given, so that strips of INT8 encoders differ by as much as INT8 does. The stages behind see the whole
map, an eighth of the picture's side in the public models.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from sana_edge.errors import OutOfMemory
from sana_edge.fused.decoder_blocks import FusedResBlock
from sana_edge.nets.autoencoder import Encoder
from sana_edge.nets.autoencoder_blocks import Downsample, ResBlock
from sana_edge.nets.efficient_vit import EfficientViTBlock
from sana_edge.plan import maps
from sana_edge.plan.memory import fit_hint

# rows of a strip for a row that neighbouring strips compute as well
_MIN_ROWS_PER_HALO = 2


@torch.no_grad()
def encode(encoder: Encoder, pixels: Tensor, *, memory_limit: int | None) -> Tensor:
    """The latent (1, C, H/f, W/f) of ``pixels`` (1, 3, H, W) in channels-last memory.

    Args:
        memory_limit: bytes to use; None: at once.

    Raises:
        OutOfMemory: it does not fit, even in strips.
    """
    height, width = pixels.shape[2:]
    config, item = encoder.config, pixels.element_size()
    cell = config.spatial_compression
    needed = maps.encode_bytes(config, height // cell, width // cell, item)
    if memory_limit is None or needed <= memory_limit:
        latent: Tensor = encoder(pixels)
        return latent
    blocks = encoder.blocks()
    front = list(takewhile(lambda block: not isinstance(block, EfficientViTBlock), blocks))
    scale, halo = _reach(front)
    middle = maps.middle_bytes(config, height, width, item)
    rows = _rows(encoder, height, width, item, memory_limit - middle, scale, halo)
    least = middle + maps.front_bytes(config, min(_window(rows, halo), height), width, item)
    least = max(least, maps.back_bytes(config, height, width, item))
    if least > memory_limit:
        raise OutOfMemory(
            f"encoding {width}x{height} pixels needs {least} bytes, {memory_limit} are free",
            fit_hint(memory_limit),
            needed=least,
            free=memory_limit,
        )
    x = _strips(front, pixels, rows, scale, halo)
    for block in blocks[len(front) :]:
        x = block(x)
    return encoder.finish(x)


def _strips(front: Sequence[nn.Module], pixels: Tensor, rows: int, scale: int, halo: int) -> Tensor:
    """What the first stages make of all rows, ``rows`` at a time; both are multiples of ``scale``."""
    height, found = pixels.shape[2], None
    for top in range(0, height, rows):
        bottom, start = min(top + rows, height), max(top - halo, 0)
        # which they overwrite
        x = pixels[:, :, start : min(bottom + halo, height)].clone(memory_format=torch.channels_last)
        for block in front:
            x = block(x)
        if found is None:
            shape = (len(x), x.shape[1], height // scale, x.shape[3])
            found = x.new_empty(shape).contiguous(memory_format=torch.channels_last)
        part = x[:, :, (top - start) // scale : (bottom - start) // scale]
        found[:, :, top // scale : bottom // scale] = part
        del x, part
    assert found is not None
    return found


def _reach(front: Sequence[nn.Module]) -> tuple[int, int]:
    """Pixels a side for one of the map, and rows above and below on which a row of it depends.

    A convolution reads a row more, a block two; halving reads two rows of its input at the most. The rows
    are rounded up to the map's.
    """
    scale, halo = 1, 0
    for block in front:
        halo += scale * (2 if isinstance(block, Downsample | ResBlock | FusedResBlock) else 1)
        scale *= 2 if isinstance(block, Downsample) else 1
    return scale, -(-halo // scale) * scale


def _rows(encoder: Encoder, height: int, width: int, item: int, limit: int, scale: int, halo: int) -> int:
    """The most rows of a strip whose maps fit, and no fewer than the halo is worth."""
    rows = -(-height // scale) * scale
    least = max(_MIN_ROWS_PER_HALO * halo, scale)
    while rows > least:
        needed = maps.front_bytes(encoder.config, min(_window(rows, halo), height), width, item)
        if needed <= limit:
            break
        rows = max(rows // 2 // scale * scale, least)
    return rows


def _window(rows: int, halo: int) -> int:
    return rows + 2 * halo
