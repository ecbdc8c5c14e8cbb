"""The loader of a model folder: its networks, each read when it is first used, and the prompts it knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sana_edge.fused.backends import Backend
from sana_edge.fused.decoder import fuse_decoder, fuse_encoder
from sana_edge.nets.autoencoder import Autoencoder, Encoder, LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.package import Description
from sana_edge.torch_runtime.load import load_decoder, load_denoiser, load_encoder
from sana_edge.torch_runtime.precision import Precision
from sana_edge.torch_runtime.stages import Loaded, Stages
from sana_edge.torch_runtime.text import load_text_encoder
from sana_edge.torch_runtime.texts import KnownTexts, check_files, text_identity


@dataclass(frozen=True, eq=False)
class Loader:
    """What a model folder's networks are loaded with.

    ``backend`` is what the steps run on, ``int8`` whether float weights are made INT8 meanwhile,
    ``transformer`` and ``vae`` what the folders of these names say, see `load.describe`.
    """

    model: ResolvedModel
    device: torch.device
    precision: Precision
    backend: Backend
    int8: bool
    transformer: Description
    vae: Description | None

    def networks(self) -> Stages:
        """All of them; reads no weights yet."""
        return Stages(
            Loaded(self._text_encoder),
            Loaded(self._denoiser),
            Loaded(self._decoder),
            Loaded(self._encoder),
            backend=self.backend,
        )

    def texts(self, networks: Stages, channels: int, threads: int | None) -> KnownTexts:
        """The cache in front of the text encoder, whose files are looked at now.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        check_files(self.model)
        return KnownTexts(
            networks,
            text_identity(
                self.model, device=self.device, int8=self.int8, backend=self.backend.name, threads=threads
            ),
            dtype=self.precision.texts,
            channels=channels,
            device=self.device,
        )

    def _text_encoder(self) -> TextEncoder:
        return load_text_encoder(
            self.model.path,
            dtype=self.precision.texts,
            device=self.device,
            backend=self.backend.name,
            variant=self.model.component_variant("text_encoder"),
            int8=self.int8,
        )

    def _denoiser(self) -> Denoiser:
        return load_denoiser(
            self.model,
            device=self.device,
            dtype=self.precision.denoiser,
            int8=self.int8,
            fused=self.backend.fused,
            description=self.transformer,
        )[0]

    def _decoder(self) -> LatentDecoder:
        found = load_decoder(
            self.model,
            device=self.device,
            dtype=self.precision.others,
            int8=self.int8,
            description=self.vae,
        )
        if self._fusible and isinstance(found, Autoencoder):
            return fuse_decoder(found, self.backend.name)
        return found

    def _encoder(self) -> Encoder:
        found = load_encoder(self.model, device=self.device, dtype=self.precision.others, int8=self.int8)
        return fuse_encoder(found, self.backend.name) if self._fusible else found

    @property
    def _fusible(self) -> bool:
        return self.backend.name == "cuda" and self.precision.others.itemsize == 2
