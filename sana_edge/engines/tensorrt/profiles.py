"""Optimization profiles: which sizes a TensorRT engine takes, from the dynamic dimensions of a graph.

An engine runs any size between a profile's smallest and largest, and is tuned for the one between. Several
profiles of one engine nest: the smallest that holds a size is used, as it is tuned closer to it and needs
less memory. Neither torch nor TensorRT is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.store.manifest import REMAKE

# sides in pixels: the least that is tuned for, and the largest of each profile
SMALLEST = 512
LARGEST = (1024, 2048)
# the largest side that the decoder gets at once; larger pictures are decoded in tiles of this
DECODER_TILE = 1024
# tokens of a prompt: at most, and what prompts usually have
MAX_TOKENS = 300
USUAL_TOKENS = 48

# (width, height) in pixels
Size = tuple[int, int]
Shape = tuple[int, ...]
Ports = Mapping[str, tuple[str, Sequence[int | str]]]


class Range(NamedTuple):
    """What a dimension may be, and what it is tuned for."""

    min: int
    opt: int
    max: int


class Shapes(NamedTuple):
    """One input in one profile."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Sizes:
    """A profile's picture sizes; width and height may be anything between those of ``min`` and ``max``.

    Raises:
        InvalidInput: they are not in ascending order.
    """

    min: Size
    opt: Size
    max: Size

    def __post_init__(self) -> None:
        for side in (0, 1):
            if not 0 < self.min[side] <= self.opt[side] <= self.max[side]:
                raise InvalidInput(
                    f"sizes from {shown(self.min)} by {shown(self.opt)} to {shown(self.max)} do not ascend",
                    "give --min, --opt and --max so that neither width nor height gets smaller",
                )


def shown(size: Size) -> str:
    """A size as the command line takes it."""
    return f"{size[0]}x{size[1]}"


def choose_sizes(
    native: int, minimum: Size | None, optimum: Size | None, maximum: Size | None
) -> tuple[Sizes, ...]:
    """The profiles of a build: one of what the user gives, or those for 512 to 2048 px.

    Args:
        native: side in pixels of the pictures that the model was trained on.
    """
    least = min(SMALLEST, native)
    if minimum or optimum or maximum:
        low = minimum or _each(min, (least, least), optimum or maximum)
        top = max(LARGEST[-1], native)
        high = maximum or _each(max, (top, top), optimum or minimum)
        middle = optimum or _each(max, low, _each(min, (native, native), high))
        return (Sizes(low, middle, high),)
    sizes, below = [], 0
    for largest in (*LARGEST, *(side for side in (native,) if side > LARGEST[-1])):
        tuned = native if below < native <= largest else largest
        sizes.append(Sizes((least, least), (tuned, tuned), (largest, largest)))
        below = largest
    return tuple(sizes)


def size_flags(sizes: Sequence[Sizes], wanted: Size | None = None) -> list[str]:
    """The options of `sana-edge build` that make the same profiles, or ones that also hold ``wanted``."""
    if wanted is None and len(sizes) != 1:
        # those of a build without sizes
        return []
    low = high = wanted or sizes[0].min
    for size in sizes:
        low, high = _each(min, low, size.min), _each(max, high, size.max)
    tuned = ["--opt", shown(sizes[0].opt)] if len(sizes) == 1 else []
    return ["--min", shown(low), *tuned, "--max", shown(high)]


def _each(choose: Callable[[int, int], int], size: Size, other: Size | None) -> Size:
    return size if other is None else (choose(size[0], other[0]), choose(size[1], other[1]))


def ranges(graph: str, sizes: Sizes, cell: int, instruction: int) -> dict[str, Range]:
    """What the names of dynamic dimensions may be in one of the exported graphs.

    Args:
        graph: its name in the manifest.
        cell: pixels of a latent cell along a side.
        instruction: tokens of the instruction before every prompt.

    Raises:
        InvalidInput: a side is no multiple of a cell.
    """
    for size in (sizes.min, sizes.opt, sizes.max):
        if size[0] % cell or size[1] % cell:
            raise InvalidInput(f"size {shown(size)} is not a multiple of {cell}", "choose multiples of it")
    width, height = (
        Range(*(size[side] // cell for size in (sizes.min, sizes.opt, sizes.max))) for side in (0, 1)
    )
    if graph == "decoder":
        # tiles at the right and the bottom are smaller than any picture
        tile = DECODER_TILE // cell
        width, height = (Range(1, min(side.opt, tile), min(side.max, tile)) for side in (width, height))
    longest = instruction + MAX_TOKENS
    return {
        "w": width,
        "h": height,
        # a guided step predicts for the prompt and for the negative prompt
        "B": Range(1, 2, 2),
        "L": Range(1, USUAL_TOKENS, MAX_TOKENS),
        # new tokens: all of them, where the prompt begins unlike the instruction
        "T": Range(1, USUAL_TOKENS, longest),
        # a negative prompt has no instruction
        "P": Range(0, instruction, instruction),
    }


def input_shapes(inputs: Ports, dimensions: Mapping[str, Range], graph: str) -> dict[str, Shapes]:
    """The shapes of a graph's inputs in one profile.

    Raises:
        SanaError: the graph has a dynamic dimension that is not known here.
    """
    shapes = {}
    for name, (_, dims) in inputs.items():
        for dim in dims:
            if isinstance(dim, str) and dim not in dimensions:
                raise SanaError(
                    f"{graph} has the dynamic dimension {dim!r} in {name}, known are {', '.join(dimensions)}",
                    f"the folder was made by another version of sana-edge; make it again: {REMAKE}",
                )
        each = [Range(dim, dim, dim) if isinstance(dim, int) else dimensions[dim] for dim in dims]
        low, middle, high = (tuple(dim[i] for dim in each) for i in range(3))
        shapes[name] = Shapes(low, middle, high)
    return shapes


def graph_profiles(
    graph: str, inputs: Ports, sizes: Iterable[Sizes], cell: int, instruction: int
) -> list[dict[str, Shapes]]:
    """The different profiles of a graph; one where the size of the picture does not matter to it."""
    profiles: list[dict[str, Shapes]] = []
    for size in sizes:
        profile = input_shapes(inputs, ranges(graph, size, cell, instruction), graph)
        if profile not in profiles:
            profiles.append(profile)
    return profiles


def fitting(profiles: Sequence[Mapping[str, Shapes]], shapes: Mapping[str, Shape]) -> int | None:
    """The first profile that holds the shapes of all inputs; None where none does."""
    for index, profile in enumerate(profiles):
        if all(_holds(profile[name], shape) for name, shape in shapes.items()):
            return index
    return None


def _holds(allowed: Shapes, shape: Shape) -> bool:
    return len(shape) == len(allowed.min) and all(
        low <= dim <= high for low, dim, high in zip(allowed.min, shape, allowed.max, strict=True)
    )


def outside(
    graph: str,
    profiles: Sequence[Mapping[str, Shapes]],
    shapes: Mapping[str, Shape],
    cell: int,
    rebuild: Callable[[Size], str],
) -> InvalidInput:
    """The error of shapes that no profile holds: names the input and its range, a latent's in pixels.

    Args:
        rebuild: gives the command that builds the engine also for a size in pixels.
    """
    name = next(
        (
            name
            for name, shape in shapes.items()
            if not any(_holds(profile[name], shape) for profile in profiles)
        ),
        next(iter(shapes)),
    )
    shape, low, high = shapes[name], profiles[0][name].min, profiles[0][name].max
    for profile in profiles[1:]:
        low = tuple(map(min, low, profile[name].min))
        high = tuple(map(max, high, profile[name].max))
    if name == "latent" and len(shape) == 4 and _holds(Shapes(low[:2], low[:2], high[:2]), shape[:2]):
        size = shape[3] * cell, shape[2] * cell
        least, most = (shown((edge[3] * cell, edge[2] * cell)) for edge in (low, high))
        fixed = f"choose {least}, or if the graphs are for any size"
        choice = fixed if least == most else "choose a size between, or"
        return InvalidInput(
            f"size {shown(size)} is outside of what the {graph} engine was built for, {least} to {most}",
            f"{choice} build it again: {rebuild(size)}",
        )
    return InvalidInput(
        f"{graph}: input {name} has shape {shape}, the engine was built for {low} to {high}",
        "give a shape between",
    )
