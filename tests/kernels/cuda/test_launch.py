"""What holds for every CUDA operation: memory, order of threads, refusals, over one table.

That results are right is tested operation by operation, in the other files here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda import arguments, launch
from sana_edge.kernels.cuda.operations import OPERATIONS, Pointer, Size

HALF = torch.float16
Arguments = dict[str, Any]


def product(*lead: int, depth: int, columns: int) -> Arguments:
    return {
        "values": torch.randint(-127, 128, (*lead, depth), dtype=torch.int8),
        "scales": torch.rand(lead) * 0.02 / depth**0.5,
        "weight": torch.randint(-127, 128, (columns, depth), dtype=torch.int8),
        "weight_scales": torch.rand(columns) * 0.02,
        "bias": torch.randn(columns),
        "dtype": HALF,
    }


def quantize_rows(images: int, tokens: int, columns: int) -> Arguments:
    return {"x": torch.randn(images, tokens, columns).to(HALF), "static_scale": torch.tensor(0.02)}


def norm_modulate_quantize(images: int, tokens: int, columns: int) -> Arguments:
    scale, shift = torch.randn(images, 1, 2 * columns).chunk(2, dim=-1)
    return {**quantize_rows(images, tokens, columns), "scale": scale, "shift": shift, "eps": 1e-6}


def w8a8_linear(images: int, tokens: int, columns: int, depth: int = 80) -> Arguments:
    gate, constant = torch.randn(images, 1, columns), torch.randn(columns)
    residual = torch.randn(images, tokens, columns).to(HALF)
    given = product(images, tokens, depth=depth, columns=columns)
    return {**given, "gate": gate, "constant": constant, "residual": residual}


def w8a8_linear_quantize(images: int, tokens: int, columns: int, depth: int = 80) -> Arguments:
    scale, shift = torch.randn(images, 1, 2 * columns).chunk(2, dim=-1)
    norm = {"scale": scale, "shift": shift, "eps": 1e-6, "plain": (1, 2)}
    return {**w8a8_linear(images, tokens, columns, depth), **norm}


def sampler_step(images: int, height: int, width: int, channels: int = 4) -> Arguments:
    names = ("x", "velocity", "before", "noise")
    latents = {name: torch.randn(images, channels, height, width) for name in names}
    return {**latents, "coefficients": torch.randn(7)}


def qkv_linear_attention(images: int, tokens: int, heads: int, depth: int = 48) -> Arguments:
    return {**product(images, tokens, depth=depth, columns=96 * heads), "heads": heads}


def qk_norm_linear_attention(images: int, tokens: int, heads: int) -> Arguments:
    qkv = torch.randn(images, tokens, 96 * heads).to(HALF)
    return {"qkv": qkv, "norm_k": torch.randn(32 * heads), "heads": heads, "norm_eps": 1e-5}


def linear_attention_finish(images: int, tokens: int, heads: int) -> Arguments:
    q = torch.randn(images, tokens, 32 * heads).to(HALF)
    norm = {"roots": torch.rand(images, tokens, 2), "norm_q": torch.randn(32 * heads)}
    return {"q": q, "state": torch.rand(images, heads, 33, 32), "eps": 1e-15, **norm}


def cross_attention_quantize(images: int, tokens: int, heads: int, head_dim: int = 72) -> Arguments:
    q, keys, values = (
        torch.randn(images, *shape, heads * head_dim).to(HALF) for shape in ((tokens,), (48,), (48,))
    )
    return {
        "q": q,
        "keys": keys.unflatten(2, (heads, head_dim)).transpose(1, 2).contiguous(),
        "values_transposed": values.unflatten(2, (heads, head_dim)).permute(0, 2, 3, 1).contiguous(),
        "lengths": torch.tensor([33, 16, 7], dtype=torch.int32)[:images],
        "norm_q": torch.rand(heads * head_dim),
    }


def dwconv_glu_quantize(images: int, height: int, hidden: int, width: int = 3) -> Arguments:
    x = torch.randn(images, height * width, 2 * hidden).to(HALF)
    kernels = {"weight": torch.randn(3, 3, 2 * hidden).to(HALF), "bias": torch.randn(2 * hidden)}
    return {"x": x, **kernels, "height": height, "width": width}


def patch_embed(images: int, height: int, columns: int, width: int = 3) -> Arguments:
    weights = {"weight": torch.randn(3, columns), "bias": torch.randn(columns)}
    positions, latent = torch.randn(height * width, columns), torch.randn(images, 3, height, width)
    return {"latent": latent, **weights, "positions": positions, "copies": 2, "dtype": HALF}


def velocity_head(images: int, height: int, columns: int, width: int = 3) -> Arguments:
    given = norm_modulate_quantize(2 * images, height * width, columns)
    del given["static_scale"]
    weights = {"weight": torch.randn(5, columns), "bias": torch.randn(5)}
    return {**given, **weights, "guidance": torch.tensor(2.0), "size": (height, width)}


def w8a8_conv2d(images: int, height: int, columns: int, width: int = 11) -> Arguments:
    given = product(images, height, width, depth=32, columns=columns)
    given |= {"scale": torch.tensor(0.001), "weight": given.pop("weight")[:, None, None].repeat(1, 3, 3, 1)}
    del given["scales"]
    residual = torch.randn(images, height, width, columns).to(HALF)
    norm = {"norm_weight": torch.randn(columns), "norm_bias": torch.randn(columns)}
    return {**given, **norm, "residual": residual}


def norm_add_quantize(images: int, tokens: int, columns: int) -> Arguments:
    y, x = torch.randn(2, images, tokens, columns).to(HALF).unbind()
    weights = {"weight": torch.randn(columns), "bias": torch.randn(columns)}
    return {"y": y.contiguous(), "x": x.contiguous(), **weights, "eps": 1e-5}


def tensor_scale(images: int, tokens: int, columns: int) -> Arguments:
    return {"x": torch.randn(images, tokens, columns).to(HALF)}


def multiscale_linear_attention(
    images: int, height: int, heads: int, width: int = 9, mixed: bool = True
) -> Arguments:
    qkv = torch.randn(images, height * width, 96 * heads).to(HALF)
    weights = {
        "depthwise": torch.randn(5, 5, 96 * heads) / 5 if mixed else None,
        "pointwise": torch.randn(96 * heads, 32) / 6 if mixed else None,
    }
    return {"qkv": qkv, **weights, "height": height, "width": width}


def quantize_digits(images: int, tokens: int, columns: int) -> Arguments:
    return {"x": torch.randn(images, tokens, 2 * columns), "gated": True}


def add_norm_digits(images: int, tokens: int, columns: int) -> Arguments:
    x, y = torch.randn(2, images, tokens, columns).unbind(0)
    post, weight = torch.randn(2, columns).unbind(0)
    return {"x": x, "y": y, "post_weight": post, "weight": weight, "eps": 1e-6}


def w8a16_linear(images: int, tokens: int, columns: int, depth: int = 80) -> Arguments:
    given = product(images, tokens, depth=depth, columns=columns)
    digits, steps = given.pop("values").unsqueeze(2).repeat(1, 1, 2, 1), given.pop("scales")
    del given["dtype"]
    rotation = torch.randn(max(tokens, 1), 4, 2)
    return {**given, "digits": digits, "steps": steps, "rotation": rotation, "rotated": columns // 16 * 8}


def soft_capped_attention(texts: int, tokens: int, heads: int, head_dim: int = 32) -> Arguments:
    keys, values = torch.randn(2, heads, 21, head_dim).to(HALF).unbind(0)
    return {
        "qkv": torch.randn(texts, tokens, 4 * heads * head_dim),
        "prefix_keys": keys,
        "prefix_values": values,
        "known": torch.tensor(17, dtype=torch.int32),
        "heads": 2 * heads,
        "scale": 0.2,
        "cap": 5.0,
        "window": 19,
    }


# an example, and sizes with tails of all kinds: images, then what may be nothing, too
EXAMPLES: list[tuple[Callable[..., Arguments], list[tuple[int, ...]]]] = [
    (quantize_rows, [(2, 5, 48), (1, 1, 16)]),
    (norm_modulate_quantize, [(1, 5, 2240), (1, 1, 1152), (2, 3, 16)]),
    (w8a8_linear, [(2, 65, 136), (1, 1, 8, 16)]),
    (w8a8_linear_quantize, [(2, 65, 144), (1, 3, 2240, 16), (3, 1, 16, 16)]),
    (sampler_step, [(2, 5, 7), (1, 20, 20)]),
    (qkv_linear_attention, [(2, 70, 3), (1, 129, 33, 80)]),
    (qk_norm_linear_attention, [(2, 63, 3), (1, 1, 1)]),
    (linear_attention_finish, [(2, 19, 36), (1, 1, 1)]),
    (cross_attention_quantize, [(2, 40, 16), (2, 19, 3, 64), (1, 19, 2, 8)]),
    (dwconv_glu_quantize, [(1, 6, 480, 5), (2, 5, 48), (1, 4, 1040, 9), (1, 1, 16, 1)]),
    (patch_embed, [(1, 5, 264, 7), (2, 1, 8, 1)]),
    (velocity_head, [(1, 3, 1152), (1, 5, 80, 7), (1, 1, 16, 1)]),
    (w8a8_conv2d, [(1, 13, 192), (1, 8, 24)]),
    (norm_add_quantize, [(2, 5, 1296), (1, 3, 512), (1, 1, 16)]),
    (tensor_scale, [(2, 70, 64), (1, 1, 16)]),
    (multiscale_linear_attention, [(2, 5, 2), (1, 19, 1, 3), (1, 1, 1, 1, False)]),
    (quantize_digits, [(2, 3, 48), (1, 1, 16), (1, 2, 3088)]),
    (add_norm_digits, [(2, 3, 48), (1, 1, 16), (1, 2, 3088)]),
    (w8a16_linear, [(2, 35, 136), (1, 1, 8, 16)]),
    (soft_capped_attention, [(2, 9, 2), (1, 1, 1, 8), (1, 3, 1, 256)]),
]
each_operation = pytest.mark.parametrize(
    ("make", "size"), [(make, sizes[0]) for make, sizes in EXAMPLES], ids=[m.__name__ for m, _ in EXAMPLES]
)
each_size = pytest.mark.parametrize(
    ("make", "size"),
    [(make, size) for make, sizes in EXAMPLES for size in sizes],
    ids=[f"{make.__name__}-{size}" for make, sizes in EXAMPLES for size in sizes],
)


def run(make: Callable[..., Arguments], given: Arguments) -> list[Tensor]:
    results = getattr(launch, make.__name__)(**given)
    return [results] if isinstance(results, Tensor) else list(results)


def same_bytes(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)) for a, b in pairs)


def test_every_operation_has_an_example() -> None:
    assert {make.__name__ for make, _ in EXAMPLES} == set(OPERATIONS)


@pytest.mark.usefixtures("emulated")
@each_size
def test_touches_nothing_beyond_and_fills_its_results(
    make: Callable[..., Arguments],
    size: tuple[int, ...],
    guarded: Callable[[Tensor], Tensor],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind every tensor lies memory that cannot be touched; results that were zeros equal those of NaN."""
    given = make(*size)
    with monkeypatch.context() as zeros:
        zeros.setattr(torch, "empty", torch.zeros)
        expected = run(make, given)
    request.getfixturevalue("guarded_outputs")
    there = {name: guarded(value) if isinstance(value, Tensor) else value for name, value in given.items()}
    assert same_bytes(run(make, there), expected)


@each_operation
def test_order_of_threads_changes_nothing(
    make: Callable[..., Arguments], size: tuple[int, ...], emulated: Any
) -> None:
    given = make(*size)
    first = run(make, given)
    for seed in (3, 4):
        emulated.shuffle(seed)
        assert same_bytes(run(make, given), first)


@pytest.mark.usefixtures("emulated")
@each_operation
def test_nothing_to_do(make: Callable[..., Arguments], size: tuple[int, ...]) -> None:
    """No images, or no tokens: sums of nothing are 0, and there is nothing else."""
    expected = arguments.definition(make.__name__)(**make(0, *size[1:]))
    expected = [expected] if isinstance(expected, Tensor) else expected
    assert [t.shape for t in run(make, make(0, *size[1:]))] == [t.shape for t in expected]
    assert not any(t.any() for t in run(make, make(size[0], 0, *size[2:])))


def wrong(pointer: Pointer, tensor: Tensor) -> dict[str, Tensor | None]:
    """Forms of a tensor that no operation takes."""
    forms: dict[str, Tensor | None] = {"dtype": tensor.double()}
    if not pointer.optional:
        forms["none"] = None
    # a convolution's scales may have the dimensions of its corners, too
    if not pointer.lead and pointer.kind != "vector" and pointer.shape != (Size.parse("corners*columns"),):
        forms["dimensions"] = tensor[None]
    if tensor.ndim:
        forms["longer"] = torch.cat([tensor, tensor[..., :1]], dim=-1)
        forms["gaps"] = tensor.repeat_interleave(2, dim=-1)[..., ::2]
    return forms


@pytest.mark.usefixtures("emulated")
@each_operation
def test_refuses_each_wrong_tensor(make: Callable[..., Arguments], size: tuple[int, ...]) -> None:
    given, name = make(*size), make.__name__
    for pointer in OPERATIONS[name].pointers:
        tensor = given.get(pointer.name)
        if tensor is None:
            continue
        for kind, form in wrong(pointer, tensor).items():
            with pytest.raises(InvalidInput) as caught:
                run(make, {**given, pointer.name: form})
            # a size that is taken from one tensor is missed in another, or is none of the library's
            assert kind == "longer" or caught.value.message.startswith(f"{pointer.name} of {name} is"), kind
            assert caught.value.hint


@each_operation
def test_refuses_other_devices(make: Callable[..., Arguments], size: tuple[int, ...], emulated: Any) -> None:
    emulated.count()  # skips where memory travels to a GPU
    given = make(*size)
    if make is tensor_scale:
        pytest.skip("its one tensor says where it runs")
    for name, tensor in given.items():
        if isinstance(tensor, Tensor):
            with pytest.raises(InvalidInput, match=r"is on |floats from"):
                run(make, {**given, name: tensor.to("meta")})


ONES = torch.ones(2, 1, 2240)
REFUSED: list[tuple[Callable[..., Arguments], tuple[int, ...], Arguments, str]] = [
    (quantize_rows, (1, 1, 24), {}, "size"),
    (quantize_rows, (1, 1, 16), {"x": torch.zeros(17, dtype=HALF)[1:].view(1, 16)}, "16 bytes"),
    (norm_modulate_quantize, (2, 3, 2240), {"scale": ONES[:, :, :1120]}, "scale of"),
    (norm_modulate_quantize, (2, 3, 2240), {"scale": torch.ones(3, 1, 2240)}, "scale of"),
    (norm_modulate_quantize, (2, 3, 2240), {"scale": ONES, "shift": ONES[0, 0]}, "2240 and 0 floats"),
    (
        *(norm_modulate_quantize, (2, 3, 16)),
        dict.fromkeys(("scale", "shift"), torch.ones(2, 1, 18)[:, :, :16]),
        "16 bytes",
    ),
    (velocity_head, (1, 3, 80), {"scale": torch.ones(80)}, "0 and 160 floats"),
    (velocity_head, (1, 3, 80), {"x": torch.zeros(3, 9, 80, dtype=HALF)}, "x of"),
    (velocity_head, (1, 3, 80), {"size": (3, 2)}, "x of"),
    (dwconv_glu_quantize, (1, 6, 48), {"height": 5}, "x of"),
    (dwconv_glu_quantize, (1, 6, 48), {"weight": torch.zeros(3, 3, 96)}, "weight of"),
    (patch_embed, (1, 5, 8), {"dtype": torch.float32}, "cannot give"),
    (w8a8_linear, (2, 3, 8), {"dtype": torch.float32}, "cannot give"),
    (w8a8_linear, (2, 3, 8), {"limit": -1.0}, "clip"),
    (w8a8_linear, (2, 3, 8), {"gate": torch.zeros(3, 1, 8)}, "gate of"),
    (w8a8_linear, (2, 3, 8), {"residual": torch.zeros(2, 3, 8)}, "residual of"),
    (w8a8_linear, (2, 3, 8), {"out": torch.zeros(6, 8, dtype=HALF)}, "out of"),
    (w8a8_linear, (2, 3, 4), {}, "size"),
    (w8a8_linear, (2, 3, 8, 8), {}, "size"),
    (w8a8_linear_quantize, (2, 3, 16), {"shift": None}, "scale and shift: one"),
    (w8a8_linear_quantize, (2, 3, 16), {"limit": -1.0}, "clip"),
    (w8a8_linear_quantize, (2, 3, 2320), {}, "size"),
    (w8a8_linear_quantize, (1, 20, 16), {"workspace": torch.zeros(16, dtype=torch.uint8)}, "too small"),
    (sampler_step, (1, 2, 2), {"velocity": torch.zeros(1, 4, 2, 3)}, "velocity of|x of"),
    (qkv_linear_attention, (1, 20, 2), {"dtype": torch.float32}, "cannot give"),
    (qkv_linear_attention, (1, 20, 2, 24), {}, "size"),
    (qkv_linear_attention, (1, 20, 2), {"workspace": torch.zeros(16, dtype=torch.uint8)}, "too small"),
    (qk_norm_linear_attention, (1, 20, 2), {"workspace": torch.zeros(16, dtype=torch.uint8)}, "too small"),
    (linear_attention_finish, (1, 20, 2), {"norm_q": None}, "norm_q"),
    (
        linear_attention_finish,
        (2, 20, 2),
        {"q": torch.zeros(4, 20, 64, dtype=HALF)[::2]},
        "q of .* with gaps",
    ),
    (w8a8_conv2d, (1, 4, 16), {"residual": torch.zeros(1, 4, 11, 16).bfloat16()}, "residual of"),
    (w8a8_conv2d, (1, 4, 16), {"out": torch.zeros(1, 4, 4, 16)}, "out of"),
    (norm_add_quantize, (1, 4, 24), {}, "size"),
    (tensor_scale, (1, 4, 24), {}, "size"),
    (tensor_scale, (1, 4, 32), {"workspace": torch.zeros(16, dtype=torch.uint8)}, "too small"),
    (multiscale_linear_attention, (1, 4, 1), {"pointwise": None}, "pointwise"),
    (multiscale_linear_attention, (1, 4, 1), {"height": 3}, "qkv of"),
    (quantize_digits, (1, 3, 24), {}, "size"),
    (quantize_digits, (1, 1, 16400), {}, "size"),
    (add_norm_digits, (1, 3, 48), {"y": None}, "y and post_weight"),
    (add_norm_digits, (1, 3, 8208), {}, "size"),
    (w8a16_linear, (2, 3, 8), {"rotation": torch.zeros(4, 4, 2)}, "rotation of"),
    (w8a16_linear, (2, 3, 8), {"rotated": 16}, "size"),
    (soft_capped_attention, (1, 3, 2), {"heads": 3}, "qkv of"),
    (soft_capped_attention, (1, 3, 2, 24), {}, "size"),
    (soft_capped_attention, (1, 3, 2), {"prefix_values": torch.zeros(2, 21, 32)}, "prefix_values of"),
]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("make", "size", "changes", "match"), REFUSED, ids=range(len(REFUSED)))
def test_refuses(
    make: Callable[..., Arguments], size: tuple[int, ...], changes: Arguments, match: str
) -> None:
    with pytest.raises(InvalidInput, match=match) as caught:
        run(make, {**make(*size), **changes})
    assert caught.value.hint


@pytest.mark.usefixtures("emulated")
def test_takes_no_other_arguments() -> None:
    with pytest.raises(TypeError, match="quantize_rows takes x, static_scale"):
        launch.quantize_rows(torch.zeros(1, 16), scale=None)
    with pytest.raises(TypeError, match="quantize_rows takes x, static_scale"):
        launch.quantize_rows(y=torch.zeros(1, 16))
