"""How much memory is free, within the limits of control group and process, and errors for want of it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError

from sana_edge.errors import CheckpointError, OutOfMemory, SanaError
from sana_edge.system import memory

CPU = torch.device("cpu")
OTHERS = ("MemFree", "Buffers", "Cached", "Active", "Inactive", "Shmem", "Slab")
MEMINFO = "MemTotal:       16000 kB\nMemAvailable:   8000 kB\nHugePages_Free:    0\n" + "".join(
    f"{name}: 1 kB\n" for name in OTHERS
)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("files", "free"), CASES.values(), ids=CASES)
def test_free_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: int | None
) -> None:
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
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
    code = "import torch; from sana_edge.system import memory; print(memory.peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ballast) == 1 << 30
    assert 1 << 24 < int(done.stdout) < 1 << 30


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_free_within_the_limits_of_the_process(limit: str) -> None:
    code = f"""if True:
        import resource
        from sana_edge.system.memory import available_memory
        resource.setrlimit(resource.{limit}, (1 << 30, 1 << 30))
        before = available_memory()
        ballast = bytearray(1 << 28)
        print(before, before - available_memory())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    free, taken = map(int, done.stdout.split())
    # the interpreter takes a part of the GiB, and its allocator rounds the ballast up to pages
    assert 1 << 28 < free < 1 << 30 and 0 <= taken - (1 << 28) < 1 << 20


# as libraries word it, and the bytes that they ask for
WORDS: dict[str, tuple[Exception, int | None]] = {
    "python": (MemoryError(), None),
    "numpy": (MemoryError("Unable to allocate 1.50 GiB for an array with shape (1, 2)"), 3 << 29),
    "torch-cpu": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 4096 bytes. Error code 12"), 4096),
    "torch-windows": (
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."), 4096),
    "torch-mmap": (RuntimeError("unable to mmap 8192 bytes from file <a>: Cannot allocate memory"), 8192),
    "torch-mapping": (RuntimeError("Couldn't open file mapping: <a>, error code: <1455>"), None),
    "onednn": (RuntimeError("could not create a primitive"), None),
    "onednn-run": (RuntimeError("could not execute a primitive"), None),
    "short": (RuntimeError("can't alloc"), None),
    "c++": (RuntimeError("std::bad_alloc"), None),
    "msvc": (RuntimeError("bad allocation"), None),
    "threads": (RuntimeError("can't start new thread"), None),
    "library": (ImportError("libx.so: failed to map segment from shared object"), None),
    "library-windows": (ImportError("DLL load failed while importing _C: The paging file is too small for"
                                    " this operation to complete."), None),
    "errno": (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    "safetensors": (SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)"), None),
    "safetensors-windows": (SafetensorError("Auslagerungsdatei ist zu klein (os error 1455)"), None),
    "rust": (SafetensorError("memory allocation of 64 bytes failed"), 64),
    "onnxruntime": (
        RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 1048576"), 1 << 20),
    "openvino": (RuntimeError("Exception from a.cpp:1:\nFailed to allocate 1099511627776 bytes of memory"),
                 1 << 40),
}  # fmt: skip


@pytest.mark.parametrize(("error", "needed"), WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "hidden"])
def test_errors_of_memory(
    monkeypatch: pytest.MonkeyPatch, error: Exception, needed: int | None, hidden: bool
) -> None:
    """Also where a reader took them for damage."""
    monkeypatch.setattr(memory, "available_memory", lambda: 2_000_000_000)
    message = r"not enough memory for m: .*2\.0 GB are free$"
    with pytest.raises(OutOfMemory, match=message) as caught, memory.memory_errors("m", needed=77):
        if not hidden:
            raise error
        raise CheckpointError("m is damaged", "download it again") from error
    assert (caught.value.needed, caught.value.free) == (77 if needed is None else needed, 2_000_000_000)
    assert caught.value.hint and "\n" not in caught.value.message


def test_not_even_enough_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(memory, "available_memory", fail)
    with pytest.raises(OutOfMemory, match=r"for m: 0\.0 MB are free") as caught, memory.memory_errors("m"):
        raise MemoryError
    assert (caught.value.needed, caught.value.free) == (None, 0)
    # the CPU's memory is not asked for where a GPU's ran out
    with pytest.raises(OutOfMemory, match=r"for m$"), memory.memory_errors("m"):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for a matmul"),
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while deserializing header: header too large"),
        RuntimeError("error code: 14551"),
        ValueError("out of memory is no name"),
        SanaError("out of memory is no name"),
    ],
    ids=str,
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory.memory_errors("m"):
        raise error
    assert caught.value is error


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.parametrize("more", [1 << 22, pytest.param(1 << 26, marks=pytest.mark.slow)])
def test_loading_with_little_address_space(more: int) -> None:
    """However far it comes; ``more`` is left when torch has been loaded, less than a picture takes."""
    code = f"""if True:
        import resource, torch, transformers
        from transformers import Gemma2Model
        import sana_edge, sana_edge.torch_runtime.runtime
        from sana_edge.system.memory import _STATUS, _table
        # OpenMP has its threads: where it cannot start one it ends the process, which nobody can catch
        torch.ones(1 << 20).sqrt()
        most = _table(_STATUS)["VmSize"] * 1024 + {more}
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            sana_edge.Sana.load("sana-tiny").generate("a red house", steps=1)
        except sana_edge.OutOfMemory as error:
            print("memory", error.needed, error.free, error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("memory"), done.stdout
