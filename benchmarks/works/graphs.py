"""Graphs for engines to be timed with: our own from random weights, and naive ones made from diffusers."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_edge.bench.shapes import random_latent, static_scales
from sana_edge.export.graph.builder import GraphBuilder
from sana_edge.export.graph.decoder import add_decoder
from sana_edge.export.graph.denoiser import add_denoiser_folded
from sana_edge.export.graph.external_data import ExternalData
from sana_edge.export.graph.projection import add_text_projection
from sana_edge.nets.quantize import (
    decoder_targets,
    denoiser_targets,
    quantize_decoder,
    quantize_denoiser,
    set_graph_activations,
)
from sana_edge.torch_runtime.tiling import DEFAULT_TILE
from works.decoder import DecoderWork, our_decoder, their_decoder
from works.denoiser import DenoiserWork, our_denoiser, step_inputs, step_times, text_groups, their_denoiser

FLOAT, INT8, NAIVE = "float", "int8", "naive"
NAIVE_INT8 = "naive-int8.xml"
# what post-training quantization of the naive graph sees: few are enough for its time
_SAMPLES = 2


def make(work: DenoiserWork | DecoderWork, folder: Path, kinds: Collection[str]) -> None:
    """Write the graphs of a work: ``FLOAT``, ``INT8`` and ``NAIVE`` are folders, or parts of ``kinds``."""
    denoises = isinstance(work, DenoiserWork)
    if FLOAT in kinds or INT8 in kinds:
        (_our_denoiser if denoises else _our_decoder)(work, folder, kinds)
    if NAIVE in kinds:
        (folder / NAIVE).mkdir(parents=True)
        _naive(work, folder / NAIVE)


def _our_denoiser(work: DenoiserWork, folder: Path, kinds: Collection[str]) -> None:
    denoiser = our_denoiser(work, work.state())
    adders = {"text_projection": add_text_projection, "denoiser_folded": add_denoiser_folded}

    def run() -> None:
        latent, tables = step_inputs(work)[0], denoiser.modulation(step_times(work))
        texts = denoiser.text_context(text_groups(work))
        denoiser(torch.cat([latent] * 2), tables[work.steps // 2], texts)

    def save(kind: str) -> None:
        _save(folder / kind, "denoiser.data", adders, denoiser)

    if FLOAT in kinds:
        save(FLOAT)
    if INT8 in kinds:
        quantize_denoiser(denoiser, input_scales=static_scales(denoiser, denoiser_targets(denoiser), run))
        set_graph_activations(denoiser)
        save(INT8)


def _our_decoder(work: DecoderWork, folder: Path, kinds: Collection[str]) -> None:
    decoder = our_decoder(work, work.state())
    # one tile is enough to know the ranges
    side = min(work.size, DEFAULT_TILE) // decoder.config.spatial_compression
    latent = random_latent(work.size, "cpu")[..., :side, :side]

    def save(kind: str) -> None:
        _save(folder / kind, "decoder.data", {"decoder": add_decoder}, decoder)

    if FLOAT in kinds:
        save(FLOAT)
    if INT8 in kinds:
        scales = static_scales(decoder, decoder_targets(decoder), lambda: decoder.decode(latent))
        quantize_decoder(decoder, input_scales=scales)
        save(INT8)


def _save(folder: Path, weights: str, adders: Mapping[str, Callable[..., object]], model: nn.Module) -> None:
    """Graphs of a model by name, with one file of weights."""
    folder.mkdir(parents=True)
    with ExternalData(folder / weights) as data:
        for name, add in adders.items():
            graph = GraphBuilder(name, data)
            add(graph, model)
            graph.save(folder / f"{name}.onnx")


class _Step(nn.Module):
    """diffusers' network with the inputs that its pipeline gives it, by position."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latent: Tensor, captions: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        predicted: Tensor = self.transformer(
            latent,
            encoder_hidden_states=captions,
            timestep=timestep,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return predicted


class _Decode(nn.Module):
    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.decoder = autoencoder.decoder

    def forward(self, latent: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(latent)
        return pixels


def naive_inputs(work: DenoiserWork | DecoderWork) -> dict[str, Tensor]:
    """The latent; of a step what diffusers gives its network: both prompts, padded to 300 tokens."""
    if isinstance(work, DecoderWork):
        return {"latent": random_latent(work.size, "cpu")}
    latent, captions, mask = step_inputs(work)
    return {
        "latent": torch.cat([latent] * 2),
        "captions": captions.float(),
        "timestep": step_times(work)[work.steps // 2].expand(2).contiguous(),
        "mask": mask.long(),
    }


def _naive(work: DenoiserWork | DecoderWork, folder: Path) -> None:
    if isinstance(work, DenoiserWork):
        model: nn.Module = _Step(their_denoiser(work, work.state()))
    else:
        model = _Decode(their_decoder(work, work.state()))
    _convert(model, naive_inputs(work), folder, transformer=isinstance(work, DenoiserWork))


def _convert(model: nn.Module, inputs: Mapping[str, Tensor], folder: Path, *, transformer: bool) -> None:
    """What a user would do: torch's exporter with fixed shapes, then nncf's post-training quantization."""
    import nncf
    import openvino

    path = folder / "float.onnx"
    with _quiet():
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            dynamo=True,
            external_data=True,
            verbose=False,
        )
        graph = openvino.Core().read_model(path)
        samples = [{name: value.numpy() for name, value in inputs.items()}]
        generator = torch.Generator().manual_seed(3)
        while len(samples) < _SAMPLES:
            other = torch.randn(inputs["latent"].shape, generator=generator).numpy()
            samples.append({**samples[0], "latent": other})
        small = nncf.quantize(
            graph,
            nncf.Dataset(samples),
            subset_size=_SAMPLES,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )
        openvino.save_model(small, folder / NAIVE_INT8, compress_to_fp16=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress that exporters print."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
