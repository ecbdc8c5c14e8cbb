"""Energy and device memory while something runs, where the machine tells."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# seconds between looks at a GPU's memory
_PAUSE = 0.05


class Energy:
    """Joules that CPU packages (RAPL) and the GPU (NVML) took: of the whole machine, not of one process.

    ``missing`` says why one of them is not known.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml
        self.missing: list[str] = []
        self._packages = _packages(self.missing)
        if nvml is not None and _gpu_joules(nvml) is None:
            self._nvml = None
            self.missing.append("gpu: NVML does not tell the energy of this GPU")

    def read(self) -> dict[str, float]:
        """Joules on each counter so far; what cannot be read is left out."""
        found = {
            f"cpu {place.name}": joules for place in self._packages if (joules := _joules(place)) is not None
        }
        gpu = None if self._nvml is None else _gpu_joules(self._nvml)
        return {**found, **({} if gpu is None else {"gpu": gpu})}

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Joules of "cpu" and "gpu" since `read`; a counter that began again at 0 went through its range."""
        spent: dict[str, float] = {}
        for name, now in self.read().items():
            if name in before:
                part = now - before[name]
                if part < 0:
                    part += _range(POWERCAP / name.partition(" ")[2])
                spent[name.partition(" ")[0]] = spent.get(name.partition(" ")[0], 0.0) + part
        return spent


def _packages(missing: list[str]) -> list[Path]:
    """RAPL's domains of whole packages that this user may read."""
    found = [
        path for path in sorted(POWERCAP.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", path.name)
    ]
    named = [path for path in found if _text(path / "name").startswith("package")]
    readable = [path for path in named if _joules(path) is not None]
    if not named:
        missing.append("cpu: this system has no RAPL counters")
    elif len(readable) < len(named):
        missing.append(f"cpu: only root may read {named[0]}/energy_uj here")
        return []
    return readable


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _joules(domain: Path) -> float | None:
    text = _text(domain / "energy_uj")
    return int(text) / 1e6 if text.isdecimal() else None


def _range(domain: Path) -> float:
    text = _text(domain / "max_energy_range_uj")
    return int(text) / 1e6 if text.isdecimal() else 0.0


def nvml() -> Any:
    """NVIDIA's management library, started; None without its package, driver or GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        _handle(pynvml)
    except Exception:  # not only its own errors: a driver that does not load raises OSError
        return None
    return pynvml


def _handle(nvml: Any) -> Any:
    """The first GPU that this process may use."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0]
    return nvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)


def _gpu_joules(nvml: Any) -> float | None:
    # Volta and later count millijoules
    with suppress(Exception):
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(_handle(nvml))) / 1e3
    return None


class DeviceMemory:
    """The most bytes of a GPU that were in use above those at the beginning, looked at by a thread.

    Without NVML what torch has reserved; None where neither tells.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._nvml, self._most, self._before = nvml, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DeviceMemory:
        if self._nvml is not None:
            self._before = self._used()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    @property
    def most(self) -> int | None:
        """So far."""
        if self._nvml is not None:
            return max(self._most, self._used()) - self._before
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            return int(torch.cuda.max_memory_reserved())
        return None

    def _watch(self) -> None:
        while not self._ended.wait(_PAUSE):
            self._most = max(self._most, self._used())

    def _used(self) -> int:
        with suppress(Exception):
            return int(self._nvml.nvmlDeviceGetMemoryInfo(_handle(self._nvml)).used)
        return 0
