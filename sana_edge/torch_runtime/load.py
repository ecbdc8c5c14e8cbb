"""The denoiser and the decoder of a model folder, float or INT8, on a device and in the dtype that suits it.

An INT8 network comes from a package, whose tensors are checked against its config, or is made of float
weights while they are loaded, layer by layer. Both give the same network where nothing was calibrated.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.errors import CheckpointError, DamagedWeights, InvalidInput
from sana_edge.fused.backends import half_dtype
from sana_edge.nets import parameter_names
from sana_edge.nets.autoencoder import Encoder, LatentDecoder, decoder_state, encoder_state
from sana_edge.nets.convert import read_decoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import (
    decoder_targets,
    denoiser_targets,
    encoder_targets,
    prepare_decoder,
    prepare_encoder,
    quantize_decoder,
    quantize_denoiser,
    quantize_encoder,
    set_activations,
    stacked,
)
from sana_edge.nets.tiny_autoencoder import latent_decoder
from sana_edge.store import package
from sana_edge.store.folder import component_variant
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.package import Description, Quantization
from sana_edge.store.package_tensors import check_tensors, is_scale, to_16_bit
from sana_edge.store.pairing import in_place_of
from sana_edge.store.tiny_autoencoder import decoder_config
from sana_edge.store.weights import (
    StoredState,
    check_values,
    is_finite,
    load_into,
    load_state,
    needs_clamp,
    values_named,
)
from sana_edge.torch_runtime.device import DTYPES, computes_bf16


def describe(model: ResolvedModel) -> tuple[Description, Description | None]:
    """What both networks' folders say; a decoder that is a checkpoint's file has no description."""
    vae = model.component("vae")
    described = None if vae.is_file() else package.describe(vae)
    return package.describe(model.component("transformer")), described


def load_denoiser(
    model: ResolvedModel,
    *,
    device: torch.device,
    dtype: str,
    int8: bool = False,
    fused: bool = False,
    description: Description | None = None,
) -> tuple[Denoiser, str]:
    """Read ``transformer/``; returns the denoiser and the short name of the dtype it computes in.

    Args:
        dtype: a name of `DTYPES`, or "auto": the weights' own, fp32 in place of what a CPU lacks.
        int8: quantize float weights; a package is INT8 anyway.
        fused: it runs the fused operations, for which "auto" is 16 bit.
        description: of the folder, where it has been read.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit its config.
    """
    folder = model.path / "transformer"
    description = description or package.describe(folder)
    quantization, config = description.quantization, DenoiserConfig.from_dict(description.values)
    with values_named(folder, model.component_variant("transformer")):
        state = _read(model, "transformer", int8 or quantization is not None)
        if quantization is not None:
            package.verify(folder, quantization)
            check_tensors(state, quantization, denoiser_layers(config), where=str(folder))
        elif any(map(is_scale, state)):
            raise CheckpointError(
                f"{folder} has INT8 weights, config.json says nothing of it", package.DAMAGED
            )
        if dtype == "auto":
            dtype = load_dtype(_stored_dtype(state), device, fused=fused)
        if quantization is not None or not int8:
            # INT8 layers look at their weights when they are made
            check_values(state, where=str(folder))
        denoiser = Denoiser.from_diffusers(config, state)
        denoiser.clamp = clamps(model, config, state, quantization)
        # quantized layers let go of their float weights one by one
        del state
        if quantization is not None:
            set_activations(denoiser, quantization.activations)
        elif int8:
            quantize_denoiser(denoiser, values_first=False)
            store_in_16_bit(denoiser)
    return denoiser.to_compute(device, DTYPES[dtype]).requires_grad_(False).eval(), dtype


def load_decoder(
    model: ResolvedModel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    int8: bool = False,
    description: Description | None = None,
) -> LatentDecoder:
    """Read the decoder of ``vae/``, or the one that takes its place, which may be a checkpoint's file.

    Arguments and errors are those of `load_denoiser`.
    """
    folder = model.component("vae")
    if folder.is_file():
        read = read_decoder(folder)
        config, state, quantization = read.config, read.state, None
    else:
        description = description or package.describe(folder)
        quantization, config = description.quantization, decoder_config(description.values)
        state = decoder_state(_read(model, "vae", int8 or quantization is not None))
    if model.decoder is not None:
        config = in_place_of(config, model.path, folder)
    with torch.device("meta"):
        autoencoder = latent_decoder(config)
    with values_named(folder, model.component_variant("vae")):
        if quantization is not None:
            package.verify(folder, quantization)
            check_tensors(state, quantization, decoder_layers(autoencoder), where=str(folder))
            prepare_decoder(autoencoder, state)
        load_into(autoencoder, state, where=str(folder))
        if quantization is not None or not int8:
            check_values(state, where=str(folder))
        del state
        if int8 and quantization is None:
            quantize_decoder(autoencoder, values_first=False)
            store_in_16_bit(autoencoder)
    autoencoder.to(device, dtype)
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return autoencoder.requires_grad_(False).eval()


def load_encoder(
    model: ResolvedModel, *, device: torch.device, dtype: torch.dtype, int8: bool = False
) -> Encoder:
    """Read the encoder of the model's own ``vae/``; arguments are those of `load_denoiser`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit its config.
        InvalidInput: there is no encoder.
    """
    folder = model.path / "vae"
    description = package.describe(folder)
    quantization, config = description.quantization, decoder_config(description.values)
    variant = component_variant(os.listdir(folder), model.variant)
    state = encoder_state(load_state(folder, variant=variant))
    # a tiny autoencoder's is not run
    if not state or not isinstance(config, AutoencoderConfig):
        hint = "give the model that it was made from, or quantize that again with this version"
        raise InvalidInput(f"{model.name} has no encoder, which an image needs", hint)
    with torch.device("meta"):
        encoder = Encoder(config)
    with values_named(folder, variant):
        if quantization is not None:
            package.verify(folder, quantization)
            # it is never calibrated
            check_tensors(state, Quantization("token"), encoder_layers(encoder), where=str(folder))
            prepare_encoder(encoder, state)
        load_into(encoder, state, where=str(folder))
        if quantization is not None or not int8:
            check_values(state, where=str(folder))
        del state
        if int8 and quantization is None:
            quantize_encoder(encoder, values_first=False)
            store_in_16_bit(encoder)
    encoder.to(device, dtype)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return encoder.requires_grad_(False).eval()


def denoiser_layers(config: DenoiserConfig) -> list[tuple[str, ...]]:
    """What can be INT8 in a denoiser, as `check_tensors` wants it, by diffusers' names."""
    with torch.device("meta"):
        targets = denoiser_targets(Denoiser(config))
    names = parameter_names.names(config)
    return [tuple(name.removesuffix(".weight") for name in names[f"{target}.weight"]) for target in targets]


def decoder_layers(autoencoder: LatentDecoder) -> list[tuple[str, ...]]:
    """What can be INT8 in a decoder, as `check_tensors` wants it."""
    return [stacked(target) for target in decoder_targets(autoencoder)]


def encoder_layers(encoder: Encoder) -> list[tuple[str, ...]]:
    """What can be INT8 in an encoder, as `check_tensors` wants it."""
    return [stacked(target) for target in encoder_targets(encoder)]


def clamps(
    model: ResolvedModel,
    config: DenoiserConfig,
    state: Mapping[str, Tensor],
    quantization: Quantization | None = None,
) -> bool:
    """Whether a denoiser's self-attention is clamped: a package says it, the table knows, else `needs_clamp`.

    Raises:
        CheckpointError: the package does not say it.
    """
    if quantization is not None:
        if quantization.clamp is None:
            path = model.path / "transformer" / "config.json"
            raise CheckpointError(f"{path}: {package.KEY} lacks clamp", package.DAMAGED)
        return quantization.clamp
    return model.info.trained == "fp16" if model.info else needs_clamp(config, state)


def _read(model: ResolvedModel, component: str, int8: bool) -> dict[str, Tensor]:
    """A component's weights; for INT8 layers each is mapped on its own, to leave the memory once copied."""
    folder, variant = model.component(component), model.component_variant(component)
    return dict(StoredState(folder, variant=variant)) if int8 else load_state(folder, variant=variant)


def _stored_dtype(state: Mapping[str, Tensor]) -> str:
    """The short name of the dtype of most float tensors."""
    floats = Counter(t.dtype for name, t in state.items() if t.is_floating_point() and not is_scale(name))
    stored = max(floats, key=floats.__getitem__, default=torch.float32)
    return next((short for short, dtype in DTYPES.items() if dtype == stored), "fp32")


def load_dtype(stored: str, device: torch.device, *, fused: bool = False) -> str:
    """What "auto" is for weights of a dtype: the same, fp32 in place of what a CPU lacks, 16 bit if fused."""
    lacks = device.type == "cpu" and (stored == "fp16" or (stored == "bf16" and not computes_bf16()))
    name = "fp32" if lacks else stored
    return half_dtype(device) if fused and name != "fp16" else name


def store_in_16_bit(network: nn.Module) -> None:
    """Round what is not INT8 to what a package would hold, so that both give the same pictures.

    Raises:
        CheckpointError: a weight has NaN or infinite values; names it.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not is_scale(name):
            if not is_finite(tensor):
                raise DamagedWeights(f"{name} has NaN or infinite values", "the checkpoint is damaged")
            tensor.data = to_16_bit(tensor.data)
