"""Every fused operation of a backend against its definition in torch, at a model's widths, twice.

What torch allocates is NaN before it is written. An operation that fails is recorded, and
the others go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.operation_cases import Maker, results
from gpu.steps import Setting
from harness.results import write_json
from sana_edge.errors import SanaError
from sana_edge.fused import ops

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# an emulator takes its time
DTYPES = {"cuda": tuple(ROUNDING), "cpu": (torch.float16,)}
SIZES = {"cuda": (24, 41), "cpu": (3, 5)}


def compare(found: list[Tensor], wanted: list[Tensor], unit: float) -> float:
    """The largest error in shares of what is allowed; at most 1 is right, infinite where shapes differ.

    Of 16-bit and fp32 results the relative L2, allowed two roundings: one of a factor on the way, one of the
    result. Of INT8 a level, where a number lies in the middle of two; a factor rounded on the way moves a
    number at 40 levels, the mean of normal numbers, by 40 roundings of a level, and so many numbers change:
    25 % more is allowed, and one number in 1000, for the order of sums in fp32.
    """
    worst = 0.0
    for result, expected in zip(found, wanted, strict=True):
        if result.shape != expected.shape or result.dtype != expected.dtype:
            return float("inf")
        if result.dtype == torch.int8:
            levels = (result.int() - expected.int()).abs()
            share = float(levels.float().mean()) / (50 * unit + 1e-3)
            error = max(share, float(levels.max() > 1) * 2)
        else:
            distance = (result.double() - expected.double()).norm() / expected.double().norm()
            error = float(distance) / (2 * unit)
        # NaN is the largest
        worst = error if not error <= worst else worst
    return worst


def checked(make: Maker, name: str, backend: str) -> dict[str, Any]:
    """One operation in one dtype: its error, and whether a second call gives the same bytes."""
    row: dict[str, Any] = {"operation": name, "dtype": str(make.dtype).removeprefix("torch.")}
    try:
        found = results(make, name, backend)
        again = results(make, name, backend)
        error = compare(found, results(make, name, "torch"), ROUNDING[make.dtype])
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    # Triton raises what it likes, and the next operation is worth a try
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        return {**row, "passed": False, "reason": f"{type(problem).__name__}: {reason}"[:300]}
    reason = "" if error <= 1 else f"error of {error:.3g} times what is allowed"
    reason = reason or ("" if same else "a second call gives other bytes")
    return {**row, "passed": not reason, "error": round(error, 4), "same": same, "reason": reason}


def check(setting: Setting, output: Path, backend: str) -> None:
    """All operations; writes as it goes.

    Raises:
        SanaError: one is wrong.
    """
    device, shapes = torch.device(setting.device), setting.shapes
    # torch.empty gives NaN, and the definitions are in fp32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES[device.type]:
        make = Maker(shapes, dtype, device, SIZES[device.type])
        for name in ops.OPERATIONS:
            if backend == "triton" and name in ops.CUDA_ONLY:
                continue
            rows.append(checked(make, name, backend))
            print(rows[-1], flush=True)
            wrong = [row for row in rows if not row["passed"]]
            figure = f"{len(rows) - len(wrong)} of {len(rows)} right"
            figure += "".join(
                f"; {row['operation']} {row['dtype']}: {row['reason'][:80]}" for row in wrong[:2]
            )
            write_json(output, {"figure": figure, "backend": backend, "operations": rows})
    if wrong:
        raise SanaError(figure, "the first that is wrong comes first")
