"""The networks of a model on a device, each in the dtype that suits it, and what they do for a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial

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
from sana_edge.fused.decoder import fuse_decoder
from sana_edge.nets.autoencoder import Autoencoder, Encoder, LatentDecoder
from sana_edge.nets.denoiser import Denoiser, Modulation, TextContext, join_texts
from sana_edge.nets.text_encoder import EncodedTexts, TextEncoder
from sana_edge.progress import Progress, unseen
from sana_edge.prompt import instruction_of, reading_notes
from sana_edge.request import MAX_SIDE, Plan
from sana_edge.sampler import Origin, Sampler, guide, sampler_of, varied
from sana_edge.sizes import resized
from sana_edge.store.domain import Domain, read_domain
from sana_edge.store.folder import foreign_parts
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.package import Quantization
from sana_edge.store.pairing import read_sampler
from sana_edge.store.preview_map import PreviewMap, read_map
from sana_edge.system.memory import HINT, available_memory, peak_memory
from sana_edge.torch_runtime import tiling
from sana_edge.torch_runtime.device import DTYPES, full_precision, torch_threads, without_fp16
from sana_edge.torch_runtime.load import describe, load_decoder, load_denoiser, load_encoder
from sana_edge.torch_runtime.steps import Predictor, Velocity, make_predictor

WHILE_LOADING = "quantized while loading, without calibration; `sana-edge quantize` makes a package"

# memory of a denoising step, in units of its token stream; measured 7 in fp32 and 12 in bf16
_TOKEN_COPIES = 12


@dataclass(frozen=True, eq=False)
class TorchRuntime:
    """What turns a prompt into a picture, one method for each part of the way.

    ``dtype`` is the denoiser's, by its short name, ``backend`` what its steps run on, ``quantization`` an
    INT8 model's scheme, ``decoder`` one that was chosen in place of the model's; ``notes`` say what happened
    while loading, ``domain`` what a small model knows, ``threads`` is None for torch's own number. Latents
    are (1, C, h, w) fp32 on ``device``.
    """

    name: str
    device: torch.device
    dtype: str
    text_encoder: TextEncoder | EncodedTexts
    denoiser: Denoiser
    autoencoder: LatentDecoder
    sampler: SamplerConfig
    backend: Backend
    predictor: Predictor
    quantization: str | None = None
    notes: tuple[str, ...] = ()
    domain: Domain | None = None
    decoder: str | None = None
    threads: int | None = None
    encoder: Callable[[], Encoder] | None = None
    preview_map: PreviewMap | None = None

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
        on_progress: Progress = unseen,
    ) -> TorchRuntime:
        """Read a model folder, a float one or a package.

        Args:
            dtype: "auto", "fp32", "bf16" or "fp16", for the denoiser. The other two networks overflow in fp16
                and run in bf16 then, or in fp32 where the device has no bf16. In an INT8 model, of what is
                not INT8.
            int8: make float weights INT8 while they are loaded; a package is INT8 anyway.
            backend: see `backends.choose`.
            threads: see `torch_threads`.
            on_progress: told before each of the three networks; what it raises ends the loading.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit its config.
            InvalidInput, UnsupportedDevice: the backend cannot be used for this model.
        """
        transformer, vae = describe(model)
        quantization = transformer.quantization or (vae.quantization if vae else None)
        quantize = int8 and quantization is None
        if quantize:
            quantization = Quantization("token")
        config = DenoiserConfig.from_dict(transformer.values)
        chosen = backends.choose(backend, device, dtype, quantization is not None, config)
        loading = partial(on_progress, f"loading {model.name}")
        loading(0, 3)
        denoiser, dtype = load_denoiser(
            model, device=device, dtype=dtype, int8=quantize, fused=chosen.fused, description=transformer
        )
        sampler, sampler_notes = read_sampler(model.path, config)
        others = DTYPES[dtype] if dtype != "fp16" else without_fp16(device)
        loading(1, 3)
        decoder = load_decoder(model, device=device, dtype=others, int8=quantize, description=vae)
        if chosen.name == "cuda" and others.itemsize == 2 and isinstance(decoder, Autoencoder):
            decoder = fuse_decoder(decoder, chosen.name)
        loading(2, 3)
        return cls(
            name=model.name,
            device=device,
            dtype=dtype,
            text_encoder=TextEncoder.load(
                model.path,
                dtype=others,
                device=device,
                variant=model.component_variant("text_encoder"),
                int8=quantize,
            ),
            denoiser=denoiser,
            autoencoder=decoder,
            sampler=sampler,
            backend=chosen,
            predictor=make_predictor(denoiser, chosen.name, device),
            quantization=quantization.summary if quantization else None,
            notes=(*((WHILE_LOADING,) if quantize else ()), *sampler_notes, *foreign_parts(model.path)),
            decoder=model.decoder_name,
            domain=read_domain(model.path),
            threads=threads,
            encoder=cache(partial(load_encoder, model, device=device, dtype=others, int8=quantize)),
            preview_map=read_map(model.path, config.in_channels),
        )

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
        return cls(
            name=model.name,
            device=device,
            dtype="fp32",
            text_encoder=text_encoder,
            denoiser=denoiser.requires_grad_(False).eval(),
            autoencoder=autoencoder.requires_grad_(False).eval(),
            sampler=read_sampler(model.path, denoiser.config)[0],
            backend=backends.choose("torch", device, "fp32", False, denoiser.config),
            predictor=make_predictor(denoiser, "torch", device),
        )

    @property
    def place(self) -> str:
        """Where it runs, for people."""
        return str(self.device)

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained for."""
        side = self.denoiser.config.native_size
        return side, side

    @property
    def trained_side(self) -> int:
        """Side in pixels of the pictures that the model was trained on."""
        return self.denoiser.config.native_size

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

    def check_plan(self, plan: Plan) -> None:
        """Compare an estimate of the largest stage with what is free, where that is known; computes nothing.

        Raises:
            OutOfMemory: it does not fit, even decoded in tiles, where these are not turned off.
        """
        config, dtype = self.autoencoder.config, self.autoencoder.dtype
        cell = config.spatial_compression
        side = tiling.DEFAULT_TILE if plan.tile is None else plan.tile or MAX_SIDE
        tile = side // cell
        height, width = plan.height // cell, plan.width // cell
        pixels = config.in_channels * plan.height * plan.width * dtype.itemsize
        # the sums of an INT8 layer are INT32
        widest = torch.float32 if self.quantization else dtype
        decoding = pixels + tiling.decode_bytes(config, min(height, tile), min(width, tile), widest)
        tokens = height * width * (2 if plan.guided else 1)
        denoising = tokens * self.denoiser.config.dim * DTYPES[self.dtype].itemsize * _TOKEN_COPIES
        # what a graph was recorded with stays its own while a picture is decoded
        needed = decoding + denoising if self.device.type == "cuda" else max(decoding, denoising)
        free = available_memory(self.device)
        if free is not None and needed > free:
            raise OutOfMemory(
                f"{plan.width}x{plan.height} needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                HINT,
                needed=needed,
                free=free,
            )

    def read(self, plan: Plan) -> tuple[TextContext, tuple[str, ...]]:
        """Encode the prompt, and the negative one where it is used; say what was cut or ignored."""
        groups = [self.text_encoder.encode([plan.prompt], instruction=instruction_of(plan))]
        if plan.guided:
            groups.insert(0, self.text_encoder.encode([plan.negative_prompt], instruction=None))
        notes = reading_notes(plan, self.text_encoder, self.domain, self.name)
        return self.denoiser.text_context(groups), (*self.notes, *notes)

    def schedule(self, plan: Plan) -> tuple[Sampler, Modulation]:
        """Make the sampler, and the denoiser's modulation tables for all of its steps."""
        sampler = sampler_of(self.sampler, plan.sampler, plan.steps, plan.flow_shift, plan.skip)
        embedded = plan.guidance if self.denoiser.config.guidance_embeds else None
        timesteps = torch.from_numpy(sampler.timesteps).to(self.device)
        return sampler, self.denoiser.modulation(timesteps, embedded)

    def origin(self, plan: Plan) -> Origin[Tensor]:
        """Encode the plan's image, with an encoder that is loaded for the first one.

        Raises:
            InvalidInput: the model has no encoder.
        """
        assert plan.init is not None and self.encoder is not None
        encoder, drawn = self.encoder(), (plan.width, plan.height)
        weight = next(encoder.parameters())
        pixels = torch.from_numpy(plan.init.at(drawn)).to(weight.device, weight.dtype)
        latent = encoder(pixels.contiguous(memory_format=torch.channels_last)).float()
        cells = plan.init.cells(drawn, self.autoencoder.config.spatial_compression)
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
        return lambda: torch.from_numpy(draw()).to(self.device)

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
        velocity, note = self.predictor.start(latent, tables, context, guidance)
        return velocity, (note,) if note else ()

    def release(self) -> None:
        """Let go of memory that can be had again: after an error, everything that was not loaded."""
        self.predictor.release()
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
        if tile == 0:
            tile = max(latent.shape[2:]) * self.autoencoder.config.spatial_compression
        latent = latent.to(self.autoencoder.dtype) / self.autoencoder.config.scaling_factor
        on_block = None if on_progress is None else partial(on_progress, "decode")
        decode = partial(
            tiling.decode, self.autoencoder, latent, tile=tile, on_block=on_block, on_tiled=on_tiled
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
        cell = self.autoencoder.config.spatial_compression
        return 1, self.denoiser.config.in_channels, plan.height // cell, plan.width // cell

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
