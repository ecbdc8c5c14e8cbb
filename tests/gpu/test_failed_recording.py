"""A failed recording on a GPU, in a process of its own: torch stays half in capture."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SCRIPT = """
import torch
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.cuda_graph import CudaGraphs, StepGraph

with torch.inference_mode():
    x = torch.ones(1 << 20, device="cuda")
    whole = CudaGraphs()(lambda: x * 3)
    before = torch.cuda.current_stream()
    # waits for the device, which nothing that is recorded may
    loop = StepGraph(lambda step, prompt: step[0] * x.sum().item(), [x], [], CudaGraphs())
    assert "without a CUDA graph" in loop.note, loop.note
    assert torch.cuda.current_stream() == before
    assert cuda_graph.refusal().startswith("a capture failed in this process"), cuda_graph.refusal()
    assert loop([x])[0].item() == 1 << 20
    # what was recorded before goes on
    assert whole()[0].item() == 3
    later = StepGraph(lambda step, prompt: step[0] + 1, [x], [], CudaGraphs())
    assert cuda_graph.refusal() in later.note
    assert later([x]).sum().item() == 2 << 20
"""


def test_a_failed_recording_leaves_the_device_usable() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
