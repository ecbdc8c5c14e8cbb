"""Whether Triton can run on a device, and why not; imports no Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

# its INT8 dot product needs Ampere's tensor cores
_LEAST = (8, 0)


def refusal(device: torch.device) -> str:
    """Why Triton's kernels cannot run on a device; empty where they can.

    On a CPU they do in Triton's interpreter, where ``TRITON_INTERPRET=1`` was set before it was imported.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'sana-edge[triton]'"
    if device.type != "cuda":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else f"the Triton kernels run on cuda, not on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        ""
        if (major, minor) >= _LEAST
        else f"Triton needs compute capability 8.0, the device has {major}.{minor}"
    )
