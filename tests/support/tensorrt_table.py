"""Writes what the bindings of TensorRT and CUDA have, for tests without them: names, parameters, enums.

    python tests/support/tensorrt_table.py WHEEL... > tests/support/tensorrt_api.json
    python tests/support/tensorrt_table.py --cuda > tests/support/cuda_api.json

The second needs the package cuda-bindings. WHEEL is a `tensorrt_cu12_bindings` wheel for this Python, from
``pip download --no-deps``. Its module wants libraries of NVIDIA's that are no part of it; here empty ones
take their place, with which it can be imported and asked for its signatures, and nothing more. Needs a C
compiler.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# the classes that `export/tensorrt.py` and `sana_edge/engines/tensorrt/backend.py` have to do with
CLASSES = (
    *(
        "Builder",
        "INetworkDefinition",
        "IBuilderConfig",
        "IOptimizationProfile",
        "ITimingCache",
        "IHostMemory",
    ),
    *("ITensor", "OnnxParser", "ParserError", "ILogger", "IProgressMonitor"),
    *("Runtime", "ICudaEngine", "IExecutionContext"),
)
ENUMS = (
    *("NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType", "HardwareCompatibilityLevel"),
    *("ExecutionContextAllocationStrategy", "TensorIOMode", "DataType", "ILogger.Severity"),
)
# what `sana_edge/engines/tensorrt/cuda.py` has to do with
CUDA = (
    *("cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaGetDevice", "cudaGetDeviceProperties"),
    *("cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamSynchronize", "cudaDriverGetVersion"),
    *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGetLastError", "cudaGetErrorString"),
    *("cudaGraphInstantiate", "cudaGraphLaunch", "cudaGraphDestroy", "cudaGraphExecDestroy"),
)
CUDA_ENUMS = {
    "cudaError_t": (
        *("cudaSuccess", "cudaErrorMemoryAllocation", "cudaErrorInsufficientDriver", "cudaErrorNoDevice"),
        *("cudaErrorStreamCaptureInvalidated", "cudaErrorInvalidValue"),
    ),
    "cudaMemcpyKind": ("cuda",),
    "cudaStreamCaptureMode": ("cuda",),
}
_INTERNAL = ("createInfer", "createNvOnnx", "getBuilderPlugin", "getNvOnnx", "getPlugin", "initLib")


def table(wheel: Path) -> dict[str, Any]:
    """What one wheel has: "version"; "classes", each with signatures of methods or "property"; "enums"."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        module = next(Path(folder, "tensorrt_bindings").glob("tensorrt*.so"))
        _empty_libraries(module, Path(folder))
        script = [sys.executable, __file__, "--dump", folder]
        environment = {**os.environ, "LD_LIBRARY_PATH": folder}
        read: dict[str, Any] = json.loads(subprocess.check_output(script, env=environment))
        return read


def _empty_libraries(module: Path, folder: Path) -> None:
    dynamic = subprocess.check_output(["readelf", "-d", module], text=True)
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", module], text=True)
    names = sorted({word.partition("@")[0] for word in symbols.split() if word.startswith(_INTERNAL)})
    source = folder / "empty.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in names))
    for library in re.findall(r"\[(libnv\w+\.so\.\d+)\]", dynamic):
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source]
        subprocess.check_call(command)


def dump(folder: str) -> None:
    """In a process of its own: print what the bindings under ``folder`` have."""
    sys.path.insert(0, folder)
    import tensorrt_bindings as trt

    classes = {}
    for name in CLASSES:
        members = {"__init__": _signatures(getattr(trt, name).__init__)}
        for member in dir(getattr(trt, name)):
            # layers come out of ONNX files
            if not member.startswith(("_", "add_")) or member == "add_optimization_profile":
                found = getattr(getattr(trt, name), member)
                is_property = isinstance(found, property)
                members[member] = _access(found) if is_property else _signatures(found)
        classes[name] = {member: value for member, value in members.items() if value}
    enums = {}
    for name in ENUMS:
        found = trt
        for part in name.split("."):
            found = getattr(found, part)
        enums[name] = {key: int(value) for key, value in found.__members__.items()}
    print(json.dumps({"version": trt.__version__, "classes": classes, "enums": enums}))


def _access(found: property) -> str:
    return "read and write" if found.fset else "read"


def _signatures(function: Any) -> str:
    """Parameters and result of each overload, without the types' modules."""
    lines = re.findall(r"^(?:\d+\. )?\w+\((self.*)\) -> (.*)$", function.__doc__ or "", re.MULTILINE)
    return " | ".join(re.sub(r"\w+\.(?=[A-Za-z])", "", f"({given}) -> {result}") for given, result in lines)


def cuda_table() -> dict[str, Any]:
    """What the functions that `engines/tensorrt/cuda.py` calls take, and what they give beside the error."""
    from cuda.bindings import runtime

    functions = {}
    for name in CUDA:
        text = getattr(runtime, name).__doc__
        parameters = re.match(r"\w+\((.*)\)", text)[1]
        results = text.partition("Returns\n-------\n")[2].partition("\n\n")[0]
        functions[name] = {
            "parameters": [part.partition(":")[0].split()[-1] for part in parameters.split(",") if part],
            "results": re.findall(r"^(\w+) : ", results, re.MULTILINE),
        }
    enums = {
        name: {
            member.name: int(member) for member in getattr(runtime, name) if member.name.startswith(wanted)
        }
        for name, wanted in CUDA_ENUMS.items()
    }
    return {"functions": functions, "enums": enums}


if __name__ == "__main__":
    if sys.argv[1] == "--dump":
        dump(sys.argv[2])
    elif sys.argv[1] == "--cuda":
        print(json.dumps(cuda_table(), indent=1))
    else:
        print(json.dumps([table(Path(wheel)) for wheel in sys.argv[1:]], indent=1))
