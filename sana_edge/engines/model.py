"""An exported folder and its engines: what is loaded of it, and what is known of the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sana_edge.config import SamplerConfig
from sana_edge.engines import choose
from sana_edge.engines.decoder import EngineDecoder
from sana_edge.engines.denoiser import EngineDenoiser
from sana_edge.engines.encoder import EngineEncoder
from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.memory import Memory, check_limit
from sana_edge.engines.sessions import DECODER, DENOISER, TEXT, Graphs
from sana_edge.engines.text import EngineText, Floats, KnownText
from sana_edge.errors import InvalidInput
from sana_edge.progress import Progress, unseen
from sana_edge.store import manifest, manifest_files
from sana_edge.store.domain import read_domain
from sana_edge.store.manifest import Manifest
from sana_edge.store.preview_map import read_map
from sana_edge.system.memory import peak_memory

Model = TypeVar("Model", bound="EngineModel")


class EngineModel:
    """An exported folder whose graphs are run by one kind of engine."""

    def __init__(
        self,
        folder: Path,
        described: Manifest,
        kind: EngineKind,
        notes: tuple[str, ...] = (),
        *,
        prompt_cache: bool = False,
    ) -> None:
        self.graphs = Graphs(folder, described, kind)
        self.backend = kind
        self._manifest, self._notes = described, notes
        self._domain = read_domain(folder)
        self._map = read_map(folder, described.latent_channels)
        self._decoder, self._denoiser = EngineDecoder(self.graphs), EngineDenoiser(self.graphs)
        # a method of this object would keep it, and with it the engines, until a garbage collection
        read = partial(EngineText, folder, described.text, partial(_run_text, self.graphs))
        self._known = KnownText(folder, described, kind, read) if prompt_cache else None
        self._text = self._known or read()
        self._memory = Memory(self.graphs, self._known)
        self._encoder = EngineEncoder(self.graphs, self._memory)

    @classmethod
    def load(
        cls: type[Model],
        folder: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        int8: bool = False,
        backend: str = "auto",
        engine_folder: Path | None = None,
        trust_engine: bool = False,
        threads: int | None = None,
        memory: int | None = None,
        prompt_cache: bool = False,
        notes: tuple[str, ...] = (),
        on_progress: Progress = unseen,
    ) -> Model:
        """Read an exported folder and load a usual picture's graphs; only the text where memory is short.

        Args:
            device: one of `choose.DEVICES`.
            dtype: one of `choose.PRECISIONS`.
            int8: refuse a float model.
            backend: "auto" or one of `choose.NAMES`.
            engine_folder, trust_engine, threads, memory: see `engine.Settings`.
            prompt_cache: load the text encoder with the first prompt that was not read before.
            notes: why this folder was taken.
            on_progress: told before files are verified and each graph is loaded; what it raises ends that.

        Raises:
            CheckpointError: a file is missing or damaged.
            InvalidInput, MissingDependency, UnsupportedDevice: see `choose.choose`.
        """
        described = manifest.read(folder)
        if int8 and described.quantization is None:
            command = described.export_command(int8=True)
            hint = f"`{command}` makes an INT8 one; or leave out --int8"
            raise InvalidInput(f"{folder} is an exported float model", hint)
        settings = Settings(
            threads=threads,
            precision=dtype,
            engine_folder=engine_folder,
            trust_engine=trust_engine,
            memory=memory,
        )
        kind = choose.choose(backend, device, folder, settings)
        check_limit(described, kind)
        loading = partial(on_progress, f"loading {described.name}")
        parts = 4 if prompt_cache else 5
        loading(0, parts)
        manifest_files.verify(folder, described)
        loaded = cls(folder, described, kind, notes, prompt_cache=prompt_cache)
        # Sprint models never are guided
        usual = "denoiser" if described.sampler.kind == "scm" else "denoiser_folded"
        try:
            everything = loaded.graphs.fit(TEXT, DENOISER, DECODER)
            names = [] if prompt_cache else [TEXT]
            names += ["text_projection", usual] if everything else []
            for number, name in enumerate(names, start=1):
                loading(number, parts)
                loaded.graphs.load(name)
            loading(parts - 1, parts)
            if everything:
                loaded.load_decoder()
        except BaseException:
            # the error's traceback would keep those that were loaded
            loaded.close()
            raise
        return loaded

    @property
    def name(self) -> str:
        """Of the model."""
        return self._manifest.name

    @property
    def dtype(self) -> str:
        """What the engine computes in where it is not INT8, by its short name."""
        return self.backend.precision

    @property
    def quantization(self) -> str | None:
        """An INT8 model's scheme."""
        return self._manifest.quantization

    @property
    def decoder(self) -> None:
        """Its own."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened while loading, and what of the exported model is not done."""
        return (*self._notes, *self._manifest.notes, *self.graphs.notes)

    @property
    def sampler(self) -> SamplerConfig:
        """What the model was made for."""
        return self._manifest.sampler

    @property
    def place(self) -> str:
        """Where it runs, for people."""
        return self.backend.title

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained for, or exported for alone."""
        return self._manifest.size or (self._manifest.native_size,) * 2

    @property
    def trained_side(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return self._manifest.native_size

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Width and height that it was exported for alone."""
        return self._manifest.size

    @property
    def peak_memory(self) -> int | None:
        """The most bytes that the process has used on the CPU."""
        return peak_memory()

    def load_decoder(self) -> None:
        """Load what decodes pictures of the native size, where it stays in memory."""
        self._decoder.load(*self.native_size)

    def release(self) -> None:
        """Let go of the engines, after an error; they are loaded again when they are needed."""
        if self._known is not None:
            self._known.last.keep()
        self.graphs.close()

    def close(self) -> None:
        """Free the engines; one that is needed all the same is loaded again."""
        self.graphs.close()


def _run_text(graphs: Graphs, ids: NDArray[np.int64], keys: Floats, values: Floats) -> Floats:
    if TEXT not in graphs.loaded:
        graphs.make_room(DENOISER, DECODER, for_graph=TEXT)
    return graphs.run(TEXT, ids=ids, past_keys=keys, past_values=values)["hidden"]
