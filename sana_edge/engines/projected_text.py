"""Texts as the denoiser reads them, from the exported graph text_projection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sana_edge.engines.text import Floats

# added to the scores of what pads a shorter text
_PADDING = np.float32(-1e30)


@dataclass(frozen=True, eq=False)
class ProjectedText:
    """keys (layers, B, heads, d, L), values (layers, B, heads, L, d), constant (layers, 1, 1, dim).

    ``constant`` is what the denoiser reads of the first token alone, as of an empty negative prompt.
    """

    keys: Floats
    values: Floats
    constant: Floats

    @property
    def length(self) -> int:
        """L."""
        return int(self.keys.shape[-1])


@dataclass(frozen=True, eq=False)
class Context:
    """The texts of a plan; ``negative`` is None without guidance."""

    prompt: ProjectedText
    negative: ProjectedText | None


def side_by_side(one: ProjectedText, two: ProjectedText) -> ProjectedText:
    """Two texts as a batch, the shorter one padded with zeros; see `padding_mask`."""
    longest = max(one.length, two.length)

    def pad(array: Floats, axis: int) -> Floats:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, longest - array.shape[axis])
        return np.pad(array, widths)

    keys, values = (
        np.concatenate([pad(a, axis), pad(b, axis)], axis=1)
        for a, b, axis in ((one.keys, two.keys, 4), (one.values, two.values, 3))
    )
    return ProjectedText(keys, values, np.concatenate([one.constant, two.constant], axis=1))


def padding_mask(*lengths: int) -> Floats:
    """(B, 1, 1, L) to add to the scores of texts with so many tokens: 0, and -1e30 beyond their ends."""
    beyond = np.arange(max(lengths)) >= np.array(lengths)[:, None]
    mask: Floats = np.where(beyond, _PADDING, np.float32(0))[:, None, None]
    return mask
