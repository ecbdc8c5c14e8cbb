"""GPUs as the model of the time knows them: data sheets, and what is assumed of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sana_edge.kernels.cuda.library import DeviceInfo

_KIB = 1024
# all that is assumed, by name; csrc/tile_times.h has the rates of products and of L2
ASSUMPTIONS = {
    "clock": "the sustained clock of each GPU under INT8 load, at the named power; +-15 %",
    "l2": "bytes that an SM gets from L2 in a clock: 16 on 8.6, 8.9 and 12.0, 28 on 9.0",
    "dram": "0.85 of the data sheet's bandwidth is reached",
    "hits": "maps are in L2 as far as half of it holds a kernel's; weights always come from DRAM",
    "gap": "1.2 us from the end of a kernel in a CUDA graph to the work of the next; 0.5 us from 9.0 on, "
    "where our kernels take their place while the one before them ends",
    "latency": "1,500 clocks of waiting in a kernel that is not a product: memory, reductions, barriers",
    "issue": "a scheduler with w warps issues in w of w + 1 clocks; special functions take 8 of a warp",
    "limits": "limits near each other slow each other: their 4-norm",
    "loops": "of a kernel's machine code the largest loop runs as often as sizes say, all else once",
    "host": "7 us of the host for an operation that is not in a graph, if the GPU is not the slower",
    "graph": "15 us of the host to start what is recorded",
    "synchronisation": "60 us of the host to wait for a stage, of steps only where they are not queued",
}
DRAM, LATENCY, HOST, GRAPH, SYNCHRONISATION = 0.85, 1500, 7e-6, 15e-6, 60e-6
_GAP, _EARLY_GAP = 1.2e-6, 0.5e-6


@dataclass(frozen=True)
class Gpu:
    """clock: GHz, assumed; power: W; bandwidth: GB/s and l2: MB of the data sheet; half: multiply-adds of 16
    bit with fp32 sums per clock and SM, by mma.sync; shared: KiB that a block can have."""

    name: str
    capability: int
    processors: int
    clock: float
    power: int
    bandwidth: float
    l2: float
    half: int
    shared: int = 99

    @property
    def device(self) -> DeviceInfo:
        """What the library would be told of it."""
        return DeviceInfo(self.capability, self.processors, self.shared * _KIB)

    def gap(self, early: bool) -> float:
        """Seconds between two kernels, of which the second may begin early."""
        return _EARLY_GAP if early and self.capability >= 90 else _GAP

    @property
    def hertz(self) -> float:
        return self.clock * 1e9

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


GPUS = (
    Gpu("RTX 3060 Laptop", 86, 30, 1.60, 115, 336, 3, 256),
    Gpu("RTX 4060 Laptop", 89, 24, 2.30, 110, 256, 32, 256),
    Gpu("RTX 4090 Laptop", 89, 76, 2.04, 150, 576, 64, 256),
    Gpu("RTX 5090 Laptop", 120, 82, 2.01, 140, 896, 64, 256),
    Gpu("H200", 90, 132, 1.755, 700, 4800, 50, 1280, 227),
)
