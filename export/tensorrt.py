"""One TensorRT engine from an ONNX file: the network, its profiles, the build itself.

It has not run with TensorRT, which the machine of the tests cannot have. Tests run it against a stand-in with
the names, parameters and enumerations of the real bindings of 10.0 and 11.4, so that a call that those do not
have fails; what TensorRT then does with a network is untested.

Networks are strongly typed: what a layer computes in is what its tensors are in the ONNX file, where INT8 has
its quantization explicitly. So there is no flag to set for fp16, bf16 or int8; `check_precision` refuses an
export of another type than the user asks for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from sana_edge.engines.tensorrt.engine import logger_class
from sana_edge.engines.tensorrt.profiles import Shapes
from sana_edge.errors import InvalidInput, SanaError, UnsupportedDevice
from sana_edge.progress import Progress
from sana_edge.store.manifest import REMAKE, Manifest
from sana_edge.system import atomic

logger = logging.getLogger("sana_edge")

# seconds that the main thread sleeps between looks at Ctrl-C
_POLL = 0.1


def check_workspace(gigabytes: float | None) -> None:
    """Check the GPU memory that a layer may use while it runs; None leaves it to TensorRT.

    Raises:
        InvalidInput: it is not a positive number of GB.
    """
    if gigabytes is not None and not 0 < gigabytes < 1 << 20:
        raise InvalidInput(f"workspace is {gigabytes:g} GB", "choose a positive number of GB, such as 4")


def check_precision(manifest: Manifest, wanted: str | None, capability: tuple[int, int]) -> None:
    """Check that the exported graphs compute in what the user asks for and the GPU has.

    Args:
        wanted: "fp16", "bf16", "int8", or None for what the export has.
        capability: compute capability of the GPU.

    Raises:
        InvalidInput: the graphs compute in something else; the hint has the command that exports them.
        UnsupportedDevice: the GPU cannot.
    """
    export, name = manifest.export_command, f"{capability[0]}.{capability[1]}"
    if wanted == "int8" and manifest.quantization is None:
        raise InvalidInput("--int8: the exported graphs are not INT8", f"`{export(int8=True)}`")
    if wanted in ("fp16", "bf16") and manifest.dtype != wanted:
        raise InvalidInput(
            f"--{wanted}: the exported graphs compute in {manifest.dtype}", f"`{export(dtype=wanted)}`"
        )
    if capability < (7, 5):
        raise UnsupportedDevice(
            f"engines are built for compute capability 7.5 (Turing) and newer, this GPU has {name}",
            "without TensorRT the folder runs: `sana-edge generate --model DIR --device cpu --prompt TEXT`",
        )
    if manifest.dtype == "bf16" and capability < (8, 0):
        raise UnsupportedDevice(
            f"the graphs compute in bf16, which needs compute capability 8.0, this GPU has {name}",
            f"`{export(dtype='fp16')}`",
        )


def read_network(
    trt: Any, onnx: Path, profiles: Sequence[Mapping[str, Shapes]], workspace: float | None, log: Any
) -> Any:
    """A builder, its network, its configuration and the parser, whose memory the network uses.

    Args:
        trt: the module tensorrt.
        onnx: an ONNX file; its external data lie beside it.
        workspace: GB, see `check_workspace`.
        log: a logger made of `logger_class`.

    Raises:
        SanaError: the file cannot be parsed, or its inputs are not those of the profiles.
    """
    builder = trt.Builder(log)
    # always so in TensorRT 11, where the flag has another number and no effect
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = "; ".join(f"{error.node_name()}: {error.desc()}" for error in errors[:3])
        raise SanaError(
            f"TensorRT {trt.__version__} cannot read {onnx}: {reasons or 'it gives no reason'}",
            f"the file is damaged or of another version; make it again: {REMAKE}",
        )
    _check_inputs(network, profiles, onnx)
    config = builder.create_builder_config()
    for profile in profiles:
        _add_profile(builder, config, profile, onnx)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace * 2**30))
    # weights stay as they are built
    config.clear_flag(trt.BuilderFlag.REFIT)
    return builder, network, config, parser


def _check_inputs(network: Any, profiles: Sequence[Mapping[str, Shapes]], onnx: Path) -> None:
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    if sorted(names) != sorted(profiles[0]):
        raise SanaError(
            f"{onnx} has the inputs {', '.join(names)}, its manifest says {', '.join(profiles[0])}",
            f"make the folder again: {REMAKE}",
        )


def _add_profile(builder: Any, config: Any, shapes: Mapping[str, Shapes], onnx: Path) -> None:
    profile = builder.create_optimization_profile()
    for name, (low, middle, high) in shapes.items():
        profile.set_shape(name, low, middle, high)
    if config.add_optimization_profile(profile) < 0:
        raise SanaError(f"TensorRT refuses the shapes {dict(shapes)} for {onnx}", "choose other sizes")


def build(
    trt: Any,
    onnx: Path,
    profiles: Sequence[Mapping[str, Shapes]],
    *,
    workspace: float | None,
    timing: Path,
    progress: Progress,
) -> Any:
    """Build an engine, minutes of work, which Ctrl-C ends at its next step. Gives bytes or the like.

    Args:
        workspace: GB, see `check_workspace`.
        timing: what TensorRT measured in earlier builds for this GPU, read and written again.
        progress: called with the innermost phase, from any thread.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        SanaError: TensorRT cannot build it; the message has its last error.
    """
    log = logger_class(trt)()
    # the network refers to memory of the parser
    builder, network, config, _parser = read_network(trt, onnx, profiles, workspace, log)
    timings = _timing_cache(config, timing)
    config.progress_monitor = monitor = monitor_class(trt)(progress)
    built = _interruptible(lambda: builder.build_serialized_network(network, config), monitor.stopped)
    if built is None:
        raise SanaError(
            f"TensorRT {trt.__version__} could not build {onnx.name}: {log.last or 'it gives no reason'}",
            "free GPU memory, give less --workspace or a smaller --max; -v shows what TensorRT says",
        )
    if timings is not None:
        _keep_timings(timing, config)
    return built


def _interruptible(work: Callable[[], Any], stopped: threading.Event) -> Any:
    """Do the work in another thread, so that this one hears Ctrl-C: it sets ``stopped``, waits and ends."""
    result: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    try:
        threading.Thread(target=run, name="tensorrt-build", daemon=True).start()
        # Windows hears Ctrl-C only between waits
        while not futures.wait([result], _POLL).done:
            pass
    except KeyboardInterrupt:
        stopped.set()
        futures.wait([result])
        raise
    return result.result()


def _timing_cache(config: Any, path: Path) -> Any:
    """Attach the timing cache of a file, or an empty one where that is missing, damaged or of another GPU."""
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    for content in dict.fromkeys((stored, b"")):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, False):
            return timings
    return None


def _keep_timings(path: Path, config: Any) -> None:
    """Keep the timing cache; it only saves time, so a failure is a line in the log."""
    try:
        atomic.write_bytes(path, config.get_timing_cache().serialize())
    except SanaError as error:
        logger.warning("TensorRT's timings are not kept: %s", error.message)


def monitor_class(trt: Any) -> Any:
    """A class of progress monitors: they report the innermost phase; `stopped` ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, progress: Progress) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = threading.Event()
            self._progress = progress
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return not self.stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor
