"""What quantizing a model cost and what it brought: the numbers, as JSON values and as a table in text."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sana_edge import __version__
from sana_edge.calib.report.measure import Run
from sana_edge.calib.trajectory import Comparison

VERSION = 1
FILE, PICTURE = "report.json", "report.png"

# in the order in which a block computes them
BLOCK_LAYERS = ("qkv", "out", "cross_q", "cross_out", "expand", "project")

_BLOCK = re.compile(r"denoiser\.blocks\.(\d+)\.(\w+)")
_STAGE = re.compile(r"decoder\.up_blocks\.(\d+)\.")


@dataclass(frozen=True)
class Layer:
    """One layer that could be INT8.

    Attributes:
        name: as in the statistics, "denoiser.blocks.0.qkv" or "decoder.conv_in".
        sqnr: of its output on calibration samples, in dB; without calibration, of its weight.
        kept: whether it stays in 16 bit; its `sqnr` is then what INT8 would have been.
        alpha: of smoothing, 0 where nothing was smoothed.
        reason: why nothing was, where it was tried.
        input_scale: one step of the calibrated activations, where the package has one.
    """

    name: str
    sqnr: float
    kept: bool = False
    alpha: float = 0.0
    reason: str = ""
    input_scale: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Bytes of a component's tensors that a picture needs, as they are stored."""

    float: int
    int8: int


@dataclass(frozen=True)
class Report:
    """All of it; what was not measured is empty, and ``notes`` say why.

    Attributes:
        settings: JSON values; what calibration did, None where there was none, is under "calibration".
        sizes: by component.
        runs: of the "float" and the "int8" model.
        seconds: spent by each part of `quantize`.
    """

    model: str
    settings: dict[str, Any]
    layers: list[Layer]
    sizes: dict[str, Sizes]
    timesteps: list[float] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def calibrated(self) -> bool:
        return self.settings.get("calibration") is not None

    @property
    def worst(self) -> int | None:
        """Which comparison has the lowest PSNR."""
        if not self.comparisons:
            return None
        return min(range(len(self.comparisons)), key=lambda i: self.comparisons[i].psnr)

    @property
    def bytes(self) -> Sizes:
        """Of all components."""
        sizes = self.sizes.values()
        return Sizes(sum(size.float for size in sizes), sum(size.int8 for size in sizes))

    def steps(self) -> list[dict[str, float]]:
        """Errors of each step, over the compared pictures: mean, and largest velocity error."""
        result = []
        for i, timestep in enumerate(self.timesteps):
            velocity = [c.velocity_errors[i] for c in self.comparisons]
            latent = [c.latent_errors[i] for c in self.comparisons]
            result.append(
                {
                    "timestep": timestep,
                    "velocity_error": statistics.fmean(velocity),
                    "largest_velocity_error": max(velocity),
                    "latent_error": statistics.fmean(latent),
                }
            )
        return result

    def picture_numbers(self) -> dict[str, dict[str, float]]:
        """Mean and worst of PSNR (dB), SSIM and the decoder's own PSNR over the compared pictures."""
        if not self.comparisons:
            return {}
        columns = {
            name: [getattr(comparison, name) for comparison in self.comparisons]
            for name in ("psnr", "ssim", "decoder_psnr")
        }
        return {
            name: {"mean": statistics.fmean(values), "worst": min(values)} for name, values in columns.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values; null stands for infinity, the PSNR of equal pictures."""
        pictures = [
            {
                "prompt": comparison.plan.prompt,
                "seed": comparison.plan.seed,
                **{name: getattr(comparison, name) for name in ("psnr", "ssim", "decoder_psnr")},
            }
            for comparison in self.comparisons
        ]
        content = {
            "version": VERSION,
            "sana_edge": __version__,
            "model": self.model,
            "settings": self.settings,
            "notes": self.notes,
            "pictures": {**self.picture_numbers(), "worst": self.worst, "pairs": pictures},
            "steps": self.steps(),
            "sqnr_of": "output" if self.calibrated else "weight",
            "layers": [asdict(layer) for layer in self.layers],
            "bytes": {name: asdict(size) for name, size in {**self.sizes, "all": self.bytes}.items()},
            "runs": {name: asdict(run) for name, run in self.runs.items()},
            "seconds": self.seconds,
        }
        finite: dict[str, Any] = _finite(content)
        return finite

    def subtitle(self) -> str:
        """The scheme and its calibration in one line."""
        scheme = f"W8A8, activations per {self.settings['activations']}"
        calibration = self.settings.get("calibration")
        if calibration is None:
            return f"{scheme}, not calibrated"
        width, height = calibration["size"]
        return (
            f"{scheme}, calibrated on {calibration['prompts']} prompts of {calibration['prompt_set']}, "
            f"{calibration['steps']} steps, {width}x{height}"
        )


def block_grid(layers: Sequence[Layer]) -> list[dict[str, Layer]]:
    """The denoiser's layers: for each block, by the names in `BLOCK_LAYERS`."""
    grid: dict[int, dict[str, Layer]] = {}
    for layer in layers:
        match = _BLOCK.fullmatch(layer.name)
        if match:
            grid.setdefault(int(match.group(1)), {})[match.group(2)] = layer
    return [grid[block] for block in sorted(grid)]


def decoder_stages(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The decoder's layers by stage, in the order in which they are computed.

    A tiny decoder's sequence of layers is divided where a convolution stands alone.
    """
    stages: dict[str, list[Layer]] = {}
    parts = 0
    for layer in layers:
        if layer.name.startswith("decoder."):
            match = _STAGE.match(layer.name)
            parts += layer.name.count(".") == 2
            name = f"stage {match.group(1)}" if match else layer.name.split(".")[1]
            name = f"part {parts}" if name == "layers" else name
            stages.setdefault(name, []).append(layer)
    if parts:
        return stages
    # the highest stage has the smallest maps and comes first
    order = {"conv_in": -1000, "conv_out": 1000}
    return dict(sorted(stages.items(), key=lambda item: order.get(item[0]) or -int(item[0].split()[1])))


def megabytes(count: int) -> str:
    """Bytes for people: "22.1 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def decibels(value: float) -> str:
    """A PSNR or SQNR for people."""
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
