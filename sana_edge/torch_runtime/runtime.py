"""The networks of a model on a device, each in the dtype that suits it, and what they do for a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sana_edge.config import DenoiserConfig, SamplerConfig
from sana_edge.decoding import PREVIEW_CELLS, check_finite
from sana_edge.errors import OutOfMemory
from sana_edge.fused import backends
from sana_edge.fused.backends import Backend
from sana_edge.fused.decoder import fuse_decoder, fuse_encoder
from sana_edge.nets.autoencoder import Autoencoder, Encoder, LatentDecoder
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.text_context import TextContext, join_texts
from sana_edge.nets.text_encoder import EncodedTexts, TextEncoder
from sana_edge.plan.memory import (
    Stage,
    Work,
    check_smallest,
    fit_hint,
    fitting_dtypes,
    in_turn,
    together,
    torch_stages,
)
from sana_edge.plan.model import Facts, folder_facts
from sana_edge.progress import Progress, unseen
from sana_edge.prompt import reading_notes, texts_of
from sana_edge.request import Plan
from sana_edge.sampler import Origin, Sampler, guide, sampler_of, varied
from sana_edge.sizes import resized
from sana_edge.store.domain import Domain, read_domain
from sana_edge.store.folder import foreign_parts
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.package import Quantization
from sana_edge.store.pairing import read_sampler
from sana_edge.store.preview_map import PreviewMap, read_map
from sana_edge.store.tiny_autoencoder import DecoderConfig
from sana_edge.system.budget import within
from sana_edge.system.memory import available_memory, peak_memory, used_memory
from sana_edge.torch_runtime import tiling
from sana_edge.torch_runtime.device import DTYPES, full_precision, torch_threads, without_fp16
from sana_edge.torch_runtime.encoding import encode
from sana_edge.torch_runtime.load import describe, load_decoder, load_denoiser, load_dtype, load_encoder
from sana_edge.torch_runtime.stages import Loaded, Stages
from sana_edge.torch_runtime.steps import Predictor, Velocity
from sana_edge.torch_runtime.text import load_text_encoder
from sana_edge.torch_runtime.texts import KnownTexts, check_files, text_identity

IN_TURN = "memory is short: text encoder, denoiser and decoder are loaded in turn, for each picture"
WHILE_LOADING = "quantized while loading, without calibration; `sana-edge quantize` makes a package"


@dataclass(frozen=True, eq=False)
class TorchRuntime:
    """What turns a prompt into a picture, one method for each part of the way.

    ``dtype`` is the denoiser's, by its short name, ``text_dtype`` the text encoder's where it is another,
    ``backend`` what the steps run on, ``quantization`` an INT8 model's scheme, ``decoder`` one that was
    chosen in place of the model's; ``notes`` say what happened while loading, ``domain`` what a small model
    knows, ``threads`` is None for torch's own number, ``memory`` bytes that may be taken, None for what is
    free, ``texts`` those that need no text encoder, None without a cache. Latents are (1, C, h, w) fp32 on
    ``device``.
    """

    name: str
    device: torch.device
    dtype: str
    networks: Stages
    facts: Facts
    sampler: SamplerConfig
    backend: Backend
    quantization: str | None = None
    notes: tuple[str, ...] = ()
    domain: Domain | None = None
    decoder: str | None = None
    threads: int | None = None
    memory: int | None = None
    preview_map: PreviewMap | None = None
    texts: KnownTexts | None = None
    text_dtype: str | None = None

    @classmethod
    def load(
        cls,
        model: ResolvedModel,
        *,
        device: torch.device,
        dtype: str,
        int8: bool = False,
        backend: str = "torch",
        threads: int | None = None,
        memory: int | None = None,
        prompt_cache: bool = False,
        on_progress: Progress = unseen,
    ) -> TorchRuntime:
        """Read a model folder, a float one or a package; only its text encoder where memory is short.

        Args:
            dtype: "auto", "fp32", "bf16" or "fp16", for the denoiser. The other two networks overflow in fp16
                and run in bf16 then, or in fp32 where the device has no bf16. In an INT8 model, of what is
                not INT8.
            int8: make float weights INT8 while they are loaded; a package is INT8 anyway.
            backend: see `backends.choose`.
            threads: see `torch_threads`.
            memory: bytes that may be taken; None: what is free.
            prompt_cache: load the text encoder with the first prompt that was not read before.
            on_progress: told before each of the networks; what it raises ends the loading.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit its config.
            InvalidInput, UnsupportedDevice: the backend cannot be used for this model.
            OutOfMemory: not even the smallest picture fits into ``memory``.
        """
        transformer, vae = describe(model)
        quantization = transformer.quantization or (vae.quantization if vae else None)
        quantize = int8 and quantization is None
        if quantize:
            quantization = Quantization("token")
        config = DenoiserConfig.from_dict(transformer.values)
        chosen = backends.choose(backend, device, dtype, quantization is not None, config)
        backends.measure_tiles(chosen, device)
        loading = partial(on_progress, f"loading {model.name}")
        loading(0, 2 if prompt_cache else 3)
        facts = folder_facts(model)
        notes: tuple[str, ...] = (WHILE_LOADING,) if quantize else ()
        text_dtype = None
        if dtype == "auto":
            dtype = load_dtype(facts.stored["denoiser"].dtype, device, fused=chosen.fused)
            if device.type == "cpu":
                free = within(available_memory(device), memory, device)
                fast = dtype
                dtype, text_dtype = fitting_dtypes(facts, dtype, int8=quantize, free=free)
                if text_dtype != fast:
                    part = "the text encoder" if dtype == fast else "all"
                    notes += (f"memory is short: {part} is in bf16, which this CPU has no instructions for",)
        others = DTYPES[dtype] if dtype != "fp16" else without_fp16(device)
        texts_in = others if text_dtype is None else DTYPES[text_dtype]
        sampler, sampler_notes = read_sampler(model.path, config)

        fusible = chosen.name == "cuda" and others.itemsize == 2

        def decoder() -> LatentDecoder:
            found = load_decoder(model, device=device, dtype=others, int8=quantize, description=vae)
            return fuse_decoder(found, chosen.name) if fusible and isinstance(found, Autoencoder) else found

        def encoder() -> Encoder:
            found = load_encoder(model, device=device, dtype=others, int8=quantize)
            return fuse_encoder(found, chosen.name) if fusible else found

        networks = Stages(
            Loaded(
                lambda: load_text_encoder(
                    model.path,
                    dtype=texts_in,
                    device=device,
                    backend=chosen.name,
                    variant=model.component_variant("text_encoder"),
                    int8=quantize,
                )
            ),
            Loaded(
                lambda: load_denoiser(
                    model,
                    device=device,
                    dtype=dtype,
                    int8=quantize,
                    fused=chosen.fused,
                    description=transformer,
                )[0]
            ),
            Loaded(decoder),
            Loaded(encoder),
            backend=chosen,
        )
        texts = None
        if prompt_cache:
            check_files(model)
            texts = KnownTexts(
                networks,
                text_identity(model, device=device, int8=quantize, backend=chosen.name, threads=threads),
                dtype=texts_in,
                channels=facts.text["hidden_size"],
                device=device,
            )
        loaded = cls(
            name=model.name,
            device=device,
            dtype=dtype,
            networks=networks,
            facts=facts,
            sampler=sampler,
            backend=chosen,
            quantization=quantization.summary if quantization else None,
            notes=(*notes, *sampler_notes, *foreign_parts(model.path)),
            decoder=model.decoder_name,
            domain=read_domain(model.path),
            threads=threads,
            memory=memory,
            preview_map=read_map(model.path, config.in_channels),
            texts=texts,
            text_dtype=text_dtype,
        )
        loaded._load(loading)
        return loaded

    def _load(self, loading: Callable[[int, int], None]) -> None:
        """Load all networks that fit together for a usual picture, or else only the one that works first."""
        cells = self.facts.denoiser.sample_size
        usual = self._stages(Work(cells, cells, guided=self.sampler.kind != "scm"))
        free = self._free()
        self.networks.in_turn = free is not None and together(usual) > free
        if self.memory is not None:
            check_smallest(self.name, self._stages(Work(1, 1, guided=False)), free, self.memory)
        parts = 3 if self.texts is None else 2
        if not self.networks.in_turn:
            _ = self.networks.denoiser
            loading(1, parts)
            _ = self.networks.decoder
        if self.texts is None:
            loading(2, parts)
            _ = self.networks.text

    @classmethod
    def of_networks(
        cls,
        model: ResolvedModel,
        text_encoder: TextEncoder | EncodedTexts,
        denoiser: Denoiser,
        autoencoder: LatentDecoder,
        device: torch.device,
    ) -> TorchRuntime:
        """Networks in fp32 that were loaded one by one, some perhaps without weights."""
        backend = backends.choose("torch", device, "fp32", False, denoiser.config)
        return cls(
            name=model.name,
            device=device,
            dtype="fp32",
            networks=Stages(
                Loaded[TextEncoder | EncodedTexts](None, text_encoder),
                Loaded(None, denoiser.requires_grad_(False).eval()),
                Loaded(None, autoencoder.requires_grad_(False).eval()),
                backend=backend,
            ),
            facts=folder_facts(model),
            sampler=read_sampler(model.path, denoiser.config)[0],
            backend=backend,
        )

    @property
    def text_encoder(self) -> TextEncoder | EncodedTexts:
        """In memory from now on, as the other networks."""
        return self.networks.text

    @property
    def denoiser(self) -> Denoiser:
        """See `text_encoder`."""
        return self.networks.denoiser

    @property
    def autoencoder(self) -> LatentDecoder:
        """See `text_encoder`."""
        return self.networks.decoder

    @property
    def predictor(self) -> Predictor:
        """Of the denoiser."""
        return self.networks.predictor

    @property
    def place(self) -> str:
        """Where it runs, for people."""
        return str(self.device)

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained for."""
        return self.trained_side, self.trained_side

    @property
    def trained_side(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return self.facts.denoiser.native_size

    @property
    def fixed_size(self) -> None:
        """It draws at any size."""

    @property
    def peak_memory(self) -> int | None:
        """See `sana_edge.system.memory.peak_memory`."""
        return peak_memory(self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Be inside of it for all work on a picture; the caller's own grad mode is left alone."""
        exact = full_precision() if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), exact, torch_threads(self.threads):
            yield

    def synchronize(self) -> None:
        """Wait for what was queued."""
        if self.device.type == "cuda":
            # not the device, which another model may be recording on
            torch.cuda.current_stream(self.device).synchronize()

    def mark(self) -> Callable[[], None] | None:
        """What waits for all that was queued until now; None where nothing is queued."""
        if self.device.type != "cuda":
            return None
        # the host sleeps meanwhile
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def check_plan(self, plan: Plan, count: int = 1) -> None:
        """Compare an estimate of the largest stage with what is free, where that is known; computes nothing.

        Args:
            count: pictures that go through the denoiser together.

        Raises:
            OutOfMemory: it does not fit, even decoded in tiles, where these are not turned off.
        """
        cell = self.facts.decoder.spatial_compression
        sides = (plan.height // cell, plan.width // cell)
        work = Work(*sides, plan.guided, plan.tile, plan.init is not None, count)
        stages, there, free = self._stages(work), self.networks.loaded, self._free()
        if free is None:
            return
        known = self.texts is not None and self.texts.have(texts_of(plan))
        used = [stage for stage in stages if not (known and stage.name == "text")]
        if self.networks.in_turn:
            needed = in_turn(used, tiles=True)
            free += sum(stage.weights for stage in stages if stage.name in there)
        else:
            works = {s.name: s.least + (0 if s.name in there else s.weights) for s in used}
            needed = max(works.values())
            if self.device.type == "cuda":
                # what a graph was recorded with stays its own while a picture is decoded
                needed = max(needed, works["denoiser"] + works["decoder"])
        if needed > free:
            size = f"{plan.width}x{plan.height}"
            pictures = f"{size} needs" if count == 1 else f"{count} pictures of {size} at once need"
            raise OutOfMemory(
                f"{pictures} about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                fit_hint(free + (used_memory(self.device) or 0)),
                needed=needed,
                free=free,
            )

    def _stages(self, work: Work) -> list[Stage]:
        int8, host, facts = self.quantization is not None, self.device.type == "cpu", self.facts
        if "decoder" in self.networks.loaded:
            # a file's is known when it is read
            config = cast("DecoderConfig", self.networks.decoder.config)
            facts = facts if config == facts.decoder else dataclasses.replace(facts, decoder=config)
        return torch_stages(facts, work, self.dtype, self.text_dtype, int8=int8, host=host)

    def _free(self) -> int | None:
        return within(available_memory(self.device), self.memory, self.device)

    def read(self, plan: Plan) -> tuple[TextContext, tuple[str, ...]]:
        """Encode the prompt, and the negative one where it is used; say what was cut or ignored."""
        texts = texts_of(plan)
        if self.texts is not None:
            # others make room
            self.texts.forget(texts)
        encoder = self.texts or self.networks.text
        groups = [encoder.encode([prompt], instruction=instruction) for prompt, instruction in texts]
        notes = reading_notes(plan, encoder, self.domain, self.name)
        notes = (*notes, encoder.note) if encoder.note else notes
        # which may have to go for the denoiser
        del encoder
        if self.texts is not None:
            context = self.texts.context(texts, groups, lambda: self.networks.denoiser)
        else:
            context = self.networks.denoiser.text_context(groups)
        return context, (*self.notes, *notes)

    def schedule(self, plan: Plan) -> tuple[Sampler, Modulation]:
        """Make the sampler, and the denoiser's modulation tables for all of its steps."""
        sampler = sampler_of(self.sampler, plan.sampler, plan.steps, plan.flow_shift, plan.skip)
        embedded = plan.guidance if self.facts.denoiser.guidance_embeds else None
        timesteps = torch.from_numpy(sampler.timesteps).to(self.device)
        return sampler, self.networks.denoiser.modulation(timesteps, embedded)

    def origin(self, plan: Plan) -> Origin[Tensor]:
        """Encode the plan's image, with an encoder that is loaded for the first one.

        Raises:
            InvalidInput: the model has no encoder.
            OutOfMemory: it does not fit, even in strips.
        """
        assert plan.init is not None
        encoder, drawn = self.networks.encoder, (plan.width, plan.height)
        weight = next(encoder.parameters())
        pixels = torch.from_numpy(plan.init.at(drawn)).to(weight.device, weight.dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latent = encode(encoder, pixels, memory_limit=self._free()).float()
        cells = plan.init.cells(drawn, self.facts.decoder.spatial_compression)
        mask = None if cells is None else torch.from_numpy(cells).to(self.device)
        return Origin(latent * encoder.scaling_factor, mask)

    def noise(self, plan: Plan, picture: int = 0) -> Callable[[], Tensor]:
        """What draws N(0, 1) for one of the plan's pictures, as diffusers does for a generator on the CPU.

        A generator of its own, on the CPU, makes a seed the same picture alone and on every device.
        """
        one, shape = plan.picture(picture), self._latent_shape(plan)

        def source(seed: int) -> Callable[[], NDArray[np.float32]]:
            generator = torch.Generator().manual_seed(seed)
            return lambda: torch.randn(shape, generator=generator).numpy()

        draw = varied(source, one.seed, one.variation)
        return lambda: self._sent(draw())

    def _sent(self, array: NDArray[np.float32]) -> Tensor:
        """An array on the device, without waiting for what was queued."""
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def noises(self, plans: Sequence[Plan]) -> Callable[[], Tensor]:
        """`noise` of a batch, a row for each plan: what each of them gets alone."""
        sources = [self.noise(plan) for plan in plans]
        return lambda: torch.cat([draw() for draw in sources])

    def join(self, contexts: Sequence[TextContext]) -> TextContext:
        """The texts of a batch.

        Raises:
            InvalidInput: some have one token and others several.
        """
        return join_texts(contexts)

    def predict(
        self, plan: Plan, tables: Modulation, context: TextContext, count: int = 1
    ) -> tuple[Velocity, tuple[str, ...]]:
        """Make ready for the plan's steps, until another plan is; say what stood in the way of a graph.

        Args:
            count: latents of the batch, whose texts are the context's.
        """
        latent = torch.zeros((count, *self._latent_shape(plan)[1:]), device=self.device)
        guidance = plan.guidance if plan.guided else None
        networks = self.networks
        started, note = networks.predictor.start(latent, tables, context, guidance)
        notes = (note,) if note else ()
        if not networks.in_turn:
            return started, notes
        notes = (*notes, IN_TURN)
        networks.velocity = started
        # a name here would keep the denoiser
        del started

        def velocity(x: Tensor, i: int) -> Tensor:
            # a picture may have been decoded meanwhile
            if networks.velocity is None:
                networks.velocity, _ = networks.predictor.start(latent, tables, context, guidance)
            return networks.velocity(x, i)

        return velocity, notes

    def release(self) -> None:
        """Let go of memory that can be had again: after an error, everything that was not loaded."""
        if self.texts is not None:
            self.texts.forget()
        self.networks.release()
        if self.device.type == "cuda":
            # which torch refuses after a failed capture
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of what was recorded; the networks go with the last reference to them."""
        self.release()

    def velocity(self, plan: Plan, tables: Modulation, context: TextContext) -> Velocity:
        """`predict` with the denoiser as it is: where calibration listens."""

        def velocity(x: Tensor, i: int) -> Tensor:
            predicted: Tensor = self.denoiser(torch.cat([x, x]) if plan.guided else x, tables[i], context)
            return guide(predicted.chunk(2), plan.guidance) if plan.guided else predicted

        return velocity

    def decode(
        self,
        latent: Tensor,
        size: tuple[int, int] | None = None,
        on_progress: Progress | None = None,
        *,
        tile: int | None = None,
        on_tiled: Callable[[int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Turn a latent into (H, W, 3) uint8, resized and cropped to ``size`` (width, height).

        Tells ``on_progress`` before each block of the decoder; what that raises ends the decode. ``tile`` and
        ``on_tiled`` are those of `tiling.decode`, but that a tile of 0 is the whole picture.

        Raises:
            SanaError: the latent, or what the autoencoder makes of it, has NaN or infinite values.
        """
        check_finite("latent", *map(float, latent.aminmax()))
        autoencoder = self.networks.decoder
        if tile == 0:
            tile = max(latent.shape[2:]) * autoencoder.config.spatial_compression
        latent = latent.to(autoencoder.dtype) / autoencoder.config.scaling_factor
        on_block = None if on_progress is None else partial(on_progress, "decode")
        decode = partial(
            tiling.decode,
            autoencoder,
            latent,
            tile=tile,
            on_block=on_block,
            on_tiled=on_tiled,
            memory_limit=None if self.memory is None else self._free(),
            graphs=self.networks.decodes,
        )
        pixels = self._decode_or_none(decode)
        if pixels is None:
            # what steps were recorded with can be had again; the error would have kept what failed
            self.release()
            pixels = decode()
        check_finite("decoded picture", *map(float, pixels.aminmax()))
        if size is not None and size != (pixels.shape[3], pixels.shape[2]):
            pixels = _resized(pixels, size)
        levels = pixels[0].mul_(0.5).add_(0.5).clamp_(0, 1).float().mul_(255).round_()
        result: NDArray[np.uint8] = levels.byte().permute(1, 2, 0).contiguous().cpu().numpy()
        return result

    def _decode_or_none(self, decode: Callable[[], Tensor]) -> Tensor | None:
        """None where a GPU's memory runs out."""
        try:
            return decode()
        except (torch.OutOfMemoryError, OutOfMemory):
            if self.device.type != "cuda":
                raise
            return None

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int, int]:
        cell = self.facts.decoder.spatial_compression
        return 1, self.facts.denoiser.in_channels, plan.height // cell, plan.width // cell

    @torch.inference_mode()
    def preview(self, latent: Tensor, linear: bool = False) -> NDArray[np.uint8]:
        """Decode a latent shrunk to at most 8 cells a side, or map its cells where there is a map."""
        if linear and self.preview_map is not None:
            check_finite("latent", *map(float, latent.aminmax()))
            return self.preview_map.pixels(latent.float().cpu().numpy())
        factor = -(-max(latent.shape[-2:]) // PREVIEW_CELLS)
        return self.decode(F.avg_pool2d(latent, factor, ceil_mode=True))


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """As `sana_edge.decoding.resize_and_crop`, (1, C, H, W); a copy."""
    (width, height), (left, top) = resized((pixels.shape[3], pixels.shape[2]), size)
    scaled = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    return scaled[:, :, top : top + size[1], left : left + size[0]].contiguous()
