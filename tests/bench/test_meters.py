"""Energy and device memory, on counters that are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sana_edge.bench import machine, meters
from sana_edge.bench.meters import DeviceMemory, Energy


def _domain(powercap: Path, number: str, name: str, joules: float, most: float = 1000) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{int(most * 1e6)}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(meters, "POWERCAP", tmp_path / "powercap")
    return tmp_path / "powercap"


def test_packages_are_added_and_counters_wrap(powercap: Path) -> None:
    first, second = _domain(powercap, "0", "package-0", 10), _domain(powercap, "1", "package-1", 990)
    # a part of the first, and the whole board: both would count twice
    _domain(powercap, "0:0", "core", 5)
    _domain(powercap, "2", "psys", 5)
    energy = Energy()
    before = energy.read()
    assert set(before) == {"cpu intel-rapl:0", "cpu intel-rapl:1"} and not energy.missing
    (first / "energy_uj").write_text("30500000\n")
    (second / "energy_uj").write_text("15000000\n")
    # 20.5, and 10 up to the end of the range with 15 after it
    assert energy.since(before) == {"cpu": pytest.approx(45.5)}


def test_no_counters(powercap: Path) -> None:
    energy = Energy()
    assert energy.read() == {} and energy.since({}) == {}
    assert energy.missing == ["cpu: this system has no RAPL counters"]


def test_counters_that_only_root_may_read(powercap: Path) -> None:
    folder = _domain(powercap, "0", "package-0", 10)
    (folder / "energy_uj").unlink()
    energy = Energy()
    assert energy.read() == {} and "only root may read" in energy.missing[0]


class _Nvml:
    """What of NVML is asked for."""

    def __init__(self, joules: float | None = 1.0, used: int = 100) -> None:
        self.joules, self.used = joules, used

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if self.joules is None:
            raise RuntimeError("Not Supported")
        return int(self.joules * 1e3)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=self.used)


def test_a_gpu(powercap: Path) -> None:
    library = _Nvml()
    energy = Energy(library)
    before = energy.read()
    library.joules = 31.0
    assert energy.since(before) == {"gpu": 30.0}
    assert any("does not tell the energy of this GPU" in text for text in Energy(_Nvml(joules=None)).missing)


def test_memory_of_a_gpu() -> None:
    library = _Nvml(used=100)
    with DeviceMemory(library) as device:
        library.used = 700
        assert device.most == 600


def test_without_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert meters.nvml() is None


@pytest.mark.parametrize(
    ("battery", "source", "charge"),
    [
        (SimpleNamespace(power_plugged=False, percent=62.7), "battery", 63),
        (SimpleNamespace(power_plugged=True, percent=100), "mains", 100),
        (None, None, None),
    ],
)
def test_power(
    battery: Any, source: str | None, charge: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(machine, "_POWERCAP", tmp_path)
    assert machine.power()["limit_w"] is None
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "constraint_0_power_limit_uw").write_text("28000000\n")
    found = machine.power()
    assert (found["source"], found["charge"], found["limit_w"]) == (source, charge, 28.0)
