"""TensorRT engines from an exported folder: the network out of an ONNX file, its profiles, the build itself.

Nothing here has run with TensorRT, which the machine of the tests cannot have. Tests run it against a
stand-in that is made of the names, parameters and enumerations of the real bindings of 10.0, 10.6, 10.16
and 11.4, so that a call that those do not have fails; what TensorRT then does with a network is untested.

Networks are strongly typed: what a layer computes in is what its tensors are in the ONNX file, where INT8 has
its quantization explicitly. So there is no flag to set for fp16, bf16 or int8; `check_precision` refuses an
export of another type than the user asks for.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_edge.engines.tensorrt.engine import logger_class
from sana_edge.engines.tensorrt.profiles import Shapes
from sana_edge.errors import InvalidInput, SanaError, UnsupportedDevice
from sana_edge.store.manifest import REMAKE, Manifest

logger = logging.getLogger("sana_edge")

# seconds that the main thread sleeps between looks at Ctrl-C
_POLL = 0.1

# the name of a part of the work, how much of it is done, how much there is
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How engines are built.

    Attributes:
        workspace: GB of GPU memory that a layer may use while it runs; None leaves it to TensorRT.
        version_compatible: for newer TensorRT versions of the same major number too; costs speed.
        hardware_compatible: for other GPUs since Ampere too; costs speed.

    Raises:
        InvalidInput: the workspace is not positive.
    """

    workspace: float | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.workspace is not None and not 0 < self.workspace < 1 << 20:
            raise InvalidInput(
                f"workspace is {self.workspace:g} GB", "choose a positive number of GB, such as 4"
            )


def check_precision(manifest: Manifest, wanted: str | None, capability: tuple[int, int]) -> None:
    """See that the exported graphs compute in what the user asks for and the GPU has.

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
    trt: Any, onnx: Path, profiles: Sequence[Mapping[str, Shapes]], options: Options, log: Any
) -> Any:
    """A builder, its network, its configuration and the parser, whose memory the network uses.

    Args:
        trt: the module tensorrt.
        onnx: an ONNX file; its external data lie beside it.
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
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * 2**30))
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
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
    options: Options,
    target: Path,
    *,
    timing: Path,
    told: Told,
) -> None:
    """Build an engine into the file ``target``; minutes of work, which Ctrl-C ends at its next step.

    Args:
        timing: what TensorRT measured in earlier builds for this GPU, read and written again.
        told: called with how far the innermost phase is, from any thread.

    Raises:
        KeyboardInterrupt: Ctrl-C; nothing is written.
        SanaError: TensorRT cannot build it; the message has its last error.
    """
    log = logger_class(trt)()
    builder, network, config, parser = read_network(trt, onnx, profiles, options, log)
    cache = _timing_cache(config, timing)
    monitor = monitor_class(trt)(told)
    config.progress_monitor = monitor
    memory = _interruptible(lambda: builder.build_serialized_network(network, config), monitor.stop)
    # what the network refers to in the parser's memory lives until here
    del parser
    if memory is None:
        raise SanaError(
            f"TensorRT {trt.__version__} could not build {onnx.name}: {log.last or 'it gives no reason'}",
            "free GPU memory, give less --workspace or a smaller --max; -v shows what TensorRT says",
        )
    with open(target, "wb") as file:
        file.write(memory)
    if cache is not None:
        write_timing(timing, config.get_timing_cache().serialize())


def _interruptible(work: Callable[[], Any], stop: Callable[[], None]) -> Any:
    """Do the work in another thread, so that this one hears Ctrl-C: it calls ``stop`` and waits."""
    results: list[Any] = []
    errors: list[BaseException] = []
    # not Thread.join: where Ctrl-C interrupts that, Python up to 3.12 takes the thread for finished
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    with _on_interrupt(stop):
        # a second Ctrl-C leaves it running while the program ends
        threading.Thread(target=run, name="tensorrt-build", daemon=True).start()
        # Windows hears Ctrl-C only between waits
        while not done.wait(_POLL):
            pass
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C inside calls ``stop``, and becomes a KeyboardInterrupt at the end; the second at once.

    Where a program has a handler of its own, or in other threads than the main one, nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


def _timing_cache(config: Any, path: Path) -> Any:
    """Attach the timing cache of a file, or an empty one where that is missing, damaged or of another GPU."""
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    for content in (stored, b"") if stored else (b"",):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def write_timing(path: Path, content: Any) -> None:
    """Keep a timing cache; it only saves time, so a failure is a note in the log."""
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        logger.warning("cannot keep TensorRT's timings: %s", error)
    finally:
        partial.unlink(missing_ok=True)


def monitor_class(trt: Any) -> Any:
    """A class of progress monitors that tell the innermost phase, and end the build after ``stop``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, told: Told) -> None:
            trt.IProgressMonitor.__init__(self)
            self._told, self._stopped, self._lock = told, threading.Event(), threading.Lock()
            self._steps: dict[str, int] = {}

        def stop(self) -> None:
            self._stopped.set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._steps[phase_name] = num_steps
                self._told(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._told(phase_name, step + 1, self._steps.get(phase_name, 0))
            return not self._stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._steps.pop(phase_name, None)

    return Monitor
