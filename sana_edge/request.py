"""What a caller asks for: the arguments of one generation, checked before anything heavy is loaded or run."""

from __future__ import annotations

import dataclasses
import numbers
import secrets
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from sana_edge import sizes
from sana_edge.config import LATENT_CELL, SamplerKind
from sana_edge.errors import InvalidInput
from sana_edge.init_image import InitImage, read_image, read_mask, to_size
from sana_edge.system.json_values import shown

if TYPE_CHECKING:
    from sana_edge.init_image import Picture

MAX_SIDE = 8192
MAX_STEPS = 1000
MAX_IMAGES = 10_000
MAX_GUIDANCE = 1000
MAX_SHIFT = 100
MAX_INSTRUCTION = 20_000
# characters, of which 300 tokens are read
MAX_PROMPT = 100_000
MAX_SEED = 2**63 - 1
# as diffusers has it
DEFAULT_STRENGTH = 0.6
# of variations: of a seed's noise, and of an image
VARIATION_STRENGTH = 0.2
IMAGE_VARIATION_STRENGTH = 0.3
# of one picture, each a variation of the one before
MAX_VARIATION = 16
SAMPLERS: tuple[SamplerKind, ...] = typing.get_args(SamplerKind)
# what can be asked for, of models (`sana_edge.fused.backends`) and of exported folders (`sana_edge.engines`)
TORCH_BACKENDS = ("auto", "torch", "triton", "cuda")
BACKENDS = (*TORCH_BACKENDS, "tensorrt", "onnxruntime", "openvino")
TORCH_DEVICES = ("auto", "cpu", "cuda")
DEVICES = (*TORCH_DEVICES, "gpu", "npu", "tensorrt")


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
        _check_text(self.prompt, "prompt")
        if not self.prompt.strip():
            raise InvalidInput("the prompt is empty", "say what the picture should show")
        _check_text(self.negative_prompt, "negative prompt")
        numbers = ("size", "steps", "images", "seed", "guidance", "flow_shift", "tile", "strength")
        for name in (*numbers, "variations", "variation_strength", "variation_seed", "variation"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        self._vary()
        # numpy's too, as JSON has it in a picture's metadata
        object.__setattr__(self, "exact_size", bool(self.exact_size))
        if self.size is not None:
            _check_size(self.size, exact=self.exact_size)
        if self.steps is not None:
            _check_whole(self.steps, "steps", 1, MAX_STEPS, "20 is usual, 2 for Sprint")
        if self.guidance is not None:
            _check_guidance(self.guidance)
        _check_whole(self.images, "images", 1, MAX_IMAGES)
        _check_variation(self.variation, self.images)
        if self.seed is not None:
            _check_whole(self.seed, "seed", 0, MAX_SEED - (0 if self.variation else self.images - 1))
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InvalidInput(f"unknown sampler {shown(self.sampler)}", f"choose {', '.join(SAMPLERS)}")
        if self.flow_shift is not None:
            _check_shift(self.flow_shift)
        if self.tile is not None:
            _check_tile(self.tile)
        if self.instruction is not None:
            _check_text(self.instruction, "instruction", MAX_INSTRUCTION)
        self._check_image()

    def _vary(self) -> None:
        """Make of what asks for variations what each of them is."""
        count, strength, seed = self.variations, self.variation_strength, self.variation_seed
        if count is None:
            for name, value in (("strength", strength), ("seed", seed)):
                if value is not None:
                    raise InvalidInput(f"a variation {name} was given, but no variations", "say how many")
            return
        _check_whole(count, "variations", 1, MAX_IMAGES)
        if self.images != 1:
            found = f"images is {shown(self.images)} and variations is {count}"
            raise InvalidInput(found, "give one of them")
        if strength is not None:
            _check_strength(strength, "variation strength", "0.2")
        made: dict[str, Any] = {"images": count, "variation_strength": None, "variation_seed": None}
        if self.image is not None and self.strength is None:
            # nobody knows the noise that it came from
            made["strength"] = IMAGE_VARIATION_STRENGTH if strength is None else strength
            made["seed"] = self.seed if seed is None else seed
        else:
            made["seed"] = random_seed() if self.seed is None else self.seed
            first = (made["seed"] + 1 if type(made["seed"]) is int else 0) if seed is None else seed
            share = VARIATION_STRENGTH if strength is None else strength
            made["variation"] = (*_pairs(self.variation), (first, share))
        for name, value in {**made, "variations": None}.items():
            object.__setattr__(self, name, value)

    @property
    def labels(self) -> tuple[str, ...]:
        """What tells the pictures of a request with a seed apart: their seeds, and those mixed in."""
        assert self.seed is not None
        pictures = (_counted(self.seed, tuple(self.variation), index) for index in range(self.images))
        return tuple(label(*picture) for picture in pictures)

    def _check_image(self) -> None:
        """Read the image and its mask, which then are pixels."""
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise InvalidInput(f"a {name} was given, but no image", f"give the image, or no {name}")
            return
        if self.strength is not None:
            _check_strength(self.strength)
        pixels = read_image(self.image)
        object.__setattr__(self, "image", pixels)
        height, width = pixels.shape[:2]
        if self.size is None:
            _check_size((width, height), exact=self.exact_size)
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


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; `sana_edge.Sana.load` explains each."""

    device: str = "auto"
    dtype: str = "auto"
    int8: bool = False
    backend: str = "auto"
    engines: Path | None = None
    trust_engine: bool = False
    offline: bool = False
    progress: bool = False
    revision: str | None = None
    decoder: str | None = None
    threads: int | None = None
    memory: int | str | None = None
    prompt_cache: bool = True


@dataclass(frozen=True)
class Plan:
    """A `Request` to a certain model, with nothing left open.

    It is drawn at ``width`` x ``height``, then resized and cropped to ``size`` (width, height).
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    size: tuple[int, int]
    exact_size: bool
    native_size: int
    steps: int
    guidance: float
    seed: int
    sampler: SamplerKind
    images: int
    flow_shift: float | None = None
    instruction: str | None = None
    tile: int | None = None
    init: InitImage | None = None
    variation: tuple[tuple[int, float], ...] = ()

    def picture(self, index: int) -> Plan:
        """The plan of one of its pictures alone: seeds count up, of variations those mixed in last."""
        seed, variation = _counted(self.seed, self.variation, index)
        return dataclasses.replace(self, images=1, seed=seed, variation=variation)

    @property
    def skip(self) -> int:
        """How many steps an image leaves out at the start."""
        return 0 if self.init is None else self.init.skip(self.steps)

    @property
    def guided(self) -> bool:
        """Whether each step makes a second prediction, from the negative prompt; Sprint never does."""
        return self.guidance > 1 and self.sampler != "scm"

    @property
    def size_notes(self) -> tuple[str, ...]:
        """Sentences about a picture that is enlarged, or drawn far from what the model was trained on."""
        drawn, native = f"{self.width}x{self.height}", self.native_size
        if self.size[0] > self.width or self.size[1] > self.height:
            enlarged = f"enlarged to {self.size[0]}x{self.size[1]}"
            return (f"drawn at {drawn}, the nearest size that the model was trained on, and {enlarged}",)
        if sizes.has_buckets(native) and not self.exact_size:
            return ()
        if not 0.5 <= self.width * self.height / native**2 <= 2:
            return (f"{drawn} is far from {native}x{native}, which the model was trained for: expect debris",)
        return ()

    def metadata(self) -> dict[str, Any]:
        """What `Request` needs to make this again, as JSON values; the seed is the first picture's."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "size": list(self.size),
            **({"exact_size": True} if self.exact_size else {}),
            "steps": self.steps,
            "guidance": self.guidance,
            "sampler": self.sampler,
            **({} if self.flow_shift is None else {"flow_shift": self.flow_shift}),
            **({} if self.instruction is None else {"instruction": self.instruction}),
            **({} if self.tile is None else {"tile": self.tile}),
            **({"variation": [list(pair) for pair in self.variation]} if self.variation else {}),
            **({} if self.init is None else self.init.metadata()),
        }


def label(seed: int, variation: Sequence[tuple[int, float]]) -> str:
    """A picture's seed, and those that were mixed into its noise."""
    return "-".join(map(str, (seed, *(mixed for mixed, _ in variation))))


def _counted(
    seed: int, variation: tuple[tuple[int, float], ...], index: int
) -> tuple[int, tuple[tuple[int, float], ...]]:
    """Seed and variation of a picture: the seed counts up, or where there are variations their last."""
    if not variation:
        return seed + index, ()
    *before, (mixed, strength) = variation
    return seed, (*before, (mixed + index, strength))


def random_seed() -> int:
    """A seed that is short enough to be typed again."""
    return secrets.randbelow(2**32)


def _check_text(text: Any, name: str, most: int = MAX_PROMPT) -> None:
    if not isinstance(text, str):
        raise InvalidInput(f"the {name} is {shown(text)}", "give a string")
    if len(text) > most:
        raise InvalidInput(f"the {name} has {len(text)} characters", f"give at most {most}")


def plain(value: Any) -> Any:
    """Numbers of any library, alone or in a row, as Python's own, which JSON and torch take.

    What is no number is returned as it is, to be refused in its own words.
    """
    # numpy's scalars and arrays, and torch's
    if callable(convert := getattr(value, "tolist", None)):
        value = convert()
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    if isinstance(value, bool | int | float):
        return value
    try:
        if isinstance(value, numbers.Integral):
            return int(value)
        return float(value) if isinstance(value, numbers.Real) else value
    # a fraction of huge numbers
    except OverflowError:
        return value


def _check_whole(value: Any, name: str, low: int, high: int, usual: str = "") -> None:
    # bool is an int to Python
    if type(value) is not int or not low <= value <= high:
        raise InvalidInput(
            f"{name} is {shown(value)}",
            f"choose a whole number from {low} to {high}" + (f"; {usual}" if usual else ""),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_guidance(value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= MAX_GUIDANCE:
        raise InvalidInput(
            f"guidance is {shown(value)}",
            f"choose a number from 0 to {MAX_GUIDANCE}; 4.5 is usual, 1 turns guidance off",
        )


def _check_strength(value: Any, name: str = "strength", usual: str = "0.6") -> None:
    if not _is_number(value) or not 0 < value <= 1:
        hint = (
            f"choose a number above 0, at most 1, where nothing of the first picture stays; {usual} is usual"
        )
        raise InvalidInput(f"{name} is {shown(value)}", hint)


def _pairs(variation: Any) -> tuple[tuple[Any, Any], ...]:
    """Seeds and strengths.

    Raises:
        InvalidInput: the value is no list of pairs, or too long.
    """
    pairs = isinstance(variation, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in variation
    )
    if not pairs or len(variation) > MAX_VARIATION:
        hint = f"give at most {MAX_VARIATION} pairs of a seed and a strength, such as [[8, 0.2]]"
        raise InvalidInput(f"variation is {shown(variation)}", hint)
    return tuple(variation)


def _check_variation(variation: Any, images: int) -> None:
    pairs = _pairs(variation)
    for number, (seed, strength) in enumerate(pairs, start=1):
        counted = images - 1 if number == len(pairs) else 0
        _check_whole(seed, "variation seed", 0, MAX_SEED - counted)
        _check_strength(strength, "variation strength", "0.2")


def _check_shift(value: Any) -> None:
    if not _is_number(value) or not 0 < value <= MAX_SHIFT:
        hint = f"choose a number above 0, at most {MAX_SHIFT}; 3 is usual, 4 for the 0.6B at 1024 px"
        raise InvalidInput(f"flow shift is {shown(value)}", hint)


def _check_tile(value: Any) -> None:
    fits = type(value) is int and (value == 0 or (2 * LATENT_CELL <= value <= MAX_SIDE))
    if not fits or value % LATENT_CELL:
        hint = f"choose a multiple of {LATENT_CELL} from {2 * LATENT_CELL} to {MAX_SIDE}, 1024 is usual;"
        raise InvalidInput(f"tile is {shown(value)}", f"{hint} or 0 for none, which is --tile off")


def _check_size(size: Any, *, exact: bool) -> None:
    if not isinstance(size, tuple) or len(size) != 2 or any(type(side) is not int for side in size):
        raise InvalidInput(f"size is {shown(size)}", "give width and height in pixels, such as (512, 512)")
    width, height = size
    named, least = f"{shown(width)}x{shown(height)}", LATENT_CELL if exact else 1
    if min(size) < least:
        raise InvalidInput(f"size {named} is too small", f"choose sides of at least {least}")
    if max(size) > MAX_SIDE:
        raise InvalidInput(f"size {named} is too large", f"choose sides of at most {MAX_SIDE}")
    if exact and (width % LATENT_CELL or height % LATENT_CELL):
        below = "x".join(str(max(side // LATENT_CELL, 1) * LATENT_CELL) for side in size)
        above = "x".join(str(-(-side // LATENT_CELL) * LATENT_CELL) for side in size)
        hint = f"try {below} or {above}, or leave out the exact size: any is then resized to"
        raise InvalidInput(f"size {named} is not a multiple of {LATENT_CELL}", hint)
