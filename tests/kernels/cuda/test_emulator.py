"""The emulator itself: emulator_kernels.cu against torch and against the PTX manual's fragments."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
THREADS = 128
# in the order of emulator_kernels.cu
MISTAKES = {
    "barrier missed": "not reached by all",
    "barrier left": "not reached by all",
    "lanes apart": "different collectives",
    "misaligned load": "not a multiple",
    "misaligned store": "not a multiple",
    "beyond shared": "not in shared memory",
    "before shared": "not in shared memory",
    "plain beyond": "beyond the shared memory",
    "copy read too soon": "on its way",
    "copy forgotten": "without having waited",
    "copy over read": "with no barrier between",
    "write, read": "with no barrier between",
    "read, write": "with no barrier between",
    "write, write": "with no barrier between",
    "write, read in a warp": "with no barrier between",
    "plain race": "with no barrier between",
}


class Call(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("kind", ctypes.c_int32),
    )


class Kernels:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded = ctypes.CDLL(str(path))

    def __call__(
        self, name: str, a: Tensor | None, b: Tensor | None, out: Tensor | None, count: int = 0, kind: int = 0
    ) -> None:
        pointers = (None if t is None else t.data_ptr() for t in (a, b, out))
        assert getattr(self._loaded, name)(ctypes.byref(Call(*pointers, count, kind))) == 0

    def shuffle(self, seed: int) -> None:
        self._loaded.sana_edge_emulator_shuffle(seed)

    def conflicts(self) -> tuple[int, int]:
        numbers = (ctypes.c_int64 * 6)()
        self._loaded.sana_edge_emulator_counters(numbers)
        return numbers[4], numbers[5]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels and emulator with the flags of csrc/compile.py and that which shows it plain accesses."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    spec = importlib.util.spec_from_file_location("csrc_compile", CSRC / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp("emulator") / "kernels.so"
    flags = [*module.EMULATED_FLAGS, "-fsanitize=thread", "-DSANA_EDGE_EMULATED=890", f"-I{CSRC}"]
    objects = []
    for source in (HERE / "emulator_kernels.cu", CSRC / "emulator" / "emulator.cpp"):
        objects.append(path.with_name(f"{source.stem}.o"))
        subprocess.run([compiler, *flags, "-x", "c++", "-c", source, "-o", objects[-1]], check=True)
    # what it would need of the compiler's own library must be in the emulator
    subprocess.run([compiler, "-shared", *objects, "-Wl,-z,defs", "-o", path], check=True)
    return path


@pytest.fixture(params=[0, 1], ids=["in order", "shuffled"])
def kernels(request: pytest.FixtureRequest, library: Path) -> Kernels:
    found = Kernels(library)
    found.shuffle(request.param)
    found.conflicts()
    return found


TYPES = [("half", torch.float16), ("bfloat16", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), TYPES, ids=["half", "bfloat16"])
def test_every_16_bit_number(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    out = torch.empty(2**16)
    kernels(f"{name}_to_float", numbers, None, out, 2**16)
    torch.testing.assert_close(out, numbers.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[~out.isnan()], numbers.float().signbit()[~out.isnan()])


def hostile_floats(dtype: torch.dtype) -> Tensor:
    """Bits at random; all 16-bit numbers, the middles between them (ties), and what is next to those."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].float().sort().values
    middles = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()
    infinite = torch.tensor(torch.inf)
    most = torch.tensor([65519.99, 65520.0, 65536.0, 3.4e38, torch.inf, torch.nan, 0.0, 1e-45, 2.0**-25])
    bits = torch.randint(-(2**31), 2**31, (50000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    beside = [torch.nextafter(middles, infinite), torch.nextafter(middles, -infinite)]
    return torch.cat([numbers, middles, *beside, most, -most, bits])


@pytest.mark.parametrize(("name", "dtype"), TYPES, ids=["half", "bfloat16"])
def test_rounds_as_torch(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    numbers = hostile_floats(dtype)
    out = torch.full((len(numbers),), torch.nan).to(dtype)
    kernels(f"float_to_{name}", numbers, None, out, len(numbers))
    expected = numbers.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    same = ~expected.isnan()
    assert torch.equal(out[same].view(torch.int16), expected[same].view(torch.int16))


def test_rounds_to_integers(kernels: Kernels) -> None:
    """Ties to even; NaN is 0, what is too large is the largest."""
    halves = torch.arange(-1000, 1000) / 2
    numbers = torch.cat([halves, torch.nextafter(halves, torch.tensor(9e9)), torch.randn(1000) * 1e6])
    numbers = torch.cat([numbers, torch.tensor([2.0**31, -(2.0**31), 1e38, -1e38, torch.inf, -torch.inf])])
    out = torch.empty(len(numbers) + 1, dtype=torch.int32)
    kernels("rounded", torch.cat([numbers, torch.tensor([torch.nan])]), None, out, len(out))
    expected = numbers.double().round().clamp(-(2**31), 2**31 - 1).to(torch.int32)
    assert torch.equal(out[:-1], expected)
    assert out[-1] == 0


# The PTX manual's "matrix fragments for mma": (row, column) of element i of a lane, of b (k, column).
# A lane's group is lane / 4, its place in it lane % 4.


def a_int8(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 if i in (0, 1, 2, 3, 8, 9, 10, 11) else lane // 4 + 8
    return row, lane % 4 * 4 + i % 4 + (16 if i >= 8 else 0)


def b_int8(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 4 + i % 4 + (16 if i >= 4 else 0), lane // 4


def a_16(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i in (2, 3, 6, 7) else 0), lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def b_16(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def sums_at(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def lanes(matrix: Tensor, place: object, count: int) -> Tensor:
    """What the lanes have of a matrix: (32, count)."""
    assert callable(place)
    rows = [[matrix[place(lane, i)] for i in range(count)] for lane in range(32)]
    return torch.stack([torch.stack(row) for row in rows]).contiguous()


def test_fragments_cover_their_matrices() -> None:
    for place, count, shape in (
        (a_int8, 16, (16, 32)),
        (b_int8, 8, (32, 8)),
        (a_16, 8, (16, 16)),
        (b_16, 4, (16, 8)),
        (sums_at, 4, (16, 8)),
    ):
        found = {place(lane, i) for lane in range(32) for i in range(count)}
        assert found == set(itertools.product(range(shape[0]), range(shape[1])))


def test_int8_product(kernels: Kernels) -> None:
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((16, 32), (32, 8)))
    start = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)
    out = lanes(start, sums_at, 4)
    kernels("int8_product", lanes(a, a_int8, 16), lanes(b, b_int8, 8), out)
    assert torch.equal(out, lanes(start + a.int() @ b.int(), sums_at, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_product_of_16_bits(kernels: Kernels, dtype: torch.dtype) -> None:
    """Of small integers, whose sums are exact."""
    a, b = (torch.randint(-9, 10, shape).to(dtype) for shape in ((16, 16), (16, 8)))
    start = torch.randint(-99, 100, (16, 8)).float()
    out = lanes(start, sums_at, 4)
    kind = 1 if dtype == torch.float16 else 2
    kernels("product_of_16_bits", lanes(a, a_16, 8), lanes(b, b_16, 4), out, kind=kind)
    assert torch.equal(out, lanes(start + a.float() @ b.float(), sums_at, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_loads_matrices(kernels: Kernels, transposed: bool) -> None:
    """Four 8x8 matrices, their rows anywhere; lane l gets 2 neighbours of row l / 4 of each."""
    matrices = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    places = torch.randperm(40)[:32].to(torch.int32)
    memory = torch.zeros(40, 8, dtype=torch.int16)
    memory[places.long()] = matrices.view(32, 8)
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    kernels("matrices", memory, places * 16, out, memory.numel() * 2, int(transposed))
    given = matrices.transpose(1, 2) if transposed else matrices
    for lane, i, element in itertools.product(range(32), range(4), range(2)):
        assert out[lane, i, element] == given[i, lane // 4, lane % 4 * 2 + element]


@pytest.mark.parametrize(
    ("stride", "expected"), [(128, 4 * 7), (64, 4 * 3), (32, 4 * 1), (16, 0), (144, 0), (80, 0), (0, 0)]
)
def test_counts_bank_conflicts(kernels: Kernels, stride: int, expected: int) -> None:
    """Rows of 16 bytes: 8 of them fill the 128 bytes of the banks; all 8 in one bank take 7 cycles more."""
    places = torch.arange(32, dtype=torch.int32) * stride
    memory = torch.zeros(32 * 144, dtype=torch.uint8)
    kernels("matrices", memory, places, torch.empty(32, 4, dtype=torch.int32), len(memory))
    assert kernels.conflicts() == (4, expected)


def test_shuffles(kernels: Kernels) -> None:
    given = torch.randn(32)
    source = torch.randint(0, 32, (32,), dtype=torch.int32)
    out = torch.empty(32)
    kernels("shuffled", given, source, out)
    assert torch.equal(out, given[source.long()])
    for lane in (1, 2, 4, 8, 16, 31):
        kernels("shuffled", given, None, out, kind=lane)
        assert torch.equal(out, given[torch.arange(32) ^ lane])


def test_reductions_of_a_warp(kernels: Kernels) -> None:
    given = torch.randn(32)
    out = torch.empty(32)
    kernels("reduced", given, None, out, kind=1)
    # of magnitudes
    assert torch.equal(out, given.abs().max().expand(32))
    kernels("reduced", given, None, out, kind=0)
    tree = given.numpy()
    for step in (16, 8, 4, 2, 1):
        tree = tree + tree[np.arange(32) ^ step]
    assert torch.equal(out, torch.from_numpy(tree))
    given[7] = torch.nan
    kernels("reduced", given, None, out, kind=1)
    assert out.isnan().all()


def test_order_shows_a_missing_barrier(library: Path) -> None:
    """Through memory of the GPU, whose accesses are not watched, as those of shared memory are."""
    expected = (torch.arange(THREADS, dtype=torch.int32) + 37) % THREADS
    kernels = Kernels(library)
    for seed in range(3):
        kernels.shuffle(seed)
        for barrier in (0, 1):
            out = torch.full((THREADS,), -1, dtype=torch.int32)
            kernels("exchange", None, None, out, kind=barrier)
            assert torch.equal(out, expected) == bool(barrier)


def test_shared_memory_starts_as_nan(kernels: Kernels) -> None:
    out = torch.zeros(3 * THREADS)
    kernels("first_sight", None, None, out, 3 * THREADS)
    assert out.isnan().all()


@pytest.mark.parametrize("partly", [False, True])
def test_asynchronous_copies(kernels: Kernels, partly: bool) -> None:
    given = torch.randn(2, 32, 4)
    out = torch.full_like(given, torch.nan)
    kernels("copies", given, None, out, kind=int(partly))
    if partly:
        given[:, 1::2] = 0
    assert torch.equal(out, given)


def mistake(library: Path, number: int, seed: int) -> subprocess.CompletedProcess[str]:
    """What a process says that runs it: without torch, since it begins quickly."""
    program = f"""
import ctypes
class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "out")]
    _fields_ += [(name, ctypes.c_int32) for name in ("count", "kind")]
library = ctypes.CDLL({str(library)!r})
library.sana_edge_emulator_shuffle({seed})
memory = (ctypes.c_char * 4096)()
at = (ctypes.addressof(memory) + 63) // 64 * 64
print(library.mistake(ctypes.byref(Call(at, at, at, {16 * THREADS}, {number}))))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_right_passes(library: Path, seed: int) -> None:
    done = mistake(library, 0, seed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_the_process(library: Path, name: str) -> None:
    number = list(MISTAKES).index(name) + 1
    for seed in (0, 1):
        done = mistake(library, number, seed)
        assert done.returncode != 0, name
        assert MISTAKES[name] in done.stderr
        assert "emulator: block (0, 0, 0), thread" in done.stderr


def test_pytest_shows_the_last_words(library: Path, tmp_path: Path) -> None:
    """Without -s, though the process ends in the middle of a test."""
    program = f"""
import ctypes
def test_mistake():
    library = ctypes.CDLL({str(library)!r})
    class Call(ctypes.Structure):
        _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "out")]
        _fields_ += [(name, ctypes.c_int32) for name in ("count", "kind")]
    memory = (ctypes.c_char * 4096)()
    at = (ctypes.addressof(memory) + 63) // 64 * 64
    library.mistake(ctypes.byref(Call(at, at, at, {16 * THREADS}, 1)))
"""
    (tmp_path / "test_it.py").write_text(program)
    paths = [str(HERE.parents[2]), str(HERE.parents[1]), str(HERE.parents[1] / "support")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", str(tmp_path / "test_it.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "emulator: block (0, 0, 0), thread" in done.stderr
