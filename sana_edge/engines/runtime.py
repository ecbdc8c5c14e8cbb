"""What the exported graphs do for a picture, on numpy arrays; `sana_edge.torch_runtime` without torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sana_edge.config import SamplerConfig
from sana_edge.decoding import DEFAULT_TILE, PREVIEW_CELLS, check_finite, resize_and_crop, shrink
from sana_edge.engines import choose
from sana_edge.engines.decoder import EngineDecoder
from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.noise import NoiseSource
from sana_edge.engines.sessions import DENOISERS, Graphs
from sana_edge.engines.text import (
    Context,
    EngineText,
    Floats,
    KnownText,
    ProjectedText,
    padding_mask,
    side_by_side,
)
from sana_edge.engines.tiles import encode_tiles
from sana_edge.errors import InvalidInput, OutOfMemory
from sana_edge.plan.memory import Stage, Work, check_smallest, engine_stages, fit_hint, in_turn
from sana_edge.progress import Progress, unseen
from sana_edge.prompt import reading_notes, texts_of
from sana_edge.request import Plan
from sana_edge.sampler import Origin, Sampler, guide, sampler_of, varied
from sana_edge.store import manifest, manifest_files
from sana_edge.store.domain import read_domain
from sana_edge.store.manifest import ENCODER, Manifest
from sana_edge.store.preview_map import read_map
from sana_edge.system.budget import within
from sana_edge.system.memory import available_memory, peak_memory, used_memory

logger = logging.getLogger("sana_edge")

_TEXT, _DENOISER, _DECODER = "text_encoder", "denoiser", "decoder"


class EngineRuntime:
    """What `sana_edge.runtime.Runtime` promises, of an exported folder. Latents are (1, C, h, w) fp32."""

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
        self._manifest, self._notes, self._memory = described, notes, kind.settings.memory
        self._domain = read_domain(folder)
        self._map = read_map(folder, described.latent_channels)
        self._decoder = EngineDecoder(self.graphs)
        # a method of this object would keep it, and with it the engines, until a garbage collection
        read = partial(EngineText, folder, described.text, partial(_run_text, self.graphs))
        self._known = KnownText(folder, described, kind, read) if prompt_cache else None
        self._text = self._known or read()

    @classmethod
    def load(
        cls,
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
    ) -> EngineRuntime:
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
        if memory is not None and kind.device == "cpu":
            smallest = engine_stages(described, Work(1, 1, guided=False), kind.name, kind.precision)
            check_smallest(described.name, smallest, within(available_memory(), memory), memory)
        loading = partial(on_progress, f"loading {described.name}")
        parts = 4 if prompt_cache else 5
        loading(0, parts)
        manifest_files.verify(folder, described)
        runtime = cls(folder, described, kind, notes, prompt_cache=prompt_cache)
        # Sprint models never are guided
        usual = "denoiser" if described.sampler.kind == "scm" else "denoiser_folded"
        try:
            everything = runtime.graphs.fit(_TEXT, _DENOISER, _DECODER)
            names = [] if prompt_cache else [_TEXT]
            names += ["text_projection", usual] if everything else []
            for number, name in enumerate(names, start=1):
                loading(number, parts)
                runtime.graphs.load(name)
            loading(parts - 1, parts)
            if everything:
                runtime.load_decoder()
        except BaseException:
            # the error's traceback would keep those that were loaded
            runtime.close()
            raise
        return runtime

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

    def computing(self) -> AbstractContextManager[None]:
        """Nothing is set for numpy."""
        return nullcontext()

    def mark(self) -> None:
        """Nothing is queued."""

    def synchronize(self) -> None:
        """Engines return when they are done."""

    def check_plan(self, plan: Plan, count: int = 1) -> None:
        """See that the graphs know the size, and that its pixels fit; computes nothing.

        What engines take besides is not known before they run: they map weights from files, hold them in
        another precision, and share buffers among maps.

        Raises:
            InvalidInput: they were exported, or their engines built, for other sizes.
            OutOfMemory: not even the decoded picture would fit.
        """
        size, asked = self._manifest.size, f"{plan.width}x{plan.height}"
        if size is not None and (plan.width, plan.height) != size:
            made = "x".join(map(str, size))
            hint = f"choose size {made}, or export again: `{self._manifest.export_command(size=asked)}`"
            raise InvalidInput(
                f"{self.name} was exported for {made} alone, not for {asked}",
                f"{hint}; without --size for any",
            )
        if size is not None and plan.tile and plan.tile < max(size):
            made = f"`{self._manifest.export_command()}` without --size makes graphs that can"
            found = f"{self.name} was exported for one size, tiles of {plan.tile} are another"
            raise InvalidInput(found, made)
        if plan.init is not None:
            self._check_encoder()
        # which of them a prompt needs shows when it has been read
        for name in DENOISERS:
            self.graphs.check(name, latent=self._latent_shape(plan))
        # RGB in fp32, and before and after rounding
        needed, free = 2 * 3 * 4 * plan.width * plan.height, available_memory()
        if self._memory is not None and self.backend.device == "cpu":
            stages, there = self._stages(plan), self.graphs.loaded
            known = self._known is not None and self._known.have(texts_of(plan))
            used = [stage for stage in stages if not (known and stage.name == "text")]
            free, needed = self.graphs.free(free), in_turn(used, tiles=plan.tile != 0)
            if free is not None:
                free += sum(s.weights for s in stages if any(name.startswith(s.name) for name in there))
        if free is not None and needed > free:
            raise OutOfMemory(
                f"{asked} needs more than {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                fit_hint(free + (used_memory() or 0)),
                needed=needed,
                free=free,
            )

    def _stages(self, plan: Plan) -> list[Stage]:
        cell = self._manifest.cell
        work = Work(plan.height // cell, plan.width // cell, plan.guided, plan.tile, plan.init is not None)
        return engine_stages(self._manifest, work, self.backend.name, self.backend.precision)

    def read(self, plan: Plan) -> tuple[Context, tuple[str, ...]]:
        """Encode the prompt, and the negative one where it is used; say what was cut or ignored."""
        texts = texts_of(plan)
        missing = range(len(texts)) if self._known is None else self._known.last.missing(texts)
        # all of them before the first is projected, for which the text encoder makes room
        features = {i: self._text.encode(texts[i][0], instruction=texts[i][1]) for i in missing}
        notes = reading_notes(plan, self._text, self._domain, self.name)
        self.graphs.make_room(_TEXT)

        def project(number: int) -> ProjectedText:
            return ProjectedText(**self.graphs.run("text_projection", embeddings=features[number]))

        found = [*map(project, missing)] if self._known is None else self._known.last.get(texts, project)
        return Context(found[-1], found[0] if plan.guided else None), (*self.notes, *notes)

    def schedule(self, plan: Plan) -> tuple[Sampler, Floats]:
        """Make the sampler; its timesteps (S,) are what the denoiser gets."""
        sampler = sampler_of(self.sampler, plan.sampler, plan.steps, plan.flow_shift, plan.skip)
        return sampler, sampler.timesteps

    def noises(self, plans: Sequence[Plan]) -> Callable[[], Floats]:
        """`noise` of a batch, a row for each plan."""
        sources = [self.noise(plan) for plan in plans]
        return lambda: np.concatenate([draw() for draw in sources])

    def join(self, contexts: Sequence[Context]) -> Context:
        """Texts of a batch: the graphs that fold guidance have one row.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(f"{self.name} is exported for one picture at a time", "leave out the batch")

    def predict(
        self, plan: Plan, tables: Floats, context: Context, count: int = 1
    ) -> tuple[Callable[[Floats, int], Floats], tuple[str, ...]]:
        """What predicts the velocities of the plan's steps; ``count`` is 1."""
        scale = np.array([plan.guidance], np.float32)
        prompt, negative = context.prompt, context.negative
        if negative is not None and negative.length == 1:
            name, text = "denoiser_folded", prompt
            fixed = {"constant": negative.constant, "scale": scale}
        else:
            name, text = "denoiser", prompt if negative is None else side_by_side(negative, prompt)
            mask = np.zeros((1, 1, 1, prompt.length), np.float32)
            fixed = {"mask": mask if negative is None else padding_mask(negative.length, prompt.length)}
        # engines on a GPU copy what cannot change only once
        fixed |= {"keys": text.keys, "values": text.values, "guidance": scale}
        for array in fixed.values():
            array.setflags(write=False)
        self._load_denoiser(name)
        paired = name == "denoiser" and negative is not None

        def velocity(x: Floats, i: int) -> Floats:
            # a picture may have been decoded meanwhile
            self._load_denoiser(name)
            latent = np.concatenate([x, x]) if paired else x
            found = self.graphs.run(name, latent=latent, timestep=tables[i : i + 1], **fixed)["velocity"]
            return guide((found[:1], found[1:]), scale) if paired else found

        return velocity, ()

    def origin(self, plan: Plan) -> Origin[Floats]:
        """Encode the plan's image."""
        assert plan.init is not None
        self.graphs.make_room(_TEXT, _DENOISER, _DECODER, for_graph=ENCODER)
        drawn = (plan.width, plan.height)

        def encode(pixels: Floats) -> Floats:
            return self.graphs.run(ENCODER, pixels=pixels)["latent"]

        cell, tile = self._manifest.cell, None
        whole = next(s for s in self._stages(plan) if s.name == ENCODER).working
        free = self.graphs.free(available_memory())
        if self._manifest.size is None and free is not None and whole > free:
            tile = DEFAULT_TILE
            logger.warning("the image is encoded in tiles of %s pixels, as memory is short: it differs", tile)
        latent = encode_tiles(plan.init.at(drawn), encode, cell=cell, tile=tile)
        # it is needed once a picture
        self.graphs.close(ENCODER)
        return Origin(latent, plan.init.cells(drawn, self._manifest.cell))

    def _check_encoder(self) -> None:
        if ENCODER not in self._manifest.graphs:
            found = f"{self.name} was exported without an encoder, which an image needs"
            command = self._manifest.export_command(int8=self.quantization is not None)
            raise InvalidInput(found, f"`{command} --encoder` makes one that has it")
        if self.backend.name == "tensorrt":
            found = "TensorRT's engines have no encoder, which an image needs"
            raise InvalidInput(found, "choose another backend")

    def noise(self, plan: Plan, picture: int = 0) -> Callable[[], Floats]:
        """What draws N(0, 1) for one of the plan's pictures, as with torch."""
        one, shape = plan.picture(picture), self._latent_shape(plan)
        return varied(lambda seed: partial(NoiseSource(seed).normal, shape), one.seed, one.variation)

    def decode(
        self,
        latent: Floats,
        size: tuple[int, int] | None = None,
        on_progress: Progress | None = None,
        *,
        tile: int | None = None,
        on_tiled: Callable[[int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Turn a latent into (H, W, 3) uint8, resized and cropped to ``size`` (width, height).

        Tells ``on_progress`` between strips or tiles; what that raises ends the decode. ``tile`` and
        ``on_tiled`` are those of `EngineDecoder.decode`.

        Raises:
            SanaError: the latent, or what the decoder makes of it, has NaN or infinite values.
        """
        self.graphs.make_room(_DENOISER)
        told = on_progress or unseen
        decode = partial(self._decoder.decode, on_progress=told, tile=tile, on_tiled=on_tiled)
        return self._picture(latent, decode, size)

    def _picture(
        self, latent: Floats, decode: Callable[[Floats], Floats], size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        check_finite("latent", float(latent.min()), float(latent.max()))
        pixels = decode(latent)
        check_finite("decoded picture", float(pixels.min()), float(pixels.max()))
        picture = pixels[0] if size is None else resize_and_crop(pixels[0], size)
        levels = np.clip(picture * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
        return np.ascontiguousarray(np.rint(levels).astype(np.uint8).transpose(1, 2, 0))

    def preview(self, latent: Floats, linear: bool = False) -> NDArray[np.uint8]:
        """Decode a latent shrunk to at most 8 cells a side, or map its cells where there is a map."""
        if linear and self._map is not None:
            check_finite("latent", float(latent.min()), float(latent.max()))
            return self._map.pixels(latent)
        if not isinstance(self._manifest.graphs["decoder"].inputs["latent"][1][2], str):
            # the graph knows only the height of the whole picture
            return self._picture(latent, self._decoder.decode)
        small = shrink(latent, -(-max(latent.shape[-2:]) // PREVIEW_CELLS))
        return self._picture(small, self._decoder.decode)

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

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int, int]:
        cell = self._manifest.cell
        return 1, self._manifest.latent_channels, plan.height // cell, plan.width // cell

    def _load_denoiser(self, name: str) -> None:
        if name not in self.graphs.loaded:
            self.graphs.make_room(_TEXT, _DECODER)
            self.graphs.load(name)


def _run_text(graphs: Graphs, ids: NDArray[np.int64], keys: Floats, values: Floats) -> Floats:
    if _TEXT not in graphs.loaded:
        graphs.make_room(_DENOISER, _DECODER, for_graph=_TEXT)
    return graphs.run(_TEXT, ids=ids, past_keys=keys, past_values=values)["hidden"]
