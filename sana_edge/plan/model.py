"""What is known of a model without its weights: its configs, what its files hold, and what is to download."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sana_edge.config import AutoencoderConfig, DenoiserConfig, SamplerKind
from sana_edge.errors import CheckpointError
from sana_edge.plan import layers
from sana_edge.store import catalogue, hub, package, pairing
from sana_edge.store.architectures import DC_AE, DC_AE_LITE, DENOISERS, GEMMA_2_2B
from sana_edge.store.folder import choose_entry, component_variant, read_json, shard_names
from sana_edge.store.headers import safetensors_header
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.identify import identify
from sana_edge.store.known_models import DECODERS, KNOWN, KnownModel
from sana_edge.store.snapshots import cached
from sana_edge.store.tiny_autoencoder import DecoderConfig, config_of, decoder_config, renamed
from sana_edge.system.regular import open_regular

# of a text encoder's config, what its layers and their memory follow from
_TEXT_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size"),
)


@dataclass(frozen=True)
class Stored:
    """A component's weights as they lie in files.

    Attributes:
        bytes: of its tensors.
        dtype: short name of most of its floats.
        int8: whether its layers are INT8.
    """

    bytes: int
    dtype: str
    int8: bool = False


@dataclass(frozen=True)
class Facts:
    """A model to be run by torch, here or not.

    Attributes:
        text: ``text_encoder/config.json``.
        encoder: the config of what encodes pictures; None where nothing does.
        stored: of "denoiser", "text" and "decoder".
        download: bytes that are not on this machine; disk: what the model takes there.
    """

    name: str
    denoiser: DenoiserConfig
    decoder: DecoderConfig
    encoder: AutoencoderConfig | None
    text: Mapping[str, Any]
    sampler: SamplerKind
    stored: Mapping[str, Stored]
    path: Path | None = None
    download: int = 0
    disk: int = 0

    @property
    def int8(self) -> bool:
        """Whether it is a package."""
        return self.stored["denoiser"].int8

    @cached_property
    def layers(self) -> dict[str, list[layers.Layer]]:
        """Of each network."""
        found = {
            "text": list(layers.text_layers(self.text)),
            "denoiser": list(layers.denoiser_layers(self.denoiser)),
            "decoder": list(layers.decoder_layers(self.decoder)),
        }
        return found | (
            {} if self.encoder is None else {"encoder": list(layers.encoder_layers(self.encoder))}
        )


def facts_of(
    model: str, *, int8: bool = False, decoder: str | None = None, revision: str | None = None
) -> Facts:
    """What is known of a model by its name or folder; downloads nothing.

    Raises:
        ModelNotFound: nothing has this name, or only a repository that is not on this machine.
        CheckpointError: a config is missing or damaged, or weights are: a pointer of Git LFS, a part.
    """
    info = KNOWN.get(model.lower()) or next((k for k in KNOWN.values() if k.repository == model), None)
    here = info is None or os.path.isdir(model) or cached(info.repository, info.variant, revision) is not None
    own, missing = decoder, 0
    known = DECODERS.get(decoder.lower()) if decoder is not None else None
    if known is not None and cached(known.repository, None, component=True) is None:
        own, missing = None, known.download
    if here:
        resolved = hub.resolve(model, int8=int8, offline=True, progress=False, revision=revision, decoder=own)
        _check_weights(resolved)
        found = folder_facts(resolved)
    else:
        assert info is not None
        hub.check_revision(revision)
        found = known_facts(info)
        if own is not None:
            found = _with_decoder(found, hub.resolve_decoder(own, offline=True, progress=False))
    if missing:
        found = with_lite_decoder(found)
        found = dataclasses.replace(found, download=found.download + missing, disk=found.disk + missing)
    return found


def with_lite_decoder(found: Facts) -> Facts:
    """A model of the public latents with DC-AE-Lite in place of its decoder."""
    stored = Stored(4 * layers.count(layers.decoder_layers(DC_AE_LITE)), "fp32")
    return dataclasses.replace(found, decoder=DC_AE_LITE, stored={**found.stored, "decoder": stored})


def folder_facts(model: ResolvedModel) -> Facts:
    """What a model folder says, without its weights.

    Raises:
        CheckpointError: a config is missing or damaged.
    """
    denoiser = package.describe(model.path / "transformer")
    own = decoder_config(read_json(model.path / "vae" / "config.json"))
    config = DenoiserConfig.from_dict(denoiser.values)
    found = Facts(
        name=model.name,
        denoiser=config,
        decoder=own,
        encoder=own if isinstance(own, AutoencoderConfig) else None,
        text=_text_config(read_json(model.path / "text_encoder" / "config.json")),
        sampler=pairing.read_sampler(model.path, config)[0].kind,
        stored={
            "denoiser": _stored(model.path / "transformer", model.variant),
            "text": _stored(model.path / "text_encoder", model.variant),
            "decoder": _stored(model.path / "vae", model.variant, "decoder."),
        },
        path=model.path,
        disk=catalogue.size_of(model.path),
    )
    return found if model.decoder is None else _with_decoder(found, model.decoder)


def known_facts(info: KnownModel) -> Facts:
    """A public model that is not on this machine, as its authors describe it."""
    kind = next(kind for kind in DENOISERS if kind in info.name)
    sprint, side = "sprint" in info.name, next(s for s in (512, 1024, 2048, 4096) if str(s) in info.name)
    normed = sprint or "sana-1.5" in info.name
    config = dataclasses.replace(
        DENOISERS[kind],
        sample_size=side // 32,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if normed else None,
    )
    text = layers.count(layers.text_layers(GEMMA_2_2B))
    text += GEMMA_2_2B["vocab_size"] * GEMMA_2_2B["hidden_size"]
    return Facts(
        name=info.name,
        denoiser=config,
        decoder=DC_AE,
        encoder=DC_AE,
        text=GEMMA_2_2B,
        sampler="scm" if sprint else "flow-dpm",
        stored={
            "denoiser": Stored(2 * layers.count(layers.denoiser_layers(config)), info.trained),
            "text": Stored(2 * text, "bf16"),
            "decoder": Stored(4 * layers.count(layers.decoder_layers(DC_AE)), "fp32"),
        },
        download=info.download,
        disk=info.download,
    )


def _check_weights(model: ResolvedModel) -> None:
    """See that files are what they seem to be, by how they begin: a plan of what cannot be loaded is none."""
    for name in ("transformer", "text_encoder", "vae"):
        for path in _files(model.component(name), model.variant):
            _check_whole(path)
    _check_whole(model.path / "tokenizer" / "tokenizer.json")


def _check_whole(path: Path) -> None:
    found = identify(path)
    if not found.whole:
        raise CheckpointError(f"cannot read {path}: it is {found.words}", found.hint)


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a component's weights; a decoder may be one itself."""
    if folder.is_file():
        return [folder]
    names = [path.name for path in folder.iterdir()]
    entry = folder / choose_entry(names, component_variant(names, variant), str(folder))
    return [entry] if entry.suffix != ".json" else [folder / name for name in shard_names(entry)]


def _with_decoder(found: Facts, place: Path) -> Facts:
    if place.is_file():
        header: dict[str, object] = {}
        with suppress(OSError, ValueError), open_regular(place) as file:
            header = safetensors_header(file, place.stat().st_size) or {}
        shapes = {n: tuple(e["shape"]) for n, e in header.items() if isinstance(e, dict) and "shape" in e}
        published = any(name.startswith("decoder.") for name in shapes)
        try:
            config: DecoderConfig = config_of(renamed(shapes, published=published))
        except CheckpointError:
            # another one than TAESANA, or a pickle: it is known when it is read
            return found
        stored = Stored(_tensor_bytes(header), _common(header))
    else:
        config, stored = decoder_config(read_json(place / "config.json")), _stored(place, None, "decoder.")
    return dataclasses.replace(found, decoder=config, stored={**found.stored, "decoder": stored})


def _text_config(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sizes in a ``text_encoder/config.json``; what is missing or absurd, who reads it all will name."""
    fits = {name for name in _TEXT_SIZES if type(data.get(name)) is int and 0 < data[name] < 1 << 20}
    return {name: data[name] if name in fits else GEMMA_2_2B[name] for name in _TEXT_SIZES}


def _stored(folder: Path, variant: str | None, prefix: str = "") -> Stored:
    """Of a component's folder; only tensors whose names begin with ``prefix``.

    What is damaged or missing counts as nothing: who loads it will name it.
    """
    header: dict[str, object] = {}
    try:
        for path in _files(folder, variant):
            with open_regular(path) as file:
                header |= safetensors_header(file, path.stat().st_size) or {}
    except (OSError, ValueError, CheckpointError):
        header = {}
    kept = {name: entry for name, entry in header.items() if name.startswith(prefix)} or header
    return Stored(_tensor_bytes(kept), _common(kept), int8=package.read(folder) is not None)


# FP8 becomes fp32 when it is read
_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp32", "F8_E5M2": "fp32"}


def _common(header: Mapping[str, object]) -> str:
    """The short name of the dtype of most floats, as `sana_edge.torch_runtime.load` counts them."""
    names = Counter(
        str(entry.get("dtype"))
        for name, entry in header.items()
        if isinstance(entry, dict) and not name.endswith(("weight_scale", "input_scale"))
    )
    floats = {dtype: names[dtype] for dtype in _DTYPES if names[dtype]}
    return _DTYPES[max(floats, key=lambda dtype: floats[dtype])] if floats else "fp32"


def _tensor_bytes(header: Mapping[str, object]) -> int:
    found = 0
    for entry in header.values():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets):
            found += offsets[1] - offsets[0]
    return found
