"""Keys and values of all layers as one product: the same numbers, whatever becomes of the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_denoiser import CONFIG
from torch import Tensor

from sana_edge.int8.linear import Linear, W8A8Linear
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_denoiser
from sana_edge.nets.text_context import TextContext, lay_together, projected, stacked
from sana_edge.nets.text_encoder import TextFeatures

TYPES = [torch.float32, torch.bfloat16]


def random_denoiser(dtype: torch.dtype, **changed: Any) -> Denoiser:
    denoiser = Denoiser(replace(CONFIG, num_layers=3, **changed)).requires_grad_(False).eval()
    for parameter in denoiser.parameters():
        parameter.normal_(std=0.3)
    return denoiser.to(dtype)


def readers(denoiser: Denoiser) -> list[Linear]:
    return [denoiser.get_submodule(f"blocks.{n}.cross_kv") for n in range(3)]  # type: ignore[misc]


def features(*lengths: int) -> TextFeatures:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(len(lengths), max(lengths), 40), mask.flip(1))


def tensors(context: TextContext) -> list[Tensor]:
    found: list[Tensor | None] = []
    for layer in context.layers:
        for group in layer:
            found += [group.output] if isinstance(group, Constant) else [group.keys, group.values, group.mask]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_one_product_makes_the_same_numbers(dtype: torch.dtype, qk_norm: str | None) -> None:
    denoiser = random_denoiser(dtype, qk_norm=qk_norm)
    groups = [features(1), features(9), features(3, 7)]
    apart = denoiser.text_context(groups)
    lay_together(readers(denoiser), "cpu", dtype)
    together = denoiser.text_context(groups)
    for ours, expected in zip(tensors(together), tensors(apart), strict=True):
        assert torch.equal(ours, expected)
    if qk_norm is None:
        # and no copy is made where all layers' are wanted
        keys = [layer[1].keys for layer in together.layers if isinstance(layer[1], KeysValues)]
        assert stacked(keys).data_ptr() == keys[0].data_ptr()


def products(layers: list[Linear], x: Tensor) -> int:
    """How many there are: what one product made lies in one memory."""
    return len({made.untyped_storage().data_ptr() for made in projected(layers, x)})


def test_weights_that_lie_elsewhere_are_multiplied_one_by_one() -> None:
    denoiser, x = random_denoiser(torch.bfloat16), torch.randn(2, 5, 64).to(torch.bfloat16)
    layers = readers(denoiser)
    assert products(layers, x) == 3
    lay_together(layers, "cpu", torch.bfloat16)
    assert products(layers, x) == 1
    # of another dtype than the weights: all of them would be converted at once
    assert products(layers, x.float()) == 3
    # what writes into a weight is seen, what replaces one, too
    layers[1].weight.zero_()
    assert products(layers, x) == 1
    assert torch.equal(projected(layers, x)[1], layers[1].bias.expand(2, 5, -1))
    layers[1].weight.data = torch.ones_like(layers[1].weight)
    assert products(layers, x) == 3
    assert torch.equal(projected(layers, x)[1], layers[1](x))
    lay_together(layers, "cpu", torch.bfloat16)
    # as Module.to leaves them
    denoiser.to(torch.float32)
    assert products(layers, x.float()) == 3


def test_who_observes_or_trains_sees_each_layer() -> None:
    layers, x, seen = readers(random_denoiser(torch.float32)), torch.randn(1, 4, 64), list[Tensor]()
    lay_together(layers, "cpu", torch.float32)
    layers[2].observer = seen.append
    assert products(layers, x) == 1 and len(seen) == 1 and seen[0] is x
    for layer in layers:
        layer.requires_grad_(True)
    torch.stack(list(projected(layers, x))).sum().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.any() for layer in layers)


@pytest.mark.parametrize(
    ("dtype", "stored", "held"),
    [
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_computing_elsewhere_costs_no_memory(
    dtype: torch.dtype, stored: torch.dtype, held: torch.dtype
) -> None:
    """What runs once is cast while it is loaded, but to what is larger; then it is one product."""
    with torch.device("meta"):
        denoiser = Denoiser(CONFIG).requires_grad_(False)
        quantize = {name: layer for name, layer in denoiser.named_modules() if name.endswith("cross_q")}
        for name, layer in quantize.items():
            denoiser.set_submodule(name, W8A8Linear(layer.in_features, layer.out_features))  # type: ignore[arg-type]
    denoiser.to(stored).to_compute("meta", dtype)
    cold = [denoiser.modulate, denoiser.caption_mix, denoiser.time.expand, *denoiser.blocks[0].children()]
    assert {layer.weight.dtype for layer in cold if isinstance(layer, Linear)} <= {held, dtype}
    assert denoiser.modulate.weight.dtype == denoiser.get_submodule("blocks.1.cross_kv").weight.dtype == held
    layers = [denoiser.get_submodule(f"blocks.{n}.cross_kv") for n in range(2)]
    one = held == dtype
    assert (layers[1].weight.storage_offset() == layers[0].weight.numel()) == one  # type: ignore[operator]
    assert layers[0].weight.untyped_storage().nbytes() == (2 if one else 1) * 128 * 64 * held.itemsize  # type: ignore[operator]


def test_an_int8_denoiser_reads_the_same() -> None:
    """Constants go on through an INT8 layer of their own."""
    denoiser = random_denoiser(torch.float32)
    quantize_denoiser(denoiser)
    denoiser.to_compute("cpu", torch.bfloat16)
    for layer in readers(denoiser):
        layer.to(torch.bfloat16)
    text = [features(1), features(5)]
    apart = denoiser.text_context(text)
    lay_together(readers(denoiser), "cpu", torch.bfloat16)
    for ours, expected in zip(tensors(denoiser.text_context(text)), tensors(apart), strict=True):
        assert torch.equal(ours, expected)
