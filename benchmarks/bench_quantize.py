"""Time, memory and sizes of `sana-edge quantize --no-calibration`, and a first picture from what it made.

    python benchmarks/random_model.py random-0.6b --shapes 0.6b
    python benchmarks/bench_quantize.py random-0.6b

Each command runs in a process of its own, whose peak memory the system tells when it ends. The folder that is
quantized should have been read once before, so that the disk is not what is measured.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import ended, header, write_json
from safetensors import safe_open

from sana_edge.errors import SanaError

RESULTS = Path(__file__).parent / "results"
COMPONENTS = ("transformer", "vae", "text_encoder")
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    model = options.model.resolve()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=model.parent) as name:
        folder = Path(name)
        package = folder / "int8"
        data: dict[str, Any] = {
            **header("benchmarks/bench_quantize.py", given),
            "quantize": command("quantize", str(model), "--no-calibration", "--output", str(package)),
            "bytes": {"float": sizes(model), "int8": sizes(package)},
        }
        if options.generate:
            place = ("--size", options.generate, "--steps", "1", "--output", str(folder / "picture.png"))
            made = ("--prompt", "a fox in the snow", "--seed", "0", *place)
            data["generate"] = command("generate", "--model", str(package), *made)
    write_json(options.output, data)
    print(table(data))


def command(*arguments: str) -> dict[str, float]:
    """Runs ``sana-edge`` with these arguments: seconds, and bytes of peak memory.

    Raises: SanaError with what it wrote, if it fails.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "sana_edge", *arguments, "--quiet"], stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SanaError(f"sana-edge {arguments[0]} failed: {said.read().decode().strip()}")
    # bytes on macOS, else KiB
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": round(seconds, 2), "peak_memory": usage.ru_maxrss * unit}


def sizes(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of the tensors that a picture needs: as they are stored, and what they would take in fp32.

    A quantized module's scales do not count in fp32. The autoencoder counts without its encoder.
    """
    found = {name: {"stored": 0, "fp32": 0} for name in COMPONENTS}
    for name in COMPONENTS:
        for path in (folder / name).glob("*.safetensors"):
            with safe_open(path, "numpy") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if name == "vae" and not key.startswith("decoder."):
                        continue
                    part = file.get_slice(key)
                    count = math.prod(part.get_shape())
                    found[name]["stored"] += count * BYTES[part.get_dtype()]
                    found[name]["fp32"] += 0 if key.endswith("_scale") else 4 * count
    return found


def table(data: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'':14}{'fp32':>10}{'stored':>10}{'INT8':>10}{'of fp32':>9}"]
    for name, after in data["bytes"]["int8"].items():
        before = data["bytes"]["float"][name]
        shown = (before["fp32"], before["stored"], after["stored"])
        ratio = after["stored"] / before["fp32"]
        lines.append(f"{name:14}{''.join(f'{size / 1e6:>7.0f} MB' for size in shown)}{ratio:>9.3f}")
    for name in ("quantize", "generate"):
        if name in data:
            seconds, memory = data[name]["seconds"], data[name]["peak_memory"]
            lines.append(f"{name}: {seconds:.1f} s, {memory / 1e9:.2f} GB")
    return "\n".join(lines)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_quantize.py", description="Time quantizing a folder.")
    add = parser.add_argument
    add("model", type=Path, metavar="DIR", help="a float model folder; the package is made beside it")
    add("--generate", metavar="WxH", help="also make a picture in one step from the package")
    add(
        "--output",
        type=Path,
        default=RESULTS / "bench_quantize.json",
        metavar="PATH",
        help="(default: results/)",
    )
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
