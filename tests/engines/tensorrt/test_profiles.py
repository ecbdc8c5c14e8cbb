"""Which sizes a TensorRT engine is built for, and what is said of those that it was not."""

from __future__ import annotations

import pytest

from sana_edge.engines.tensorrt import profiles as engine_profiles
from sana_edge.engines.tensorrt.profiles import (
    Shapes,
    Size,
    Sizes,
    choose_sizes,
    fitting,
    graph_profiles,
    ranges,
    size_flags,
)
from sana_edge.errors import InvalidInput, SanaError

INPUTS = {"latent": ("float32", ("B", 4, "h", "w")), "scale": ("float32", (1,))}


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        (256, [(256, 256, 1024), (256, 2048, 2048)]),
        (512, [(512, 512, 1024), (512, 2048, 2048)]),
        (1024, [(512, 1024, 1024), (512, 2048, 2048)]),
        (4096, [(512, 1024, 1024), (512, 2048, 2048), (512, 4096, 4096)]),
    ],
)
def test_profiles_reach_from_512_to_2048_and_hold_the_native_size(
    native: int, expected: list[tuple[int, ...]]
) -> None:
    sizes = choose_sizes(native, None, None, None)
    assert [(size.min[0], size.opt[1], size.max[0]) for size in sizes] == expected


def test_sizes_of_the_user_make_one_profile_and_leave_the_rest_open() -> None:
    assert choose_sizes(1024, None, None, (1536, 768)) == (Sizes((512, 512), (1024, 768), (1536, 768)),)
    assert choose_sizes(1024, None, (256, 4096), None) == (Sizes((256, 512), (256, 4096), (2048, 4096)),)
    assert choose_sizes(512, (640, 640), None, None) == (Sizes((640, 640), (640, 640), (2048, 2048)),)
    with pytest.raises(InvalidInput, match="from 640x640 by 640x640 to 512x2048 do not ascend"):
        choose_sizes(512, (640, 640), None, (512, 2048))
    with pytest.raises(InvalidInput, match="size 520x512 is not a multiple of 32"):
        ranges("denoiser", choose_sizes(512, (520, 512), None, None)[0], 32, 0)


def test_ranges_of_each_graph() -> None:
    size = Sizes((512, 256), (1024, 512), (2048, 1536))
    denoiser = ranges("denoiser", size, 32, 210)
    assert denoiser == {
        "w": (16, 32, 64),
        "h": (8, 16, 48),
        "B": (1, 2, 2),
        "L": (1, 48, 300),
        "T": (1, 48, 510),
        "P": (0, 210, 210),
    }
    # a tile at the edge may be a single cell, and none is larger than 1024 px
    decoder = ranges("decoder", size, 32, 210)
    assert (decoder["w"], decoder["h"]) == ((1, 32, 32), (1, 16, 32))


def test_a_graph_without_sizes_has_one_profile_and_static_sides_stay() -> None:
    sizes = choose_sizes(512, None, None, None)
    text = graph_profiles("text_encoder", {"ids": ("int64", (1, "T"))}, sizes, 32, 9)
    assert text == [{"ids": Shapes((1, 1), (1, 48), (1, 309))}]
    fixed = {"latent": ("float32", (1, 32, 16, 16))}
    assert graph_profiles("decoder", fixed, sizes, 32, 9) == [{"latent": Shapes(*3 * [(1, 32, 16, 16)])}]
    with pytest.raises(SanaError, match="dynamic dimension 'depth' in x"):
        graph_profiles("decoder", {"x": ("float32", ("depth",))}, sizes, 32, 9)


def test_the_smallest_profile_that_holds_a_size_is_taken() -> None:
    profiles = graph_profiles("denoiser", INPUTS, choose_sizes(512, None, None, None), 32, 9)
    assert [fitting(profiles, {"latent": (1, 4, side, 32)}) for side in (15, 16, 32, 33, 64, 65)] == [
        *(None, 0, 0, 1, 1, None)
    ]
    assert fitting(profiles, {"latent": (3, 4, 16, 16)}) is None


def test_a_size_outside_names_the_range_and_the_command() -> None:
    sizes = choose_sizes(512, None, None, None)
    profiles = graph_profiles("denoiser", INPUTS, sizes, 32, 9)

    def rebuild(size: Size) -> str:
        return f"build {' '.join(size_flags(sizes, size))}"

    error = engine_profiles.outside("denoiser", profiles, {"latent": (1, 4, 10, 80)}, 32, rebuild)
    assert error.message == (
        "size 2560x320 is outside of what the denoiser engine was built for, 512x512 to 2048x2048"
    )
    assert error.hint == "choose a size between, or build it again: build --min 512x320 --max 2560x2048"
    # what no size changes
    shapes = {"latent": (3, 4, 16, 16), "scale": (1,)}
    other = engine_profiles.outside("denoiser", profiles, shapes, 32, rebuild)
    assert other.message == (
        "denoiser: input latent has shape (3, 4, 16, 16), the engine was built for (1, 4, 16, 16) to"
        " (2, 4, 64, 64)"
    )
    assert other.hint == "give a shape between"
    fixed = graph_profiles("denoiser", {"latent": ("float32", (1, 4, 16, 24))}, sizes, 32, 9)
    alone = engine_profiles.outside("denoiser", fixed, {"latent": (1, 4, 16, 16)}, 32, rebuild)
    command = rebuild((512, 512))
    assert alone.hint == f"choose 768x512, or if the graphs are for any size build it again: {command}"


@pytest.mark.parametrize(
    "given",
    [
        *((None, None, None), (None, None, (1536, 768)), (None, (256, 4096), None)),
        *(((640, 640), None, None), ((512, 512), (512, 512), (512, 512))),
    ],
)
def test_options_make_the_same_sizes_again(given: tuple[Size | None, ...]) -> None:
    def read(flags: list[str]) -> tuple[Sizes, ...]:
        pairs = zip(flags[::2], flags[1::2], strict=True)
        found = {flag: tuple(map(int, size.split("x"))) for flag, size in pairs}
        return choose_sizes(1024, *(found.get(flag) for flag in ("--min", "--opt", "--max")))

    sizes = choose_sizes(1024, *given)
    assert read(size_flags(sizes)) == sizes
    # and with another size what they held before
    (wider,) = read(size_flags(sizes, (128, 8192)))
    assert wider.min[0] == 128 and wider.max[1] == 8192
    for size in sizes:
        assert all(wider.min[side] <= size.min[side] <= size.max[side] <= wider.max[side] for side in (0, 1))
    assert len(sizes) > 1 or wider.opt == sizes[0].opt
