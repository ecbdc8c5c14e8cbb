"""What a caller of `quantize` asks for, checked before torch is loaded and anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sana_edge.calib.prompts import PromptSet
from sana_edge.config import SamplerKind
from sana_edge.errors import InvalidInput
from sana_edge.request.bounds import plain
from sana_edge.request.request import Request
from sana_edge.store.package import Activations

# compared side by side in the report
PICTURES = 6
# of the preset "quick": prompts, steps, side and number of pictures; prompts and cells of sensitivity
_QUICK_PROMPTS, _QUICK_STEPS, _QUICK_SIDE, _QUICK_PICTURES = 8, 6, 256, 2
_QUICK_PROBES, _QUICK_CELLS = 1, 4
MAX_PICTURES = 100
PRESETS = ("full", "quick")
SEED = 0


@dataclass(frozen=True)
class Settings:
    """How a model is quantized. None means the model's default.

    Attributes:
        prompts: a bundled set's name or a file, one prompt per line.
        steps, size, guidance: of the pictures that calibration makes; size is (width, height) in pixels.
        seed: of the first calibration picture, counting up.
        alpha: how far outliers are moved from activations to weights, 0 to 1; "auto" measures it per layer.
        keep: layers that stay in 16 bit: "auto" by their measured error, "none", or how many.
        activations: "token", dynamic scales for each token; "tensor", calibrated ones for each layer.
        calibrate: False takes the weights only: no forward pass, dynamic scales, no smoothing.
        pictures: made with both models and compared in the report, 0 to 100; 6, or 2 when it is quick.
        preset: "full"; or "quick": few prompts, few steps, small pictures, where they are not given.
        probes: prompts that sensitivity is measured on, each at its first, middle and last step.
        cells: side of the latents that it is measured on; the decoder's are half as wide.

    Raises:
        InvalidInput: a value out of range, or one that needs the calibration that is turned off.
    """

    prompts: str | None = None
    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    seed: int = SEED
    alpha: float | Literal["auto"] = "auto"
    keep: int | Literal["auto", "none"] = "auto"
    activations: Activations = "token"
    calibrate: bool = True
    pictures: int | None = None
    preset: Literal["full", "quick"] = "full"
    probes: int = 4
    cells: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "size", "guidance", "seed", "alpha", "keep", "pictures"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        # the same limits as for a picture
        Request(
            "calibration",
            steps=self.steps,
            size=self.size,
            exact_size=self.size is not None,
            guidance=self.guidance,
            seed=self.seed,
        )
        self._check_alpha()
        self._check_keep()
        if self.activations not in ("token", "tensor"):
            raise InvalidInput(f"activations is {self.activations!r}", "choose token or tensor")
        if self.preset not in PRESETS:
            raise InvalidInput(f"preset is {self.preset!r}", f"choose {' or '.join(PRESETS)}")
        pictures = PICTURES if self.pictures is None else self.pictures
        if type(pictures) is not int or not 0 <= pictures <= MAX_PICTURES:
            raise InvalidInput(
                f"pictures is {self.pictures!r}", f"choose a whole number from 0 to {MAX_PICTURES}"
            )
        if not self.calibrate:
            self._check_uncalibrated()

    def resolved(self, native_size: int, sampler: SamplerKind) -> Settings:
        """With what the preset decides filled in, for a model of this native size and sampler."""
        if self.preset == "full":
            return replace(self, pictures=PICTURES if self.pictures is None else self.pictures)
        side = min(native_size, _QUICK_SIDE)
        return replace(
            self,
            # Sprint's are few anyway
            steps=self.steps or (None if sampler == "scm" else _QUICK_STEPS),
            size=self.size or (side, side),
            pictures=_QUICK_PICTURES if self.pictures is None else self.pictures,
            probes=_QUICK_PROBES,
            cells=_QUICK_CELLS,
        )

    def selected(self, prompts: PromptSet) -> PromptSet:
        """The prompts that the preset takes, evenly over the set."""
        total = len(prompts.prompts)
        if self.preset == "full" or total <= _QUICK_PROMPTS:
            return prompts
        chosen = [prompts.prompts[i * total // _QUICK_PROMPTS] for i in range(_QUICK_PROMPTS)]
        return replace(PromptSet.of(chosen, prompts.name), notes=prompts.notes)

    def _check_alpha(self) -> None:
        alpha = self.alpha
        if alpha == "auto":
            return
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise InvalidInput(f"alpha is {alpha!r}", "choose auto or a number from 0 to 1; 0.5 is usual")

    def _check_keep(self) -> None:
        keep = self.keep
        if keep not in ("auto", "none") and (type(keep) is not int or keep < 0):
            raise InvalidInput(f"keep-fp16 is {keep!r}", "choose auto, none or a number of layers from 0")

    def _check_uncalibrated(self) -> None:
        hint = "leave one of them out"
        for name in ("prompts", "steps", "size", "guidance"):
            if getattr(self, name) is not None:
                raise InvalidInput(f"{name} is for calibration, which is turned off", hint)
        if self.activations == "tensor":
            raise InvalidInput("scales per tensor need calibration, which is turned off", hint)
        if self.alpha != "auto":
            raise InvalidInput("alpha is given, but smoothing needs calibration, which is turned off", hint)
        if self.keep not in ("auto", "none", 0):
            raise InvalidInput(
                f"keep-fp16 is {self.keep}, but choosing layers needs calibration, which is turned off", hint
            )


def parse_alpha(text: str) -> float | Literal["auto"]:
    """``--alpha`` as it is typed; what is no number goes on to be refused with the others."""
    return "auto" if text == "auto" else _number(text, float, "alpha", "auto or a number from 0 to 1")


def parse_keep(text: str) -> int | Literal["auto", "none"]:
    """``--keep-fp16`` as it is typed."""
    if text == "auto" or text == "none":
        return "auto" if text == "auto" else "none"
    return int(_number(text, int, "keep-fp16", "auto, none or a number of layers from 0"))


def _number(text: str, kind: type[int] | type[float], name: str, expected: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise InvalidInput(f"{name} is {text!r}", f"choose {expected}") from None


def calibration_folder(output: Path) -> Path:
    """Where an interrupted calibration keeps what it saw, beside ``output``."""
    return output.parent / f".{output.name}.calibration"
