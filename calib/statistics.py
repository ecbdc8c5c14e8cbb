"""What calibration knows about the input of each layer that is to be quantized.

Memory for S steps, C channels and R sample rows, in bytes: S · (4 C + 8 BINS + 4) + R · (4 C + 8) per layer,
whatever the number of prompts. The denoiser of SANA 0.6B (168 layers, 242 k channels in all, 20 steps, 256
rows) takes 295 MB, most of it samples. A layer that sees N values more adds nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana_edge.errors import CheckpointError, SanaError
from sana_edge.store.weights import save_state
from sana_edge.system.json_values import parse

BINS = 1024
VERSION = 1

# exponents of limits whose products with BINS and its inverse are normal numbers of fp32
_EXPONENTS = (-100, 127)
_LATENT = "latent."
# steps or channels
_MOST = 1 << 20
_DAMAGED = "delete the file and calibrate again"


@dataclass
class LayerStatistics:
    """Absolute values and sample rows of one layer's float input with C channels, on the CPU.

    Attributes:
        absmax: (S, C) fp32, per step and channel, of all rows; the decoder has S = 1.
        histogram: (S, BINS) int64, how often |x| is in each of BINS equal bins from 0 to ``limit``. Where
            rows are skipped a counted one stands for its neighbours, so that the sum is near the number of
            values.
        limit: (S,) fp32, the power of two above the step's largest value; 0 before there is any.
        samples: (R, C) fp32 rows of the input, as it was.
        sample_steps: (R,) int64, the step that each row is of.
    """

    absmax: Tensor
    histogram: Tensor
    limit: Tensor
    samples: Tensor
    sample_steps: Tensor

    @classmethod
    def empty(cls, steps: int, channels: int) -> LayerStatistics:
        """Statistics of nothing."""
        return cls(
            absmax=torch.zeros(steps, channels),
            histogram=torch.zeros(steps, BINS, dtype=torch.int64),
            limit=torch.zeros(steps),
            samples=torch.zeros(0, channels),
            sample_steps=torch.zeros(0, dtype=torch.int64),
        )

    def update(self, step: int, x: Tensor, *, counted: Tensor | None = None, weight: int = 1) -> None:
        """Add the rows x (N, C), any float dtype and device, to the step's absmax and histogram.

        Args:
            counted: (n,) rows that the histogram sees, each ``weight`` times; None for all.

        Raises:
            SanaError: a value is NaN or infinite.
        """
        if not len(x):
            return
        # NaN stays NaN in all of these
        absmax = torch.maximum(x.amax(0), -x.amin(0)).float().cpu()
        peak = float(absmax.max())
        if not math.isfinite(peak):
            channel = int(absmax.isfinite().logical_not().nonzero()[0])
            raise SanaError(
                f"values that are not finite at step {step + 1} of {len(self.limit)} (channel {channel})",
                "choose dtype fp32 or bf16, or a lower guidance",
            )
        torch.maximum(self.absmax[step], absmax, out=self.absmax[step])
        self._widen(step, _limit(peak))
        rows = x if counted is None else x[counted.to(x.device)]
        self.histogram[step] += weight * _count(rows, float(self.limit[step]))

    def add_samples(self, step: int, rows: list[Tensor]) -> None:
        """Append sample rows, (C,) each."""
        if rows:
            self.samples = torch.cat([self.samples, torch.stack(rows)])
            self.sample_steps = torch.cat([self.sample_steps, torch.full((len(rows),), step)])

    def whole(self) -> bool:
        """Whether the tensors are of one layer, as they are when they come from a file."""
        shape, rows = self.absmax.shape, len(self.sample_steps) if self.sample_steps.ndim == 1 else -1
        expected = LayerStatistics.empty(*shape) if len(shape) == 2 and max(shape) <= _MOST else None
        if expected is None or self.samples.shape != (rows, shape[1]):
            return False
        fits = all(tensor.dtype == expected.tensors()[name].dtype for name, tensor in self.tensors().items())
        same = self.histogram.shape == expected.histogram.shape and self.limit.shape == expected.limit.shape
        # values that a sum or a later limit cannot take
        good = fits and same and bool((self.absmax.isfinite() & (self.absmax >= 0)).all())
        return good and bool((self.limit.isfinite() & (self.limit >= 0)).all() & (self.histogram >= 0).all())

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def _widen(self, step: int, limit: float) -> None:
        if limit > self.limit[step]:
            self.histogram[step] = _widened(self.histogram[step], float(self.limit[step]), limit)
            self.limit[step] = limit


@dataclass
class Statistics:
    """`LayerStatistics` by target name, "denoiser.blocks.0.qkv" or "decoder.conv_in".

    ``info`` is JSON values that say what was observed: model, prompts, steps and so on (`observe`).
    ``latents`` are those of the last observed prompts, (1, C, h, w), which the decoder has not seen yet.
    """

    layers: dict[str, LayerStatistics]
    info: dict[str, Any] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write a safetensors file; until it is complete, ``path`` is not touched.

        Raises:
            SanaError: the file cannot be written.
        """
        metadata = {"statistics_version": str(VERSION), "info": json.dumps(self.info, sort_keys=True)}
        waiting = {f"{_LATENT}{i}": latent for i, latent in enumerate(self.latents)}
        save_state({**_tensors(self.layers), **waiting}, path, metadata)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                # copies: the file may be replaced while they are used
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the statistics in {path}: {error}", _DAMAGED) from error
        version = metadata.get("statistics_version")
        if version != str(VERSION):
            raise CheckpointError(f"{path} has statistics of version {version}, expected {VERSION}", _DAMAGED)
        count = sum(key.startswith(_LATENT) for key in tensors)
        try:
            latents = [tensors.pop(f"{_LATENT}{i}") for i in range(count)]
            names = sorted({key.rpartition(".")[0] for key in tensors})
            parts = [item.name for item in fields(LayerStatistics)]
            layers = {
                name: LayerStatistics(**{part: tensors[f"{name}.{part}"] for part in parts}) for name in names
            }
            info = parse(metadata["info"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not hold whole statistics: {error}", _DAMAGED) from error
        if not isinstance(info, dict) or not all(layer.whole() for layer in layers.values()):
            raise CheckpointError(f"{path} does not hold whole statistics", _DAMAGED)
        return cls(layers, info, latents)

    def checksum(self) -> str:
        """sha256 of all values and ``info``, in hexadecimal; the order of layers does not matter."""
        return checksum(_tensors(self.layers), json.dumps(self.info, sort_keys=True))


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """sha256 of names, dtypes, shapes and values, whatever their order and memory layout, and of a text."""
    return checksum_of(((name, tensors[name]) for name in sorted(tensors)), text)


def checksum_of(named: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """`checksum` of tensors that come one by one, sorted by name."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in named:
        tensor = tensor.detach()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(layers: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor for name, layer in layers.items() for part, tensor in layer.tensors().items()
    }


def _limit(peak: float) -> float:
    """The power of two above ``peak``.

    Limits of this form have bins that nest, so that a histogram does not depend on the order of the values.
    """
    exponent = math.frexp(peak)[1] if peak else _EXPONENTS[0]
    return float(2.0 ** min(max(exponent, _EXPONENTS[0]), _EXPONENTS[1]))


def _count(x: Tensor, limit: float) -> Tensor:
    bins = x.float().abs().mul_(BINS / limit).int().clamp_(max=BINS - 1)
    return torch.bincount(bins.flatten(), minlength=BINS).cpu()


def _widened(histogram: Tensor, limit: float, wider: float) -> Tensor:
    """A histogram (BINS,) up to ``limit`` as one up to ``wider``, which is a power of two times that."""
    if limit in (0.0, wider):
        return histogram
    # doublings beyond this put everything into the first bin
    factor = int(min(wider / limit, BINS))
    widened = torch.zeros_like(histogram)
    widened[: BINS // factor] = histogram.view(-1, factor).sum(1)
    return widened
