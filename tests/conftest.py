"""Fixtures: seeds, the CUDA operations emulated, Triton without a GPU, and tiny pipelines."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# read when triton is imported, which torch and diffusers may do: its kernels then run on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import tiny
import torch
from emulator import Emulator, FakeGpu, Gpu, OnGpu, keep_stderr
from filelock import FileLock
from guarded import guarded as guard

from sana_edge.engines.tensorrt import cuda
from sana_edge.kernels.cuda import library as cuda_library
from sana_edge.store.package import KEY, METHOD

# workers of `pytest -n` share the cores
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(torch.get_num_threads() // WORKERS, 1))

CSRC = Path(__file__).parents[1] / "csrc"
# compute capabilities that the Triton kernels are compiled for: 8.9 always, the others in the slow tests
CAPABILITIES = (80, 86, 89, 90, 120)


def pytest_configure() -> None:
    # nothing is captured yet
    keep_stderr()


@pytest.fixture
def figures(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """Records what a long test counted, also in the file that SANA_EDGE_FIGURES names."""

    def record(**values: object) -> None:
        line = json.dumps(
            {"name": request.node.callspec.id if hasattr(request.node, "callspec") else "", **values}
        )
        record_property("figures", line)
        if "SANA_EDGE_FIGURES" in os.environ:
            with open(os.environ["SANA_EDGE_FIGURES"], "a") as file:
                file.write(f"{line}\n")

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What long tests counted, also in workers, whose output nobody sees."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    for name, line in (pair for report in reports for pair in getattr(report, "user_properties", ())):
        if name == "figures":
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test, nor a process that it starts, shares the user's cache; all of a session share one."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("SANA_EDGE_CACHE", str(cache))
        yield cache


@pytest.fixture(autouse=True)
def _no_prompts(_session_cache: Path) -> None:
    """No prompt is known from a test before."""
    shutil.rmtree(_session_cache / "prompts", ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreted() -> None:
    """Triton kernels run in its interpreter, on CPU tensors; import their modules after asking for this."""
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("TRITON_INTERPRET is not 1")


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels built for the CPU (csrc/emulator), as they are on compute capability 8.9."""
    return _emulate(890, tmp_path_factory)


@pytest.fixture(scope="session")
def turing_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`emulated_library`, as the kernels are on compute capability 7.5."""
    return _emulate(750, tmp_path_factory)


def _emulate(architecture: int, folder: pytest.TempPathFactory) -> Path:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    # SANA_EDGE_EMULATED_FOLDER keeps what was built, for those who run one test file again and again;
    # the workers of one run have the folder above their own in common
    base = folder.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = Path(os.environ.get("SANA_EDGE_EMULATED_FOLDER") or shared / "emulated")
    place.mkdir(exist_ok=True)
    library = place / f"libsana_edge_emulated_{architecture}.so"
    command = [sys.executable, str(CSRC / "compile.py"), "--emulated", str(architecture)]
    with FileLock(f"{library}.lock"):
        done = subprocess.run([*command, "--output", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


FORMS: dict[str, int | type[Gpu] | type[FakeGpu]] = {
    "in order": 0,
    "shuffled": 1,
    "fake gpu": FakeGpu,
    "gpu": Gpu,
}


@pytest.fixture(
    params=[pytest.param(form, marks=[pytest.mark.gpu] if form is Gpu else []) for form in FORMS.values()],
    ids=FORMS,
)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator | OnGpu]:
    """The CUDA operations on CPU tensors: emulated in two orders, on a GPU, and on what stands for one."""
    if request.param is Gpu:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield _on_gpu(Gpu(), monkeypatch)
        return
    seed = 0 if request.param is FakeGpu else request.param
    with _emulator(request.getfixturevalue("emulated_library"), seed, monkeypatch) as emulator:
        emulator.pretend(89, 24, 99 << 10)
        yield _on_gpu(FakeGpu(), monkeypatch) if request.param is FakeGpu else emulator


def _on_gpu(transport: Gpu | FakeGpu, monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    on_gpu = OnGpu(cuda_library.load(), transport)
    monkeypatch.setattr(cuda_library, "load", lambda: on_gpu)
    return on_gpu


@pytest.fixture
def emulated_turing(turing_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """`emulated` for compute capability 7.5, in order."""
    with _emulator(turing_library, 0, monkeypatch) as emulator:
        emulator.pretend(75, 24, 64 << 10)
        yield emulator


@contextlib.contextmanager
def _emulator(library: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    monkeypatch.setenv("SANA_EDGE_CUDA_LIBRARY", str(library))
    cuda_library.load.cache_clear()
    emulator = Emulator(ctypes.CDLL(str(library)))
    emulator.shuffle(seed)
    emulator.count()
    load = cuda_library.load
    yield emulator
    emulator.shuffle(0)
    load.cache_clear()


@pytest.fixture
def guarded() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor to where readable memory ends behind it: see tests/support/guarded.py."""
    function: Callable[[torch.Tensor], torch.Tensor] = guard
    return function


@pytest.fixture
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty gives, such as a wrapper's outputs, is NaN, and readable memory ends behind it."""
    empty = torch.empty

    def guarded_empty(*args: Any, **options: Any) -> torch.Tensor:
        found = guard(empty(*args, **options))
        found.flatten().view(torch.uint8).fill_(0xFF)
        return found

    monkeypatch.setattr(torch, "empty", guarded_empty)


@pytest.fixture(params=[pytest.param(sm, marks=() if sm == 89 else pytest.mark.slow) for sm in CAPABILITIES])
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Compiles a Triton kernel ahead of time, for each architecture: "ptx", "sass" and "usage" of its code.

    Args of what is returned:
        name: "w8a8_linear.w8a8_linear_kernel", module and kernel in sana_edge.kernels.triton.
        signature: Triton's types of the arguments that are not constexpr, in their order, "*fp32" or "i32".
        constexprs: values of the others; None stands for an argument that is left out.
        multiples: integer arguments that are known to be multiples of 16, as all pointers are.
        options: of the launch, num_warps and the like.
    """
    pytest.importorskip("triton", reason="triton is not installed")

    def build(
        name: str,
        signature: Mapping[str, str],
        constexprs: Mapping[str, object],
        multiples: Sequence[str] = (),
        **options: object,
    ) -> dict[str, str]:
        module, kernel = name.rsplit(".", 1)
        asked = {
            "module": f"sana_edge.kernels.triton.{module}",
            "kernel": kernel,
            "capability": request.param,
            "signature": signature,
            "constexprs": constexprs,
            "multiples": list(multiples),
            "options": options,
        }
        done = subprocess.run(
            [sys.executable, Path(__file__).parent / "support" / "compile_kernel.py"],
            input=json.dumps(asked),
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "triton")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        code: dict[str, str] = json.loads(done.stdout)
        return code

    return build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SanaPipeline, native size 128 px, fp32 weights; session-wide: copy it before changing a file."""
    return tiny.write_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def marked_int8(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that calls itself INT8; its weights are float."""
    folder = tmp_path / "marked-int8"
    shutil.copytree(tiny_folder, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), KEY: {"quant_method": METHOD}}))
    return folder


@pytest.fixture(scope="session")
def tiny_sprint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SanaSprintPipeline (qk-norm, guidance embedding, SCM), otherwise as `tiny_folder`."""
    return tiny.write_sprint_pipeline(tmp_path_factory.mktemp("models") / "tiny-sprint")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, which no test may share; and no NVIDIA driver of the machine's own."""
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "_DRIVER", tmp_path / "no driver")
    return tmp_path / "cache"
