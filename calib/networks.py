"""A model folder's networks, one in memory at a time: text encoder, denoiser, decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_edge.calib.observe import named_weights
from sana_edge.calib.statistics import checksum_of
from sana_edge.config import DenoiserConfig
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import EncodedTexts, TextEncoder
from sana_edge.nets.tiny_autoencoder import latent_decoder
from sana_edge.progress import Progress
from sana_edge.prompt import instruction_of
from sana_edge.request.plan import Plan
from sana_edge.store import package
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.tiny_autoencoder import decoder_config
from sana_edge.system.memory import give_back
from sana_edge.torch_runtime.load import load_decoder, load_denoiser
from sana_edge.torch_runtime.runtime import TorchRuntime

# bytes of a float text encoder's layers that stay in memory while prompts are read; see `load_text_model`
RESIDENT = 3 << 30


@dataclass(frozen=True)
class Networks:
    """A float model or a package, computed in fp32; what a method returns goes with the last reference."""

    model: ResolvedModel
    device: torch.device

    def texts(self, plans: Iterable[Plan], progress: Progress) -> EncodedTexts:
        """What the plans' prompts say to a denoiser, by a text encoder that is gone afterwards."""
        encoder = TextEncoder.load(
            self.model.path,
            dtype=torch.float32,
            device=self.device,
            variant=self.model.component_variant("text_encoder"),
            resident=RESIDENT,
        )
        texts, plans = EncodedTexts(), list(plans)
        for number, plan in enumerate(plans, start=1):
            texts.add(encoder, plan.prompt, instruction=instruction_of(plan))
            if plan.guided:
                texts.add(encoder, plan.negative_prompt, instruction=None)
            progress("read prompts", number, len(plans))
        return texts

    def empty(self, texts: EncodedTexts | None = None) -> TorchRuntime:
        """A runtime that knows what the networks are like; none has weights."""
        configs = (package.describe(self.model.path / name).values for name in ("transformer", "vae"))
        with torch.device("meta"):
            denoiser = Denoiser(DenoiserConfig.from_dict(next(configs)))
            autoencoder = latent_decoder(decoder_config(next(configs)))
        return self._runtime(denoiser, autoencoder, texts)

    def denoising(self, texts: EncodedTexts) -> TorchRuntime:
        """A runtime whose denoiser has its weights."""
        give_back()
        denoiser, _ = load_denoiser(self.model, device=self.device, dtype="fp32")
        return self._runtime(denoiser, self.empty().autoencoder, texts)

    def decoding(self) -> TorchRuntime:
        """A runtime whose decoder has its weights."""
        give_back()
        decoder = load_decoder(self.model, device=self.device, dtype=torch.float32)
        return self._runtime(self.empty().denoiser, decoder)

    def checksum(self) -> str:
        """`sana_edge.calib.observe.weights_checksum` of both networks."""

        def named() -> Iterator[tuple[str, Tensor]]:
            # in the order of the names, "decoder..." and "denoiser..."
            yield from sorted(named_weights(self.decoding().autoencoder), key=_name)
            yield from sorted(named_weights(self.denoising(EncodedTexts()).denoiser), key=_name)

        return checksum_of(named())

    def _runtime(
        self, denoiser: Denoiser, autoencoder: LatentDecoder, texts: EncodedTexts | None = None
    ) -> TorchRuntime:
        return TorchRuntime.of_networks(
            self.model, texts or EncodedTexts(), denoiser, autoencoder, self.device
        )


def _name(item: tuple[str, Tensor]) -> str:
    return item[0]
