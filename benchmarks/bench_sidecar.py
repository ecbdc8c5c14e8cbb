"""Times the first picture of a sidecar, from the start of its process, beside that of the command.

    python benchmarks/bench_sidecar.py --threads 2

Both run without torch, in turns; a picture counts when its last byte is with the parent, and both are equal.
What the sidecar saves shows in its second picture. Processor time is what tells on a busy machine.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from harness import ROOT, needs

needs("torch", "onnxruntime", "psutil")

import psutil

from harness.results import Say, ended, output_for, positive, say
from harness.run_tables import sidecar as table
from sana_edge.bench.machine import versions
from sana_edge.bench.results import header, load, write_json
from sana_edge.errors import SanaError
from sana_edge.store.known_models import BUNDLED

MODEL = BUNDLED / "sana-tiny-int8-onnx"
PROMPT, SEED = "a red house left of a yellow star", 7
# the end of every PNG
END = b"IEND\xaeB`\x82"
_PROCESS = [sys.executable, str(ROOT / "benchmarks" / "works" / "picture_process.py"), "cli"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    output = output_for(options, "bench_sidecar")
    data = {
        **header("benchmarks/bench_sidecar.py", given),
        "packages": versions("onnxruntime"),
        "load_before": load(),
        "model": MODEL.name,
        "steps": options.steps,
        "threads": options.threads,
        **measure(options, partial(say, "sidecar")),
        "load_after": load(),
    }
    write_json(output, data)
    print(table(data).text())


def measure(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Both in turns, after one turn that reads the files and is not counted.

    Returns:
        Seconds of each turn: "command", "sidecar", "second" of the sidecar, "difference" of the first two,
        and of the processor "command's processor", "sidecar's processor".

    Raises:
        SanaError: one of them fails, or their pictures differ.
    """
    found: dict[str, list[float]] = {}
    for turn in range(options.repeat + 1):
        command, picture = _command(options)
        sidecar, pictures = _sidecar(options)
        if {picture} != set(pictures):
            raise SanaError("the pictures of command and sidecar differ", "no time counts before they do not")
        taken = {**command, **sidecar}
        say(
            f"{turn}/{options.repeat}, " + ", ".join(f"{name} {value:.2f} s" for name, value in taken.items())
        )
        for name, seconds in taken.items() if turn else ():
            found.setdefault(name, []).append(seconds)
    pairs = zip(found["sidecar"], found["command"], strict=True)
    found["difference"] = [sidecar - command for sidecar, command in pairs]
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {"seconds": found, "median": medians}


def _started(words: Sequence[str], options: argparse.Namespace) -> subprocess.Popen[bytes]:
    shared = ["--quiet", "--no-prompt-cache", "--model", str(MODEL), "--threads", str(options.threads)]
    command = [*_PROCESS, *words, *shared]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _processor(process: subprocess.Popen[bytes]) -> float:
    """Seconds that it has used of the processor so far."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def _command(options: argparse.Namespace) -> tuple[dict[str, float], bytes]:
    """Seconds until the whole picture of ``generate`` is on its stdout, and the picture."""
    start = time.perf_counter()
    words = ["generate", PROMPT, "--seed", str(SEED), "--steps", str(options.steps), "--output", "-"]
    with _started(words, options) as process:
        _, out = _pipes(process)
        picture = bytearray()
        while not picture.endswith(END):
            part = os.read(out.fileno(), 1 << 20)
            if not part:
                raise SanaError("the command drew nothing", "run it by itself")
            picture += part
        found = {"command": time.perf_counter() - start, "command's processor": _processor(process)}
    return found, bytes(picture)


def _sidecar(options: argparse.Namespace) -> tuple[dict[str, float], list[bytes]]:
    """Seconds of the first picture and the second, which is asked for when the first is there; and both."""
    found: dict[str, float] = {}
    pictures = []
    start = time.perf_counter()
    with _started(["serve", "--stdio"], options) as process:
        into, out = _pipes(process)
        for name in ("sidecar", "second"):
            ask = {"type": "generate", "id": name, "prompt": PROMPT, "seed": SEED, "steps": options.steps}
            into.write(f"{json.dumps(ask)}\n".encode())
            into.flush()
            pictures.append(_drawn(out))
            found[name] = time.perf_counter() - start
            found.setdefault("sidecar's processor", _processor(process))
            start = time.perf_counter()
        into.close()
    return found, pictures


def _drawn(out: IO[bytes]) -> bytes:
    for line in out:
        event = json.loads(line)
        if event["type"] == "image":
            return base64.b64decode(event["b64_json"])
        if event["type"] == "error":
            raise SanaError(event["error"], event["hint"])
    raise SanaError("the sidecar ended", "run it by itself")


def _options(given: Sequence[str]) -> argparse.Namespace:
    description = "Time the first picture of a sidecar beside that of the command."
    parser = argparse.ArgumentParser(prog="bench_sidecar.py", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--steps", type=positive, default=20, metavar="N", help="(default: %(default)s)")
    add("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="(default: %(default)s)")
    add("--repeat", type=positive, default=11, metavar="N", help="turns (default: %(default)s)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_sidecar.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
