"""Libraries that cannot be used: what is refused, with which reason, and what `sana-edge doctor` makes of it.

The libraries are stand-ins in C, of which every one has something wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sana_edge.cli import doctor
from sana_edge.errors import SanaError, UnsupportedDevice
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.operations import OPERATIONS

GPU = torch.device("cuda", 0)
AGAIN = "install sana-edge again, or in a checkout: make cuda"
SOURCE = """
int sana_edge_abi(void) { return ABI; }
int sana_edge_emulated(void) { return 0; }
const char *sana_edge_version(void) { return "9.9"; }
const char *sana_edge_architectures(void) { return ARCHITECTURES; }
const char *sana_edge_status_text(int status) { return status == 7 ? "no GPU" : "something else"; }
int sana_edge_device(int device, int *out) {
  out[0] = CAPABILITY, out[1] = out[2] = 1;
  return DEVICE + 0 * device;
}
"""
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds a library of these properties and gives it to `cuda_library`."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")

    def build(
        abi: int = library.ABI,
        device: int = 0,
        capability: int = 89,
        architectures: str = "75 80 86 89 90 ptx90 120",
        without: tuple[str, ...] = (),
    ) -> Path:
        names = [name for name in OPERATIONS if name not in without]
        # each answers what sana_edge_device does
        lines = [
            f"int sana_edge_{name}(void *a, void *b) {{ return a == b ? 0 : DEVICE; }}" for name in names
        ]
        (tmp_path / "library.c").write_text("\n".join([SOURCE, *lines]))
        path = tmp_path / f"library{len(list(tmp_path.iterdir()))}.so"
        values = {
            "ABI": abi,
            "DEVICE": device,
            "CAPABILITY": capability,
            "ARCHITECTURES": f'"{architectures}"',
        }
        flags = [f"-D{name}={value}" for name, value in values.items()]
        command = [compiler, "-shared", "-fPIC", *flags, str(tmp_path / "library.c"), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        use(path, monkeypatch)
        return path

    yield build
    library.load.cache_clear()


def use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, str(path))
    library.load.cache_clear()


def refused() -> str:
    """What `doctor` says of the library."""
    backend = doctor.backends()[0]
    assert backend.name == "cuda kernels" and not backend.usable
    return backend.detail


def test_one_that_suits(make: Make) -> None:
    make()
    assert library.refusal(GPU) == ""
    assert library.refusal(torch.device("cpu")) == "the CUDA kernels run on cuda, not on cpu"


def test_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path / "libsana_edge_cuda.so", monkeypatch)
    text = f"the CUDA library was not built: no {tmp_path / 'libsana_edge_cuda.so'}"
    assert library.refusal(GPU) == text
    assert refused().startswith(f"{text}; ")


def test_another_interface(make: Make) -> None:
    path = make(abi=library.ABI + 1)
    ours = library.ABI
    text = f"the CUDA library {path} has interface {ours + 1}, this sana-edge needs {ours}"
    assert library.refusal(GPU) == text
    assert refused() == f"{text}; {AGAIN}"


def test_truncated(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make()
    whole = path.read_bytes()
    for size in (0, 20, 100, 5000, len(whole) - 1):
        # a new file each time: one that a process has loaded must not be cut
        cut = path.with_name(f"cut{size}.so")
        cut.write_bytes(whole[:size])
        use(cut, monkeypatch)
        text = library.refusal(GPU)
        assert text.startswith("the CUDA library does not load: ") and str(cut) in text
        assert refused() == f"{text}; {AGAIN}"


def test_another_program(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    (tmp_path / "library.c").write_text("int another;")
    path = tmp_path / "another.so"
    subprocess.run(["cc", "-shared", str(tmp_path / "library.c"), "-o", str(path)], check=True)
    use(path, monkeypatch)
    text = library.refusal(GPU)
    assert (
        text.startswith("the CUDA library does not load: ") and "undefined symbol: sana_edge_version" in text
    )


def test_lacks_an_operation(make: Make) -> None:
    path = make(without=("w8a8_linear", "quantize_rows"))
    text = f"the CUDA library {path} lacks quantize_rows, w8a8_linear"
    assert library.refusal(GPU) == text
    assert refused() == f"{text}; {AGAIN}"


@pytest.mark.parametrize("status", [7, 8, 6])
def test_no_device(make: Make, status: int) -> None:
    make(device=status)
    text = "sana_edge_device: no GPU" if status == 7 else "sana_edge_device: something else"
    assert library.refusal(GPU) == text
    if not torch.cuda.is_available():
        assert refused() == f"{text} (9.9 for 75 80 86 89 90 ptx90 120)"


def test_code_for_other_gpus(make: Make) -> None:
    make(architectures="89", capability=86)
    text = "the CUDA library is built for 89, not for compute capability 8.6"
    assert library.refusal(GPU) == text


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("75 80 86 89 90 ptx90 120", 75, True),
        ("75 80 86 89 90 ptx90 120", 87, True),
        ("75 80 86 89 90 ptx90 120", 100, True),
        ("75 80 86 89 90 ptx90 120", 121, True),
        ("75 80 86 89 90 ptx90 120", 130, True),
        ("75 80 86 89 90 ptx90 120", 72, False),
        ("80", 90, False),
        ("80 ptx80", 90, True),
        ("120", 100, False),
        ("89", 86, False),
        ("75 ptx75", 75, True),
        ("75 ptx75", 80, False),
        ("75 ptx75", 120, False),
    ],
)
def test_which_gpus_run_which_code(architectures: str, capability: int, expected: bool) -> None:
    assert library.covers(architectures, capability) == expected


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_device_without_number_is_the_current_one(
    name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    asked: list[int] = []
    device = library.Library.device
    monkeypatch.setattr(
        library.Library, "device", lambda self, index: asked.append(index) or device(self, index)
    )
    assert library.refusal(torch.device(name)) == ""
    assert asked == [3 if name == "cuda" else 0]


def test_a_device_without_number_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "current_device", fails)
    assert library.index_of(torch.device("cuda")) == library.index_of(torch.device("cpu")) == 0


def test_device_lost(make: Make) -> None:
    make(device=10)
    with pytest.raises(SanaError, match="something else") as caught:
        library.load().device(0)
    assert caught.value.hint == "start the program again"
    assert not isinstance(caught.value, UnsupportedDevice)
