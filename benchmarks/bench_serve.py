"""What a request costs beyond its picture, and pictures per minute: the server, a loop, and diffusers served.

    python benchmarks/bench_serve.py

starts `sana-edge serve` and a small server of the same route around diffusers' SanaPipeline, each in a
process of its own, with sana-tiny's weights in fp32, and draws the same pictures from both and in a loop in
this process, in turns. What both draw is compared, since times of unequal work say nothing.

The overhead is that of requests for a picture that is there already: the queue, the PNG, base64, JSON and
HTTP, less the PNG and base64 alone, which a loop needs as well. Its time on the processors is told beside
what the client waits, as that grows with what else runs on a machine. "clients" are several that ask at
once. A ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import ROOT, needs

needs("torch", "transformers", "diffusers", "starlette", "uvicorn")

from sana_edge.system.threads import wait_passively

# as the servers do, before torch is loaded: where the loop alone spins, the work is not equal
wait_passively(os.environ)

import numpy as np
import PIL.Image
import torch

from harness import run_tables
from harness.results import BASELINE, ended, output_for, positive, say
from sana_edge import Image, Sana, Step
from sana_edge.bench.results import header, load, write_json
from sana_edge.errors import SanaError
from sana_edge.progress import Progress
from sana_edge.serve.server import Server, address, listen
from sana_edge.serve.service import Service

MODEL = "sana-tiny"
PROMPT = "a red house left of a yellow star"
PATH = "/v1/images/generations"
SERVER, LOOP, CLIENTS = "sana-edge serve", "loop in one process", "sana-edge serve, 4 clients"
AT_ONCE = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    if options.serve_diffusers:
        return ended(lambda: serve_diffusers(options.threads))
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    output, threads = output_for(options, "bench_serve"), str(options.threads)
    ours = ["-m", "sana_edge", "serve", "--port", "0", "--model", MODEL, "--threads", threads]
    theirs = [str(Path(__file__).resolve()), "--serve-diffusers", "--threads", threads]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served([*ours, "--dtype", "fp32", "--no-prompt-cache", "--quiet"]))
        baseline = stack.enter_context(served(theirs))
        how = {"dtype": "fp32", "threads": options.threads, "prompt_cache": False}
        sana = stack.enter_context(Sana.load(MODEL, **how))
        compare(server, baseline, sana, options.steps)
        data = {
            **header("benchmarks/bench_serve.py", given),
            "load_before": load(),
            "model": MODEL,
            "threads": options.threads,
            "overhead": overhead(sana.generate(PROMPT, seed=7, steps=options.steps), options.requests),
            "pictures": pictures(server, baseline, sana, options),
        }
    write_json(output, data)
    print(run_tables.serving(data).text())


class Client:
    """A connection that stays open, as clients keep theirs."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=600)
        self._connection.connect()

    def draw(self, seed: int, steps: int, size: int) -> tuple[float, dict[str, Any]]:
        """Seconds of a request, and the answer's first picture."""
        body = {"prompt": PROMPT, "seed": seed, "steps": steps, "size": f"{size}x{size}", "exact_size": True}
        data = json.dumps(body).encode()
        start = time.perf_counter()
        self._connection.request("POST", PATH, data, {"content-type": "application/json"})
        response = self._connection.getresponse()
        content = response.read()
        seconds = time.perf_counter() - start
        if response.status != 200:
            raise SanaError(f"the server answers {response.status}: {content[:200]!r}")
        return seconds, json.loads(content)["data"][0]


@contextlib.contextmanager
def served(arguments: Sequence[str]) -> Iterator[str]:
    """A server in a process of its own: its address, which it prints first."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line.startswith("http://"):
                raise SanaError("a server did not start")
            yield line
        finally:
            process.terminate()


def compare(server: str, baseline: str, sana: Sana, steps: int) -> None:
    """That all draw the same.

    Raises: SanaError: they do not.
    """
    own = sana.generate(PROMPT, seed=7, steps=steps)
    for name, place in ((SERVER, server), (BASELINE, baseline)):
        data = base64.b64decode(Client(place).draw(7, steps, 256)[1]["b64_json"])
        drawn = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        if np.abs(drawn - own.pixels).max() > (0 if name == SERVER else 1):
            raise SanaError(f"{name} draws another picture", "times of unequal work say nothing")


class Drawn:
    """In place of a model: gives a picture that was drawn before, at once; a request is then all overhead."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.native_size = image.pixels.shape[1::-1]

    def stream(self, prompt: str, **options: Any) -> Iterator[Step]:
        """One step, with the picture."""
        yield Step(0, 1, self._image, lambda linear: self._image.pixels)

    def close(self) -> None:
        """Nothing is held."""


class DrawnLoader:
    """Loads `Drawn`."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def __call__(self, model: str, on_progress: Progress, cancel: threading.Event) -> Any:
        return Drawn(self._image)

    def size(self, model: str) -> int:
        """Bytes of its weights."""
        return 0


def overhead(image: Image, requests: int) -> dict[str, Any]:
    """Milliseconds of requests for a picture that is there, and of its PNG alone, in turns.

    Client and server are threads of this process, whose time on the processors counts both: what else runs on
    the machine is in "waited", and not in "computed".
    """
    service = Service({MODEL: MODEL}, DrawnLoader(image))
    server = Server(service)
    found: dict[str, list[float]] = {}
    with listen("127.0.0.1", 0, None) as listening:
        thread = threading.Thread(target=server.answer, args=[listening])
        thread.start()
        try:
            client = Client(address(listening))
            works: dict[str, Callable[[], object]] = {
                "request": lambda: client.draw(7, 1, 256),
                "png": lambda: base64.b64encode(image.png()),
            }
            for turn in range(requests + 5):
                for name, work in works.items():
                    waited, computed = time.perf_counter(), time.process_time()
                    work()
                    if turn >= 5:
                        found.setdefault(f"{name} waited", []).append(time.perf_counter() - waited)
                        found.setdefault(f"{name} computed", []).append(time.process_time() - computed)
        finally:
            server.stop()
            thread.join()
    for kind in ("waited", "computed"):
        pairs = zip(found[f"request {kind}"], found[f"png {kind}"], strict=True)
        found[f"beyond {kind}"] = [request - png for request, png in pairs]
    kept = {name: _spread([value * 1e3 for value in values]) for name, values in found.items()}
    say("overhead", f"{kept['beyond computed']['median']} ms computed beyond the PNG")
    return {"requests": requests, "bytes": len(image.png()), "milliseconds": kept}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and what nine of ten values lie between."""
    ordered = sorted(values)
    cut = len(ordered) // 20
    numbers = {"median": statistics.median(ordered), "low": ordered[cut], "high": ordered[-1 - cut]}
    return {name: round(value, 3) for name, value in numbers.items()}


def pictures(server: str, baseline: str, sana: Sana, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures per minute of each contender, turn by turn, and the ratios to the loop."""
    steps, count = options.steps, options.count

    def one_by_one(place: str) -> None:
        # a connection of each turn, as servers close those that wait long
        client = Client(place)
        for seed in range(count):
            client.draw(seed, steps, 256)

    def at_once() -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            shares = [range(first, count, AT_ONCE) for first in range(AT_ONCE)]
            jobs = [
                pool.submit(lambda c, seeds: [c.draw(seed, steps, 256) for seed in seeds], client, seeds)
                for client, seeds in zip((Client(server) for _ in shares), shares, strict=True)
            ]
            for job in jobs:
                job.result()

    def loop() -> None:
        for seed in range(count):
            sana.generate(PROMPT, seed=seed, steps=steps).png()

    contenders: dict[str, Callable[[], None]] = {
        LOOP: loop,
        SERVER: lambda: one_by_one(server),
        CLIENTS: at_once,
        BASELINE: lambda: one_by_one(baseline),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.repeat + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                rates[name].append(round(60 * count / (time.perf_counter() - start), 2))
        if turn:
            say(f"turn {turn}", ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()))
    return {"steps": steps, "count": count, "rates": rates, "ratios": ratios(rates)}


def ratios(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each contender to the loop of the same turn, the median."""
    shares = {
        name: [a / b for a, b in zip(values, rates[LOOP], strict=True)] for name, values in rates.items()
    }
    return {name: round(statistics.median(values), 3) for name, values in shares.items()}


def serve_diffusers(threads: int) -> None:
    """The route by diffusers, a picture at a time, as its users write such servers."""
    import uvicorn
    from diffusers import SanaPipeline
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from sana_edge.store.known_models import BUNDLED

    torch.set_num_threads(threads)
    pipeline = SanaPipeline.from_pretrained(BUNDLED / MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    turn = asyncio.Lock()

    def draw(asked: Mapping[str, Any]) -> str:
        width, height = map(int, asked["size"].split("x"))
        (image,) = pipeline(
            asked["prompt"],
            num_inference_steps=asked["steps"],
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(asked["seed"]),
            use_resolution_binning=False,
        ).images
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    async def generations(request: Request) -> JSONResponse:
        asked = await request.json()
        async with turn:
            b64_json = await asyncio.to_thread(draw, asked)
        return JSONResponse({"created": int(time.time()), "data": [{"b64_json": b64_json}]})

    with listen("127.0.0.1", 0, None) as listening:
        print(address(listening), flush=True)
        app = Starlette(routes=[Route(PATH, generations, methods=["POST"])])
        uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listening])


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_serve.py", description="Measure the server.")
    add = parser.add_argument
    add("--requests", type=positive, default=100, metavar="N", help="of the overhead (default: %(default)s)")
    add("--count", type=positive, default=8, metavar="N", help="pictures of a turn (default: %(default)s)")
    add("--repeat", type=positive, default=5, metavar="N", help="turns (default: %(default)s)")
    add("--steps", type=positive, default=20, metavar="N", help="of a picture (default: %(default)s)")
    add("--threads", type=positive, default=2, metavar="N", help="of each (default: %(default)s)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_serve.json)")
    add("--serve-diffusers", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
