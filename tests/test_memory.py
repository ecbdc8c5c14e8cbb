"""How much memory is free: what the system says, within the limits of a control group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana_edge import memory

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       16000 kB\nMemAvailable:   8000 kB\nHugePages_Free:    0\n"
V1 = {"memory/memory.limit_in_bytes": "3000000", "memory/memory.usage_in_bytes": "1000000"}
V2 = {"memory.max": "3000000\n", "memory.current": "1000000\n"}
CASES: dict[str, tuple[dict[str, str], int | None]] = {
    "unknown": ({}, None),
    "no-group": ({"meminfo": MEMINFO}, 8_192_000),
    "v2": ({"meminfo": MEMINFO, **V2}, 2_000_000),
    "v2-alone": (V2, 2_000_000),
    "v2-files-read": ({**V2, "memory.stat": "anon 7\ninactive_file 300\nactive_file 50\n"}, 2_000_350),
    "v2-unlimited": ({"meminfo": MEMINFO, **V2, "memory.max": "max\n"}, 8_192_000),
    "v2-used-up": ({"meminfo": MEMINFO, **V2, "memory.current": "3000001"}, 0),
    "v2-larger": ({"meminfo": MEMINFO, **V2, "memory.max": "900000000"}, 8_192_000),
    "v1": ({"meminfo": MEMINFO, **V1}, 2_000_000),
    "v1-files-read": ({**V1, "memory/memory.stat": "cache 9\ntotal_inactive_file 300\n"}, 2_000_300),
    "v1-unlimited": (
        {"meminfo": MEMINFO, **V1, "memory/memory.limit_in_bytes": f"{2**63 - 4096}"},
        8_192_000,
    ),
}


@pytest.mark.parametrize(("files", "free"), CASES.values(), ids=CASES)
def test_free_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int | None
) -> None:
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_memory(CPU) == free


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_free_here_is_plausible() -> None:
    free = memory.available_memory(CPU)
    assert free is not None and 1 << 26 < free < 1 << 44
    assert memory.available_memory(torch.device("meta")) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_this_program_s_own() -> None:
    # 1 GiB of pages that this process has touched
    ballast = bytearray(b"\1") * (1 << 30)
    code = "import torch; from sana_edge.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ballast) == 1 << 30
    assert 1 << 24 < int(done.stdout) < 1 << 30
