"""The report of ``sana-edge doctor`` here, and where something is missing or broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import PIL
import pytest
import torch

import sana_edge
from sana_edge.cli import doctor
from sana_edge.cli.main import main
from sana_edge.engines.engine import Settings
from sana_edge.engines.tensorrt.backend import TensorRT
from sana_edge.int8 import matmul, ops, text_linear
from sana_edge.store import catalogue


def test_report(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "not" / "made" / "yet"))
    monkeypatch.setattr(catalogue, "BUNDLED", tiny_folder.parent)
    text = doctor.report()
    assert f"sana-edge {sana_edge.__version__}, Python 3." in text
    assert f"torch {torch.__version__}, transformers " in text
    assert "torch cpu: ok, " in text
    size = sum(path.stat().st_size for path in tiny_folder.rglob("*") if path.is_file())
    assert f"{tiny_folder.name}: {size / 1e6:.0f} MB in {tiny_folder}" in text
    assert f"downloads go to {tmp_path / 'not' / 'made' / 'yet'}, " in text
    assert all(
        line.startswith((" " * 10, "system", "packages", "memory", "backends", "engines", "models"))
        for line in text.splitlines()
    )


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sana_edge"] == sana_edge.__version__ and found["packages"]["torch"] == torch.__version__
    assert found["memory"] is None or 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert {"name", "usable", "detail"} == set(found["backends"][0]) == set(found["engines"][0])
    assert "sana-tiny" in [model["name"] for model in found["models"]] and found["downloads"]["free"] > 0


def test_packages_without_their_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frozen program, which has the modules only."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    packages = doctor.facts()["packages"]
    assert packages["torch"] == torch.__version__ and packages["pillow"] == PIL.__version__
    assert doctor._version("no-such-package", "no_such_package") is None


def test_backends_of_this_machine() -> None:
    by_name = {backend.name: backend for backend in doctor.backends()}
    assert by_name["torch cpu"].usable
    assert by_name["torch cuda"].usable == torch.cuda.is_available()
    if torch.version.cuda is None:
        assert by_name["torch cuda"].detail == f"torch {torch.__version__} is built without CUDA"


def test_what_multiplies_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {backend.name: backend for backend in doctor.backends()}
    found = by_name["int8"]
    # CPUs without VNNI multiply in fp32
    slow = matmul.int8_refusal("cpu") and matmul.onednn_linear_refusal()
    assert found.usable == (not slow)
    assert found.detail.startswith("cpu multiplies in fp32" if slow else ("torch._int_mm", "oneDNN"))
    monkeypatch.setattr(matmul, "int8_refusal", lambda device: f"no INT8 on {device}")
    monkeypatch.setattr(matmul, "onednn_linear_refusal", lambda: "nor here")
    monkeypatch.setattr(ops, "onednn_refusal", lambda: "none here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        text_linear, "choose_product", lambda device: text_linear.Product("dequantized", "no INT8 there")
    )
    slower = "cpu multiplies in fp32, because: no INT8 on cpu"
    rest = "no oneDNN convolution: none here; text encoder on cpu: no INT8 there"
    refused = doctor.Backend("int8", False, f"{slower}; {rest}")
    assert doctor.backends()[-1] == refused
    assert f"int8: no, {refused.detail}" in doctor.report()


def test_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise RuntimeError("Found no NVIDIA driver on your system.\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", fails)
    by_name = {backend.name: backend for backend in doctor.backends()}
    assert by_name["torch cuda"] == doctor.Backend(
        "torch cuda", False, "Found no NVIDIA driver on your system."
    )
    assert not by_name["triton"].usable
    assert by_name["triton"].detail.startswith(
        "torch cannot use a GPU: Found no NVIDIA driver on your system."
    )


@pytest.mark.parametrize(
    ("version", "said"), [("2.6.0", "no CUDA graphs: torch 2.6.0"), ("2.11.0", "steps are")]
)
def test_cuda_graphs(version: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="GPU", major=9, minor=0)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "current_device": 0,
        "device_count": 1,
        "get_device_properties": properties,
        "mem_get_info": (1, 2),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    found = doctor._cuda()
    assert found.usable and f"; {said}" in found.detail


def test_engines() -> None:
    """Each on each of its devices, in plain words."""
    lines = [line.strip() for line in doctor.report().splitlines()]
    names = [backend.name for backend in doctor.engine_backends()]
    assert names[0] == "tensorrt cuda" and {"onnxruntime tensorrt", "openvino npu"} < set(names)
    for backend in doctor.engine_backends():
        assert any(backend.detail in line for line in lines)
        assert "Cannot load library" not in backend.detail and "FULL_DEVICE_NAME" not in backend.detail
    if importlib.util.find_spec("tensorrt") is None:
        reason = "TensorRT engines need tensorrt, which cannot be imported: No module named 'tensorrt'"
        detail = f"{reason}; pip install 'sana-edge[tensorrt]'"
        assert doctor.Backend("tensorrt cuda", False, detail) in doctor.engine_backends()


def test_tensorrt_without_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path))
    kind = TensorRT("cuda", "fp32", "TensorRT 10.6 on a GPU", Settings())
    monkeypatch.setattr(TensorRT, "probe", lambda device, settings: kind)
    detail = "TensorRT 10.6 on a GPU, no engines built yet: sana-edge build DIR"
    assert next(doctor.engine_backends()) == doctor.Backend("tensorrt cuda", True, detail)
    # a user without a home folder has none
    for name in ("SANA_EDGE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert "no home folder to keep engines in" in next(doctor.engine_backends()).detail


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    missing = doctor.Backend("triton", False, "not installed: pip install 'sana-edge[triton]'")
    assert doctor.backends()[1] == missing


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        (
            "torch",
            ModuleNotFoundError("no torch", name="torch"),
            "torch is not installed: pip install 'sana-edge[torch]'",
        ),
        ("transformers", ModuleNotFoundError("no", name="transformers"), "transformers is not installed: "),
        ("torch", OSError("libc10.so: cannot open\nmore"), "torch does not load: libc10.so: cannot open"),
    ],
)
def test_torch_that_is_missing_or_broken(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, reason: str
) -> None:
    real = importlib.import_module

    def broken(wanted: str, package: str | None = None) -> Any:
        if wanted == name:
            raise error
        return real(wanted, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert [(backend.usable, backend.detail[: len(reason)]) for backend in doctor.backends()] == [
        (False, reason)
    ] * 4


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, sana_edge.cli.doctor; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
