"""The model that is exported: its configs, whether it can be, and about what its graphs will weigh."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from sana_edge.config import DenoiserConfig, SamplerConfig
from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.store import package
from sana_edge.store.folder import WEIGHT_COMPONENTS, foreign_parts, needed_files, read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.known_models import BUNDLED, KNOWN
from sana_edge.store.package import Quantization
from sana_edge.store.pairing import read_sampler
from sana_edge.store.tiny_autoencoder import DecoderConfig, decoder_config
from sana_edge.store.weights import StoredState, weight_files
from sana_edge.torch_runtime.device import DTYPES

# begin the names of files with the terms of the weights
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
# graphs, tokenizer, instruction and padding, which are no weights
_BESIDES = 64 << 20


@dataclass(frozen=True)
class Source:
    """A model folder whose components are all float, or all INT8 with calibrated scales.

    ``notes`` say what it has, or was made for, that has no effect here.
    """

    model: ResolvedModel
    denoiser: DenoiserConfig
    autoencoder: DecoderConfig
    sampler: SamplerConfig
    quantizations: dict[str, Quantization]
    notes: tuple[str, ...] = ()

    @property
    def quantization(self) -> str | None:
        """The scheme of the graphs, as in `Quantization.summary`: calibrated scales in any case.

        Of a denoiser's scales per token `sana_edge.nets.quantize.set_graph_activations` leaves some.
        """
        if not self.quantizations:
            return None
        denoiser = self.quantizations.get("transformer")
        mixed = denoiser is not None and denoiser.activations == "token"
        return f"w8a8, per tensor{' and token' if mixed else ''}, calibrated"

    def state(self, component: str) -> StoredState:
        """The tensors of a component."""
        return StoredState(self.model.path / component, variant=self.model.component_variant(component))

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each component's weight files."""

        def checksum(component: str) -> str:
            # which loading compares
            if component in self.quantizations:
                return self.quantizations[component].checksum
            variant = self.model.component_variant(component)
            return package.digest(weight_files(self.model.path / component, variant=variant))

        return {component: checksum(component) for component in WEIGHT_COMPONENTS}

    def text_dtype(self) -> torch.dtype:
        """What most of the text encoder's floats are stored in."""
        state = self.state("text_encoder")
        dtypes = Counter(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        if not dtypes:
            raise CheckpointError(
                f"{self.model.path / 'text_encoder'} has no weights", "download the model again"
            )
        return max(dtypes, key=dtypes.__getitem__)

    def bytes_of_graphs(self, dtype: str) -> int:
        """About what the exported folder takes, if the denoiser computes in ``dtype``."""
        total = _BESIDES
        for component in WEIGHT_COMPONENTS:
            wide = 4 if component == "vae" else DTYPES[dtype].itemsize
            state = self.state(component)
            for name in state:
                tensor = state[name]
                if component == "vae" and not name.startswith("decoder."):
                    continue
                kept = component == "text_encoder" or not tensor.is_floating_point()
                total += tensor.numel() * (tensor.itemsize if kept else wide)
        return total

    def origin(self) -> str:
        """The float model that it began as."""
        given = (quantization.source.get("name") for quantization in self.quantizations.values())
        return str(next(given, self.model.name))

    def licence(self) -> str:
        """What is known of the terms of the weights."""
        info = self.model.info or KNOWN.get(self.origin())
        bundled = self.model.path.is_relative_to(BUNDLED)
        return info.licence if info else "Apache-2.0" if bundled else "those of the model"

    def tokenizer(self) -> list[str]:
        """The tokenizer's files, by their paths in the model's folder."""
        names = [f"tokenizer/{path.name}" for path in (self.model.path / "tokenizer").iterdir()]
        return sorted(name for name in needed_files(names, None) if name.startswith("tokenizer/"))

    def terms(self) -> list[str]:
        """Files beside the components with the terms of the weights, which go where the weights go."""
        names = (path.name for path in self.model.path.iterdir() if path.is_file())
        return sorted(name for name in names if name.upper().startswith(_TERMS))


def describe(model: ResolvedModel, *, int8: bool) -> Source:
    """Read the configs of a model.

    Args:
        int8: it has to be INT8.

    Raises:
        CheckpointError: a config is missing, damaged, or of a model that SANA does not have.
        InvalidInput: INT8 is asked for and the model is float, or it is INT8 without calibrated scales.
    """
    folder = model.path
    quantizations = {name: package.read(folder / name) for name in WEIGHT_COMPONENTS}
    given = {name: quantization for name, quantization in quantizations.items() if quantization is not None}
    if int8 and not given:
        raise InvalidInput(
            f"{model.name} is no INT8 package",
            f"`sana-edge quantize {model.name} --output DIR` makes one; export DIR instead",
        )
    for name, quantization in given.items():
        # activations of the text encoder are not INT8
        if name != "text_encoder" and quantization.calibration is None:
            raise InvalidInput(
                f"{folder / name} has no calibrated scales, which INT8 graphs need",
                "make it again: `sana-edge quantize MODEL --output DIR --force`, without --no-calibration",
            )
    denoiser = DenoiserConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    sampler, notes = read_sampler(folder, denoiser)
    return Source(
        model=model,
        denoiser=denoiser,
        autoencoder=decoder_config(read_json(folder / "vae" / "config.json")),
        sampler=sampler,
        quantizations=given,
        notes=(*notes, *foreign_parts(folder)),
    )
