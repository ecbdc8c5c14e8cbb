"""The graphs of an exported folder, which of their engines are in memory, and who makes room for whom.

Text encoder, denoiser and decoder are needed one after the other. Each makes room for the next where its
files are larger than a quarter of what is free beside it; a picture then waits some seconds for each GB of
them. One that is small for the machine stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sana_edge.engines.engine import Engine, EngineKind
from sana_edge.engines.text import Floats
from sana_edge.plan.memory import read_bytes
from sana_edge.store.manifest import Manifest
from sana_edge.system.budget import within
from sana_edge.system.memory import available_memory

TEXT, DENOISER, DECODER = "text_encoder", "denoiser", "decoder"
# which hold the same weights
DENOISERS = ("denoiser", "denoiser_folded")
# so many times the size of what stays has to be free
_SHARE = 4


@runtime_checkable
class Sized(Protocol):
    """An engine that takes only some of the sizes that its graph does."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See that it takes inputs of these shapes, also when it is closed; runs nothing.

        Raises:
            InvalidInput: it does not; names the range.
        """


class Graphs:
    """The engines of an exported folder, each loaded when it is first used.

    Of the two denoisers only the one used last stays.

    Attributes:
        kind: of the engines.
        described: the folder's manifest.
    """

    def __init__(self, folder: Path, described: Manifest, kind: EngineKind) -> None:
        self.described, self.kind = described, kind
        self._folder = folder
        self._engines: dict[str, Engine] = {}
        # also of engines that were closed: a size can be refused while they are not in memory
        self._sized: dict[str, Sized] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """The graphs whose engines are in memory."""
        return tuple(self._engines)

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened while loading that a user should know."""
        return tuple(dict.fromkeys(note for engine in self._engines.values() for note in engine.notes))

    def load(self, name: str) -> Engine:
        """The engine of a graph."""
        if name not in self._engines:
            if name in DENOISERS:
                self.close(*DENOISERS)
            graph = self.described.graphs[name]
            engine = self.kind.load(self._folder / graph.file, graph.inputs, graph.outputs)
            self._engines[name] = engine
            if isinstance(engine, Sized):
                self._sized[name] = engine
        return self._engines[name]

    def check(self, name: str, **shapes: tuple[int, ...]) -> None:
        """See that the engine of a graph, once it was loaded, takes inputs of these shapes; runs nothing.

        Raises:
            InvalidInput: it does not.
        """
        if name in self._sized:
            self._sized[name].check(shapes)

    def run(self, name: str, **inputs: NDArray[np.generic]) -> dict[str, Floats]:
        """Run a graph. Inputs that it does not have are left out."""
        known = self.described.graphs[name].inputs
        return self.load(name).run({key: array for key, array in inputs.items() if key in known})

    def bytes_of(self, name: str) -> int:
        """See `sana_edge.plan.memory.read_bytes`: about what its engine holds."""
        return read_bytes(self.described, name, self.kind.name)

    def fit(self, *names: str) -> bool:
        """Whether the engines of these graphs can be in memory together, and each stays there."""
        sizes = [self.bytes_of(name) for name in names]
        free = self._free()
        return free is None or sum(sizes) + _SHARE * max(sizes) <= free

    def make_room(self, *names: str, for_graph: str | None = None) -> None:
        """Free some engines if that helps: each by its own size, or all by what a graph will need."""
        for name in names:
            free = self._free()
            if free is not None and _SHARE * self.bytes_of(for_graph or name) > free:
                self.close(*(DENOISERS if name in DENOISERS else (name,)))

    def _free(self) -> int | None:
        return self.free(available_memory())

    def free(self, available: int | None) -> int | None:
        """Of so many bytes of the CPU's memory what engines may take; of a GPU's nothing is known."""
        return within(available, self.kind.settings.memory) if self.kind.device == "cpu" else None

    def close(self, *names: str) -> None:
        """Free the engines of some graphs, without names of all; they are loaded again when needed."""
        for name in names or self.loaded:
            engine = self._engines.pop(name, None)
            if engine is not None:
                engine.close()
