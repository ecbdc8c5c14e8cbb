"""Float networks made INT8 in memory, layer by layer; nothing is calibrated here.

The denoiser's layers are those of `sana_edge.int8.linear`, the decoder's also those of `sana_edge.int8.conv`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sana_edge.errors import CheckpointError, DamagedWeights, InvalidInput, SanaError
from sana_edge.int8 import quant
from sana_edge.int8.conv import Conv2d, PhaseConv2d, W8A8Conv2d, W8A8PhaseConv2d
from sana_edge.int8.linear import Linear, W8A8Linear
from sana_edge.nets.autoencoder import Encoder, LatentDecoder
from sana_edge.nets.denoiser import Denoiser

_BLOCK_LAYERS = ("qkv", "out", "cross_q", "cross_out", "expand", "project")


def denoiser_targets(denoiser: Denoiser) -> list[str]:
    """Names of the layers that can be quantized: ``blocks.0.qkv`` and so on, in the order of their use."""
    return [f"blocks.{index}.{name}" for index in range(denoiser.config.num_layers) for name in _BLOCK_LAYERS]


def quantize_denoiser(
    denoiser: Denoiser,
    *,
    keep: Collection[str] = (),
    input_scales: Mapping[str, float] | None = None,
    static: bool = False,
    values_first: bool = True,
) -> None:
    """Make a float denoiser's layers INT8, in place.

    Args:
        keep: names of layers that stay as they are.
        input_scales: calibrated scales of inputs by layer, stored with it.
        static: use them, instead of one scale per token.
        values_first: look at all weights before the first is changed. Where they are mapped from a file that
            reads all of it into memory.

    Raises:
        CheckpointError: a weight has NaN or infinite values; names its layer. Nothing is changed then,
            if ``values_first``.
        InvalidInput: an unknown name, or static without a scale for every layer.
        SanaError: it is quantized already.
    """
    targets = denoiser_targets(denoiser)
    _check(denoiser, targets, keep, input_scales, static=static, values=values_first)
    for name in targets:
        if name in keep:
            continue
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, Linear)
        scale = (input_scales or {}).get(name)
        given = None if scale is None else torch.tensor(scale, dtype=torch.float32)
        with _naming(name):
            layer = W8A8Linear.from_float(layer, input_scale=given, static=static)
        denoiser.set_submodule(name, layer)


def set_activations(model: nn.Module, activations: str) -> None:
    """Let the INT8 linear layers of a model use one scale per "token", or one per "tensor".

    Raises:
        CheckpointError: "tensor", but a layer has no input scale; names it.
        InvalidInput: another word.
    """
    if activations not in ("token", "tensor"):
        raise InvalidInput(f"unknown activation scales {activations!r}", "choose token or tensor")
    for name, layer in model.named_modules():
        if isinstance(layer, W8A8Linear):
            if activations == "tensor" and layer.input_scale is None:
                raise CheckpointError(f"{name} has no input_scale", "calibrate, or use scales per token")
            layer.set_static(activations == "tensor")


def set_graph_activations(denoiser: Denoiser) -> None:
    """Let the INT8 layers of a denoiser use the scales that exported graphs have: one per tensor.

    Only the second product of Mix-FFN keeps one per token, unless the package asks for one per tensor: single
    values of its input are so far above the others that one scale leaves those few steps.

    Raises:
        CheckpointError: a layer has no input scale; names it.
    """
    per_token = {
        name: layer
        for name, layer in denoiser.named_modules()
        if isinstance(layer, W8A8Linear) and not layer.static and name.endswith(".project")
    }
    set_activations(denoiser, "tensor")
    for layer in per_token.values():
        layer.set_static(False)


def decoder_targets(autoencoder: LatentDecoder) -> list[str]:
    """Names of the decoder's layers that can be quantized: ``decoder.conv_in`` and so on, in order of use.

    A ``to_q`` stands for its `stacked` layers.
    """
    kinds = (Linear, Conv2d, W8A8Linear, W8A8Conv2d, W8A8PhaseConv2d)
    return [
        name
        for part in autoencoder.parts()
        for name, layer in autoencoder.get_submodule(f"decoder.{part}").named_modules(
            prefix=f"decoder.{part}"
        )
        if isinstance(layer, kinds) and not name.endswith((".to_k", ".to_v"))
    ]


def stacked(target: str) -> tuple[str, ...]:
    """The modules that a target of the decoder stands for: q, k and v are one product of one input.

    They are quantized together; the first has the observer and the ``input_scale``.
    """
    if not target.endswith(".to_q"):
        return (target,)
    return (target, f"{target[:-1]}k", f"{target[:-1]}v")


def quantize_decoder(
    autoencoder: LatentDecoder,
    *,
    keep: Collection[str] = (),
    input_scales: Mapping[str, float] | None = None,
    values_first: bool = True,
) -> None:
    """Make a float decoder's layers INT8, in place.

    Args:
        keep: names of layers that stay as they are.
        input_scales: calibrated scales of inputs by layer. Without one, a convolution takes the absmax of the
            map that it is given, and a linear layer or 1x1 convolution that of each pixel.
        values_first: as of `quantize_denoiser`.

    Raises:
        CheckpointError: a weight has NaN or infinite values; names its layer. Nothing is changed then,
            if ``values_first``.
        InvalidInput: an unknown name.
        SanaError: it is quantized already.
    """
    targets, scales = decoder_targets(autoencoder), input_scales or {}
    _check(autoencoder, targets, keep, scales, values=values_first)
    for target in targets:
        if target in keep:
            continue
        given = torch.tensor(scales[target], dtype=torch.float32) if target in scales else None
        _quantize(autoencoder, target, given)


def encoder_targets(encoder: Encoder) -> list[str]:
    """Names of the encoder's layers that can be quantized, as `decoder_targets`; not those that halve."""
    kinds = (Linear, Conv2d, W8A8Linear, W8A8Conv2d)
    return [
        name
        for name, layer in encoder.named_modules()
        if isinstance(layer, kinds) and not name.endswith((".to_k", ".to_v"))
    ]


def quantize_encoder(encoder: Encoder, *, values_first: bool = True) -> None:
    """Make a float encoder's layers INT8, in place, as `quantize_decoder` does without scales."""
    targets = encoder_targets(encoder)
    _check(encoder, targets, values=values_first)
    for target in targets:
        _quantize(encoder, target, None)


def prepare_decoder(autoencoder: LatentDecoder, state: Mapping[str, Tensor]) -> None:
    """Make a decoder on the meta device ready for an INT8 state dict: its layers with a ``weight_scale``."""
    _prepare(autoencoder, decoder_targets(autoencoder), state)


def prepare_encoder(encoder: Encoder, state: Mapping[str, Tensor]) -> None:
    """As `prepare_decoder`."""
    _prepare(encoder, encoder_targets(encoder), state)


def _quantize(network: nn.Module, target: str, scale: Tensor | None) -> None:
    for name in stacked(target):
        with _naming(name):
            layer = _w8a8(network.get_submodule(name), scale if name == target else None)
        network.set_submodule(name, layer)


def _prepare(network: nn.Module, targets: list[str], state: Mapping[str, Tensor]) -> None:
    for target in targets:
        for name in stacked(target):
            if f"{name}.weight_scale" in state:
                calibrated = f"{name}.input_scale" in state
                network.set_submodule(name, _empty(network.get_submodule(name), calibrated))


def _w8a8(layer: nn.Module, scale: Tensor | None) -> nn.Module:
    if isinstance(layer, PhaseConv2d):
        return W8A8PhaseConv2d.from_float(layer, input_scale=scale)
    if isinstance(layer, Conv2d):
        return W8A8Conv2d.from_float(layer, input_scale=scale)
    assert isinstance(layer, Linear)
    return W8A8Linear.from_float(layer, input_scale=scale, static=scale is not None)


def _empty(layer: nn.Module, calibrated: bool) -> nn.Module:
    """The INT8 kind of a float layer, without values."""
    bias = layer.bias is not None
    with torch.device("meta"):
        if isinstance(layer, PhaseConv2d):
            return W8A8PhaseConv2d(layer.in_channels, layer.out_channels, bias=bias, input_scale=calibrated)
        if isinstance(layer, Conv2d):
            return W8A8Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size[0], bias=bias, input_scale=calibrated
            )
        assert isinstance(layer, Linear)
        empty = W8A8Linear(layer.in_features, layer.out_features, bias=bias, input_scale=calibrated)
        empty.set_static(calibrated)
        return empty


def _check(
    model: nn.Module,
    targets: list[str],
    keep: Collection[str] = (),
    scales: Mapping[str, float] | None = None,
    *,
    static: bool = False,
    values: bool = True,
) -> None:
    """All that can be wrong, before the first layer is changed."""
    scales = scales or {}
    unknown = sorted({*keep, *scales} - set(targets))
    if unknown:
        raise InvalidInput(f"{unknown[0]} is not a layer that can be quantized", f"such as {targets[0]}")
    for target in targets:
        if static and target not in keep and target not in scales:
            raise InvalidInput(f"{target} has no input scale", "calibrate, or use scales per token")
        for name in stacked(target):
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                raise SanaError(
                    f"the model is quantized already: {name} is INT8", "start from the float model"
                )
            looked_at = values and target not in keep
            if looked_at and not quant.weight_scales(layer.weight.detach()).isfinite().all():
                raise _damaged(name)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let what is wrong with the weight of a layer say whose it is."""
    try:
        yield
    except DamagedWeights:
        raise _damaged(name) from None


def _damaged(name: str) -> DamagedWeights:
    return DamagedWeights(f"the weight of {name} has NaN or infinite values", "the checkpoint is damaged")
