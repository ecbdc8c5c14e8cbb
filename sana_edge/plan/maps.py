"""The memory of decoding and encoding a picture at once: the maps that are alive at the same time.

Weights, and what a convolution library takes for itself, are not in it. Maps are of ``item`` bytes a value,
heights and widths in latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator

from sana_edge.config import EXPAND_RATIO, AutoencoderConfig
from sana_edge.decoding import strip_rows
from sana_edge.store.tiny_autoencoder import REACH, DecoderConfig, TinyAutoencoderConfig


def decode_bytes(
    config: DecoderConfig,
    height: int,
    width: int,
    item: int,
    *,
    int8: bool = False,
    whole_maps: bool = False,
) -> int:
    """The peak of decoding one (height, width) latent: the largest over the layers.

    Args:
        int8: its convolutions are INT8; what they compute is then fp32 until it is stored.
        whole_maps: of `sana_edge.nets.autoencoder.LatentDecoder`.
    """
    if isinstance(config, TinyAutoencoderConfig):
        return max(_tiny_bytes(config, height, width, item, int8))
    return max(_layer_bytes(config, height, width, item, int8, whole_maps))


def encode_bytes(config: AutoencoderConfig, height: int, width: int, item: int) -> int:
    """The peak of encoding the pixels of one (height, width) latent, the pixels among them."""
    rows, columns = height * config.spatial_compression, width * config.spatial_compression
    return max(front_bytes(config, rows, columns, item), back_bytes(config, rows, columns, item))


def front_bytes(config: AutoencoderConfig, rows: int, columns: int, item: int) -> int:
    """The peak in the stages of convolutions alone, which can be computed in strips, of pixels."""
    return max(found for attends, found in _encoder_bytes(config, rows, columns, item) if not attends)


def back_bytes(config: AutoencoderConfig, rows: int, columns: int, item: int) -> int:
    """The peak in the stages behind, which see the whole map; 0 where there are none."""
    found = (found for attends, found in _encoder_bytes(config, rows, columns, item) if attends)
    return max(found, default=0)


def middle_bytes(config: AutoencoderConfig, rows: int, columns: int, item: int) -> int:
    """The map between those stages, of so many pixels."""
    types = config.encoder_block_types
    stage = next((n for n, kind in enumerate(types) if kind != "ResBlock"), len(types) - 1)
    return rows * columns * config.encoder_block_out_channels[stage] * item >> (2 * stage)


def _tiny_bytes(
    config: TinyAutoencoderConfig, height: int, width: int, item: int, int8: bool
) -> Iterator[int]:
    """`_layer_bytes` of a tiny autoencoder."""
    widths = config.decoder_block_out_channels
    for stage, channels in enumerate(widths):
        # input; window of a strip with 3 more rows on each side, input and output of a convolution
        rows = min(strip_rows(width * channels * item) + 2 * REACH, height)
        yield (height + 3 * rows) * width * channels * item
        if stage + 1 < len(widths):
            yield _upsample_bytes(height, width, channels, widths[stage + 1], item, True, int8)
            height, width = 2 * height, 2 * width
    yield height * width * (widths[-1] + config.in_channels) * item


def _layer_bytes(
    config: AutoencoderConfig, height: int, width: int, item: int, int8: bool, whole_maps: bool
) -> Iterator[int]:
    """Yield what each kind of layer of each stage holds at its peak, in bytes."""
    channels, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
    interpolate = config.upsample_block_type == "interpolate"
    for stage in reversed(range(len(channels))):
        if layers[stage] == 0:
            continue
        if stage + 1 < len(channels):
            inner = channels[stage + 1]
            # and what it reads and hands on in INT8
            held = height * width * (inner + 4 * channels[stage]) if whole_maps else 0
            yield _upsample_bytes(height, width, inner, channels[stage], item, interpolate, int8) + held
            height, width = 2 * height, 2 * width
        if config.decoder_block_types[stage] == "ResBlock":
            yield _residual_bytes(height, width, channels[stage], item, whole_maps)
        else:
            scales = len(config.decoder_qkv_multiscales[stage])
            yield _attending_bytes(height, width, channels[stage], scales, item)
    if layers[0] > 0:
        yield height * width * (channels[0] + config.in_channels) * item
    else:
        yield _upsample_bytes(height, width, channels[1], config.in_channels, item, interpolate, int8)


def _encoder_bytes(
    config: AutoencoderConfig, height: int, width: int, item: int
) -> Iterator[tuple[bool, int]]:
    """Of each kind of layer: whether it comes behind the first attention, and what it holds at its peak."""
    channels, layers, attends = config.encoder_block_out_channels, config.encoder_layers_per_block, False
    pixels = height * width * config.in_channels * item
    if layers[0]:
        yield False, pixels + height * width * channels[0] * item
    else:
        # there is no shortcut
        yield False, pixels + height * width * channels[1] * item // 2
        height, width = height // 2, width // 2
    for stage in range(len(channels)):
        if layers[stage] == 0:
            continue
        if config.encoder_block_types[stage] == "ResBlock":
            yield attends, _residual_bytes(height, width, channels[stage], item, False)
        else:
            attends = True
            scales = len(config.encoder_qkv_multiscales[stage])
            yield True, _attending_bytes(height, width, channels[stage], scales, item)
        if stage + 1 < len(channels):
            # the input, unshuffled again for the shortcut, and three of the output
            half = height * width * channels[stage + 1] // 4
            yield attends, (2 * height * width * channels[stage] + 3 * half) * item
            height, width = height // 2, width // 2
    yield attends, height * width * (channels[-1] + 2 * config.latent_channels) * item


def _residual_bytes(height: int, width: int, channels: int, item: int, whole_maps: bool) -> int:
    # input; window of a strip with 2 more rows on each side, outputs of both convolutions
    rows = min(strip_rows(width * channels * item) + 4, height)
    # or the input and what both convolutions read of it in INT8, whole
    held = height + (2 * height / item if whole_maps else 3 * rows)
    return int(held * width * channels * item)


def _attending_bytes(height: int, width: int, channels: int, scales: int, item: int) -> int:
    attention = height * width * channels * _attention_width(scales, item)
    hidden = 2 * EXPAND_RATIO * channels
    # input; window of a strip, expanded map before and after the depthwise convolution
    rows = min(strip_rows(width * hidden * item) + 2, height)
    gated = (height * channels + rows * (channels + 2 * hidden)) * width * item
    return max(attention, gated)


def _upsample_bytes(
    height: int, width: int, in_channels: int, out_channels: int, item: int, interpolate: bool, int8: bool
) -> int:
    out_row = 2 * width * out_channels * item
    rows = min(strip_rows(2 * out_row) + 2, height)
    # of a strip, in rows of the output: one phase out of four, or all of them before they are shuffled
    strip = rows * out_row // 2 if interpolate and not int8 else 2 * rows * out_row
    window = rows * width * in_channels * item
    kernels = 16 * in_channels * out_channels * item if interpolate and not int8 else 0
    return height * width * in_channels * item + 2 * height * out_row + strip + window + kernels


def _attention_width(scales: int, item: int) -> int:
    """Bytes per position and channel of a multi-scale attention, at the last of its scales.

    Alive in the autoencoder's dtype: input, q, k and v, the results of the scales before, and this scale's
    projected q, k and v. In fp32: q and k after ReLU, v if it had to be converted, a copy of q that the
    batched product makes, two stages of the result.
    """
    stored = 1 + 3 + scales + (3 if scales else 0)
    fp32 = 5 if item == 4 else 6
    return stored * item + fp32 * 4
