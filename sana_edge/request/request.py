"""The arguments of one generation."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from sana_edge import sizes
from sana_edge.config import SamplerKind
from sana_edge.errors import InvalidInput
from sana_edge.init_image import InitImage, read_image, read_mask, to_size
from sana_edge.request.bounds import (
    DEFAULT_STRENGTH,
    IMAGE_VARIATION_STRENGTH,
    MAX_IMAGES,
    MAX_INSTRUCTION,
    MAX_SEED,
    MAX_STEPS,
    VARIATION_STRENGTH,
    check_guidance,
    check_shift,
    check_size,
    check_strength,
    check_text,
    check_tile,
    check_variation,
    check_whole,
    pairs,
    plain,
)
from sana_edge.request.plan import Plan, counted, label, random_seed
from sana_edge.system.json_values import shown

if TYPE_CHECKING:
    from sana_edge.init_image import Picture

SAMPLERS: tuple[SamplerKind, ...] = typing.get_args(SamplerKind)


class Options(TypedDict, total=False):
    """The keyword arguments of `sana_edge.Sana.generate` and `sana_edge.Sana.stream`, explained there."""

    negative_prompt: str
    size: tuple[int, int] | None
    steps: int | None
    guidance: float | None
    seed: int | None
    sampler: SamplerKind | None
    exact_size: bool
    flow_shift: float | None
    instruction: str | None
    tile: int | None
    image: Picture | None
    strength: float | None
    mask: Picture | None
    variation_strength: float | None
    variation_seed: int | None
    variation: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Request:
    """One generation. None means the model's default, or a random seed.

    What asks for variations becomes ``images``, ``variation`` and, for an image, ``strength``: the three
    fields that ask are None then.

    Raises:
        InvalidInput: a value that no model can serve; the message has the value.
    """

    prompt: str
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    sampler: SamplerKind | None = None
    images: int = 1
    exact_size: bool = False
    flow_shift: float | None = None
    instruction: str | None = None
    tile: int | None = None
    image: Picture | None = field(default=None, compare=False)
    strength: float | None = None
    mask: Picture | None = field(default=None, compare=False)
    variations: int | None = None
    variation_strength: float | None = None
    variation_seed: int | None = None
    variation: Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt")
        if not self.prompt.strip():
            raise InvalidInput("the prompt is empty", "say what the picture should show")
        check_text(self.negative_prompt, "negative prompt")
        numbers = ("size", "steps", "images", "seed", "guidance", "flow_shift", "tile", "strength")
        for name in (*numbers, "variations", "variation_strength", "variation_seed", "variation"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        self._vary()
        # numpy's too, as JSON has it in a picture's metadata
        object.__setattr__(self, "exact_size", bool(self.exact_size))
        if self.size is not None:
            check_size(self.size, exact=self.exact_size)
        if self.steps is not None:
            check_whole(self.steps, "steps", 1, MAX_STEPS, "20 is usual, 2 for Sprint")
        if self.guidance is not None:
            check_guidance(self.guidance)
        check_whole(self.images, "images", 1, MAX_IMAGES)
        check_variation(self.variation, self.images)
        if self.seed is not None:
            check_whole(self.seed, "seed", 0, MAX_SEED - (0 if self.variation else self.images - 1))
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InvalidInput(f"unknown sampler {shown(self.sampler)}", f"choose {', '.join(SAMPLERS)}")
        if self.flow_shift is not None:
            check_shift(self.flow_shift)
        if self.tile is not None:
            check_tile(self.tile)
        if self.instruction is not None:
            check_text(self.instruction, "instruction", MAX_INSTRUCTION)
        self._check_image()

    def _vary(self) -> None:
        """Make of what asks for variations what each of them is."""
        count, strength, seed = self.variations, self.variation_strength, self.variation_seed
        if count is None:
            for name, value in (("strength", strength), ("seed", seed)):
                if value is not None:
                    raise InvalidInput(f"a variation {name} was given, but no variations", "say how many")
            return
        check_whole(count, "variations", 1, MAX_IMAGES)
        if self.images != 1:
            found = f"images is {shown(self.images)} and variations is {count}"
            raise InvalidInput(found, "give one of them")
        if strength is not None:
            check_strength(strength, "variation strength", "0.2")
        made: dict[str, Any] = {"images": count, "variation_strength": None, "variation_seed": None}
        if self.image is not None and self.strength is None:
            # nobody knows the noise that it came from
            made["strength"] = IMAGE_VARIATION_STRENGTH if strength is None else strength
            made["seed"] = self.seed if seed is None else seed
        else:
            made["seed"] = random_seed() if self.seed is None else self.seed
            first = (made["seed"] + 1 if type(made["seed"]) is int else 0) if seed is None else seed
            share = VARIATION_STRENGTH if strength is None else strength
            made["variation"] = (*pairs(self.variation), (first, share))
        for name, value in {**made, "variations": None}.items():
            object.__setattr__(self, name, value)

    @property
    def labels(self) -> tuple[str, ...]:
        """What tells the pictures of a request with a seed apart: their seeds, and those mixed in."""
        assert self.seed is not None
        pictures = (counted(self.seed, tuple(self.variation), index) for index in range(self.images))
        return tuple(label(*picture) for picture in pictures)

    def _check_image(self) -> None:
        """Read the image and its mask, which then are pixels."""
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise InvalidInput(f"a {name} was given, but no image", f"give the image, or no {name}")
            return
        if self.strength is not None:
            check_strength(self.strength)
        pixels = read_image(self.image)
        object.__setattr__(self, "image", pixels)
        height, width = pixels.shape[:2]
        if self.size is None:
            check_size((width, height), exact=self.exact_size)
        if self.mask is not None:
            object.__setattr__(self, "mask", read_mask(self.mask, (width, height)))

    @property
    def _image_size(self) -> tuple[int, int] | None:
        return (self.image.shape[1], self.image.shape[0]) if isinstance(self.image, np.ndarray) else None

    def _init(self, size: tuple[int, int]) -> InitImage | None:
        """The image at the size that is asked for."""
        if not isinstance(self.image, np.ndarray):
            return None
        mask = to_size(self.mask, size) if isinstance(self.mask, np.ndarray) else None
        strength = DEFAULT_STRENGTH if self.strength is None else float(self.strength)
        return InitImage(to_size(self.image, size), strength, mask)

    @classmethod
    def of(cls, prompt: str, **options: Any) -> Request:
        """The request of `Options`, or of a picture's metadata, which is known by its "version".

        Of metadata what is no argument is left out: model, dtype, backend, and what later versions add.

        Raises:
            TypeError: an argument that there is not.
        """
        if "version" in options:
            known = {field.name for field in fields(cls)}
            options = {name: value for name, value in options.items() if name in known}
        return cls(prompt, **options)

    def plan(self, native_size: int, made_for: SamplerKind, fixed: tuple[int, int] | None = None) -> Plan:
        """Fill in what was left open.

        Args:
            native_size: side in pixels of the pictures that the model was trained on.
            made_for: the sampler in the model's folder.
            fixed: the only (width, height) that the model can draw at.

        Raises:
            InvalidInput: the sampler asked for does not suit the model.
        """
        sampler = self.sampler or made_for
        if (sampler == "scm") != (made_for == "scm"):
            usable = "scm" if made_for == "scm" else "flow-dpm or flow-euler"
            raise InvalidInput(f"sampler {sampler} does not work with this model", f"choose {usable}")
        if sampler == "scm" and self.flow_shift is not None:
            hint = "leave it out: Sprint models have no shift"
            raise InvalidInput(f"flow shift {self.flow_shift} does not work with this model", hint)
        asked = self.size or self._image_size or fixed or (native_size, native_size)
        exact = self.exact_size or asked == fixed
        width, height = asked if exact else sizes.bucket(*asked, native_size)
        return Plan(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            size=asked,
            exact_size=self.exact_size,
            native_size=native_size,
            steps=self.steps or (2 if sampler == "scm" else 20),
            guidance=4.5 if self.guidance is None else float(self.guidance),
            seed=random_seed() if self.seed is None else self.seed,
            sampler=sampler,
            images=self.images,
            flow_shift=None if self.flow_shift is None else float(self.flow_shift),
            instruction=self.instruction,
            tile=self.tile,
            init=self._init(asked),
            variation=tuple(self.variation),
        )
