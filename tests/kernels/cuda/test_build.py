"""The CUDA library as nvcc makes it, for every architecture: spills, tensor cores, symbols; that it loads.

No GPU is needed. SANA_EDGE_CUDA_FOLDER keeps what was built, so that the next run compiles only what changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import sana_edge
from sana_edge.kernels.cuda import library as cuda_library
from sana_edge.kernels.cuda.operations import OPERATIONS

CSRC = Path(__file__).parents[3] / "csrc"
MACHINE_CODE = ("75", "80", "86", "89", "90", "120")
PRODUCTS = ("w8a8_linear", "w8a8_linear_quantize", "qkv_linear_attention", "w8a8_conv2d")
# what Turing multiplies at a time, and what the others do: m8n8k16, m16n8k32
INSTRUCTIONS = {"75": "IMMA.8816.S8.S8"}
LATER = "IMMA.16832.S8.S8"
OPERATIONS_OF = {"w8a8_linear": 0, "w8a8_linear_quantize": 1}
# bytes that a kernel other than the products may write and read again; a large array would be more
FEW = 512
# behind the product a lane of w8a8_linear_quantize has 72 numbers of a row: one kernel of six, with 128 x 128
# on 9.0, keeps 6 words in memory, written and read once
TAIL_SPILLS = 48
# w8a8_conv2d in bf16 with 128 x 128 on 7.5, which has no instructions for bf16: rounding takes registers that
# the sums leave none of; bytes written or read, behind the product
TURING_CONVOLUTION_SPILLS = 640
NO_DEVICE, OLD_DRIVER = 7, 8


@dataclass(frozen=True)
class Usage:
    """What ptxas tells of a kernel."""

    architecture: str
    kernel: str
    registers: int
    stack: int
    spilled: int


@pytest.fixture(
    scope="module",
    params=[
        # laptops' own, in a seventh of the time
        pytest.param(("89",), id="89", marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param(MACHINE_CODE, id="all", marks=pytest.mark.slow),
    ],
)
def architectures(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture(scope="module")
def folder(architectures: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With libsana_edge_cuda.so, and beside it what it was made from."""
    nvcc = shutil.which("nvcc")
    if nvcc is None and not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ):
        pytest.skip("no nvcc")
    kept = os.environ.get("SANA_EDGE_CUDA_FOLDER")
    place = Path(kept, "-".join(architectures)) if kept else tmp_path_factory.mktemp("cuda")
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(CSRC / "compile.py"), "--output", str(place / "libsana_edge_cuda.so")]
    environment = {**os.environ, "SANA_EDGE_CUDA_ARCHS": ";".join(architectures)}
    if architectures == MACHINE_CODE:
        # what a wheel is built for
        del environment["SANA_EDGE_CUDA_ARCHS"]
    done = subprocess.run(
        [*command, "--objects", str(place)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return folder / "libsana_edge_cuda.so"


def usage(log: str) -> list[Usage]:
    """Of every kernel that a log of `nvcc -Xptxas -v` tells of."""
    entry = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'(.*?)Used (\d+) registers", re.DOTALL)
    properties = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    found = []
    for kernel, architecture, text, registers in entry.findall(log):
        frames = [tuple(map(int, numbers)) for numbers in properties.findall(text)]
        assert frames, f"ptxas told nothing of {kernel}"
        stack = max(frame[0] for frame in frames)
        found.append(
            Usage(architecture, kernel, int(registers), stack, sum(sum(frame[1:]) for frame in frames))
        )
    return found


def test_log_is_understood() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_75'
ptxas info    : Function properties for _Z1aPf
    40 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_120'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 85 registers, used 1 barriers"""
    assert usage(log) == [Usage("75", "_Z1aPf", 255, 40, 28), Usage("120", "_Z1bPf", 85, 0, 0)]


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_no_kernel_spills(folder: Path, architectures: tuple[str, ...], operation: str) -> None:
    """Neither spills nor arrays in memory: what a kernel indexes is unrolled."""
    kernels = usage((folder / f"{operation}.log").read_text())
    assert {kernel.architecture for kernel in kernels} == set(architectures)

    def allowed(kernel: Usage) -> int:
        if operation == "w8a8_linear_quantize":
            return TAIL_SPILLS
        if operation == "w8a8_conv2d" and kernel.architecture == "75" and "BFloat16" in kernel.kernel:
            return TURING_CONVOLUTION_SPILLS
        return 0 if operation in (*PRODUCTS, "dwconv_glu_quantize") else FEW

    assert not [kernel for kernel in kernels if max(kernel.spilled, kernel.stack) > allowed(kernel)]


@pytest.mark.parametrize("operation", PRODUCTS)
def test_products_are_on_tensor_cores(folder: Path, architectures: tuple[str, ...], operation: str) -> None:
    """All that multiply do it on tensor cores; some are for Turing only, or for all but Turing."""
    sass = machine_code(folder / f"{operation}.o")
    kernels = {}
    for architecture in architectures:
        instruction = INSTRUCTIONS.get(architecture, LATER)
        kernels[architecture] = {name for name, code in sass[architecture].items() if instruction in code}
        found = set(re.findall(r"IMMA\.[\w.]+", "".join(sass[architecture].values())))
        assert all(name.startswith(instruction) for name in found)
    turing, (later, *others) = kernels.pop("75", None), kernels.values()
    assert later
    assert all(names == later for names in others)
    if turing is not None:
        # each is for all, or empty on the one or on the others
        assert turing | later == set(sass["75"])


def test_epilogues_have_the_instructions_that_tiles_are_chosen_by(folder: Path) -> None:
    """A tile of 128 columns has those of 64 results of a thread more than one of 64 columns."""
    text = (CSRC / "tile_times.h").read_text()
    ((numbers,),) = [re.findall(r"INSTRUCTIONS\[\] = \{(.*)\};", text)]
    counts: dict[int, list[int]] = {}
    for operation in ("w8a8_linear", "w8a8_linear_quantize"):
        for name, code in machine_code(folder / f"{operation}.o").get("89", {}).items():
            kind = re.search(r"TileILi128ELi(64|128)ELi64ELi2ELi2ELi[34]EE8BFloat16L8Epilogue(\d)", name)
            if kind:
                found = counts.setdefault(10 * OPERATIONS_OF[operation] + int(kind[2]), [0, 0])
                found[kind[1] == "128"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE))
    for epilogue, given in enumerate(map(int, numbers.split(","))):
        each = [(wide - narrow) / 64 for key, (narrow, wide) in counts.items() if key % 10 == epilogue]
        # SiLU and its special functions are in ALL, too
        counted = min(each) - 5 * (epilogue == 5)
        assert counted == pytest.approx(given, rel=0.2), epilogue


def machine_code(path: Path) -> dict[str, dict[str, str]]:
    """SASS of every kernel by architecture and name."""
    text = subprocess.run(
        [disassembler(), "-sass", str(path)], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^Fatbin (?:elf|ptx) code:$", text, flags=re.MULTILINE)[1:]:
        (architecture,) = re.findall(r"^arch = sm_(\d+)$", part, re.MULTILINE)
        functions = re.split(r"^\s*Function : (\S+)$", part, flags=re.MULTILINE)
        found.setdefault(architecture, {}).update(zip(functions[1::2], functions[2::2], strict=True))
    return found


def disassembler() -> str:
    """cuobjdump of the toolkit, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump: neither the toolkit's nor Triton's")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def test_exports_the_header_and_nothing_else(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "--dynamic", "--defined-only", str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {line.split()[-1] for line in lines} == declared()


def declared() -> set[str]:
    text = (CSRC / "sana_edge.h").read_text()
    return set(re.findall(r"^SANA_EDGE_API [\w\s*]+?(sana_edge_\w+)\(", text, re.MULTILINE))


def test_header_declares_every_operation() -> None:
    assert {f"sana_edge_{name}" for name in OPERATIONS} <= declared()


def test_needs_nothing_but_the_system(library: Path) -> None:
    """No CUDA runtime, no C++ runtime, no torch: any program can load it."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    text = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    assert needed
    assert all(re.match(r"(libc|libm|libdl|librt|libpthread|ld-linux-.*)\.so", name) for name in needed)


def test_tells_what_it_is(library: Path, architectures: tuple[str, ...]) -> None:
    loaded = cuda_library.Library(library)
    assert loaded.abi == cuda_library.ABI
    assert loaded.version == sana_edge.__version__
    assert set(loaded.architectures.split()) == {
        *architectures,
        *(["ptx90"] if architectures == MACHINE_CODE else []),
    }
    assert loaded.device_type == "cuda"


def test_answers_without_a_gpu(library: Path) -> None:
    """In a process that sees no GPU, and whose memory no kernel ever gets to."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(library)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["device"] in (NO_DEVICE, OLD_DRIVER)
    assert answers["no struct"] == 1
    assert answers["kernel"] in (NO_DEVICE, OLD_DRIVER)


ASK = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "static_scale", "values", "scales")]
    _fields_ += [("rows", ctypes.c_int64), ("columns", ctypes.c_int32), ("type", ctypes.c_int32)]
memory = ctypes.create_string_buffer(4096)
address = (ctypes.addressof(memory) + 255) // 256 * 256
arguments = Arguments(address, None, address, address, 1, 16, 0)
info = (ctypes.c_int32 * 3)()
print(json.dumps({
    "device": library.sana_edge_device(0, info),
    "no struct": library.sana_edge_quantize_rows(None, None),
    "kernel": library.sana_edge_quantize_rows(ctypes.byref(arguments), None),
}))
"""
