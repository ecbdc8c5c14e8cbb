"""What a denoiser's training takes from a model and leaves as it is: autoencoder and text encoder."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import CheckpointError, SanaError
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.store import hub
from sana_edge.store.weights import load_into, load_state, weight_files
from sana_edge.system.json_values import read_json

from .imagefolder import checksum

PARTS = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Frozen:
    """Folders of a model in diffusers layout, of which the parts need be there only."""

    folder: Path
    variant: str | None = None

    @classmethod
    def find(cls, model: str) -> Frozen:
        """A folder that has the parts, or a model by its name.

        Raises:
            ModelNotFound, CheckpointError: there is none, or parts of it are missing.
        """
        folder = Path(os.path.expanduser(model))
        if not folder.is_dir():
            found = hub.resolve(model)
            return cls(found.path, found.variant)
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}", "give a model in diffusers layout")
        return cls(folder)

    @property
    def autoencoder_config(self) -> AutoencoderConfig:
        return AutoencoderConfig.from_dict(_json(self.folder / "vae" / "config.json"))

    def autoencoder_checksum(self) -> str:
        """Of its config and weights."""
        files = [
            self.folder / "vae" / "config.json",
            *weight_files(self.folder / "vae", variant=self.variant),
        ]
        return hashlib.sha256("".join(checksum(file) for file in files).encode()).hexdigest()[:32]

    def autoencoder(self, device: torch.device) -> Autoencoder:
        """Encoder and decoder, fp32."""
        with torch.device("meta"):
            model = Autoencoder(self.autoencoder_config)
        state = load_state(self.folder / "vae", variant=self.variant)
        load_into(model, {k: v.float() for k, v in state.items()}, where=str(self.folder / "vae"))
        return model.requires_grad_(False).eval().to(device)

    def text_encoder(self, device: torch.device) -> TextEncoder:
        """In bf16 on a CUDA device or where it is stored so, fp32 elsewhere."""
        config = _json(self.folder / "text_encoder" / "config.json")
        stored = config.get("dtype") or config.get("torch_dtype")
        half = device.type == "cuda" or stored == "bfloat16"
        dtype = torch.bfloat16 if half else torch.float32
        return TextEncoder.load(self.folder, dtype=dtype, device=device, variant=self.variant)

    def link(self, folder: Path) -> None:
        """Put the parts into another model folder, without a copy where the file system can do that.

        Raises:
            SanaError: they cannot be written.
        """
        try:
            for source in (
                path for part in PARTS for path in (self.folder / part).rglob("*") if path.is_file()
            ):
                target = folder / source.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                # a small file may be edited later, and then in one place only
                if source.suffix != ".safetensors" or not _linked(source.resolve(), target):
                    shutil.copyfile(source, target)
        except OSError as error:
            raise SanaError(
                f"cannot write {folder}: {error}", "check the free space and the permissions"
            ) from error


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "the model folder is incomplete") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not an object", "the model folder is damaged")
    return content
