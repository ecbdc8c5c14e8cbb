"""A model on a device: its networks, each in the dtype that suits it, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from sana_edge.config import DenoiserConfig, SamplerConfig
from sana_edge.fused import backends
from sana_edge.fused.backends import Backend
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import EncodedTexts, TextEncoder
from sana_edge.plan.model import Facts, folder_facts
from sana_edge.progress import Progress, unseen
from sana_edge.store.domain import Domain, read_domain
from sana_edge.store.folder import foreign_parts
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.package import Quantization
from sana_edge.store.pairing import read_sampler
from sana_edge.store.preview_map import PreviewMap, read_map
from sana_edge.system.memory import peak_memory
from sana_edge.torch_runtime.load import describe
from sana_edge.torch_runtime.loader import Loader
from sana_edge.torch_runtime.memory import Memory
from sana_edge.torch_runtime.precision import choose_precision
from sana_edge.torch_runtime.stages import Loaded, Stages
from sana_edge.torch_runtime.steps import Predictor
from sana_edge.torch_runtime.texts import KnownTexts

WHILE_LOADING = "quantized while loading, without calibration; `sana-edge quantize` makes a package"

Model = TypeVar("Model", bound="TorchModel")


@dataclass(frozen=True, eq=False)
class TorchModel:
    """A model folder that torch computes.

    ``dtype`` is the denoiser's, by its short name, ``backend`` what the steps run on, ``quantization`` an
    INT8 model's scheme, ``decoder`` one that was chosen in place of the model's; ``notes`` say what happened
    while loading, ``domain`` what a small model knows, ``threads`` is None for torch's own number, ``texts``
    those that need no text encoder, None without a cache.
    """

    name: str
    device: torch.device
    dtype: str
    networks: Stages
    memory: Memory
    facts: Facts
    sampler: SamplerConfig
    backend: Backend
    quantization: str | None = None
    notes: tuple[str, ...] = ()
    domain: Domain | None = None
    decoder: str | None = None
    threads: int | None = None
    preview_map: PreviewMap | None = None
    texts: KnownTexts | None = None

    @classmethod
    def load(
        cls: type[Model],
        model: ResolvedModel,
        *,
        device: torch.device,
        dtype: str,
        int8: bool = False,
        backend: str = "torch",
        threads: int | None = None,
        memory: int | None = None,
        prompt_cache: bool = False,
        on_progress: Progress = unseen,
    ) -> Model:
        """Read a model folder, a float one or a package; only its text encoder where memory is short.

        Args:
            dtype: "auto", "fp32", "bf16" or "fp16", for the denoiser. The other two networks overflow in fp16
                and run in bf16 then, or in fp32 where the device has no bf16. In an INT8 model, of what is
                not INT8.
            int8: make float weights INT8 while they are loaded; a package is INT8 anyway.
            backend: see `backends.choose`.
            threads: see `torch_threads`.
            memory: bytes that may be taken; None: what is free.
            prompt_cache: load the text encoder with the first prompt that was not read before.
            on_progress: told before each of the networks; what it raises ends the loading.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit its config.
            InvalidInput, UnsupportedDevice: the backend cannot be used for this model.
            OutOfMemory: not even the smallest picture fits into ``memory``.
        """
        transformer, vae = describe(model)
        quantization = transformer.quantization or (vae.quantization if vae else None)
        quantize = int8 and quantization is None
        if quantize:
            quantization = Quantization("token")
        config = DenoiserConfig.from_dict(transformer.values)
        chosen = backends.choose(backend, device, dtype, quantization is not None, config)
        backends.measure_tiles(chosen, device)
        loading = partial(on_progress, f"loading {model.name}")
        loading(0, 2 if prompt_cache else 3)
        facts = folder_facts(model)
        precision = choose_precision(facts, dtype, device, int8=quantize, fused=chosen.fused, memory=memory)
        sampler, sampler_notes = read_sampler(model.path, config)
        loader = Loader(model, device, precision, chosen, quantize, transformer, vae)
        networks = loader.networks()
        texts = loader.texts(networks, facts.text["hidden_size"], threads) if prompt_cache else None
        loaded = cls(
            name=model.name,
            device=device,
            dtype=precision.denoiser,
            networks=networks,
            memory=Memory(
                networks,
                facts,
                device,
                precision.denoiser,
                precision.text,
                int8=quantization is not None,
                limit=memory,
                texts=texts,
            ),
            facts=facts,
            sampler=sampler,
            backend=chosen,
            quantization=quantization.summary if quantization else None,
            notes=(
                *((WHILE_LOADING,) if quantize else ()),
                *precision.notes,
                *sampler_notes,
                *foreign_parts(model.path),
            ),
            decoder=model.decoder_name,
            domain=read_domain(model.path),
            threads=threads,
            preview_map=read_map(model.path, config.in_channels),
            texts=texts,
        )
        loaded._load(loading)
        return loaded

    def _load(self, loading: Callable[[int, int], None]) -> None:
        """Load all networks that fit together for a usual picture, or else only the one that works first."""
        self.memory.arrange(self.name, guided=self.sampler.kind != "scm")
        parts = 3 if self.texts is None else 2
        if not self.networks.in_turn:
            _ = self.networks.denoiser
            loading(1, parts)
            _ = self.networks.decoder
        if self.texts is None:
            loading(2, parts)
            _ = self.networks.text

    @classmethod
    def of_networks(
        cls: type[Model],
        model: ResolvedModel,
        text_encoder: TextEncoder | EncodedTexts,
        denoiser: Denoiser,
        autoencoder: LatentDecoder,
        device: torch.device,
    ) -> Model:
        """Networks in fp32 that were loaded one by one, some perhaps without weights."""
        backend = backends.choose("torch", device, "fp32", False, denoiser.config)
        networks = Stages(
            Loaded[TextEncoder | EncodedTexts](None, text_encoder),
            Loaded(None, denoiser.requires_grad_(False).eval()),
            Loaded(None, autoencoder.requires_grad_(False).eval()),
            backend=backend,
        )
        facts = folder_facts(model)
        return cls(
            name=model.name,
            device=device,
            dtype="fp32",
            networks=networks,
            memory=Memory(networks, facts, device, "fp32"),
            facts=facts,
            sampler=read_sampler(model.path, denoiser.config)[0],
            backend=backend,
        )

    @property
    def text_encoder(self) -> TextEncoder | EncodedTexts:
        """In memory from now on, as the other networks."""
        return self.networks.text

    @property
    def denoiser(self) -> Denoiser:
        """See `text_encoder`."""
        return self.networks.denoiser

    @property
    def autoencoder(self) -> LatentDecoder:
        """See `text_encoder`."""
        return self.networks.decoder

    @property
    def predictor(self) -> Predictor:
        """Of the denoiser."""
        return self.networks.predictor

    @property
    def place(self) -> str:
        """Where it runs, for people."""
        return str(self.device)

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained for."""
        return self.trained_side, self.trained_side

    @property
    def trained_side(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return self.facts.denoiser.native_size

    @property
    def fixed_size(self) -> None:
        """It draws at any size."""

    @property
    def peak_memory(self) -> int | None:
        """See `sana_edge.system.memory.peak_memory`."""
        return peak_memory(self.device)
