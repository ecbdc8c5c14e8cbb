"""A picture's steps: denoiser, fused or as it is, and the sampler's update, recorded once for each size."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.errors import InvalidInput, OutOfMemory
from sana_edge.fused import ops
from sana_edge.fused.denoiser import FusedDenoiser
from sana_edge.fused.text import FusedText, fuse_text
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.text_context import TextContext
from sana_edge.sampler import Denoised, Sampler, guide
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.cuda_graph import Function, Recorder, StepGraph

# prompts of about the same length share a graph
_LENGTHS = 64
# sizes whose graphs are kept
KEPT = 3
# of `sana_edge.sampler.StepCoefficients`
_COEFFICIENTS = 7

# the velocity (1, C, h, w) of a latent at a step
Velocity = Callable[[Tensor, int], Tensor]


class Network(Protocol):
    """A denoiser as a `Predictor` needs it."""

    @property
    def backend(self) -> str: ...

    def pack(self, context: TextContext, latent: Tensor, guided: bool) -> tuple[Hashable, list[Tensor]]:
        """What the text is made of and its tensors, of the same shapes wherever the former is equal."""

    def tables(self, tables: Modulation) -> list[Tensor]:
        """A schedule's tables as the function takes them, each with a row for every step."""

    def function(self, structure: Any, latent: Tensor, guided: bool) -> Function:
        """What computes the velocity of one step.

        Its inputs are the latent and a row of each of ``tables``; guidance if there is any, and the text.
        """


class Predictor:
    """Makes the steps of each prompt, with the graphs of the sizes used last.

    Attributes:
        network: what predicts.
    """

    def __init__(self, network: Network, recorder: Recorder) -> None:
        self.network = network
        self._recorder = recorder
        self._graphs: OrderedDict[Hashable, StepGraph] = OrderedDict()

    def start(
        self, latent: Tensor, tables: Modulation, context: TextContext, guidance: float | None
    ) -> tuple[RecordedSteps, str]:
        """A prompt's steps, until the next start; and a note where no graph could be made.

        Args:
            latent: like those to come, (B, C, h, w) fp32.
            tables: of all steps.
            guidance: g of v_u + g (v_c - v_u) (arXiv 2207.12598), the first half of the context's groups
                being u's; None for a single prediction.
        """
        guided = guidance is not None
        rows = self.network.tables(tables)
        structure, text = self.network.pack(context, latent, guided)
        prompt = [*([latent.new_tensor(guidance)] if guided else []), *text]
        own = [torch.zeros_like(latent) for _ in range(4)]
        step = [*own, latent.new_zeros(_COEFFICIENTS), *(table[0] for table in rows)]
        key = (structure, *(tuple(tensor.shape) for tensor in (*step, *prompt)))

        def make() -> StepGraph:
            function = self.network.function(structure, latent, guided)
            return StepGraph(_whole_step(function, self.network.backend), step, prompt, self._recorder)

        # what could not be recorded may be now
        if key in self._graphs and self._graphs[key].note:
            del self._graphs[key]
        graph = self._made(key, make)
        graph.load(prompt)
        # made again where its memory was needed for something else
        return RecordedSteps(lambda: self._graph(key, make), rows), graph.note

    def _graph(self, key: Hashable, make: Callable[[], StepGraph]) -> StepGraph:
        """The graph of a key, made where there is none; the one that was used longest ago gives way to it."""
        graph = self._graphs.pop(key, None)
        if graph is None:
            while len(self._graphs) >= KEPT:
                self._graphs.popitem(last=False)
            graph = make()
        self._graphs[key] = graph
        return graph

    def _made(self, key: Hashable, make: Callable[[], StepGraph]) -> StepGraph:
        try:
            return self._graph(key, make)
        except (torch.OutOfMemoryError, OutOfMemory):
            # those of other sizes give way
            self._graphs.clear()
            # which torch refuses after a failed capture
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
        return self._graph(key, make)

    def release(self) -> None:
        """Let go of everything that was recorded."""
        self._graphs.clear()


class RecordedSteps:
    """The steps of one prompt, `sana_edge.sampler.Steps` and a `Velocity`.

    The graph has the latent and the clean latent of the step before; of a step only its row of the tables and
    of the sampler's coefficients is copied there, so that steps are queued one behind the other.

    Args:
        graph: gives the prompt's graph, perhaps a new one.
        tables: each with a row for every step.
    """

    def __init__(self, graph: Callable[[], StepGraph], tables: Sequence[Tensor]) -> None:
        self._graph, self._tables = graph, tables
        self._sampler: Sampler | None = None
        self._coefficients = self._before = tables[0].new_zeros(0)
        self._taken = -1

    def __call__(self, x: Tensor, i: int) -> Tensor:
        graph = self._graph()
        own = graph.step
        # an update that nobody reads
        own[4].fill_(1)
        return graph([x, *own[1:5], *(table[i] for table in self._tables)])

    def take(self, sampler: Sampler, x: Tensor, i: int, noise: Callable[[], Tensor]) -> Denoised[Tensor]:
        """See `sana_edge.sampler.Steps`.

        Raises:
            InvalidInput: the step before was not taken, and its clean latent is needed.
        """
        graph = self._graph()
        mine, given, before, drawn, *_ = graph.step
        if sampler is not self._sampler:
            self._sampler = sampler
            self._coefficients = torch.from_numpy(sampler.table()).to(x.device)
        c = sampler.coefficients[i]
        if not c.previous:
            self._before = before
        elif self._taken != i - 1:
            raise InvalidInput(f"sampler step {i} was taken before step {i - 1}", "step through in order")
        z = noise() if c.noise else drawn
        row = [self._coefficients[i], *(table[i] for table in self._tables)]
        velocity = graph([x, given, self._before, z, *row])
        self._before, self._taken = before, i
        return Denoised(given, velocity, mine, before / sampler.initial_scale)


def _whole_step(predict: Function, backend: str) -> Function:
    """What predicts, between the sampler's two parts.

    Its step's tensors are the latent and the clean one of the step before, which become the next and this
    step's; what the denoiser gets, which it writes; the noise, the coefficients, and what ``predict`` takes.
    """

    def run(step: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
        x, given, before, noise, coefficients, *rows = step
        torch.mul(x, coefficients[0], out=given)
        velocity = predict([given, *rows], prompt)
        asked = (x, velocity, before, noise, coefficients)
        if backend == "cuda":
            ops.sampler_step(*asked, backend=backend, out=x, clean=before)
        else:
            for own, result in zip((x, before), ops.sampler_step(*asked, backend="torch"), strict=True):
                own.copy_(result)
        return velocity

    return run


class FusedNetwork:
    """A `FusedDenoiser`; prompts of every length have the same shapes."""

    def __init__(self, denoiser: Denoiser, backend: str) -> None:
        self._fused, self.backend = FusedDenoiser(denoiser, backend), backend

    def pack(self, context: TextContext, latent: Tensor, guided: bool) -> tuple[Hashable, list[Tensor]]:
        images = len(latent) * (2 if guided else 1)
        return fuse_text(context, images, latent.device).pack()

    def tables(self, tables: Modulation) -> list[Tensor]:
        # one row, (layers · 6 · dim + 2 · dim,), is one copy
        return [torch.cat([tables.blocks.flatten(1), tables.final.flatten(1)], dim=1).float()]

    def function(self, structure: Any, latent: Tensor, guided: bool) -> Function:
        fused, (B, _, H, W) = self._fused, latent.shape
        positions = fused.positions(H, W)
        workspace = fused.workspace(2 * B if guided else B, H * W, latent.device)

        def run(step: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
            x, row = step
            guidance, text = (prompt[0], prompt[1:]) if guided else (None, prompt)
            read = FusedText.unpack(structure, text)
            dim = fused.config.dim
            modulation = Modulation(row[: -2 * dim].view(-1, 6, dim), row[-2 * dim :].view(2, dim))
            return fused.step(x, modulation, read, guidance, positions, workspace)

        return run


class PlainNetwork:
    """A `Denoiser` as it is.

    Args:
        length: texts are padded to multiples of it; 1 leaves them as they are.
    """

    backend = "torch"

    def __init__(self, denoiser: Denoiser, length: int = 1) -> None:
        self._denoiser, self._length = denoiser, length

    def pack(self, context: TextContext, latent: Tensor, guided: bool) -> tuple[Hashable, list[Tensor]]:
        packed = [[_pack(group, self._length) for group in layer] for layer in context.layers]
        kinds = tuple(len(tensors) for tensors in packed[0])
        return kinds, [tensor for layer in packed for tensors in layer for tensor in tensors]

    def tables(self, tables: Modulation) -> list[Tensor]:
        return [tables.blocks, tables.final]

    def function(self, structure: Any, latent: Tensor, guided: bool) -> Function:
        denoiser = self._denoiser

        def run(step: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
            x, blocks, final = step
            text = iter(prompt[1:] if guided else prompt)
            context = TextContext(
                tuple(
                    tuple(_unpack([next(text) for _ in range(count)]) for count in structure)
                    for _ in range(denoiser.config.num_layers)
                )
            )
            velocity: Tensor = denoiser(
                torch.cat([x, x]) if guided else x, Modulation(blocks, final), context
            )
            return guide(velocity.chunk(2), prompt[0]) if guided else velocity

        return run


def make_predictor(denoiser: Denoiser, backend: str, device: torch.device) -> Predictor:
    """The predictor of a loaded denoiser, with graphs on a CUDA device."""
    recorder = cuda_graph.CudaGraphs(device) if device.type == "cuda" else cuda_graph.eager
    if backend != "torch":
        return Predictor(FusedNetwork(denoiser, backend), recorder)
    return Predictor(PlainNetwork(denoiser, _LENGTHS if device.type == "cuda" else 1), recorder)


def _pack(group: KeysValues | Constant, length: int) -> list[Tensor]:
    if isinstance(group, Constant):
        return [group.output]
    missing = -group.keys.shape[2] % length
    mask = group.mask
    if length > 1 and mask is None:
        mask = torch.ones(
            len(group.keys), 1, 1, group.keys.shape[2], dtype=torch.bool, device=group.keys.device
        )
    keys, values = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (group.keys, group.values))
    return [keys, values, *([] if mask is None else [F.pad(mask, (0, missing))])]


def _unpack(tensors: Sequence[Tensor]) -> KeysValues | Constant:
    if len(tensors) == 1:
        return Constant(tensors[0])
    return KeysValues(tensors[0], tensors[1], tensors[2] if len(tensors) == 3 else None)
