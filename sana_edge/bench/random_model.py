"""A whole model folder in full size with random weights, to measure what loading and drawing with it takes.

Pictures from it are noise. Weights are streamed to the disk: memory stays below 3 GB, and for a package below
5. A package has its scales from one small picture: `sana-edge quantize` looks for the best factors and tries
every layer, which takes long in full size and tells nothing of random weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_edge.bench.shapes import AUTOENCODERS, DENOISERS, decoder_shapes, static_scales, weights
from sana_edge.calib import package_component
from sana_edge.calib.calibrate import Calibration
from sana_edge.calib.job import Job
from sana_edge.calib.package_writer import copy_files, new_folder, write_shards
from sana_edge.calib.settings import Settings
from sana_edge.config import SamplerConfig
from sana_edge.export.graph.ports import ports
from sana_edge.export.onnx import write_decoder
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import decoder_targets, denoiser_targets, quantize_decoder, quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.nets.tiny_autoencoder import latent_decoder
from sana_edge.noise.schedules import sampler_of
from sana_edge.sampler import denoise
from sana_edge.store import domain, hub, manifest
from sana_edge.store.architectures import GEMMA_2_2B
from sana_edge.store.folder import read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.manifest_files import stored_files
from sana_edge.store.weights import load_into
from sana_edge.system.atomic import write_json
from sana_edge.torch_runtime.load import load_decoder, load_denoiser

# what the Sprint models have beside their shapes, and their sampler with diffusers' settings
SPRINT: dict[str, Any] = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
SCM = {
    "_class_name": "SCMScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "trigflow",
    "sigma_data": 0.5,
}

_CPU = torch.device("cpu")
_INFO = {"prompt_set": "none, one random text", "observed": 1}
# side of the latent, tokens of the text, steps of the picture, and the guidance where it is embedded
_CELLS, _TOKENS, _STEPS, _GUIDANCE = 8, 30, 2, 4.5


def write_model(
    output: Path,
    shapes: str,
    *,
    dtype: torch.dtype,
    text_layers: int,
    text_width: int,
    force: bool,
    sprint: bool = False,
    device: str = "cpu",
    layers: int | None = None,
) -> None:
    """Write the folder.

    Args:
        shapes: a name of `sana_edge.bench.shapes.DENOISERS`.
        dtype: of the denoiser and the autoencoder; the text encoder is bf16, as the public ones.
        text_layers, text_width: Gemma-2-2B has 26 and 2304; the denoiser must read as many channels.
        device: where the weights are drawn; each kind draws its own.
        sprint: a Sprint model, with a guidance embedding, norms of queries and keys, and the SCM sampler.
        layers: of the denoiser; all of the shapes' if left out.
    """
    tiny = BUNDLED / "sana-tiny"
    config = replace(DENOISERS[shapes], **SPRINT) if sprint else DENOISERS[shapes]
    config = config if layers is None else replace(config, num_layers=layers)
    with new_folder(output, force=force) as folder:
        names = [path.relative_to(tiny).as_posix() for path in tiny.rglob("*.json")]
        kept = ("model_index.json", "scheduler/", "tokenizer/")
        # but not what sana-tiny was trained for
        copy_files([name for name in names if name.startswith(kept) and name != domain.FILE], tiny, folder)
        if sprint:
            _make_sprint(folder)
        with torch.device("meta"):
            denoiser = Denoiser(config).to_diffusers()
            autoencoder = Autoencoder(AUTOENCODERS[shapes]).state_dict()
        _component(folder / "transformer", config.to_dict(), denoiser, dtype, device)
        _component(folder / "vae", AUTOENCODERS[shapes].to_dict(), autoencoder, dtype, device)
        text = _text_config(text_layers, text_width)
        _component(folder / "text_encoder", text, _text_shapes(text), torch.bfloat16, device, stem="model")


def _make_sprint(folder: Path) -> None:
    """Name Sprint's pipeline and sampler in place of those that were copied."""
    index = read_json(folder / "model_index.json")
    scheduler = ["diffusers", SCM["_class_name"]]
    changed = {**index, "_class_name": "SanaSprintPipeline", "scheduler": scheduler}
    write_json(folder / "model_index.json", changed)
    write_json(folder / "scheduler" / "scheduler_config.json", SCM)


def _text_config(layers: int, width: int) -> dict[str, Any]:
    vocabulary = GEMMA_2_2B["vocab_size"]
    if width != GEMMA_2_2B["hidden_size"]:
        # a small text encoder for tests
        vocabulary = read_json(BUNDLED / "sana-tiny" / "text_encoder" / "config.json")["vocab_size"]
    return {**GEMMA_2_2B, "hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}


def _text_shapes(config: Mapping[str, Any]) -> dict[str, Tensor]:
    from transformers import Gemma2Config, Gemma2Model

    with torch.device("meta"):
        return dict(Gemma2Model(Gemma2Config.from_dict(dict(config))).state_dict())


def _component(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: str,
    *,
    stem: str = "diffusion_pytorch_model",
) -> None:
    folder.mkdir()
    write_json(folder / "config.json", dict(config))
    write_shards(weights(shapes, dtype, device), folder, stem=stem)


def write_package(model: Path, output: Path, *, force: bool = False) -> None:
    """Write the package of a float model folder, whole or not at all."""
    found = hub.resolve(str(model), offline=True)
    with new_folder(output.absolute(), force=force) as folder:
        job = Job(found, folder, Settings(), _CPU, lambda name, done, count: None)
        latent = _write_denoiser(job, found)
        _write_decoder(job, found, latent)
        job.write_rest()


def _write_denoiser(job: Job, model: ResolvedModel) -> Tensor:
    """Returns the latent (1, C, h, w) that the float denoiser draws."""
    denoiser, _ = load_denoiser(model, device=_CPU, dtype="fp32")
    latents: list[Tensor] = []
    targets = denoiser_targets(denoiser)
    scales = static_scales(denoiser, targets, lambda: latents.append(_draw(denoiser, model)))
    quantize_denoiser(denoiser, input_scales=scales)
    half = package_component.common_dtype(job.state("transformer"))
    tensors = package_component.stored(denoiser.to_diffusers(), half)
    job.write("transformer", tensors, Calibration(scales, [], [], _INFO))
    return latents[0]


def _draw(denoiser: Denoiser, model: ResolvedModel) -> Tensor:
    """A picture's latent without guidance, of a random text."""
    generator, config = torch.Generator().manual_seed(0), denoiser.config
    captions = torch.randn(1, _TOKENS, config.caption_channels, generator=generator)
    text = denoiser.text_context([TextFeatures(captions, torch.ones(1, _TOKENS, dtype=torch.bool))])
    made_for = SamplerConfig.from_dict(read_json(model.path / "scheduler" / "scheduler_config.json"))
    sampler = sampler_of(made_for, made_for.kind, _STEPS)
    guidance = _GUIDANCE if config.guidance_embeds else None
    tables = denoiser.modulation(torch.from_numpy(sampler.timesteps), guidance)

    def noise() -> Tensor:
        return torch.randn(1, config.in_channels, _CELLS, _CELLS, generator=generator)

    *_, last = denoise(sampler, lambda x, i: denoiser(x, tables[i], text), noise)
    latent: Tensor = last.x
    return latent


def _write_decoder(job: Job, model: ResolvedModel, latent: Tensor) -> None:
    decoder = load_decoder(model, device=_CPU, dtype=torch.float32)
    scaled = latent / decoder.config.scaling_factor
    scales = static_scales(decoder, decoder_targets(decoder), lambda: decoder.decode(scaled))
    quantize_decoder(decoder, input_scales=scales)
    half = package_component.common_dtype(job.state("vae"))
    job.write("vae", package_component.stored(decoder.state_dict(), half), Calibration(scales, [], [], _INFO))


def write_graphs(exported: Path, output: Path, shapes: str, name: str, *, force: bool = False) -> None:
    """Write an exported INT8 folder with another decoder, whole or not at all; the rest is linked.

    Args:
        shapes: of the model that was exported.
        name: of `sana_edge.bench.shapes.DECODERS`.
    """
    described = manifest.read(exported)
    with torch.device("meta"):
        decoder = latent_decoder(decoder_shapes(shapes, name))
    state = dict(weights(decoder.state_dict(), torch.float32))
    load_into(decoder, state, where=name)
    decoder.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, described.latent_channels, _CELLS, _CELLS, generator=generator)
    scales = static_scales(
        decoder, decoder_targets(decoder), lambda: decoder.decode(latent / decoder.config.scaling_factor)
    )
    quantize_decoder(decoder, input_scales=scales)
    old = {graph.file for key, graph in described.graphs.items() if key.startswith("decoder")}
    old.add("decoder.data")
    with new_folder(output.absolute(), force=force) as folder:
        for file in described.files.keys() - old:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(exported / file, folder / file)
        parts = write_decoder(decoder, folder, "fp32")
        graphs = {key: graph for key, graph in described.graphs.items() if not key.startswith("decoder")}
        graphs |= {key: ports(folder / f"{key}.onnx") for key in ("decoder", *(part.graph for part in parts))}
        files = {file: stored for file, stored in described.files.items() if file not in old}
        files |= {file: s for file, s in stored_files(folder, without=[]).items() if file not in files}
        changed = replace(described, graphs=graphs, files=files, decoder_parts=parts, verification=None)
        manifest.write(changed, folder)
