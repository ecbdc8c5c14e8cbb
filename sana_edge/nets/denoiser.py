"""The Linear DiT of SANA 1.0, 1.5 and Sprint (arXiv 2410.10629, section 2.2) on token-major tensors.

Text and schedule are digested before the loop: `Denoiser.text_context` once per prompt, `Denoiser.modulation`
once per schedule; `Denoiser.forward` is what remains for a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.int8 import ops
from sana_edge.int8.linear import Linear, Move, W8A8Linear, keeping_dtype
from sana_edge.nets import parameter_names
from sana_edge.nets.block import Block, Constant, KeysValues
from sana_edge.nets.text_context import TextContext, lay_together, projected
from sana_edge.nets.text_encoder import TextFeatures

_FREQUENCIES = 128
_MAX_PERIOD = 10000
_CAPTION_EPS = 1e-5
FINAL_EPS = 1e-6

# what runs once for a prompt or a schedule
_COLD = ("time", "guidance", "modulate", "caption_expand", "caption_mix", "cross_kv")


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate vectors: of a schedule (S steps), of a batch (B rows) or of one step.

    ``blocks`` is (S or B, layers, 6, dim), ``final`` (S or B, 2, dim); one step's have no leading dimension.
    The vectors are in the paper's order, with the 1 of (1 + scale) already added.
    """

    blocks: Tensor
    final: Tensor

    def __getitem__(self, step: int) -> Modulation:
        return Modulation(self.blocks[step], self.final[step])

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """One layer's six vectors of one step, (dim,), or of a batch, (B, 1, dim)."""
        return _vectors(self.blocks[..., index, :, :])

    def head(self) -> tuple[Tensor, ...]:
        """Shift and scale before the last linear layer, in the same shapes."""
        return _vectors(self.final)


class Embedder(nn.Module):
    """A number's sinusoid through Linear, SiLU, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = Linear(2 * _FREQUENCIES, dim)
        self.mix = Linear(dim, dim)

    def forward(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """(S,) to (S, dim) in ``dtype``; angles are fp32."""
        exponents = torch.arange(_FREQUENCIES, dtype=torch.float32, device=numbers.device) / _FREQUENCIES
        angles = numbers.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        embedded: Tensor = self.mix(F.silu(self.expand(waves)))
        return embedded


class Denoiser(nn.Module):
    """Predicts the velocity of a noisy latent: x_t = (1 − σ) x_0 + σ ε, velocity ε − x_0.

    ``clamp`` limits every self-attention output to ±65504, which weights trained in fp16 have only ever seen
    (set it from the checkpoint's dtype); in fp16 they are clamped without it.

    Layers may be INT8 (`sana_edge.nets.quantize`). ``smoothing`` is (layers, 2, dim) fp32 or None: factors by
    which the inputs of every block's ``qkv`` and ``expand`` are divided; their weights make up for it.
    """

    smoothing: Tensor | None

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.clamp = False
        self.patch = nn.Linear(config.in_channels, dim)
        self.time = Embedder(dim)
        self.guidance = Embedder(dim) if config.guidance_embeds else None
        self.modulate = Linear(dim, 6 * dim)
        self.caption_expand = Linear(config.caption_channels, dim)
        self.caption_mix = Linear(dim, dim)
        self.caption_norm = nn.Parameter(torch.ones(dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.head = nn.Linear(dim, config.out_channels)
        self.register_buffer("smoothing", None)

    @classmethod
    def from_diffusers(cls, config: DenoiserConfig, state: Mapping[str, Tensor]) -> Denoiser:
        """Build from the state dict of a SanaTransformer2DModel, in its dtypes; INT8 where there are scales.

        Raises:
            CheckpointError: a tensor is missing, has another shape or dtype, or belongs to no parameter.
        """
        with torch.device("meta"):
            denoiser = cls(config)
            for name, scale in parameter_names.quantized(config, state).items():
                layer = denoiser.get_submodule(name)
                denoiser.set_submodule(name, _unfilled(name, layer, scale))
            if "transformer_blocks.0.smoothing" in state:
                denoiser.smoothing = torch.ones(config.num_layers, 2, config.dim)
        shapes = {name: tensor.shape for name, tensor in denoiser.state_dict().items()}
        denoiser.load_state_dict(parameter_names.from_diffusers(config, state, shapes), assign=True)
        return denoiser

    def to_diffusers(self) -> dict[str, Tensor]:
        """The state dict of the SanaTransformer2DModel with these weights, in new memory.

        INT8 modules have int8 ``weight``, fp32 ``weight_scale`` and perhaps ``input_scale``, the blocks of a
        smoothed model ``smoothing`` (2, dim).
        """
        return parameter_names.to_diffusers(self.config, self.state_dict())

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in, INT8 layers aside."""
        return self.patch.weight.dtype

    def to_compute(self, device: torch.device | str, dtype: torch.dtype) -> Denoiser:
        """Move to a device and compute in ``dtype``.

        Of a model with INT8 layers, what runs once for a prompt or a schedule, a sixth of the weights, keeps
        the dtype that it is stored in and is cast when it is used: on a CPU always, elsewhere where it would
        take more memory. There all layers' keys and values are one product, too.
        """
        once = _COLD if any(isinstance(module, W8A8Linear) for module in self.modules()) else ()
        on_cpu = torch.device(device).type == "cpu"

        def stays(name: str, parameter: Tensor) -> bool:
            cold = not set(once).isdisjoint(name.split("."))
            return cold and (on_cpu or parameter.element_size() < dtype.itemsize)

        layers = [block.cross_kv for block in self._blocks()]
        if not on_cpu and not any(stays("cross_kv", layer.weight) for layer in layers):
            lay_together(layers, device, dtype)
        self.to(device)
        for name, parameter in self.named_parameters():
            if not stays(name, parameter):
                parameter.data = parameter.data.to(dtype)
        return self

    def text_context(self, groups: Sequence[TextFeatures]) -> TextContext:
        """Project captions and compute every layer's cross-attention keys and values, once per prompt.

        A latent batch is split evenly over the groups, in order (for guidance: negative, positive); each
        row of a group serves the same number of consecutive images. Tokens that no row of a group needs
        are dropped; a group of single tokens becomes a constant per layer.

        Args:
            groups: embeddings (rows, length, caption_channels) with masks (rows, length).

        Raises:
            InvalidInput: a row has no valid token.
        """
        read = [self.read(*self._caption(group)) for group in groups]
        return TextContext(tuple(zip(*read, strict=True)))

    def read(self, caption: Tensor, mask: Tensor | None) -> list[KeysValues | Constant]:
        """What each layer reads of a group's projected captions (rows, L, dim) under a mask (rows, L)."""
        blocks = self._blocks()
        made = projected([block.cross_kv for block in blocks], caption)
        return [block.read(each, mask) for block, each in zip(blocks, made, strict=True)]

    def modulation(self, timesteps: Tensor, guidance: float | None = None) -> Modulation:
        """Tables for a whole schedule, or for a batch whose rows have timesteps of their own.

        Args:
            timesteps: (S,) as the sampler gives them: 0 to 1000, or 0 to 1 for Sprint.
            guidance: guidance scale, for models with a guidance embedding and only for them.
        """
        config = self.config
        # diffusers' Sprint pipeline feeds its times as they are, the other multiplies by timestep_scale
        if self.guidance is None:
            if guidance is not None:
                raise InvalidInput(f"guidance is {guidance}, but this model embeds none", "leave it out")
            embedded: Tensor = self.time(timesteps * config.timestep_scale, self.dtype)
        else:
            if guidance is None:
                raise InvalidInput("this model embeds guidance, but none was given", "pass guidance")
            scaled = timesteps.new_tensor([guidance * config.guidance_embeds_scale], dtype=torch.float32)
            embedded = self.time(timesteps, self.dtype) + self.guidance(scaled, self.dtype)
        shared = self.modulate(F.silu(embedded)).view(-1, 6, config.dim)
        tables = torch.stack([block.table for block in self._blocks()])
        blocks = tables + shared[:, None]
        final = self.table + embedded[:, None]
        return Modulation(self._smoothed(blocks + _ones_at(blocks, 1, 4)), final + _ones_at(final, 1))

    def forward(self, latent: Tensor, modulation: Modulation, context: TextContext) -> Tensor:
        """Velocity of a noisy latent.

        Args:
            latent: (B, in_channels, H, W), any size, any float dtype.
            modulation: one step's, ``tables[i]``, or one whose leading dimension is B.
            context: from `text_context`.

        Returns:
            (B, out_channels, H, W) in latent's dtype.

        Raises:
            InvalidInput: B cannot be split evenly over the groups of ``context`` and their rows.
        """
        B, _, H, W = latent.shape
        _check_split(B, context)
        x = self.patch(latent.to(self.dtype).flatten(2).transpose(1, 2))
        if self.config.interpolation_scale is not None:
            x = self._add_positions(x, H, W)
        # under autocast the token stream stays in the tables' fp32
        x = x.to(modulation.blocks.dtype)
        for layer, (block, text) in enumerate(zip(self._blocks(), context.layers, strict=True)):
            x = block(x, modulation.layer(layer), text, (H, W), self.clamp)
        shift, scale = modulation.head()
        velocity: Tensor = self.head(ops.norm_modulate(x, scale, shift, FINAL_EPS))
        return velocity.transpose(1, 2).reshape(B, -1, H, W).to(latent.dtype)

    def positions(self, height: int, width: int) -> Tensor | None:
        """What is added to the tokens of 2K and 4K models, (height · width, dim) fp32; None in the others."""
        if self.config.interpolation_scale is None:
            return None
        zeros = torch.zeros(1, height * width, self.config.dim, device=self.patch.weight.device)
        return self._add_positions(zeros, height, width)[0]

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _smoothed(self, blocks: Tensor) -> Tensor:
        """Divide shift and scale of both norms, (S, layers, 6, dim), by the smoothing factors."""
        if self.smoothing is None:
            return blocks
        factors = torch.ones_like(blocks[0], dtype=torch.float32)
        factors[:, 0:2], factors[:, 3:5] = self.smoothing[:, :1], self.smoothing[:, 1:]
        return (blocks / factors).to(blocks.dtype)

    def _apply(self, fn: Move, recurse: bool = True) -> Denoiser:
        smoothing = self.smoothing
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if smoothing is not None:
            self.smoothing = keeping_dtype(fn)(smoothing)
        return self

    def _caption(self, group: TextFeatures) -> tuple[Tensor, Tensor | None]:
        mask = group.mask.bool()
        if not mask.any(dim=1).all():
            raise InvalidInput("a prompt's mask has no valid token", "an empty prompt keeps its first")
        used = mask.any(dim=0)
        mask = mask[:, used]
        embeddings = group.embeddings[:, used].to(self.dtype)
        caption: Tensor = self.caption_mix(F.gelu(self.caption_expand(embeddings), approximate="tanh"))
        return ops.rms_norm(caption, self.caption_norm, _CAPTION_EPS), None if mask.all() else mask

    def _add_positions(self, x: Tensor, height: int, width: int) -> Tensor:
        """Add the sin-cos table of 2K and 4K models: half of the channels tell the column, half the row."""
        # (W, dim/2) and (H, 1, dim/2)
        columns, rows = self._waves(width, x.device), self._waves(height, x.device)[:, None]
        left, right = x.view(len(x), height, width, -1).chunk(2, dim=-1)
        return torch.cat([left + columns, right + rows], dim=-1).flatten(1, 2).to(x.dtype)

    def _waves(self, length: int, device: torch.device) -> Tensor:
        # a side always spans the native grid, whatever its length: (length, dim/2)
        positions = torch.arange(length, dtype=torch.float32, device=device)
        positions = positions / (length / self.config.sample_size)
        positions = positions / (self.config.interpolation_scale or 1.0)
        quarter = self.config.dim // 4
        exponents = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
        omega = 1.0 / _MAX_PERIOD**exponents
        angles = positions.double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def _unfilled(name: str, layer: nn.Module, input_scale: bool) -> W8A8Linear:
    """An INT8 layer of the shape of a float one."""
    if not isinstance(layer, Linear):
        raise CheckpointError(f"{name} has an INT8 scale, but is not a layer that can be INT8")
    bias = layer.bias is not None
    return W8A8Linear(layer.in_features, layer.out_features, bias=bias, input_scale=input_scale)


def _ones_at(table: Tensor, *positions: int) -> Tensor:
    ones = table.new_zeros(table.shape[-2], 1)
    ones[list(positions)] = 1
    return ones


def _vectors(table: Tensor) -> tuple[Tensor, ...]:
    """Split (k, dim) into k × (dim,), or (B, k, dim) into k × (B, 1, dim)."""
    return table.unbind(0) if table.ndim == 2 else table.unsqueeze(2).unbind(1)


def _check_split(batch: int, context: TextContext) -> None:
    groups = context.layers[0]
    share, rest = divmod(batch, len(groups))
    rows = [len(group.output if isinstance(group, Constant) else group.keys) for group in groups]
    if rest or any(share % count for count in rows):
        raise InvalidInput(
            f"{batch} latents cannot be split evenly over text groups of {rows} rows",
            "give every group as many latents as the largest has rows, or a multiple of it",
        )
