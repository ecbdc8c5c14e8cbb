"""A checkpoint file, of a training or published, into a folder in diffusers layout."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.nets.autoencoder import Autoencoder, decoder_state
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.tiny_autoencoder import TinyAutoencoder
from sana_edge.store import nvlabs, pairing, tiny_autoencoder
from sana_edge.store.checkpoint import Checkpoint, Weights, read_checkpoint
from sana_edge.store.folder import check_folder, needed_files, read_json
from sana_edge.store.tensor_names import DENOISER, TINY
from sana_edge.store.tiny_autoencoder import DecoderConfig, TinyAutoencoderConfig
from sana_edge.store.weights import check_state, check_values, save_state
from sana_edge.system.atomic import new_entries, write_json

_PIPELINE = ("model_index.json", "scheduler", "tokenizer", "text_encoder", "transformer", "vae")
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert(
    file: Path,
    output: Path,
    *,
    size: int | None = None,
    cross_attention_heads: int | None = None,
    base: Path | None = None,
    weights: Weights | None = None,
    force: bool = False,
    tell: Callable[[str], None] = lambda note: None,
) -> list[Path]:
    """Translate one checkpoint, tensors unchanged, into ``output/transformer`` or ``output/vae``.

    Which of the two, and which SANA, is read from the tensors' names and shapes, whatever prefix a training
    has put before them.

    Args:
        file: a .pth or .safetensors, or a folder of one component's weights, in the names of NVlabs, of the
            DC-AE authors or of diffusers.
        output: the model folder; made if needed.
        size: see `nvlabs.denoiser`; the 512 and 1024 px models do not tell.
        cross_attention_heads: see `nvlabs.denoiser`.
        base: a whole model folder that gives the other components, so that ``output`` is whole too.
        weights: see `read_checkpoint`.
        tell: is told what was chosen, and what is missing.
        force: replace what is there of the files to be written.

    Returns:
        What was written, the converted component first.

    Raises:
        InvalidInput: something is there already, or an argument is needed.
        CheckpointError: the file is damaged, may run code, or is of another model than ``base``.
        SanaError: ``output`` cannot be written.
    """
    if base is not None:
        check_folder(base)
    read = read_checkpoint(file, weights)
    component, config, state = _translate(file, read, size, cross_attention_heads)
    if base is not None:
        config = _fitted(config, base)
    for note in read.notes:
        tell(note)
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
            if not isinstance(config, DenoiserConfig):
                _write_index(folder, base, vae=["diffusers", str(config.to_dict()["_class_name"])])
            _complete(folder, base)
        written = [path.name for path in folder.iterdir()]
    if base is None and not (output / "model_index.json").is_file():
        tell(f"{component}/ is one part of a model: --base MODEL adds the others, which `generate` needs")
    return [output / name for name in sorted(written, key=lambda name: (name != component, name))]


def _translate(
    file: Path, read: Checkpoint, size: int | None, heads: int | None
) -> tuple[str, DenoiserConfig | DecoderConfig, dict[str, Tensor]]:
    """The component's name, its config and its tensors: finite, and all that the config needs."""
    check_values(read.state, where=str(file))
    published = read.network.published
    described = _described(file) if published and size is None and heads is None else {}
    if read.network.network == DENOISER:
        if described.get("_class_name") == "SanaTransformer2DModel":
            config, state = DenoiserConfig.from_dict(described), read.state
        else:
            config, state = nvlabs.denoiser(
                read.state, size=size, cross_attention_heads=heads, published=published
            )
        with torch.device("meta"):
            check_state(Denoiser(config).to_diffusers(), state, where=str(file))
        return "transformer", config, state
    if read.network.network == TINY:
        return _tiny(file, read, described)
    if described.get("_class_name") == "AutoencoderDC":
        vae_config, state = AutoencoderConfig.from_dict(described), read.state
    else:
        vae_config, state = nvlabs.autoencoder(read.state, published=published)
    with torch.device("meta"):
        check_state(Autoencoder(vae_config).state_dict(), state, where=str(file))
    return "vae", vae_config, state


def _tiny(
    file: Path, read: Checkpoint, described: dict[str, object]
) -> tuple[str, TinyAutoencoderConfig, dict[str, Tensor]]:
    state = tiny_autoencoder.renamed(read.state, published=read.network.published)
    config = tiny_autoencoder.config_of({name: tuple(tensor.shape) for name, tensor in state.items()})
    if described.get("_class_name") == tiny_autoencoder.CLASS:
        # which knows the activation
        config = TinyAutoencoderConfig.from_dict(described)
    with torch.device("meta"):
        check_state(TinyAutoencoder(config).state_dict(), state, where=str(file))
    return "vae", config, state


@dataclass(frozen=True)
class Decoder:
    """A decoder's config, and its tensors by the names of its module."""

    config: DecoderConfig
    state: dict[str, Tensor]


def read_decoder(file: Path) -> Decoder:
    """Read a file that `convert` takes and that holds an autoencoder.

    Raises:
        CheckpointError: it holds something else, or is damaged.
    """
    _, config, state = _translate(file, read_checkpoint(file), None, None)
    if isinstance(config, DenoiserConfig):
        raise CheckpointError(f"{file} holds a denoiser", "give the file of an autoencoder as the decoder")
    return Decoder(config, decoder_state(state))


def _described(file: Path) -> dict[str, object]:
    """The config.json in a component's folder, or beside a file in it."""
    path = (file if file.is_dir() else file.parent) / "config.json"
    return read_json(path) if path.is_file() else {}


def _fitted(config: DenoiserConfig | DecoderConfig, base: Path) -> DenoiserConfig | DecoderConfig:
    """A converted component's config beside a base's others, of whose latents an autoencoder takes the scale.

    Raises:
        CheckpointError: they are of different models.
    """
    parts = [read_json(base / name / "config.json") for name in ("transformer", "vae", "text_encoder")]
    denoiser, autoencoder = DenoiserConfig.from_dict(parts[0]), tiny_autoencoder.decoder_config(parts[1])
    if isinstance(config, DenoiserConfig):
        denoiser = config
    else:
        if isinstance(config, AutoencoderConfig) and isinstance(autoencoder, AutoencoderConfig):
            config = dataclasses.replace(config, scaling_factor=autoencoder.scaling_factor)
        autoencoder = config
    try:
        pairing.check_parts(denoiser, autoencoder, parts[2])
    except CheckpointError as error:
        hint = "choose another --base, or leave it out to convert this part alone"
        raise CheckpointError(f"--base {base} does not fit: {error.message}", hint) from error
    return config


def _write_sampler(folder: Path, config: DenoiserConfig, base: Path) -> None:
    """The sampler of a converted denoiser, and the index that names it, after the pattern of ``base``."""
    scheduler = pairing.scheduler_of(config)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    pipeline = "SanaSprintPipeline" if config.guidance_embeds else "SanaPipeline"
    _write_index(folder, base, _class_name=pipeline, scheduler=["diffusers", scheduler["_class_name"]])


def _write_index(folder: Path, base: Path, **changed: object) -> None:
    write_json(folder / "model_index.json", {**read_json(base / "model_index.json"), **changed})


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
