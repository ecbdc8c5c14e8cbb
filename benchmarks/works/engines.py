"""A denoising step and a decoded picture in engines, beside torch and a naive OpenVINO graph."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness import needs
from harness.results import BASELINE, HALF, NAIVE_INT8, NAIVE_INT8_BF16
from harness.results import INT8 as TORCH_INT8
from harness.work import Loader, Stage, Work
from sana_edge.bench.shapes import AUTOENCODERS, random_latent
from sana_edge.config import LATENT_CELL
from sana_edge.engines.choose import choose
from sana_edge.engines.engine import Engine, Settings
from sana_edge.engines.tiles import DEFAULT_TILE, decode_tiles
from works import graphs
from works.decoder import DecoderWork
from works.denoiser import DenoiserWork, step_times, text_groups
from works.graphs import FLOAT, INT8, NAIVE

# engine, precision of what is not INT8, and which graphs
ENGINES = {
    "onnxruntime": ("onnxruntime", "auto", FLOAT),
    "onnxruntime int8": ("onnxruntime", "auto", INT8),
    "openvino": ("openvino", "fp32", FLOAT),
    "openvino bf16": ("openvino", "bf16", FLOAT),
    "openvino int8": ("openvino", "fp32", INT8),
    "openvino int8 bf16": ("openvino", "bf16", INT8),
}
NAIVES = {NAIVE_INT8: "f32", NAIVE_INT8_BF16: "bf16"}
CONTENDERS = (BASELINE, HALF, TORCH_INT8, *ENGINES, *NAIVES)

# relative L2 from diffusers in fp32. bf16: 2^-9 a rounding, a few hundred of them at random in all layers.
# INT8: see `DenoiserWork` and `DecoderWork`; scales of a tensor instead of a token add half as much again.
_EXACT, _HALF_ERROR = 1e-3, 0.1
INT8_ERROR = {"step": 0.1, "decode": 0.15}


@dataclass(frozen=True, kw_only=True)
class EngineWork(Work):
    """What `DenoiserWork` or `DecoderWork` is, for these contenders; graphs lie in ``folder``.

    A step has its outputs for a guidance of 1: the same work as any, and comparable with one prediction.
    """

    work: DenoiserWork | DecoderWork
    folder: str

    @property
    def title(self) -> str:
        return self.work.title.partition(f", {self.dtype} on")[0]

    @property
    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in self.work.facts.items() if name != "dtype"}

    @property
    def stages(self) -> tuple[str, ...]:
        return ("step",) if isinstance(self.work, DenoiserWork) else ("decode",)

    def limit(self, stage: str, name: str) -> float | None:
        if name in NAIVES:
            # only reported
            return None
        # our INT8 in torch computes the rest in bf16
        half = "bf16" in name or name == TORCH_INT8
        return (_HALF_ERROR if half else _EXACT) + (INT8_ERROR[stage] if "int8" in name else 0)

    def prepare(self, names: Collection[str]) -> None:
        """Make the graphs that contenders need."""
        kinds = {ENGINES[name][2] for name in names if name in ENGINES}
        kinds |= {NAIVE for name in names if name in NAIVES}
        graphs.make(self.work, Path(self.folder), kinds)

    def loaders(self) -> dict[str, Loader]:
        half = replace(self.work, dtype="bf16")
        return {
            BASELINE: partial(_torch_stage, self.work, BASELINE),
            HALF: partial(_torch_stage, half, BASELINE),
            TORCH_INT8: partial(_torch_stage, half, TORCH_INT8),
            **{name: partial(_of_engine, self, name) for name in ENGINES},
            **{name: partial(_naive, self, name) for name in NAIVES},
        }


def check_installed(names: Collection[str]) -> None:
    """End the command where a contender's package is missing, before anything is measured."""
    needs(*({"diffusers"} if {BASELINE, HALF, *NAIVES} & {*names} else ()))
    needs(*(name for name in ("onnxruntime", "openvino") if any(name in contender for contender in names)))
    needs(*(("nncf", "onnxscript") if {*NAIVES} & {*names} else ()))


def engine_stage(work: EngineWork, name: str) -> tuple[Engine, Stage]:
    """The engine of one of `ENGINES` and the call that runs it; its graph has to be there (`prepare`)."""
    return (_engine_step if isinstance(work.work, DenoiserWork) else _engine_decoder)(work, name)


def _of_engine(work: EngineWork, name: str) -> dict[str, Stage]:
    return {work.stages[0]: engine_stage(work, name)[1]}


def _torch_stage(work: DenoiserWork | DecoderWork, name: str) -> dict[str, Stage]:
    """The stage of `bench_image.py`, of a step the prompt's prediction only."""
    loaded = work.loaders()[name]()
    if isinstance(work, DecoderWork):
        return {"decode": _as_floats(loaded["decode"])}
    step = loaded["step"]
    return {"step": _as_floats(Stage(lambda: step()[1:], step.weights))}


def _as_floats(stage: Stage) -> Stage:
    def call() -> Tensor:
        output = stage()
        assert isinstance(output, Tensor)
        return output.float()

    return Stage(call, stage.weights)


def _load(work: EngineWork, name: str) -> Callable[[str], Engine]:
    """Loads a graph of a contender by its name."""
    asked, precision, kind = ENGINES[name]
    chosen = choose(asked, "cpu", settings=Settings(threads=work.threads, precision=precision))
    folder = Path(work.folder) / kind

    def load(graph: str) -> Engine:
        from sana_edge.export.graph.ports import ports

        path = folder / f"{graph}.onnx"
        described = ports(path)
        return chosen.load(path, described.inputs, described.outputs)

    return load


def _engine_step(work: EngineWork, name: str) -> tuple[Engine, Stage]:
    denoiser = work.work
    assert isinstance(denoiser, DenoiserWork)
    load = _load(work, name)
    projection = load("text_projection")
    negative, prompt = (
        projection.run({"embeddings": text.contiguous().numpy()})
        for text in (group.embeddings.float() for group in text_groups(denoiser))
    )
    projection.close()
    engine = load("denoiser_folded")
    inputs = {
        "latent": random_latent(denoiser.size, "cpu").numpy(),
        "timestep": step_times(denoiser)[denoiser.steps // 2].reshape(1).float().numpy(),
        "keys": prompt["keys"],
        "values": prompt["values"],
        "constant": negative["constant"],
        "scale": np.ones(1, np.float32),
    }
    return engine, Stage(lambda: torch.from_numpy(engine.run(inputs)["velocity"]), _weights(work, name))


def _engine_decoder(work: EngineWork, name: str) -> tuple[Engine, Stage]:
    assert isinstance(work.work, DecoderWork)
    engine, latent = _load(work, name)("decoder"), random_latent(work.work.size, "cpu").numpy()
    # of the public model, which the graph divides by; the other implementations here do not
    factor = np.float32(AUTOENCODERS[work.work.shapes].scaling_factor)

    def tile(piece: NDArray[np.float32]) -> NDArray[np.float32]:
        return engine.run({"latent": np.ascontiguousarray(piece)})["pixels"]

    def decode() -> Tensor:
        return torch.from_numpy(decode_tiles(latent * factor, tile, cell=LATENT_CELL, tile=DEFAULT_TILE))

    return engine, Stage(decode, _weights(work, name))


def _naive(work: EngineWork, name: str) -> dict[str, Stage]:
    """The naive graph, with the threads and hints that ours have; of a step the prompt's prediction only."""
    import openvino

    step = isinstance(work.work, DenoiserWork)
    given = graphs.naive_inputs(work.work)
    inputs = {key: value.numpy() for key, value in given.items()}
    path = Path(work.folder) / NAIVE / graphs.NAIVE_INT8
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_NUM_THREADS": work.threads,
        "INFERENCE_PRECISION_HINT": NAIVES[name],
    }
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()

    def run() -> Tensor:
        # set here, for a request does not keep the arrays alive whose memory it reads
        for key, value in inputs.items():
            request.set_tensor(key, openvino.Tensor(value, shared_memory=True))
        request.start_async()
        request.wait()
        return torch.from_numpy(np.array(request.get_output_tensor(0).data)[1 if step else 0 :])

    return {work.stages[0]: Stage(run, path.with_suffix(".bin").stat().st_size)}


def _weights(work: EngineWork, name: str) -> int:
    """Bytes of the external data, which also has the text projection's."""
    folder = Path(work.folder) / ENGINES[name][2]
    return sum(path.stat().st_size for path in folder.glob("*.data"))
