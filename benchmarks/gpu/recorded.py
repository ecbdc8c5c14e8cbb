"""The recorded step of a cut denoiser: equal to the unrecorded one, replay after replay and on two streams.

Weights are random. On a CPU the same runs without a recording.
"""

from __future__ import annotations

import statistics
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.steps import Setting
from harness.measure import seconds_of, synchronize
from sana_edge.bench.results import write_json
from sana_edge.bench.shapes import DENOISERS, weights
from sana_edge.config import LATENT_CELL
from sana_edge.errors import SanaError
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.steps import FusedNetwork, Predictor, Velocity, make_predictor

LAYERS = {"cuda": 4, "cpu": 1}
# width and height: a usual one, and one whose tokens are a multiple of no tile
SIZES = {"cuda": ((1024, 1024), (992, 672)), "cpu": ((64, 64), (96, 160))}
REPLAYS = {"cuda": 200, "cpu": 2}
GUIDANCE = 4.5
TOKENS = 30


def int8_denoiser(shapes: str, device: torch.device) -> Denoiser:
    """With weights that keep activations near 1."""
    config = replace(DENOISERS[shapes], num_layers=LAYERS[device.type])
    with torch.device("meta"):
        names = Denoiser(config).to_diffusers()
    state = dict(weights(names, torch.float32))
    denoiser = Denoiser.from_diffusers(config, state).requires_grad_(False).eval()
    quantize_denoiser(denoiser)
    return denoiser.to_compute(device, torch.float16)


class Bench:
    """A denoiser with a prompt and a schedule of two steps."""

    def __init__(self, shapes: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.denoiser = device, int8_denoiser(shapes, device)
        C = self.denoiser.config.caption_channels
        self._text = [torch.randn(1, n, C).to(device) for n in (1, TOKENS)]
        self.tables = self.denoiser.modulation(torch.tensor([900.0, 30.0], device=device))

    def latent(self, size: tuple[int, int]) -> Tensor:
        width, height = size
        shape = (1, self.denoiser.config.in_channels, height // LATENT_CELL, width // LATENT_CELL)
        return torch.randn(shape).to(self.device)

    def eager(self) -> Predictor:
        return Predictor(FusedNetwork(self.denoiser, "cuda"), cuda_graph.eager)

    def recorded(self) -> Predictor:
        return make_predictor(self.denoiser, "cuda", self.device)

    def start(self, predictor: Predictor, x: Tensor) -> Velocity:
        """Raises SanaError where nothing could be recorded."""
        features = [
            TextFeatures(t, torch.ones(t.shape[:2], dtype=torch.bool, device=self.device)) for t in self._text
        ]
        context = self.denoiser.text_context(features)
        velocity, note = predictor.start(x, self.tables, context, GUIDANCE)
        if note:
            raise SanaError(
                f"the step was not recorded: {note}", "what is checked would be the unrecorded one"
            )
        return velocity


@torch.inference_mode()
def replays(bench: Bench, size: tuple[int, int]) -> dict[str, Any]:
    """Both steps of the schedule by turns, beside the unrecorded ones."""
    device = bench.device
    x, count = bench.latent(size), REPLAYS[device.type]
    plain, recorded = bench.start(bench.eager(), x), bench.start(bench.recorded(), x)
    wanted = [plain(x, i).clone() for i in range(2)]
    finite = all(bool(t.isfinite().all()) for t in wanted)
    recorded(x, 0)
    before = _allocated(device)
    equal = sum(torch.equal(recorded(x, i % 2), wanted[i % 2]) for i in range(count))
    grown = _allocated(device) - before
    row: dict[str, Any] = {
        "size": list(size),
        "replays": count,
        "equal": equal,
        "finite": finite,
        "grown": grown,
    }
    for name, call in (("eager", plain), ("recorded", recorded)):
        # turns of ten steps, in a dry run one
        turns, steps = (5, 10) if device.type == "cuda" else (1, 1)
        found = [seconds_of(lambda call=call: call(x, 0), steps, device.type) for _ in range(turns)]  # type: ignore[misc]
        row[f"{name}_ms"] = round(statistics.median(found) * 1e3, 4)
    return {**row, "passed": equal == count and finite and grown <= 0}


def two_streams(bench: Bench, size: tuple[int, int]) -> dict[str, Any]:
    """Two recordings of one network replayed at once, each on a stream of its own."""
    device, same = bench.device, [False, False]
    count, ready, recording = max(REPLAYS[device.type] // 4, 2), threading.Barrier(2), threading.Lock()
    latents = [bench.latent(size) for _ in range(2)]
    with torch.inference_mode():
        wanted = [bench.start(bench.eager(), x)(x, 0).clone() for x in latents]

    def work(k: int) -> None:
        with torch.inference_mode():
            with recording:
                velocity = bench.start(bench.recorded(), latents[k])
            ready.wait(60)
            same[k] = all(torch.equal(velocity(latents[k], 0), wanted[k]) for _ in range(count))

    def on_a_stream(k: int) -> None:
        try:
            if device.type != "cuda":
                return work(k)
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                work(k)
        finally:
            # the other must not wait for one that failed
            if not same[k]:
                ready.abort()

    synchronize(device.type)
    threads = [threading.Thread(target=on_a_stream, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"streams": 2, "replays": count, "passed": all(same)}


def check(setting: Setting, output: Path) -> None:
    """Both sizes, then two streams; writes as it goes.

    Raises:
        SanaError: something differs, or grows.
    """
    device = torch.device(setting.device)
    bench = Bench(setting.shapes, device)
    rows: list[dict[str, Any]] = []
    for call, size in (
        (replays, SIZES[device.type][0]),
        (replays, SIZES[device.type][1]),
        (two_streams, None),
    ):
        rows.append(call(bench, size or SIZES[device.type][0]))
        print(rows[-1], flush=True)
        ok = all(row["passed"] for row in rows)
        first = rows[0]
        figure = (
            f"{first['equal']} of {first['replays']} replays equal, a step of {LAYERS[device.type]} layers "
            f"{first['recorded_ms']:.3g} ms, unrecorded {first['eager_ms']:.3g} ms"
        )
        figure = figure if ok else f"differs: {next(row for row in rows if not row['passed'])}"
        write_json(output, {"figure": figure, "layers": LAYERS[device.type], "checks": rows})
    if not ok:
        raise SanaError(figure, "a recorded step must give the bytes of the unrecorded one")


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
