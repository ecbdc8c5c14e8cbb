"""The public models in diffusers layout that have a name here, and which of them an unknown name means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "models"

_OWNER = "Efficient-Large-Model"
_SANA = "see the licence file of the repository; its text encoder is under the Gemma terms of use"
_SPRINT = (
    "NVIDIA NSCL v2-custom and the Gemma terms of use, as quoted from its model card; see the repository"
)


# parameters of the published networks: denoisers by what their models' names have in them, decoders with
# their encoders
_DENOISERS = {"0.6b": 592_000_000, "1.6b": 1_605_000_000, "4.8b": 4_722_000_000}
_TEXT_ENCODER, _DC_AE, _DC_AE_LITE = 2_614_000_000, 312_000_000, 421_000_000


@dataclass(frozen=True)
class KnownModel:
    """A public model, or a decoder of one.

    ``trained`` is the precision its denoiser was trained in ("fp16" or "bf16"), ``variant`` the weight files
    to take, None for those without a variant name, ``download`` about how many bytes they are.
    """

    name: str
    repository: str
    trained: str
    variant: str | None
    licence: str = _SANA
    download: int = 0


def _model(name: str, repository: str, trained: str, variant: str | None, licence: str = _SANA) -> KnownModel:
    denoiser = next(size for kind, size in _DENOISERS.items() if kind in name)
    size = 2 * (denoiser + _TEXT_ENCODER) + 4 * _DC_AE
    return KnownModel(name, f"{_OWNER}/{repository}_diffusers", trained, variant, licence, size)


# autoencoders that decode the latents of the public models
DECODERS: dict[str, KnownModel] = {
    "dc-ae-lite": KnownModel(
        "dc-ae-lite",
        "mit-han-lab/dc-ae-lite-f32c32-sana-1.1-diffusers",
        "bf16",
        None,
        "see the licence file of the repository; DC-AE's code is Apache-2.0",
        4 * _DC_AE_LITE,
    )
}
KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        _model("sana-0.6b-512", "Sana_600M_512px", "fp16", "fp16"),
        _model("sana-0.6b-1024", "Sana_600M_1024px", "fp16", "fp16"),
        _model("sana-1.6b-512", "Sana_1600M_512px", "fp16", "fp16"),
        _model("sana-1.6b-512-multiling", "Sana_1600M_512px_MultiLing", "fp16", "fp16"),
        _model("sana-1.6b-1024", "Sana_1600M_1024px", "fp16", "fp16"),
        _model("sana-1.6b-1024-multiling", "Sana_1600M_1024px_MultiLing", "fp16", "fp16"),
        _model("sana-1.6b-1024-bf16", "Sana_1600M_1024px_BF16", "bf16", "bf16"),
        _model("sana-1.6b-2048", "Sana_1600M_2Kpx_BF16", "bf16", "bf16"),
        _model("sana-1.6b-4096", "Sana_1600M_4Kpx_BF16", "bf16", "bf16"),
        _model("sana-1.5-1.6b-1024", "SANA1.5_1.6B_1024px", "bf16", None),
        _model("sana-1.5-4.8b-1024", "SANA1.5_4.8B_1024px", "bf16", None),
        _model("sana-sprint-0.6b-1024", "Sana_Sprint_0.6B_1024px", "bf16", None, _SPRINT),
        _model("sana-sprint-1.6b-1024", "Sana_Sprint_1.6B_1024px", "bf16", None, _SPRINT),
    )
}

# as people write the sizes of models and pictures: in millions or billions, in pixels or thousands of them
_WRITTEN = (
    (r"_diffusers$|^efficient-large-model/|px\b", ""),
    (r"\b600m\b", "0.6b"),
    (r"\b1600m\b", "1.6b"),
    (r"\b4800m\b", "4.8b"),
    (r"\b1k\b", "1024"),
    (r"\b2k\b", "2048"),
    (r"\b4k\b", "4096"),
    (r"sana(?=\d)", "sana-"),
)
_CUTOFF = 0.6


def close_model(asked: str, bundled: Iterable[str]) -> str | None:
    """The name of a bundled or public model that is meant by ``asked``, a name or a repository; None: none.

    Names are compared as words in any order: "Sana_600M_512px" is sana-0.6b-512.
    """
    if len(asked) > 200:
        return None
    names = {_words(name): name for name in bundled}
    names |= {_words(model.repository): model.name for model in KNOWN.values()}
    names |= {_words(name): name for name in KNOWN}
    words = _words(asked)

    def likeness(other: str) -> tuple[int, float]:
        common = set(words.split()) & set(other.split())
        return len(common), difflib.SequenceMatcher(None, words, other).ratio()

    best = max(names, key=likeness)
    telling = set(words.split()) & set(best.split()) - {"sana"}
    return names[best] if telling or likeness(best)[1] >= _CUTOFF else None


def _words(name: str) -> str:
    """The words of a name in alphabetical order, sizes written as in `KNOWN`."""
    text = re.sub(r"[_\s]+", "-", name.lower().replace("_diffusers", ""))
    for pattern, written in _WRITTEN:
        text = re.sub(pattern, written, text)
    words = text.strip("-").split("-")
    return " ".join(sorted(words))
