"""Graphs for engines to be timed with: our own from random weights, and naive ones made from diffusers."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from decoder_work import DecoderWork
from denoiser_work import DenoiserWork, step_inputs, step_times
from shapes import AUTOENCODERS, random_latent, random_weights
from static_scales import static_scales
from torch import Tensor, nn

from sana_edge.export.graph.builder import GraphBuilder
from sana_edge.export.graph.decoder import add_decoder
from sana_edge.export.graph.denoiser import add_denoiser_folded
from sana_edge.export.graph.external_data import ExternalData
from sana_edge.export.graph.projection import add_text_projection
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import (
    decoder_targets,
    denoiser_targets,
    quantize_decoder,
    quantize_denoiser,
    set_graph_activations,
)
from sana_edge.store.weights import load_into
from sana_edge.torch_runtime.tiling import DEFAULT_TILE

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
        (_naive_denoiser if denoises else _naive_decoder)(work, folder / NAIVE)


def text_inputs(work: DenoiserWork) -> list[Tensor]:
    """Caption embeddings (1, L, C) of the negative prompt, one token, and of the prompt."""
    captions, mask = step_inputs(work)[1:]
    lengths = mask.sum(dim=1).tolist()
    return [captions[row : row + 1, :length].float() for row, length in enumerate(lengths)]


def _our_denoiser(work: DenoiserWork, folder: Path, kinds: Collection[str]) -> None:
    with torch.device("meta"):
        shapes = Denoiser(work.config).to_diffusers()
    denoiser = Denoiser.from_diffusers(work.config, random_weights(shapes, work)).requires_grad_(False).eval()
    # as with the public 1.0 weights
    denoiser.clamp = True

    def run() -> None:
        latent, captions, mask = step_inputs(work)
        from sana_edge.nets.text_encoder import TextFeatures

        lengths = mask.sum(dim=1).tolist()
        groups = [
            TextFeatures(captions[row : row + 1, :length], mask[row : row + 1, :length])
            for row, length in enumerate(lengths)
        ]
        tables = denoiser.modulation(step_times(work))
        denoiser(torch.cat([latent] * 2), tables[work.steps // 2], denoiser.text_context(groups))

    for kind in (FLOAT, INT8):
        if kind == INT8 and kind in kinds:
            scales = static_scales(denoiser, denoiser_targets(denoiser), run)
            quantize_denoiser(denoiser, input_scales=scales)
            set_graph_activations(denoiser)
        if kind in kinds:
            (folder / kind).mkdir(parents=True)
            with ExternalData(folder / kind / "denoiser.data") as data:
                for name, add in (
                    ("text_projection", add_text_projection),
                    ("denoiser_folded", add_denoiser_folded),
                ):
                    graph = GraphBuilder(name, data)
                    add(graph, denoiser)
                    graph.save(folder / kind / f"{name}.onnx")


def _our_decoder(work: DecoderWork, folder: Path, kinds: Collection[str]) -> None:
    with torch.device("meta"):
        autoencoder = Autoencoder(AUTOENCODERS[work.shapes], encoder=False)
    load_into(autoencoder, random_weights(autoencoder.state_dict(), work), where=work.title)
    autoencoder.requires_grad_(False).eval()
    # one tile is enough to know the ranges
    side = min(work.size, DEFAULT_TILE) // autoencoder.config.spatial_compression
    latent = random_latent(work.size, "cpu")[..., :side, :side]
    for kind in (FLOAT, INT8):
        if kind == INT8 and kind in kinds:
            scales = static_scales(
                autoencoder, decoder_targets(autoencoder), lambda: autoencoder.decode(latent)
            )
            quantize_decoder(autoencoder, input_scales=scales)
        if kind in kinds:
            (folder / kind).mkdir(parents=True)
            with ExternalData(folder / kind / "decoder.data") as data:
                graph = GraphBuilder("decoder", data)
                add_decoder(graph, autoencoder)
                graph.save(folder / kind / "decoder.onnx")


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


def naive_inputs(work: DenoiserWork) -> dict[str, Tensor]:
    """What a step of diffusers gets: both prompts, padded to 300 tokens."""
    latent, captions, mask = step_inputs(work)
    time = step_times(work)[work.steps // 2]
    return {
        "latent": torch.cat([latent] * 2),
        "captions": captions.float(),
        "timestep": time.expand(2).contiguous(),
        "mask": mask.long(),
    }


def _naive_denoiser(work: DenoiserWork, folder: Path) -> None:
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        shapes = Denoiser(work.config).to_diffusers()
        transformer = SanaTransformer2DModel(**asdict(work.config))
    transformer.load_state_dict(random_weights(shapes, work), assign=True)
    _convert(_Step(transformer.requires_grad_(False).eval()), naive_inputs(work), folder, transformer=True)


def _naive_decoder(work: DecoderWork, folder: Path) -> None:
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        shapes = Autoencoder(AUTOENCODERS[work.shapes], encoder=False).state_dict()
        autoencoder = AutoencoderDC(**asdict(AUTOENCODERS[work.shapes]))
    del autoencoder.encoder
    autoencoder.load_state_dict(random_weights(shapes, work), assign=True)
    _convert(
        _Decode(autoencoder.requires_grad_(False).eval()),
        {"latent": random_latent(work.size, "cpu")},
        folder,
        transformer=False,
    )


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
