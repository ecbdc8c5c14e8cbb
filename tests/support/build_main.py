"""The command line with a stand-in for TensorRT, as a process of its own runs it."""

from __future__ import annotations

import fake_tensorrt

from sana_edge.cli.main import main as command_line
from sana_edge.engines.tensorrt import cuda as cuda_memory


def main() -> int:
    cuda = fake_tensorrt.make_cuda()
    trt = fake_tensorrt.make_trt(fake_tensorrt.TABLES["tensorrt"][-1], cuda)
    cuda_memory.load = {"tensorrt": trt, "cuda.bindings.runtime": cuda}.__getitem__  # type: ignore[assignment]
    return command_line()
