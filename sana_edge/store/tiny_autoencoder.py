"""The tiny autoencoder of SANA's latents, TAESANA: what its ``config.json`` says, and its tensors' names.

Facts: ``F32Decoder`` in madebyollin/taesd's taesd.py (commit 2a1b414), a plain sequence of layers, and
diffusers' ``AutoencoderTiny``, which has the same layers one number lower, as the clamp in front is none of
them. That class has as many channels behind an upsampling as before it; TAESANA begins with 256 and 128.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import CheckpointError
from sana_edge.system.json_values import Between, Reader, shown

CLASS = "AutoencoderTiny"
# what decodes here, by the names of diffusers' classes
CLASSES = ("AutoencoderDC", CLASS)
HINT = f"give an AutoencoderDC, such as dc-ae-lite, or an {CLASS} of SANA's latents"
# rows around one that a block of it reads: one for each of its three convolutions
REACH = 3
_OWNER = "vae/config.json"
_Channels = Annotated[int, Between(1, 4096)]


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """``vae/config.json`` of an ``AutoencoderTiny``; tuples have an entry per stage, lowest resolution first.

    It takes latents as a sampler leaves them: ``scaling_factor`` is 1.
    """

    latent_channels: _Channels = 4
    out_channels: Annotated[int, Between(3, 3)] = 3
    decoder_block_out_channels: Annotated[tuple[_Channels, ...], Between(2, 8)] = (64, 64, 64, 64)
    num_decoder_blocks: Annotated[tuple[Annotated[int, Between(1, 64)], ...], Between(2, 8)] = (3, 3, 3, 1)
    act_fn: Literal["relu", "silu"] = "relu"
    scaling_factor: Annotated[float, Between(1e-6, 1e6)] = 1.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TinyAutoencoderConfig:
        """Read a parsed ``config.json``; what is only of the encoder is ignored.

        Raises:
            CheckpointError: a value has the wrong type, or what it asks for is not done here.
        """
        reader = Reader(_OWNER, defaults=True)
        if data.get("act_fn") == "swish":
            data = {**data, "act_fn": "silu"}
        config: TinyAutoencoderConfig = reader.convert(data, cls)
        blocks, stages = config.num_decoder_blocks, len(config.decoder_block_out_channels)
        reader.require(len(blocks) == stages, "num_decoder_blocks", blocks, f"{stages} entries")
        for key, usual in (("upsampling_scaling_factor", 2), ("upsample_fn", "nearest"), ("shift_factor", 0)):
            reader.require(data.get(key, usual) == usual, key, data.get(key), repr(usual))
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json``, which diffusers reads, too, where all widths are equal."""
        return {"_class_name": CLASS, **dataclasses.asdict(self)}

    @property
    def in_channels(self) -> int:
        """Of pictures, as `AutoencoderConfig` calls them."""
        return self.out_channels

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent cell along a side: every stage but the first doubles the resolution."""
        return int(2 ** (len(self.decoder_block_out_channels) - 1))


# what a model's ``vae/`` may be
DecoderConfig = AutoencoderConfig | TinyAutoencoderConfig


def decoder_config(data: Mapping[str, Any]) -> DecoderConfig:
    """The config of whichever autoencoder a parsed ``vae/config.json`` describes.

    Raises:
        CheckpointError: neither a DC-AE nor a tiny one, or a value is wrong.
    """
    name = data.get("_class_name", CLASSES[0])
    if name not in CLASSES:
        raise CheckpointError(f"{_OWNER}: _class_name is {shown(name)}, which is not decoded here", HINT)
    return TinyAutoencoderConfig.from_dict(data) if name == CLASS else AutoencoderConfig.from_dict(data)


def renamed(state: Mapping[str, Any], *, published: bool) -> dict[str, Any]:
    """A decoder's tensors in diffusers' names, without the encoder's.

    Args:
        published: the names are diffusers' already.
    """
    if published:
        return {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    found = {}
    for name, tensor in state.items():
        # the first layer is the clamp, which diffusers' class has not
        match = re.fullmatch(r"(\d{1,4})\.(.*)", name)
        found[f"decoder.layers.{int(match[1]) - 1}.{match[2]}" if match else name] = tensor
    return found


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> TinyAutoencoderConfig:
    """Read a decoder's config from the shapes of its tensors, in diffusers' names.

    Raises:
        CheckpointError: there is no first convolution, or the sequence of layers is another.
    """
    first = shapes.get("decoder.layers.0.weight", ())
    if len(first) != 4:
        raise CheckpointError("the tiny autoencoder has no decoder", "give the file of its decoder")
    widths, blocks, index = [first[0]], [0], 2
    while len(widths) <= 8:
        if f"decoder.layers.{index}.conv.0.weight" in shapes:
            blocks[-1] += 1
            index += 1
        elif f"decoder.layers.{index}.weight" in shapes:
            break
        else:
            # an upsampling has no tensors
            doubled = shapes.get(f"decoder.layers.{index + 1}.weight", ())
            if len(doubled) != 4:
                raise CheckpointError(f"the tiny autoencoder's decoder has no layer {index + 1}")
            widths.append(doubled[0])
            blocks.append(0)
            index += 2
    described = {
        "latent_channels": first[1],
        "decoder_block_out_channels": widths,
        "num_decoder_blocks": blocks,
    }
    return TinyAutoencoderConfig.from_dict(described)
