"""What computes an INT8 model's denoiser: the CUDA library, Triton or torch, and why not the ones before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sana_edge.config import DenoiserConfig
from sana_edge.errors import InvalidInput, SanaError, UnsupportedDevice
from sana_edge.kernels.cuda import library, tuning
from sana_edge.kernels.triton import support as triton_support
from sana_edge.request.loading import TORCH_BACKENDS
from sana_edge.store.cache import user_cache

# in the order in which they are preferred
NAMES = ("cuda", "triton", "torch")

_TITLES = {"cuda": "the CUDA kernels", "triton": "the Triton kernels"}
_MISPLACED = {name: f"{title} run on cuda" for name, title in _TITLES.items()}
_HEAD_DIM = 32
_ELSE = "choose backend torch; `sana-edge doctor` says more"


@dataclass(frozen=True)
class Backend:
    """What was chosen; ``reasons`` has for each that is preferred to it why it is not used."""

    name: str
    reasons: Mapping[str, str]

    @property
    def fused(self) -> bool:
        """Whether it runs the fused INT8 operations, in 16 bit."""
        return self.name != "torch"


TORCH = Backend("torch", {})


def choose(
    asked: str, device: torch.device, dtype: str, int8: bool, config: DenoiserConfig | None = None
) -> Backend:
    """The best backend that can run a model, or the one asked for.

    Args:
        asked: one of `sana_edge.request.loading.TORCH_BACKENDS`; auto takes the first of `NAMES` that can
            run, on a CPU torch.
        dtype: "auto", "fp32", "bf16" or "fp16".
        int8: whether the model has INT8 layers.
        config: the denoiser's, where it is known already.

    Raises:
        InvalidInput: unknown name, or one asked for by name that does not suit the dtype or the model.
        UnsupportedDevice: one asked for by name that cannot run here.
    """
    if asked not in TORCH_BACKENDS:
        raise InvalidInput(f"unknown backend {asked!r}", f"choose {', '.join(TORCH_BACKENDS)}")
    reasons: dict[str, str] = {}
    for name in NAMES:
        if asked not in ("auto", name):
            reasons[name] = f"{asked} was asked for"
            continue
        refused = refusal(name, device, dtype, int8, config)
        if refused is None and name != "torch" and asked == "auto" and device.type == "cpu":
            refused = UnsupportedDevice("on a CPU it is only for tests, asked for by name")
        if refused is None:
            return Backend(name, reasons)
        if asked == name:
            raise type(refused)(f"backend {name} cannot be used: {refused.message}", refused.hint)
        reasons[name] = refused.message
    raise AssertionError("torch is never refused")


def refusal(
    name: str,
    device: torch.device,
    dtype: str = "auto",
    int8: bool = True,
    config: DenoiserConfig | None = None,
) -> SanaError | None:
    """Why a backend cannot run a model on a device; None where it can."""
    if name == "torch":
        return None
    title = _TITLES[name]
    if not int8:
        return InvalidInput(f"{title} are for INT8 models", "add --int8, or choose backend torch")
    if dtype == "fp32":
        return InvalidInput(f"{title} compute in 16 bit, not in fp32", "choose dtype auto, bf16 or fp16")
    if config is not None and config.attention_head_dim != _HEAD_DIM:
        found = f"heads of {config.attention_head_dim} channels"
        return InvalidInput(f"{title} need heads of {_HEAD_DIM}, this model has {found}", _ELSE)
    support = library if name == "cuda" else triton_support
    refused = _placed(name, device, support.refusal(device))
    if refused:
        return UnsupportedDevice(refused, _ELSE)
    if dtype == "bf16" and half_dtype(device) != "bf16":
        return UnsupportedDevice("the device has no bf16", "choose dtype auto or fp16")
    return None


def measure_tiles(backend: Backend, device: torch.device) -> None:
    """Let the CUDA kernels time tiles of products on a GPU, kept in the cache; not with SANA_EDGE_TUNE=0."""
    if backend.name == "cuda" and device.type == "cuda":
        home = user_cache()
        tuning.use(home / "tiles.json" if home else None)


def no_gpu() -> str:
    """Why torch can use no CUDA device; empty where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.current_device()
    except RuntimeError as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def half_dtype(device: torch.device) -> str:
    """The 16-bit dtype that the fused operations compute fp32 and bf16 models in: bf16 where there is any."""
    return "bf16" if _capability(device) >= 80 else "fp16"


def _placed(name: str, device: torch.device, refused: str) -> str:
    """What kernels say of a device; why there is no GPU where that is the reason."""
    # a library that was not built is the first thing to mend
    return _elsewhere(name, device) if refused.startswith(_MISPLACED[name]) else refused


def _elsewhere(name: str, device: torch.device) -> str:
    """Why a device is none for the kernels: there is no other, or another was asked for."""
    missing = no_gpu() if device.type == "cpu" else ""
    return f"no GPU can be used: {missing}" if missing else f"{_MISPLACED[name]}, not on {device.type}"


def _capability(device: torch.device) -> int:
    """89 for compute capability 8.9; what the emulated library stands for on a CPU, or else 80."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if library.refusal(device):
        return 80
    return int(library.load().device(library.index_of(device)).capability)
