"""How far a graph may be from the torch modules, and how far it is.

A rounding errs by at most u: 2^-24 in fp32, 2^-11 in fp16, 2^-8 in bf16. Some thirty roundings a layer and up
to 28 layers are about a thousand, which add up like a random walk to 32 u. The torch modules compute in fp32.

=====  =====================  ========================================================================
dtype  relative error in L2   why
=====  =====================  ========================================================================
fp32   1e-4                   32 u is 2e-6; engines approximate exp, tanh and the like to some 1e-7, and
                              softmax and division magnify; 1e-5 holds for a module (CONTRIBUTING.md)
fp16   1.6e-2                 32 u
bf16   1.3e-1                 32 u
int8   + 1e-1                 a value near the middle of two steps rounds to either, which makes later ones
                              differ by steps: both networks are as far from the float one as INT8 is, on
                              their own. That may be 7 % of a velocity, times sqrt(2) for two. (An input
                              that differs by 1e-6 moves the torch module itself as far)
int8   + 5e-3                 the text encoder, whose activations are float in the graph and two INT8
                              digits in torch: 20 / 64516 / sqrt(3) = 1.8e-4 of an input, of 4 inputs in
                              each of 26 layers: times sqrt(104)
=====  =====================  ========================================================================

INT8 graphs also run without the rounding of activations (`float_activations`), and are held to the
limit of their dtype then: that is what finds a wrong weight.

A single value may be off by 4 times the relative error, as a share of the largest value there is: 5 standard
deviations, where the largest value is at least 3 of them, and twice that for long tails.

Pictures of a few steps: with guidance a clean latent errs by some 6 times what a velocity does. In fp32 this
is below a level of 255, and if two thirds of the values flipped to the next, PSNR would be 50 dB. 30 dB in
fp16 and 20 dB in bf16 are what pictures of the same things have. INT8 owes 35 dB, or no more than 6 dB, twice
the error, below what the torch module reaches against itself where its inputs are moved by roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.errors import SanaError
from sana_edge.image_metrics import psnr

_ERRORS = {"fp32": 1e-4, "fp16": 32 * 2.0**-11, "bf16": 32 * 2.0**-8}
_INT8, _INT8_TEXT = 1e-1, 5e-3
_LARGEST = 4
_PSNR = {"fp32": 50.0, "fp16": 30.0, "bf16": 20.0}
_PSNR_INT8, _MARGIN = 35.0, 6.0
# of equal pictures, whose PSNR is infinite, which JSON cannot say
_EQUAL = 99.0

_HINT = "please report this; the same `sana-edge export` with --no-verify writes the graphs all the same"


@dataclass
class Agreement:
    """What was found in graphs that compute in ``dtype``, quantized or not; raises where it is too far off.

    ``graphs`` has "error", "max" and "limit" by graph, the worst of all that was compared.
    """

    dtype: str
    int8: bool
    graphs: dict[str, dict[str, float]] = field(default_factory=dict)

    def limit(self, graph: str) -> float:
        """The largest relative error of a graph's outputs."""
        quantized = _INT8_TEXT if graph == "text_encoder" else _INT8
        return _ERRORS[self.dtype] + (quantized if self.int8 else 0.0)

    def check(self, graph: str, found: Mapping[str, NDArray[Any]], **expected: NDArray[Any]) -> None:
        """Compare outputs of a graph with what they should be.

        Raises:
            SanaError: another shape, values that are not finite, or too far off; names graph and output.
        """
        for name, right in expected.items():
            where, given = f"{graph}.onnx: {name}", found.get(name)
            if given is None or given.shape != right.shape:
                shape = None if given is None else given.shape
                raise SanaError(f"{where} has shape {shape}, expected {right.shape}", _HINT)
            error, largest = _difference(given, right)
            limit = self.limit(graph)
            # NaN is no number that is small enough
            for figure, value, most in (
                ("relative error", error, limit),
                ("largest difference, as a share of the largest value,", largest, _LARGEST * limit),
            ):
                if not value <= most:
                    raise SanaError(
                        f"{where} differs from the torch modules: its {figure} is {value:.2e}, "
                        f"at most {most:.2e} is expected",
                        _HINT,
                    )
            worst = self.graphs.setdefault(graph, {"error": 0.0, "max": 0.0, "limit": limit})
            worst["error"], worst["max"] = max(worst["error"], error), max(worst["max"], largest)

    def picture(
        self, found: NDArray[np.uint8], expected: NDArray[np.uint8], itself: float | None = None
    ) -> dict[str, float]:
        """Compare two pictures (H, W, 3).

        Args:
            itself: PSNR of two pictures of the torch modules whose inputs differed by roundings.

        Raises:
            SanaError: they are too far from each other.
        """
        least = min(_PSNR[self.dtype], _PSNR_INT8) if self.int8 else _PSNR[self.dtype]
        if itself is not None:
            least = min(least, itself - _MARGIN)
        value = min(psnr(found, expected), _EQUAL)
        if value < least:
            raise SanaError(
                f"the graphs' picture differs from the torch modules': PSNR is {value:.1f} dB, "
                f"at least {least:.1f} dB is expected",
                _HINT,
            )
        return {"psnr": value, "limit": least}


def _difference(given: NDArray[Any], right: NDArray[Any]) -> tuple[float, float]:
    """Relative error in L2, and the largest difference as a share of the largest value."""
    a, b = given.astype(np.float64), right.astype(np.float64)
    difference = np.abs(a - b)
    norm, largest = float(np.linalg.norm(b)), float(np.abs(b).max(initial=0.0))
    tiny = np.finfo(np.float64).tiny
    return float(np.linalg.norm(difference)) / max(norm, tiny), float(difference.max(initial=0.0)) / max(
        largest, tiny
    )
