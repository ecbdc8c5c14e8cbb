"""The model folder that a stage leaves behind, in diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sana_edge.nets.denoiser import Denoiser
from sana_edge.store.weights import save_state
from sana_edge.system.atomic import new_folder, write_json

from .frozen import Frozen
from .recipe import Recipe, Stage

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "timestep_spacing": "linspace",
}
INDEX = {
    "_class_name": "SanaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def write_model(
    folder: Path, recipe: Recipe, stage: Stage, state: Mapping[str, Tensor], frozen: Frozen
) -> None:
    """Write a model that `sana-edge generate` takes, in the place of what is at ``folder``.

    Raises:
        SanaError: it cannot be written.
    """
    config = recipe.config(stage)
    with torch.device("meta"):
        denoiser = Denoiser(config)
    dtype = _DTYPES[recipe.training.stored]
    denoiser.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    with new_folder(folder, force=True, kind="model folder", is_kind=lambda folder: True) as made:
        frozen.link(made)
        save_state(denoiser.to_diffusers(), made / "transformer" / "diffusion_pytorch_model.safetensors")
        write_json(made / "transformer" / "config.json", config.to_dict())
        write_index(made, stage.flow_shift)


def write_index(folder: Path, flow_shift: float) -> None:
    """The sampler's config, and ``model_index.json``, which makes a folder a model."""
    scheduler = {**SCHEDULER, "flow_shift": flow_shift}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", INDEX)
