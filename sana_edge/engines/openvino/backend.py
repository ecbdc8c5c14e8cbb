"""The kind "openvino": what is installed, what its devices compute in, and graphs read for them."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_edge.engines import ports as engine_ports
from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.openvino.engine import DEVICES, OpenVinoEngine
from sana_edge.engines.ports import ANY
from sana_edge.errors import InvalidInput, MissingDependency, UnsupportedDevice
from sana_edge.store.manifest import Port
from sana_edge.system.memory import available_memory, is_memory, out_of_memory
from sana_edge.system.threads import cpu_threads, shown_threads

if TYPE_CHECKING:
    import openvino

_OLDEST = (2025, 0)
_DRIVERS = {"gpu": "install the Intel graphics driver", "npu": "install the Intel NPU driver"}
# about what a plugin's library takes; where it cannot be loaded for want of memory, not all errors say so
_PLUGIN_BYTES = 128 << 20
# what Linux says where a plugin of OpenVINO needs a library
_MISSING_LIBRARY = re.compile(r"(\S+): cannot open shared object file")


@dataclass(frozen=True)
class OpenVino(EngineKind):
    """The kind "openvino"."""

    name = "openvino"
    devices = tuple(DEVICES)

    @classmethod
    def probe(cls, device: str, settings: Settings) -> OpenVino:
        """See `sana_edge.engines.engine.EngineKind.probe`."""
        runtime = _runtime()
        core, place = runtime.Core(), DEVICES[device]
        hint = f"{_DRIVERS.get(device, 'install openvino again')}, or choose --device cpu"
        # of a GPU that is the only one, "GPU" and "GPU.0" are the same
        there = device == "cpu" or any(found.split(".")[0] == place for found in core.available_devices)
        try:
            processor = str(core.get_property(place, "FULL_DEVICE_NAME")).strip()
        except RuntimeError as error:
            free = available_memory()
            if is_memory(error) or (there and free is not None and free < _PLUGIN_BYTES):
                raise out_of_memory(f"openvino on {device}", error, needed=_PLUGIN_BYTES) from error
            raise UnsupportedDevice(_refusal(device, there, error), hint) from error
        if not there:
            raise UnsupportedDevice(f"openvino finds no {device}", hint)
        precision = _precision(core, device, settings)
        version = runtime.__version__.partition("-")[0]
        title = f"openvino {version} on {device} ({processor}), {precision}"
        if device == "cpu":
            title += f", {shown_threads(cpu_threads(settings.threads))}"
        return cls(device, precision, title, settings)

    def load(
        self,
        path: Path,
        inputs: Mapping[str, Port] | None = None,
        outputs: Mapping[str, Port] | None = None,
    ) -> OpenVinoEngine:
        """See `sana_edge.engines.engine.EngineKind.load`."""
        engine_ports.check_file(path)
        runtime = _runtime()
        try:
            # not Core.read_model: that offers a damaged file to the readers of all other formats
            reader = runtime.frontend.FrontEndManager().load_by_framework("onnx")
            model = reader.convert(reader.load(str(path)))
        except Exception as error:
            raise engine_ports.load_failure(path, "openvino", error) from error
        engine_ports.check_graph(path, inputs, _ports(model.inputs))
        engine_ports.check_graph(path, outputs, _ports(model.outputs))
        ports = inputs or _ports(model.inputs), outputs or _ports(model.outputs)
        if self.precision != "fp32":
            _keep_phases(model)
        exact = self.device != "cpu" or not _is_int8(model) or sums_are_exact()
        engine = OpenVinoEngine(self, path, runtime, model, *ports, int8=exact)
        engine.compile()
        return engine


def _refusal(device: str, there: bool, error: Exception) -> str:
    """Why a device cannot be used, from what OpenVINO says when it is asked for the device's name."""
    library = _MISSING_LIBRARY.search(str(error))
    if library and device in _DRIVERS and "openvino" not in library[1]:
        return f"no Intel {device.upper()} driver ({library[1]} is missing)"
    if there:
        return f"openvino cannot use {device}: {engine_ports.said(error)}"
    # of what is not there it only says that it has no such property
    return f"openvino finds no {device}"


def _runtime() -> ModuleType:
    try:
        with _without_telemetry():
            import openvino
            import openvino.frontend
    except ModuleNotFoundError as error:
        raise MissingDependency("openvino is not installed", "pip install 'sana-edge[openvino]'") from error
    except (ImportError, OSError) as error:
        hint = "install it again: pip install --force-reinstall openvino"
        raise MissingDependency(f"openvino does not load: {engine_ports.said(error)}", hint) from error
    version = tuple(int(part) for part in openvino.__version__.split("-")[0].split(".")[:2])
    if version < _OLDEST:
        least = ".".join(map(str, _OLDEST))
        raise MissingDependency(
            f"openvino {openvino.__version__} is too old, {least} is needed", "pip install --upgrade openvino"
        )
    module: ModuleType = openvino
    return module


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Import openvino inside: it then does without its telemetry package, which looks up a host on import."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    absent: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    absent[name] = None
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def _precision(core: openvino.Core, device: str, settings: Settings) -> str:
    """What the device computes floats in.

    On a CPU bf16 where its hardware multiplies that, else fp32: fp16, OpenVINO's own choice on ARM, does not
    hold the sums of linear attention. GPUs get fp16 only of graphs exported for it; NPUs have nothing else.
    """
    capabilities = core.get_property(DEVICES[device], "OPTIMIZATION_CAPABILITIES")
    if settings.precision == "auto":
        if device == "npu":
            return "fp16"
        if device == "gpu":
            return "fp16" if settings.dtype == "fp16" else "fp32"
        return "bf16" if "BF16" in capabilities else "fp32"
    known = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
    if known[settings.precision] not in capabilities:
        able = [precision for precision, name in known.items() if name in capabilities]
        hint = f"choose dtype auto, {', '.join(able)}"
        raise InvalidInput(f"openvino cannot compute in {settings.precision} on this {device}", hint)
    return settings.precision


def _is_int8(model: openvino.Model) -> bool:
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


@functools.cache
def sums_are_exact() -> bool:
    """Whether INT8 products keep their sums: a row of the largest values times itself.

    CPUs without VNNI add pairs of products of 8 bits in 16, where they saturate.
    """
    runtime, depth = _runtime(), 64
    core, ops = runtime.Core(), runtime.opset13
    x = ops.parameter([1, depth], np.float32)
    ends = [np.float32(end) for end in (-128, 127, -128, 127)]
    weight = ops.convert(ops.constant(np.full((depth, 1), 127, np.int8)), "f32")
    product = ops.matmul(ops.fake_quantize(x, *ends, 256), ops.multiply(weight, np.float32(1)), False, False)
    model = runtime.Model([product], [x])
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    found = float(next(iter(request.infer([np.full((1, depth), 127, np.float32)]).values()))[0, 0])
    # all of it is an integer below 2^24
    return found == depth * 127 * 127


def _keep_phases(model: openvino.Model) -> None:
    """Keep the timestep's phases in fp32.

    OpenVINO rounds all that leads to a product to the precision, the angle of sine and cosine too: up to 1000
    radians, to steps of 4 in bf16. What an output needs without a product in between it leaves alone, and so
    sines and cosines become outputs, which nobody reads.
    """
    waves = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]
    if waves:
        model.add_outputs([node.output(0) for node in waves])


def _ports(nodes: list[Any]) -> dict[str, Port]:
    """OpenVINO does not keep the names of sides."""
    return {
        node.get_any_name(): (
            np.dtype(node.get_element_type().to_dtype()).name,
            tuple(ANY if side.is_dynamic else side.get_length() for side in node.get_partial_shape()),
        )
        for node in nodes
    }
