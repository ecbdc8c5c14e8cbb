"""Text projection and denoiser: the graphs run beside the torch module, and a picture's steps by both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sana_edge.export.verify.agreement import Agreement
from sana_edge.export.verify.float_activations import let_activations_be
from sana_edge.export.verify.runner import Array, GraphRunner
from sana_edge.export.verify.text import NEGATIVE, PROMPT, Text
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.quantize import set_graph_activations
from sana_edge.nets.text_context import TextContext
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.noise.schedules import make_sampler
from sana_edge.sampler import Sampler, denoise, guide
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.manifest import Manifest
from sana_edge.torch_runtime.load import load_denoiser

PROJECTION, DENOISER, FOLDED = "text_projection", "denoiser", "denoiser_folded"
GUIDANCE = 4.5
SEED = 0
# of a picture; Sprint has two
STEPS = 4
# relative; ten roundings of fp32
MOVE = 6e-7
# added to the scores of what pads a shorter text
_PADDING = -1e30

_Velocity = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Latents:
    """A picture's latents (1, C, h, w) after all steps, the torch module's and the graphs'.

    ``moved`` is what an INT8 torch module makes of inputs that differ by `MOVE` in each step; else None.
    """

    expected: Tensor
    found: Tensor
    moved: Tensor | None


class Denoising:
    """The torch denoiser of a model, the graphs that should do the same, and a schedule for both.

    An INT8 one has the scales of the graph, whatever the package asks for; or, where ``graphs`` runs without
    rounding, float activations.

    Args:
        size: of the latents, (h, w).
    """

    def __init__(
        self,
        model: ResolvedModel,
        described: Manifest,
        graphs: GraphRunner,
        agreement: Agreement,
        size: tuple[int, int],
    ) -> None:
        self._graphs, self._agreement = graphs, agreement
        self._denoiser, _ = load_denoiser(model, device=torch.device("cpu"), dtype="fp32")
        if agreement.int8:
            set_graph_activations(self._denoiser)
        elif not graphs.rounded:
            let_activations_be(self._denoiser)
        self._sampler = _sampler(described)
        # a model that embeds guidance makes one prediction
        embedded = GUIDANCE if self._denoiser.config.guidance_embeds else None
        self._guided = described.sampler.kind != "scm"
        self._embedded: dict[str, Array] = {} if embedded is None else {"guidance": _number(embedded)}
        self._tables = self._denoiser.modulation(torch.from_numpy(self._sampler.timesteps), embedded)
        self._shape = (1, self._denoiser.config.in_channels, *size)

    def compare(self, texts: Mapping[tuple[str, bool], Text]) -> Tensor:
        """Compare all three graphs.

        Args:
            texts: `compare_text`'s.

        Returns:
            The torch module's latent (1, C, h, w) after all steps.

        Raises:
            SanaError: too far off.
        """
        prompt, negative = texts[PROMPT, True].expected, texts[NEGATIVE, False].expected
        for text in (prompt, negative):
            self._compare_projection(text)
        latent, inputs = self._denoised(self._predict(texts))
        self._compare_denoiser(inputs, [negative, prompt])
        if self._guided:
            self._compare_folded(inputs, self._context(texts["", False].expected, prompt))
        return latent

    def picture(self, texts: Mapping[tuple[str, bool], Text]) -> Latents:
        """Take a picture's steps, the graphs from the embeddings that they gave themselves."""
        prompt, empty = (
            self._graphs.run(PROJECTION, embeddings=texts[key].found) for key in ((PROMPT, True), ("", False))
        )
        predict = self._predict(texts)
        expected, _ = self._denoised(predict)
        found, _ = self._denoised(
            self._folded(prompt, empty["constant"]) if self._guided else self._graph(prompt)
        )
        moved, _ = self._denoised(_moved(predict)) if self._agreement.int8 else (None, None)
        return Latents(expected, found, moved)

    def _predict(self, texts: Mapping[tuple[str, bool], Text]) -> _Velocity:
        """The torch module's velocities of a picture."""
        prompt, empty = texts[PROMPT, True].expected, texts["", False].expected
        return (
            self._guide(self._context(empty, prompt)) if self._guided else self._alone(self._context(prompt))
        )

    def _compare_projection(self, text: TextFeatures) -> None:
        """Keys and values of a prompt, and what would be read of its first token alone."""
        context = self._context(text)
        first = self._context(TextFeatures(text.embeddings[:, :1], text.mask[:, :1]))
        found = self._graphs.run(PROJECTION, embeddings=text.embeddings.numpy())
        expected = {**_projected(context, 0), "constant": _constant(first, 0)}
        self._agreement.check(PROJECTION, found, **expected)

    def _compare_denoiser(self, inputs: Sequence[Tensor], texts: Sequence[TextFeatures]) -> None:
        """Two latents with texts of their own, one of them padded; one latent mirrors the other."""
        context = self._context(*texts)
        groups = [_projected(context, index) for index in range(len(texts))]
        longest = max(group["values"].shape[3] for group in groups)
        mask = np.full((len(groups), 1, 1, longest), _PADDING, dtype=np.float32)
        for row, group in enumerate(groups):
            mask[row, ..., : group["values"].shape[3]] = 0
        keys = np.concatenate([_padded(group["keys"], 4, longest) for group in groups], axis=1)
        values = np.concatenate([_padded(group["values"], 3, longest) for group in groups], axis=1)
        predict = self._velocity(DENOISER, {"keys": keys, "values": values, "mask": mask})
        for step, x in enumerate(inputs):
            latents = torch.cat([x, x.flip(-1)])
            found = {"velocity": predict(latents, step).numpy()}
            self._agreement.check(DENOISER, found, velocity=self._alone(context)(latents, step).numpy())

    def _compare_folded(self, inputs: Sequence[Tensor], context: TextContext) -> None:
        """With the empty negative prompt and the prompt of ``context``: each prediction for itself.

        They are what scales of 0 and 1 give; larger ones would make more of the errors.
        """
        for scale in (0.0, 1.0):
            folded = self._folded(_projected(context, 1), _constant(context, 0), scale)
            expected = self._guide(context, scale)
            for step, x in enumerate(inputs):
                found = {"velocity": folded(x, step).numpy()}
                self._agreement.check(FOLDED, found, velocity=expected(x, step).numpy())

    def _context(self, *texts: TextFeatures) -> TextContext:
        return self._denoiser.text_context(texts)

    def _conditions(self, step: int) -> dict[str, Array]:
        return {"timestep": self._sampler.timesteps[step].reshape(1), **self._embedded}

    # ways to predict a velocity of x at a step

    def _alone(self, context: TextContext) -> _Velocity:
        return lambda x, step: self._denoiser(x, self._tables[step], context)

    def _guide(self, context: TextContext, scale: float = GUIDANCE) -> _Velocity:
        def velocity(x: Tensor, step: int) -> Tensor:
            both: Tensor = self._denoiser(torch.cat([x, x]), self._tables[step], context)
            return guide(both.chunk(2), scale)

        return velocity

    def _graph(self, text: Mapping[str, Array]) -> _Velocity:
        length = text["values"].shape[3]
        inputs = {"keys": text["keys"], "values": text["values"]}
        inputs["mask"] = np.zeros((1, 1, 1, length), dtype=np.float32)
        return self._velocity(DENOISER, inputs)

    def _folded(self, text: Mapping[str, Array], constant: Array, scale: float = GUIDANCE) -> _Velocity:
        inputs = {"keys": text["keys"], "values": text["values"], "constant": constant}
        return self._velocity(FOLDED, {**inputs, "scale": _number(scale)})

    def _velocity(self, graph: str, inputs: Mapping[str, Array]) -> _Velocity:
        def velocity(x: Tensor, step: int) -> Tensor:
            found = self._graphs.run(graph, latent=x.numpy(), **inputs, **self._conditions(step))
            return torch.from_numpy(found["velocity"])

        return velocity

    def _denoised(self, velocity: _Velocity) -> tuple[Tensor, list[Tensor]]:
        """A picture's latent after all steps, and what went into each; the noise is always the same."""
        sampler, generator = self._sampler, torch.Generator().manual_seed(SEED)

        def noise() -> Tensor:
            return torch.randn(self._shape, generator=generator)

        steps = list(denoise(sampler, velocity, noise))
        return steps[-1].x, [step.given for step in steps]


def _moved(velocity: _Velocity) -> _Velocity:
    generator = torch.Generator().manual_seed(SEED)
    return lambda x, step: velocity(x * (1 + MOVE * torch.randn(x.shape, generator=generator)), step)


def _sampler(described: Manifest) -> Sampler:
    config = described.sampler
    return make_sampler(
        config.kind,
        steps=2 if config.kind == "scm" else STEPS,
        flow_shift=config.flow_shift,
        num_train_timesteps=config.num_train_timesteps,
        sigma_data=config.sigma_data,
    )


def _projected(context: TextContext, group: int) -> dict[str, Array]:
    """A group's keys (layers, 1, heads, d, L) and values (layers, 1, heads, L, d)."""
    layers = [layer[group] for layer in context.layers]
    pairs = [(layer.keys.transpose(2, 3), layer.values) for layer in layers if isinstance(layer, KeysValues)]
    keys, values = (torch.stack(tensors).numpy() for tensors in zip(*pairs, strict=True))
    return {"keys": keys, "values": values}


def _constant(context: TextContext, group: int) -> Array:
    """What a group of one token gives, (layers, 1, 1, dim)."""
    layers = [layer[group] for layer in context.layers]
    found: Array = torch.stack([layer.output for layer in layers if isinstance(layer, Constant)]).numpy()
    return found


def _padded(tensor: Array, axis: int, length: int) -> Array:
    sides = [(0, 0)] * tensor.ndim
    sides[axis] = (0, length - tensor.shape[axis])
    return np.pad(tensor, sides)


def _number(value: float) -> Array:
    return np.array([value], dtype=np.float32)
