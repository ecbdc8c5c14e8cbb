"""Listens to the layers while the pipeline runs, and knows at which step of which prompt it is."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sana_edge.calib.sampling import Reservoir, generator, quota, strata
from sana_edge.calib.statistics import LayerStatistics, Statistics
from sana_edge.errors import SanaError
from sana_edge.nets.quantize import decoder_targets, denoiser_targets
from sana_edge.torch_runtime.runtime import TorchRuntime

SAMPLE_ROWS = 256
"""Sample rows of a layer, over all steps and prompts."""

# of one call, drawn at random, that the histogram sees: absmax sees all, which is much cheaper
_COUNTED_ROWS = 512


def targets(runtime: TorchRuntime) -> dict[str, Any]:
    """The layers that can be quantized, by their names in `Statistics`."""
    denoiser, decoder = runtime.denoiser, runtime.autoencoder
    found = {f"denoiser.{name}": denoiser.get_submodule(name) for name in denoiser_targets(denoiser)}
    return {**found, **{name: decoder.get_submodule(name) for name in decoder_targets(decoder)}}


def nothing(layers: Mapping[str, Any], steps: int) -> dict[str, LayerStatistics]:
    """Empty statistics of layers; those of the decoder, which runs once per picture, have one step."""
    return {
        name: LayerStatistics.empty(
            steps if name.startswith("denoiser.") else 1,
            layer.in_features if hasattr(layer, "in_features") else layer.in_channels,
        )
        for name, layer in layers.items()
    }


class Listener:
    """Adds what the layers see to statistics whose ``info`` has seed and prompts, step by step."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._prompt = self._step = 0
        self._sampled = True
        # of the current step, by layer
        self._reservoirs: dict[str, Reservoir] = {}
        self._calls: dict[str, int] = {}

    @contextmanager
    def step(self, prompt: int, step: int, *, sampled: bool = True) -> Iterator[None]:
        """Inside is this denoising step of this prompt; the decoder runs in the one after the last.

        Args:
            sampled: whether sample rows are taken; False for what comes on top of the step.
        """
        self._prompt, self._step, self._sampled = prompt, step, sampled
        self._reservoirs, self._calls = {}, {}
        yield
        for name, reservoir in self._reservoirs.items():
            layer = self._statistics.layers[name]
            layer.add_samples(self._row(layer), reservoir.rows())

    @contextmanager
    def attached(self, layers: Mapping[str, Any]) -> Iterator[None]:
        """Inside are observers on the layers; afterwards, also after an error, those from before."""
        before = {name: layer.observer for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                layer.observer = functools.partial(self._see, name)
            yield
        finally:
            for name, observer in before.items():
                layers[name].observer = observer

    def _see(self, name: str, x: Tensor) -> None:
        """One call of a layer with its input (..., C), of several where it works in pieces."""
        layer, info = self._statistics.layers[name], self._statistics.info
        rows = x.flatten(0, -2)
        row, call = self._row(layer), self._calls.get(name, 0)
        source = generator(info["seed"], name, self._prompt, row, call)
        weight = -(-len(rows) // _COUNTED_ROWS)
        counted = strata(len(rows) // weight, len(rows), source) if weight > 1 else None
        try:
            layer.update(row, rows, counted=counted, weight=weight)
        except SanaError as error:
            where = f"prompt {self._prompt + 1} of {info['prompts']}"
            raise SanaError(f"the input of {name} has {error.message}, {where}", error.hint) from None
        if not call:
            share = quota(SAMPLE_ROWS, row, len(layer.limit), self._prompt, info["prompts"])
            self._reservoirs[name] = Reservoir(share if self._sampled else 0)
        self._reservoirs[name].offer(rows, source)
        self._calls[name] = call + 1

    def _row(self, layer: LayerStatistics) -> int:
        # the decoder's layers have one for everything
        return min(self._step, len(layer.limit) - 1)
