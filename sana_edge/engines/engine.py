"""Engines as others see them: a kind for each library that runs graphs, an engine for each loaded graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from sana_edge.engines.ports import Arrays
from sana_edge.store.manifest import Port


class Engine(Protocol):
    """One graph, loaded.

    Attributes:
        graph: the name of its file without the ending.
        name, device: as in `EngineKind`.
        precision: what its products compute in, "fp32", "bf16" or "fp16"; INT8 ones stay INT8.
        notes: what happened while loading that a user should know.
    """

    @property
    def graph(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Compute the graph's outputs by name, in arrays that are the caller's.

        Contiguous inputs are read where they lie. Where an engine needs a copy, as for a GPU, an array that
        is not writeable is copied once, for as long as the same one is given.

        Raises:
            InvalidInput: a name, dtype or shape that the graph does not have.
            OutOfMemory: its memory does not suffice.
            SanaError: the engine failed, or was closed.
        """

    def close(self) -> None:
        """Free its memory; it cannot run any more."""


@dataclass(frozen=True)
class Settings:
    """How engines compute. None and "auto" leave it to what suits the machine.

    Attributes:
        threads: on the CPU.
        precision: one of `choose.PRECISIONS`, of what is not INT8.
        cache: where compiled graphs are kept; on a CPU none are kept unless this says where.
        folder: the exported folder, where it is known.
        dtype: that of its graphs.
        engine_folder: where `sana-edge build` put TensorRT's engines; None for the user's own.
        trust_engine: load them also from elsewhere than the user's own folder, which runs the code in them.
        memory: bytes that the process may take; None: what is free.
    """

    threads: int | None = None
    precision: str = "auto"
    cache: Path | None = None
    folder: Path | None = None
    dtype: str | None = None
    engine_folder: Path | None = None
    trust_engine: bool = False
    memory: int | None = None


@dataclass(frozen=True)
class EngineKind:
    """A library that runs graphs, on one of its devices. Its file has a subclass with `probe` and `load`.

    Attributes:
        name: of the library, as ``--backend`` takes it.
        devices: that it has code for.
        device: the one of them that was chosen.
        precision: "fp32", "bf16", "fp16".
        title: with its version and device, for a person.
        reasons: for each kind that is preferred to this one why it is not used, and what helps.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]

    device: str
    precision: str
    title: str
    settings: Settings
    reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def probe(cls, device: str, settings: Settings) -> EngineKind:
        """The kind as it would run here on one of its devices.

        Raises:
            MissingDependency: the library is not installed, does not load or is too old.
            UnsupportedDevice: the device is not there, or has no driver.
            InvalidInput: the device cannot compute in the precision or dtype.
            SanaError: TensorRT has no engine of ``settings.folder``.
        """
        raise NotImplementedError

    def load(
        self,
        path: Path,
        inputs: Mapping[str, Port] | None = None,
        outputs: Mapping[str, Port] | None = None,
    ) -> Engine:
        """Load one graph.

        Args:
            path: of the ``.onnx``; its external data lies beside it.
            inputs, outputs: the ports of the folder's manifest, which name the sides of shapes. Without them
                the engine's own knowledge has to do.

        Raises:
            CheckpointError: the file or its data is damaged or missing, or has what the engine cannot do.
            UnsupportedDevice: the device refuses it.
            OutOfMemory: it does not fit.
        """
        raise NotImplementedError
