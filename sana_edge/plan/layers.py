"""The layers of each network as its config describes them: how many weights, and how often each is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sana_edge.config import EXPAND_RATIO, AutoencoderConfig, DenoiserConfig
from sana_edge.store.tiny_autoencoder import DecoderConfig, TinyAutoencoderConfig

# of a timestep's sinusoid
_WAVES = 256


@dataclass(frozen=True)
class Layer:
    """Some weights that are used together.

    Attributes:
        weights: how many.
        places: positions at which each is used, for a latent cell or a token; 0: once for a picture.
        int8: whether an INT8 model has them in INT8.
        cold: whether an INT8 model keeps them in 16 bit, whatever it computes in.
        folded: INT8 weights for a float one, where kernels are folded before they are quantized.
    """

    weights: int
    places: float
    int8: bool = False
    cold: bool = False
    folded: float = 1


def denoiser_layers(config: DenoiserConfig) -> Iterator[Layer]:
    """Of `sana_edge.nets.denoiser.Denoiser`; places are for a token."""
    dim, hidden = config.dim, config.ffn_dim
    inner = config.num_cross_attention_heads * config.cross_attention_head_dim
    normed = config.qk_norm is not None
    block = (
        Layer(3 * dim * dim + dim * dim + 2 * dim * inner + 3 * dim * hidden, 1, int8=True),
        # biases of the same layers, the depthwise convolution, tables and norms
        Layer(2 * hidden * 9, 1),
        Layer(dim + inner + dim + 2 * hidden + 2 * hidden + 6 * dim, 0),
        Layer(3 * dim * config.attention_bias + normed * (2 * dim + 2 * inner), 0),
        Layer(2 * inner * (dim + 1), 0, cold=True),
    )
    for _ in range(config.num_layers):
        yield from block
    embedder = (_WAVES + 1) * dim + (dim + 1) * dim
    cold = embedder * (2 if config.guidance_embeds else 1) + 6 * dim * (dim + 1)
    cold += (config.caption_channels + 1) * dim + (dim + 1) * dim
    yield Layer(cold, 0, cold=True)
    yield Layer(config.in_channels * dim + dim * config.out_channels, 1)
    yield Layer(4 * dim + config.out_channels, 0)


def text_layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Of a Gemma-2 without its embedding, which stays in its file; places are for a token of the text."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    inner, keys = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    weights = 2 * width * inner + 2 * width * keys + 3 * width * config["intermediate_size"]
    for _ in range(config["num_hidden_layers"]):
        yield Layer(weights, 1, int8=True)
        yield Layer(4 * width, 0)
    yield Layer(width, 0)


def decoder_layers(config: DecoderConfig) -> Iterator[Layer]:
    """Of what decodes, of either kind; places are for a latent cell."""
    if isinstance(config, TinyAutoencoderConfig):
        yield from _tiny_layers(config)
        return
    channels, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
    interpolate, highest = config.upsample_block_type == "interpolate", len(channels) - 1
    yield from _convolution(config.latent_channels, channels[-1], 1)
    for stage in reversed(range(len(channels))):
        if layers[stage] == 0:
            continue
        places = 4.0 ** (highest - stage)
        if stage < highest:
            yield from _upsampling(channels[stage + 1], channels[stage], places, interpolate)
        for _ in range(layers[stage]):
            yield from _block(config, "decoder", stage, places)
    last = channels[0] if layers[0] else channels[1]
    yield Layer(2 * last, 0)
    if layers[0]:
        yield from _convolution(last, config.in_channels, 4.0**highest)
    else:
        yield from _upsampling(last, config.in_channels, 4.0**highest, interpolate)


def encoder_layers(config: AutoencoderConfig) -> Iterator[Layer]:
    """Of `sana_edge.nets.autoencoder.Encoder`; places are for a latent cell."""
    channels, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
    highest = len(channels) - 1
    unshuffle = config.downsample_block_type == "pixel_unshuffle"

    def down(inner: int, outer: int, places: float) -> Layer:
        # of stride 1 before the unshuffling, or of stride 2
        width, used = (outer // 4, places) if unshuffle else (outer, places / 4)
        return Layer((9 * inner + 1) * width, used)

    if layers[0]:
        yield Layer((9 * config.in_channels + 1) * channels[0], 4.0**highest)
    else:
        yield down(config.in_channels, channels[1], 4.0**highest)
    for stage in range(len(channels)):
        places = 4.0 ** (highest - stage)
        for _ in range(layers[stage]):
            yield from _block(config, "encoder", stage, places)
        if layers[stage] and stage < highest:
            yield down(channels[stage], channels[stage + 1], places)
    yield Layer((9 * channels[-1] + 1) * config.latent_channels, 1)


def count(layers: Iterable[Layer]) -> int:
    """All weights."""
    return sum(layer.weights for layer in layers)


def weight_bytes(layers: Iterable[Layer], item: int, *, int8: bool = False) -> int:
    """What they take in memory: INT8 layers in INT8, what is cold then in 16 bit, all else of ``item``."""
    found = 0.0
    for layer in layers:
        if int8 and layer.int8:
            found += layer.weights * layer.folded
        else:
            found += layer.weights * (2 if int8 and layer.cold else item)
    return int(found)


def _tiny_layers(config: TinyAutoencoderConfig) -> Iterator[Layer]:
    widths, blocks = config.decoder_block_out_channels, config.num_decoder_blocks
    yield from _convolution(config.latent_channels, widths[0], 1)
    for stage, width in enumerate(widths):
        places = 4.0**stage
        if stage:
            yield from _upsampling(widths[stage - 1], width, places, True, bias=False)
        for _ in range(3 * blocks[stage]):
            yield from _convolution(width, width, places)
    yield from _convolution(widths[-1], config.out_channels, 4.0 ** (len(widths) - 1))


def _block(config: AutoencoderConfig, side: str, stage: int, places: float) -> Iterator[Layer]:
    width: int = getattr(config, f"{side}_block_out_channels")[stage]
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        yield from _convolution(width, width, places)
        yield from _convolution(width, width, places, bias=False)
        yield Layer(2 * width, 0)
        return
    head = config.attention_head_dim
    inner = width // head * head
    kernels: tuple[int, ...] = getattr(config, f"{side}_qkv_multiscales")[stage]
    hidden = EXPAND_RATIO * width
    yield Layer(3 * width * inner + inner * (1 + len(kernels)) * width, places, int8=True)
    yield Layer(sum(3 * inner * (kernel**2 + head) for kernel in kernels), places)
    yield Layer(2 * hidden * width + hidden * width, places, int8=True)
    yield Layer(2 * hidden * 9, places)
    # norms and biases
    yield Layer(4 * width + 4 * hidden, 0)


def _convolution(inner: int, outer: int, places: float, *, bias: bool = True) -> Iterator[Layer]:
    yield Layer(9 * inner * outer, places, int8=True)
    if bias:
        yield Layer(outer, 0)


def _upsampling(
    inner: int, outer: int, places: float, interpolate: bool, *, bias: bool = True
) -> Iterator[Layer]:
    """To a map of ``places``; nearest-neighbour doubling is folded into four kernels of 2x2."""
    if interpolate:
        # of 9 taps each output uses the 4 of its phase
        yield Layer(9 * inner * outer, places * 4 / 9, int8=True, folded=16 / 9)
    else:
        yield Layer(9 * inner * outer * 4, places / 4, int8=True)
    if bias:
        yield Layer(outer * (1 if interpolate else 4), 0)
