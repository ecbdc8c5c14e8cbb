"""Muon whose iteration runs in fp32 on CPUs, few of which multiply in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def orthogonalized(matrix: Tensor, polynomial: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the nearest matrix with orthogonal rows or columns, (M, N), in the matrix' own dtype.

    By quintic Newton-Schulz steps X <- aX + (bA + cA^2)X with A = X X^T, which bring the singular values
    to between about 0.7 and 1.2 (K. Jordan et al., "Muon", 2024).
    """
    a, b, c = polynomial
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with its rate matched to AdamW's (0.2 sqrt(max(M, N))).

    torch's own iterates in bf16, which takes ten times as long as fp32 on a CPU that has to emulate it. On
    other devices the step is torch's. The states of both are the same.
    """

    def __init__(self, params: Any, lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(
            params, lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all matrices; returns the closure's loss, if there is one."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return super().step(closure)  # type: ignore[no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        direction = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)
