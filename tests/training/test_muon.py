"""Muon in fp32 against torch's, and against the singular values."""

from __future__ import annotations

import copy

import pytest
import torch

from sana_edge.training.muon import Muon, orthogonalized

SHAPES = [(7, 7), (16, 40), (40, 16), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values(shape: tuple[int, int]) -> None:
    """All come near 1, as far as the quintic's fixed band of 0.68 to 1.13 allows; the axes stay."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = u * torch.linspace(0.2, 1, u.shape[1], dtype=torch.float64) @ v
    found = orthogonalized(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
    axes = u.T @ found @ v.T
    assert torch.diag(axes).min() > 0.6 and torch.diag(axes).max() < 1.25
    torch.testing.assert_close(axes, torch.diag(torch.diag(axes)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_those_of_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After three steps, from the state that torch's saved after the first; torch's too in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(1)
    start, grads = torch.randn(shape), torch.randn(3, *shape)
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    reference = torch.optim.Muon(
        [theirs], 0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = Muon([ours], 0.01, weight_decay=0.1)
    for i, grad in enumerate(grads):
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        reference.step()
        if i == 0:
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
            ours.data.copy_(theirs.data)
        else:
            assert optimizer.step(lambda: 3.0) == 3.0
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, start)


def test_parameters_without_gradients_stay() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    Muon([parameter], 0.1).step()
    assert parameter.eq(1).all()
