"""The INT8 package of a random model, with scales from one small picture.

    python benchmarks/random_package.py random-0.6b random-0.6b-int8

`sana-edge quantize` looks for the best factors and tries every layer, which takes long in full size and
tells nothing of random weights. What it would write has the same size and speed. Memory stays below 5 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from static_scales import static_scales
from torch import Tensor

from sana_edge.calib import package_component
from sana_edge.calib.calibrate import Calibration
from sana_edge.calib.job import Task
from sana_edge.calib.package_writer import new_folder
from sana_edge.calib.settings import Settings
from sana_edge.config import SamplerConfig
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import decoder_targets, denoiser_targets, quantize_decoder, quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.sampler import denoise, sampler_of
from sana_edge.store import hub
from sana_edge.store.folder import read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.torch_runtime.load import load_decoder, load_denoiser

_CPU = torch.device("cpu")
_INFO = {"prompt_set": "none, one random text", "observed": 1}
# side of the latent, tokens of the text, steps of the picture, and the guidance where it is embedded
_CELLS, _TOKENS, _STEPS, _GUIDANCE = 8, 30, 2, 4.5


def write_package(model: Path, output: Path, *, force: bool = False) -> None:
    """Write the package of a float model folder, whole or not at all."""
    found = hub.resolve(str(model), offline=True)
    with new_folder(output.absolute(), force=force) as folder:
        task = Task(found, folder, Settings(), _CPU, lambda name, done, count: None)
        latent = _write_denoiser(task, found)
        _write_decoder(task, found, latent)
        task.write_rest()


def _write_denoiser(task: Task, model: ResolvedModel) -> Tensor:
    """Returns the latent (1, C, h, w) that the float denoiser draws."""
    denoiser, _ = load_denoiser(model, device=_CPU, dtype="fp32")
    latents: list[Tensor] = []
    targets = denoiser_targets(denoiser)
    scales = static_scales(denoiser, targets, lambda: latents.append(_draw(denoiser, model)))
    quantize_denoiser(denoiser, input_scales=scales)
    half = package_component.common_dtype(task.state("transformer"))
    tensors = package_component.stored(denoiser.to_diffusers(), half)
    task.write("transformer", tensors, Calibration(scales, [], [], _INFO))
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
    return last.x


def _write_decoder(task: Task, model: ResolvedModel, latent: Tensor) -> None:
    decoder = load_decoder(model, device=_CPU, dtype=torch.float32)
    scaled = latent / decoder.config.scaling_factor
    scales = static_scales(decoder, decoder_targets(decoder), lambda: decoder.decode(scaled))
    quantize_decoder(decoder, input_scales=scales)
    half = package_component.common_dtype(task.state("vae"))
    task.write(
        "vae", package_component.stored(decoder.state_dict(), half), Calibration(scales, [], [], _INFO)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="write the INT8 package of a random model")
    parser.add_argument("model", type=Path, help="a float model folder")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--force", action="store_true", help="replace the folder")
    args = parser.parse_args()
    write_package(args.model, args.output, force=args.force)
    print(args.output)


if __name__ == "__main__":
    main()
