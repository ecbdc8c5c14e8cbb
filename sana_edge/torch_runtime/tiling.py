"""Decoding within the memory there is: a picture at once where that fits, else in overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sana_edge.config import AutoencoderConfig
from sana_edge.decoding import DEFAULT_TILE as DEFAULT_TILE
from sana_edge.decoding import tile_cells
from sana_edge.errors import OutOfMemory
from sana_edge.int8.feature_maps import strip_rows
from sana_edge.nets.autoencoder import LatentConfig, LatentDecoder
from sana_edge.nets.efficient_vit import EXPAND_RATIO
from sana_edge.nets.tiny_autoencoder import REACH
from sana_edge.store.tiny_autoencoder import TinyAutoencoderConfig
from sana_edge.system.memory import available_memory

# what a laptop can be expected to have free, to choose between tiles and a whole picture where it is unknown
_ASSUMED_MEMORY = 4 << 30


@torch.no_grad()
def decode(
    autoencoder: LatentDecoder,
    latent: Tensor,
    *,
    tile: int | None = None,
    stride: int | None = None,
    memory_limit: int | None = None,
    on_tile: Callable[[int, int], None] | None = None,
    on_block: Callable[[int, int], None] | None = None,
    on_tiled: Callable[[int], None] | None = None,
) -> Tensor:
    """Decode a latent, one picture and one tile at a time.

    Attention is global within a tile, so that a tiled picture differs a little from one decoded at once.
    Tiles start every ``stride`` pixels; those at the right and the bottom are smaller. The overlaps are
    cross-faded linearly, downwards first, as in diffusers' ``AutoencoderDC.tiled_decode``.

    Args:
        latent: (B, latent channels, h, w), not scaled, in the dtype of the autoencoder.
        tile: side of a tile in pixels; a picture that is no larger is decoded at once. None decodes at once
            whatever fits the memory, and the rest in tiles of 1024.
        stride: pixels from tile to tile, 7/8 of a tile by default.
        memory_limit: bytes to use; None takes what is free on the latent's device, or 4 GiB where that is
            unknown.
        on_tile: called with (tiles done, all tiles) after each tile.
        on_block: called with (blocks done, all blocks) before each block of the decoder, for each tile; what
            it raises ends the decode.
        on_tiled: called with the side of the tiles in pixels, if there are several, before the first.

    Returns:
        Pixels (B, 3, f h, f w), about [-1, 1].

    Raises:
        InvalidInput: ``tile`` or ``stride`` is no multiple of a latent cell, or the stride exceeds the tile.
        OutOfMemory: not even one tile fits what is known to be free.
    """
    config = autoencoder.config
    cell = config.spatial_compression
    batch, _, height, width = latent.shape
    pixels = batch * config.in_channels * height * width * cell**2 * latent.element_size()
    free = available_memory(latent.device) if memory_limit is None else memory_limit
    expected = _ASSUMED_MEMORY if free is None else free
    whole = autoencoder.whole_maps
    if tile is None and pixels + decode_bytes(config, height, width, latent.dtype, whole) > expected:
        tile = DEFAULT_TILE
    side, step = tile_cells(max(height, width), cell, tile, stride)
    needed = pixels + decode_bytes(config, min(side, height), min(side, width), latent.dtype, whole)
    if free is not None and needed > free:
        raise OutOfMemory(
            f"decoding {width * cell}x{height * cell} pixels needs {needed} bytes, {free} are free",
            "choose a smaller size or tile, or close other programs",
            needed=needed,
            free=free,
        )
    if on_tiled is not None and side < max(height, width):
        on_tiled(side * cell)
    if on_block is None:
        return _decode_tiles(autoencoder, latent, side, step, on_tile)
    tiles = batch * len(range(0, height, step)) * len(range(0, width, step))
    with _blocks_told(autoencoder, tiles, on_block):
        return _decode_tiles(autoencoder, latent, side, step, on_tile)


@contextmanager
def _blocks_told(
    autoencoder: LatentDecoder, tiles: int, on_block: Callable[[int, int], None]
) -> Iterator[None]:
    blocks, done = autoencoder.blocks(), 0

    def tell(module: nn.Module, args: object) -> None:
        nonlocal done
        on_block(done, tiles * len(blocks))
        done += 1

    hooks = [block.register_forward_pre_hook(tell) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decode_tiles(
    autoencoder: LatentDecoder,
    latent: Tensor,
    side: int,
    step: int,
    on_tile: Callable[[int, int], None] | None,
) -> Tensor:
    """Decode tiles of ``side`` latent cells that start every ``step`` cells."""
    config = autoencoder.config
    cell = config.spatial_compression
    batch, _, height, width = latent.shape
    pixels = latent.new_empty((batch, config.in_channels, height * cell, width * cell))
    tops, lefts = range(0, height, step), range(0, width, step)
    done, total = 0, batch * len(tops) * len(lefts)
    overlap = (side - step) * cell
    for index in range(batch):
        # what is blended into the tiles below, per column
        bottoms: list[Tensor] = []
        for top in tops:
            above, bottoms = bottoms, []
            right: Tensor | None = None
            for column, left in enumerate(lefts):
                piece = autoencoder.decode(latent[index : index + 1, :, top : top + side, left : left + side])
                if above:
                    _cross_fade(above[column], piece, 2)
                if right is not None:
                    _cross_fade(right, piece, 3)
                bottoms.append(piece[:, :, max(piece.shape[2] - overlap, 0) :].clone())
                right = piece[:, :, :, max(piece.shape[3] - overlap, 0) :].clone()
                y, x = top * cell, left * cell
                target = pixels[index : index + 1, :, y : y + step * cell, x : x + step * cell]
                target.copy_(piece[:, :, : target.shape[2], : target.shape[3]])
                done += 1
                if on_tile is not None:
                    on_tile(done, total)
    return pixels


def _cross_fade(before: Tensor, after: Tensor, dim: int) -> None:
    """Blend the end of ``before`` into the beginning of ``after`` along ``dim``, over the shorter one."""
    extent = min(before.shape[dim], after.shape[dim])
    shape = [1] * after.ndim
    shape[dim] = extent
    share = (torch.arange(extent, device=after.device) / extent).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    beginning = after.narrow(dim, 0, extent)
    beginning.copy_(end * (1 - share) + beginning * share)


def decode_bytes(
    config: LatentConfig, height: int, width: int, dtype: torch.dtype, whole_maps: bool = False
) -> int:
    """Estimate the peak memory of decoding one (height, width) latent at once, without weights.

    The largest, over the layers, of the maps that are alive at the same time; see `_layer_bytes`. What a
    convolution library takes for itself is not counted.
    """
    if isinstance(config, TinyAutoencoderConfig):
        return max(_tiny_bytes(config, height, width, dtype.itemsize))
    assert isinstance(config, AutoencoderConfig)
    return max(_layer_bytes(config, height, width, dtype.itemsize, whole_maps))


def _tiny_bytes(config: TinyAutoencoderConfig, height: int, width: int, item: int) -> Iterator[int]:
    """`_layer_bytes` of a tiny autoencoder."""
    widths = config.decoder_block_out_channels
    for stage, channels in enumerate(widths):
        # input; window of a strip with 3 more rows on each side, input and output of a convolution
        rows = min(strip_rows(width * channels * item) + 2 * REACH, height)
        yield (height + 3 * rows) * width * channels * item
        if stage + 1 < len(widths):
            yield _upsample_bytes(height, width, channels, widths[stage + 1], item, interpolate=True)
            height, width = 2 * height, 2 * width
    yield height * width * (widths[-1] + config.in_channels) * item


def _layer_bytes(
    config: AutoencoderConfig, height: int, width: int, item: int, whole_maps: bool
) -> Iterator[int]:
    """Yield what each kind of layer of each stage holds at its peak, in bytes."""
    channels, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
    interpolate = config.upsample_block_type == "interpolate"
    for stage in reversed(range(len(channels))):
        if layers[stage] == 0:
            continue
        if stage + 1 < len(channels):
            yield _upsample_bytes(height, width, channels[stage + 1], channels[stage], item, interpolate)
            height, width = 2 * height, 2 * width
        if config.decoder_block_types[stage] == "ResBlock":
            # input; window of a strip with 2 more rows on each side, outputs of both convolutions
            rows = min(strip_rows(width * channels[stage] * item) + 4, height)
            # or the input and what both convolutions read of it in INT8, whole
            held = height + (2 * height / item if whole_maps else 3 * rows)
            yield int(held * width * channels[stage] * item)
        else:
            scales = len(config.decoder_qkv_multiscales[stage])
            yield height * width * channels[stage] * _attention_width(scales, item)
            # input, expanded map before and after the depthwise convolution
            yield height * width * channels[stage] * (1 + 4 * EXPAND_RATIO) * item
    if layers[0] > 0:
        yield height * width * (channels[0] + config.in_channels) * item
    else:
        yield _upsample_bytes(height, width, channels[1], config.in_channels, item, interpolate)


def _upsample_bytes(
    height: int, width: int, in_channels: int, out_channels: int, item: int, interpolate: bool
) -> int:
    out_row = 2 * width * out_channels * item
    rows = min(strip_rows(2 * out_row) + 2, height)
    # of a strip, in rows of the output: one phase out of four, or all of them before they are shuffled
    strip = rows * out_row // 2 if interpolate else 2 * rows * out_row
    window = rows * width * in_channels * item
    kernels = 16 * in_channels * out_channels * item if interpolate else 0
    return height * width * in_channels * item + 2 * height * out_row + strip + window + kernels


def _attention_width(scales: int, item: int) -> int:
    """Bytes per position and channel of a multi-scale attention, at the last of its scales.

    Alive in the autoencoder's dtype: input, q, k and v, the results of the scales before, and this scale's
    projected q, k and v. In fp32: q and k after ReLU, v if it had to be converted, two stages of the result.
    """
    stored = 1 + 3 + scales + (3 if scales else 0)
    fp32 = 4 if item == 4 else 5
    return stored * item + fp32 * 4
