"""The quantized components of a package: their tensors, by the names in the source, and their files.

What is not INT8 stays in the source's 16-bit dtype; fp32 becomes fp16, or bf16 where its range needs that.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana_edge.calib.package_writer import check_finite, write_shards
from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.int8 import quant
from sana_edge.int8.conv import PhaseConv2d
from sana_edge.nets.autoencoder import Encoder, LatentConfig, decoder_state, encoder_state
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import decoder_targets, quantize_decoder, quantize_encoder, stacked
from sana_edge.nets.tiny_autoencoder import latent_decoder
from sana_edge.store import package
from sana_edge.store.package import Quantization
from sana_edge.store.package_tensors import keeps_fp32, to_16_bit
from sana_edge.store.tiny_autoencoder import DecoderConfig
from sana_edge.store.weights import check_state, load_into
from sana_edge.system.atomic import write_json
from sana_edge.torch_runtime.load import denoiser_layers

Named = tuple[str, Tensor]

# called with the name of a module whose weight became INT8, and the SQNR of that in dB
NoteError = Callable[[str, float], None]

# of a weight, that its SQNR is measured on
_SQNR_VALUES = 1 << 19

_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def write_weights(folder: Path, tensors: Iterable[Named]) -> None:
    """Write a component's weights.

    Args:
        folder: "transformer", "vae" or "text_encoder" of a package; must not exist.

    Raises:
        CheckpointError, SanaError: as `write_shards`.
    """
    folder.mkdir()
    write_shards(tensors, folder, stem=_STEMS[folder.name])


def write_config(folder: Path, config: Mapping[str, Any], quantization: Quantization) -> None:
    """Write the float component's config beside the weights, with the ``quantization`` and their checksum."""
    quantization = dataclasses.replace(quantization, checksum=package.checksum(folder))
    write_json(folder / "config.json", {**config, package.KEY: quantization.to_dict()})


def quantized_denoiser(
    config: DenoiserConfig, state: Mapping[str, Tensor], note_error: NoteError
) -> Iterator[Named]:
    """A float denoiser's tensors with INT8 weights, made one by one, as `quantize_denoiser` makes them.

    Args:
        state: by diffusers' names; a `StoredState` is never in memory as a whole.

    Raises:
        CheckpointError: the weights do not fit their config, or a value is NaN or infinite: names it.
    """
    with torch.device("meta"):
        expected = Denoiser(config).to_diffusers()
    check_state(expected, state, where="transformer")
    layers = {name for layer in denoiser_layers(config) for name in layer}
    for name in expected:
        tensor, (module, _, kind) = state[name], name.rpartition(".")
        check_finite(name, tensor)
        if kind == "weight" and module in layers:
            values, columns = quant.quantize_weight(tensor)
            note_error(module, _sqnr(tensor, values, columns))
            yield name, values
            yield f"{module}.weight_scale", columns
        else:
            yield name, to_16_bit(tensor)


def quantized_decoder(
    config: DecoderConfig, state: Mapping[str, Tensor], note_error: NoteError
) -> Iterator[Named]:
    """A float decoder's tensors with INT8 weights, as `quantize_decoder` makes them without calibration.

    Arguments and errors are those of `quantized_denoiser`; `quantized_encoder` has the rest.
    """
    with torch.device("meta"):
        decoder = latent_decoder(config)
    load_into(decoder, decoder_state(state), where="vae")
    for name, tensor in decoder.state_dict().items():
        check_finite(name, tensor)
    for target in decoder_targets(decoder):
        for name in stacked(target):
            note_error(target, _layer_sqnr(decoder.get_submodule(name)))
    quantize_decoder(decoder)
    yield from stored(decoder.state_dict())


def quantized_encoder(config: LatentConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A float encoder's tensors with INT8 weights, by their names in the source; nothing where there is none.

    It is not calibrated: its layers take the scales of each picture.

    Raises:
        CheckpointError: as `quantized_denoiser`.
    """
    found = encoder_state(state)
    if not found or not isinstance(config, AutoencoderConfig):
        return {}
    with torch.device("meta"):
        encoder = Encoder(config)
    load_into(encoder, found, where="vae")
    for name, tensor in encoder.state_dict().items():
        check_finite(f"encoder.{name}", tensor)
    quantize_encoder(encoder)
    return {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}


def stored(state: Mapping[str, Tensor], half: torch.dtype = torch.float16) -> Iterator[Named]:
    """A quantized network's tensors as a package holds them.

    Args:
        state: by diffusers' names.
        half: what the source has its floats in; fp32 ones then become bf16 if it is that, else fp16.
    """
    for name, tensor in state.items():
        if tensor.dtype == torch.int8 or keeps_fp32(name):
            yield name, tensor
        else:
            yield name, tensor.bfloat16() if half == torch.bfloat16 else to_16_bit(tensor)


def common_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that the most tensors of a component have."""
    return Counter(tensor.dtype for tensor in state.values()).most_common(1)[0][0]


def _sqnr(weight: Tensor, values: Tensor, columns: Tensor) -> float:
    """Of an INT8 weight in dB, on rows evenly over all of them."""
    every = -(-weight.numel() // _SQNR_VALUES)
    return quant.sqnr(quant.dequantize_weight(values[::every], columns[::every]), weight[::every])


@torch.no_grad()
def _layer_sqnr(layer: nn.Module) -> float:
    # the four phases of a convolution on a doubled map have scales of their own
    weight = torch.cat(layer.kernels()) if isinstance(layer, PhaseConv2d) else layer.get_parameter("weight")
    return _sqnr(weight, *quant.quantize_weight(weight))
