"""The stages of a picture on the CUDA kernels, as `schedules` records them: text, a step, the decoder.

Networks of the public models' shapes on the meta device, INT8 as a calibrated package has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.bench.shapes import AUTOENCODERS, DENOISERS
from sana_edge.config import LATENT_CELL, AutoencoderConfig, DenoiserConfig
from sana_edge.fused.decoder import fuse_decoder
from sana_edge.fused.gemma import FusedGemma
from sana_edge.int8 import ops
from sana_edge.int8.linear import W8A8Linear
from sana_edge.int8.text_linear import WeightOnlyLinear
from sana_edge.nets.autoencoder import Autoencoder, Encoder
from sana_edge.nets.block import RMS_EPS, Constant, KeysValues
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.quantize import (
    decoder_targets,
    denoiser_targets,
    encoder_targets,
    prepare_decoder,
    prepare_encoder,
    stacked,
)
from sana_edge.nets.text_context import TextContext
from sana_edge.nets.text_weights import text_targets
from sana_edge.noise.schedules import make_sampler
from sana_edge.store.architectures import GEMMA_2_2B
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.steps import FusedNetwork, Predictor
from works.prediction import Schedule
from works.schedules import Launch, recorded, recording

META = torch.device("meta")
DTYPE = torch.bfloat16
# of a prompt, and of the instruction before it
TOKENS, INSTRUCTION = 60, 272
# of the recorded text pass
_LENGTH = 64
_SLOTS = 300
_GUIDANCE, _STEPS = 4.5, 8


def _denoiser(config: DenoiserConfig) -> Denoiser:
    with META:
        denoiser = Denoiser(config).requires_grad_(False).eval()
        for name in denoiser_targets(denoiser):
            layer: Any = denoiser.get_submodule(name)
            bias = layer.bias is not None
            denoiser.set_submodule(name, W8A8Linear(layer.in_features, layer.out_features, bias=bias))
    denoiser.clamp = True
    return denoiser.to_compute("meta", DTYPE)


def step(shapes: str, side: int, layers: int | None = None) -> tuple[list[Launch], list[Launch]]:
    """A step for one picture, guided, whose empty negative prompt is folded: its graph, and the rest."""
    config = DENOISERS[shapes]
    config = config if layers is None else replace(config, num_layers=layers)
    cells = side // LATENT_CELL
    sampler = make_sampler("flow-dpm", steps=_STEPS)
    with META:
        latent = torch.empty(1, config.in_channels, cells, cells)
        tables = Modulation(
            torch.empty(_STEPS, config.num_layers, 6, config.dim), torch.empty(_STEPS, 2, config.dim)
        )
    spans: list[tuple[int, int]] = []
    with recording() as found:

        def recorder(run: cuda_graph.Run) -> cuda_graph.Run:
            def replay() -> Tensor:
                first = len(found.launches)
                result = run()
                spans.append((first, len(found.launches)))
                return result

            return replay

        predictor = Predictor(FusedNetwork(_denoiser(config), "cuda"), recorder)
        steps, _ = predictor.start(latent, tables, _context(config), _GUIDANCE)
        # the first sends the sampler's coefficients
        x = steps.take(sampler, latent, 0, lambda: latent).x
        found.settle()
        first = len(found.launches)
        steps.take(sampler, x, 1, lambda: latent)
    *_, (start, end) = spans
    return found.launches[start:end], found.launches[first:start] + found.launches[end:]


def _context(config: DenoiserConfig) -> TextContext:
    """Of an empty negative prompt, which is a constant, and a prompt."""
    heads, width = config.num_cross_attention_heads, config.cross_attention_head_dim
    with META:
        keys = torch.empty(1, heads, _SLOTS, width, dtype=DTYPE)
        mask = torch.ones(1, 1, 1, _SLOTS, dtype=torch.bool)
        layer = (Constant(torch.empty(1, 1, config.dim, dtype=DTYPE)), KeysValues(keys, keys, mask))
    return TextContext((layer,) * config.num_layers)


def context(shapes: str, steps: int) -> list[Launch]:
    """What is computed once per picture: keys and values of its prompt, the schedule's tables, packing.

    Those of the empty negative prompt are kept (`sana_edge.torch_runtime.texts`).
    """
    denoiser, config = _denoiser(DENOISERS[shapes]), DENOISERS[shapes]
    network = FusedNetwork(denoiser, "cuda")
    with META:
        embeddings = torch.empty(1, TOKENS, config.caption_channels, dtype=DTYPE)
        latent = torch.empty(1, config.in_channels, 1, 1)
        kept = Constant(torch.empty(1, 1, config.dim, dtype=DTYPE))

    def run() -> None:
        caption = _caption(denoiser, embeddings)
        layers = tuple((kept, read) for read in denoiser.read(caption, None))
        network.tables(denoiser.modulation(torch.empty(steps, device=META)))
        network.pack(TextContext(layers), latent, True)

    return recorded(run)


def _caption(denoiser: Denoiser, x: Tensor) -> Tensor:
    """As `Denoiser.text_context`, whose masks have values."""
    mixed = denoiser.caption_mix(F.gelu(denoiser.caption_expand(x), approximate="tanh"))
    return ops.rms_norm(mixed, denoiser.caption_norm, RMS_EPS)


def text() -> list[Launch]:
    """A prompt behind the instruction, whose keys and values are kept, at a length that is recorded."""
    from transformers import Gemma2Config, Gemma2Model

    with META:
        model = Gemma2Model(Gemma2Config(**GEMMA_2_2B)).to(DTYPE).requires_grad_(False).eval()
        for name in text_targets(model.config.num_hidden_layers):
            weight = model.get_submodule(name).weight
            layer = WeightOnlyLinear(torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight)))
            model.set_submodule(name, layer)
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        kept = torch.empty(1, heads, INSTRUCTION, width, dtype=DTYPE)
        rows = torch.empty(1, _LENGTH, model.config.hidden_size, dtype=DTYPE)
        known = torch.empty((), dtype=torch.int32)
        gemma = FusedGemma(model, "cuda")
    past = [(kept, kept)] * model.config.num_hidden_layers
    return recorded(lambda: gemma.hidden_states(rows, past, known))


def decode(shapes: str, side: int) -> list[Launch]:
    """The decoder for one picture, with calibrated scales."""
    fused = fuse_decoder(int8_decoder(AUTOENCODERS[shapes]))
    cells = side // LATENT_CELL
    latent = torch.empty(1, DENOISERS[shapes].in_channels, cells, cells, dtype=DTYPE, device=META)
    return recorded(lambda: fused.decode(latent))


def int8_decoder(config: AutoencoderConfig, calibrated: bool = True) -> Autoencoder:
    """A decoder without values, all of whose layers are INT8."""
    with META:
        model = Autoencoder(config, encoder=False)
    targets = decoder_targets(model)
    scales = [f"{name}.weight_scale" for target in targets for name in stacked(target)]
    scales += [f"{target}.input_scale" for target in targets if calibrated]
    prepare_decoder(model, dict.fromkeys(scales, torch.empty(0, device=META)))
    model.to(DTYPE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.requires_grad_(False).eval()


def int8_encoder(config: AutoencoderConfig) -> Encoder:
    """The encoder, as `int8_decoder`, uncalibrated as it always is."""
    with META:
        model = Encoder(config)
    scales = [f"{name}.weight_scale" for target in encoder_targets(model) for name in stacked(target)]
    prepare_encoder(model, dict.fromkeys(scales, torch.empty(0, device=META)))
    model.to(DTYPE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.requires_grad_(False).eval()


def schedules(shapes: str, side: int, steps: int) -> dict[str, Schedule]:
    """All of a picture's stages in their order, of a prompt that is new, the first pictures aside."""
    graph, around = step(shapes, side)
    return {
        "text": Schedule(text(), graph=True),
        "context": Schedule(context(shapes, steps)),
        "step": Schedule(graph, around, graph=True, queued=True, times=steps),
        # recorded when a size comes for the second time (`sana_edge.torch_runtime.decode_graphs`)
        "decode": Schedule(decode(shapes, side), graph=True),
    }
