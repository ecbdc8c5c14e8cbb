"""Writes what the bindings of TensorRT and CUDA have, for tests without them: signatures and enumerations.

    python tests/support/tensorrt_table.py WHEEL... > tests/support/tensorrt_api.json

WHEEL is a `tensorrt_cu12_bindings` wheel for this Python, from ``pip download --no-deps``. Its module wants
libraries of NVIDIA's that are no part of it; here empty ones take their place, with which it can be imported
and asked for its signatures, and nothing more. Needs a C compiler and the package cuda-bindings.
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

# what `export/tensorrt.py` and `sana_edge/engines/tensorrt/engine.py` call
CLASSES = {
    "Builder": "__init__ create_network create_builder_config create_optimization_profile"
    " build_serialized_network",
    "INetworkDefinition": "num_inputs get_input",
    "ITensor": "name",
    "OnnxParser": "__init__ parse_from_file num_errors get_error",
    "ParserError": "desc node_name",
    "IOptimizationProfile": "set_shape",
    "IBuilderConfig": "add_optimization_profile set_memory_pool_limit clear_flag create_timing_cache"
    " set_timing_cache get_timing_cache progress_monitor",
    "ITimingCache": "serialize",
    "ILogger": "__init__ log",
    "IProgressMonitor": "__init__ phase_start step_complete phase_finish",
    "Runtime": "__init__ deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_dtype get_tensor_mode"
    " num_optimization_profiles get_tensor_profile_shape create_execution_context",
    "IExecutionContext": "set_optimization_profile_async set_input_shape infer_shapes get_tensor_shape"
    " set_tensor_address execute_async_v3",
}
ENUMS = {
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "BuilderFlag": "REFIT",
    "MemoryPoolType": "WORKSPACE",
    "ExecutionContextAllocationStrategy": "ON_PROFILE_CHANGE",
    "TensorIOMode": "INPUT OUTPUT",
    "DataType": "FLOAT INT64",
    "ILogger.Severity": "INTERNAL_ERROR ERROR WARNING INFO VERBOSE",
}
# what `sana_edge/engines/tensorrt/cuda.py` calls
CUDA = (
    *("cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaGetDevice", "cudaGetDeviceProperties"),
    *("cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamSynchronize", "cudaDriverGetVersion"),
    *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGetLastError", "cudaGetErrorString"),
    *("cudaGraphInstantiate", "cudaGraphLaunch", "cudaGraphDestroy", "cudaGraphExecDestroy"),
)
CUDA_ENUMS = {
    "cudaError_t": "cudaSuccess cudaErrorMemoryAllocation cudaErrorInsufficientDriver cudaErrorNoDevice"
    " cudaErrorStreamCaptureInvalidated",
    "cudaMemcpyKind": "cudaMemcpyHostToDevice cudaMemcpyDeviceToHost",
    "cudaStreamCaptureMode": "cudaStreamCaptureModeThreadLocal",
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

    classes = {
        name: {member: _described(getattr(getattr(trt, name), member)) for member in members.split()}
        for name, members in CLASSES.items()
    }
    print(json.dumps({"version": trt.__version__, "classes": classes, "enums": _enums(trt, ENUMS)}))


def _described(member: Any) -> str:
    """A property's access; or parameters and result of each overload, without the types' modules."""
    if isinstance(member, property):
        return "read and write" if member.fset else "read"
    lines = re.findall(r"^(?:\d+\. )?\w+\((self.*)\) -> (.*)$", member.__doc__ or "", re.MULTILINE)
    return " | ".join(re.sub(r"\w+\.(?=[A-Za-z])", "", f"({given}) -> {result}") for given, result in lines)


def _enums(module: Any, wanted: dict[str, str]) -> dict[str, dict[str, int]]:
    found = {}
    for name, members in wanted.items():
        enum = module
        for part in name.split("."):
            enum = getattr(enum, part)
        found[name] = {member: int(getattr(enum, member)) for member in members.split()}
    return found


def cuda_table() -> dict[str, Any]:
    """What the functions that `engines/tensorrt/cuda.py` calls take, and what they give beside the error."""
    from cuda.bindings import runtime

    functions = {}
    for name in CUDA:
        text = getattr(runtime, name).__doc__
        parameters = re.match(r"\w+\((.*)\)", text)[1]
        taken = [part.partition(":")[0].split()[-1] for part in parameters.split(",") if part]
        results = re.findall(
            r"^(\w+) : ", text.partition("Returns\n-------\n")[2].partition("\n\n")[0], re.MULTILINE
        )
        functions[name] = f"({', '.join(taken)}) -> ({', '.join(results)})"
    return {"functions": functions, "enums": _enums(runtime, CUDA_ENUMS)}


if __name__ == "__main__":
    if sys.argv[1] == "--dump":
        dump(sys.argv[2])
    else:
        tables = {"tensorrt": [table(Path(wheel)) for wheel in sys.argv[1:]], "cuda": cuda_table()}
        print(json.dumps(tables, indent=1))
