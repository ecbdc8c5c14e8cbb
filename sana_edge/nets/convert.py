"""An NVlabs checkpoint file into a folder in diffusers layout."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sana_edge.atomic import new_entries, write_json
from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.store import nvlabs
from sana_edge.store.folder import check_folder, needed_files, read_json
from sana_edge.store.weights import check_state, save_state

_PIPELINE = ("model_index.json", "scheduler", "tokenizer", "text_encoder", "transformer", "vae")
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert(
    file: Path,
    output: Path,
    *,
    size: int | None = None,
    cross_attention_heads: int | None = None,
    base: Path | None = None,
    force: bool = False,
) -> list[Path]:
    """Translate one checkpoint, tensors unchanged, into ``output/transformer`` or ``output/vae``.

    Which of the two, and which SANA, is read from the tensors' names and shapes. A .pth is opened with
    ``weights_only``: what else it holds is refused, not run.

    Args:
        file: a .pth of NVlabs (denoiser), or a .pth or .safetensors of the DC-AE authors (autoencoder).
        output: the model folder; made if needed.
        size: see `nvlabs.denoiser`; the 512 and 1024 px models do not tell.
        cross_attention_heads: see `nvlabs.denoiser`.
        base: a whole model folder that gives the other components, so that ``output`` is whole too.
        force: replace what is there of the files to be written.

    Returns:
        What was written, the converted component first.

    Raises:
        InvalidInput: something is there already, or an argument is needed.
        CheckpointError: the file is damaged, holds more than tensors, or is of another model.
        SanaError: ``output`` cannot be written.
    """
    if base is not None:
        check_folder(base)
    state = _read(file)
    component, config, state = _translate(file, state, size, cross_attention_heads)
    names = [component] if base is None else [component, *_PIPELINE]
    for target in (output / name for name in names):
        if os.path.lexists(target) and not force:
            raise InvalidInput(f"{target} exists", "choose another --output, or add --force")
    with new_entries(output, force=force) as folder:
        (folder / component).mkdir()
        save_state(state, folder / component / _WEIGHTS)
        write_json(folder / component / "config.json", config.to_dict())
        if base is not None and isinstance(config, DenoiserConfig):
            _write_sampler(folder, config, base)
        if base is not None:
            _complete(folder, base)
        written = [path.name for path in folder.iterdir()]
    return [output / name for name in sorted(written, key=lambda name: (name != component, name))]


def _translate(
    file: Path, state: dict[str, Tensor], size: int | None, heads: int | None
) -> tuple[str, DenoiserConfig | AutoencoderConfig, dict[str, Tensor]]:
    """The component's name, its config and its tensors, checked to be all that the config needs."""
    if nvlabs.is_denoiser(state):
        config, state = nvlabs.denoiser(state, size=size, cross_attention_heads=heads)
        with torch.device("meta"):
            check_state(Denoiser(config).to_diffusers(), state, where=str(file))
        return "transformer", config, state
    if nvlabs.is_autoencoder(state):
        vae_config, state = nvlabs.autoencoder(state)
        with torch.device("meta"):
            check_state(Autoencoder(vae_config).state_dict(), state, where=str(file))
        return "vae", vae_config, state
    first = next(iter(state), "none")
    raise CheckpointError(f"{file} holds no SANA denoiser and no DC-AE (its first key is {first})")


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} is no file", "give a .pth that NVlabs published")
    try:
        data: Any
        if file.suffix == ".safetensors":
            data = load_file(file)
        else:
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    # on damaged bytes the unpickler fails with whatever the step it is at raises
    except Exception as error:
        raise CheckpointError(
            f"cannot read {file}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "it is damaged, or holds more than tensors, which may be unsafe; take it from its publisher",
        ) from error
    data = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{file} holds no state dict", "give a .pth that NVlabs published")
    return data


def _write_sampler(folder: Path, config: DenoiserConfig, base: Path) -> None:
    """The sampler of a converted denoiser, and the index that names it, after the pattern of ``base``."""
    scheduler: dict[str, Any] = {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 6.0 if config.native_size == 4096 else 3.0,
    }
    if config.guidance_embeds:
        scheduler = {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5}
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = read_json(base / "model_index.json")
    index["_class_name"] = "SanaSprintPipeline" if config.guidance_embeds else "SanaPipeline"
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "model_index.json", index)


def _complete(folder: Path, base: Path) -> None:
    """Add what ``folder`` lacks from ``base``; weights as links to the same content where possible."""
    files = [path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()]
    present = {path.name for path in folder.iterdir()}
    for name in needed_files(files, None):
        if name.split("/")[0] in present:
            continue
        source, target = (base / name).resolve(), folder / name
        target.parent.mkdir(exist_ok=True)
        if target.suffix == ".safetensors":
            with contextlib.suppress(OSError):
                os.link(source, target)
                continue
        shutil.copyfile(source, target)
