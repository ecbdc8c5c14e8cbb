"""The process's TF32 flag: off while anyone is inside, then as the caller had it."""

from __future__ import annotations

import pytest
import torch

from sana_edge.torch_runtime.device import full_precision


@pytest.mark.parametrize("allowed", [True, False])
def test_off_inside_and_restored(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    first, second = full_precision(), full_precision()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    # the other is still inside
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 is allowed
