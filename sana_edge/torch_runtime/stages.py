"""The networks of a model, each loaded when it is first used; where memory is short one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sana_edge.fused.backends import Backend
from sana_edge.nets.autoencoder import Encoder, LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import EncodedTexts, TextEncoder
from sana_edge.system.memory import give_back
from sana_edge.torch_runtime.cuda_graph import CudaGraphs
from sana_edge.torch_runtime.decode_graphs import DecodeGraphs
from sana_edge.torch_runtime.steps import Predictor, Velocity, make_predictor

Network = TypeVar("Network")


class Loaded(Generic[Network]):
    """A network that can be let go and loaded again.

    Args:
        load: None for one that cannot be loaded again, and stays.
    """

    def __init__(self, load: Callable[[], Network] | None, network: Network | None = None) -> None:
        self._load, self._network = load, network

    def __bool__(self) -> bool:
        return self._network is not None

    def get(self) -> Network:
        """The network, loaded where it is not in memory."""
        if self._network is None:
            assert self._load is not None
            self._network = self._load()
        return self._network

    def free(self) -> bool:
        """Let it go; whether there was one that can be had again."""
        had = self._network is not None and self._load is not None
        if had:
            self._network = None
        return had


class Stages:
    """Text encoder, denoiser, decoder, and the encoder of pictures.

    Attributes:
        in_turn: only the one that is used is in memory.
        velocity: of the plan whose steps are taken, while the denoiser is in memory.
    """

    def __init__(
        self,
        text: Loaded[TextEncoder] | Loaded[TextEncoder | EncodedTexts],
        denoiser: Loaded[Denoiser],
        decoder: Loaded[LatentDecoder],
        encoder: Loaded[Encoder] | None = None,
        *,
        backend: Backend,
        in_turn: bool = False,
    ) -> None:
        self.in_turn = in_turn
        self.velocity: Velocity | None = None
        self._text, self._denoiser, self._decoder, self._encoder = text, denoiser, decoder, encoder
        self._backend = backend
        self._predictor: Predictor | None = None
        self._decodes: DecodeGraphs | None = None

    @property
    def text(self) -> TextEncoder | EncodedTexts:
        self._alone(self._text)
        return self._text.get()

    @property
    def denoiser(self) -> Denoiser:
        self._alone(self._denoiser)
        return self._denoiser.get()

    @property
    def decoder(self) -> LatentDecoder:
        self._alone(self._decoder)
        return self._decoder.get()

    @property
    def decodes(self) -> DecodeGraphs | None:
        """Graphs of the decoder in memory, where it runs without waiting for its device."""
        decoder = self.decoder
        device = next(decoder.parameters()).device
        if self._decodes is None and decoder.whole_maps and device.type == "cuda":
            self._decodes = DecodeGraphs(decoder, CudaGraphs(device))
        return self._decodes

    @property
    def encoder(self) -> Encoder:
        """Raises `InvalidInput` where the model has none."""
        assert self._encoder is not None
        self._alone(self._encoder)
        return self._encoder.get()

    @property
    def predictor(self) -> Predictor:
        """Of the denoiser in memory."""
        denoiser = self.denoiser
        if self._predictor is None:
            device = denoiser.patch.weight.device
            self._predictor = make_predictor(denoiser, self._backend.name, device)
        return self._predictor

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of those in memory."""
        return tuple(name for name, network in self._all().items() if network)

    def release(self) -> None:
        """Let go of what was recorded."""
        if self._text:
            self._text.get().release()
        for recorded in (self._predictor, self._decodes):
            if recorded is not None:
                recorded.release()

    def _all(self) -> dict[str, Loaded[Any]]:
        found: dict[str, Loaded[Any]] = {
            "text": self._text,
            "denoiser": self._denoiser,
            "decoder": self._decoder,
        }
        return found if self._encoder is None else {**found, "encoder": self._encoder}

    def _alone(self, wanted: object) -> None:
        """Let the others go before one is loaded, where memory is short."""
        if not self.in_turn or wanted:
            return
        freed = [network.free() for network in self._all().values()]
        if freed[1]:
            self._predictor = self.velocity = None
        if freed[2]:
            self._decodes = None
        if any(freed):
            give_back()
