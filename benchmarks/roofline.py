"""What pictures take on GPUs that are not at hand, predicted: each kernel by each of its limits.

    python benchmarks/roofline.py --code build/libsana_edge_cuda.so

The kernels of every stage are recorded from the code that starts them. Tiles and times of products are those
of csrc/tile_times.h, which chooses them on a GPU as well; instructions are counted in the machine code of
--code, a library built for compute capability 8.9, or are those of the results file. A prediction: nothing
was measured, and what is assumed has a name in the file. Kernels in files of gpu_check.py stand beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, needs

needs("torch", "transformers")

from harness.gpu_tables import predicted_kernels, predicted_pictures, tile_choices
from harness.results import ended
from sana_edge.bench.results import header, write_json
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.kernels.cuda.library import Library
from works import machine_code, stages
from works.gpus import ASSUMPTIONS, GPUS
from works.prediction import Predictor, picture
from works.tile_choices import choices

SHAPES = ("0.6b", "1.6b")
STEPS, SIDE = 20, 1024
# whose machine code is counted for all: kernels are the same but for Turing's
ARCHITECTURE = 89


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    output: Path = options.output
    instructions = _instructions(options.code, output)
    library = tile_library(options.library)
    head = header("benchmarks/roofline.py", given)
    write_json(output.with_name("tiles.json"), {**head, **tile_file(library)})
    data = {**head, **predict(library, instructions), "measured": list(measured(RESULTS))}
    write_json(output, data)
    print(predicted_pictures(data).text(), "\n")
    print(predicted_kernels(data).text(), "\n")
    print(tile_choices({**head, **tile_file(library)}).text())


def predict(library: Library, instructions: dict[str, machine_code.Code]) -> dict[str, Any]:
    """Pictures and the kernels of their stages on all GPUs, as JSON values."""
    schedules = {shapes: stages.schedules(shapes, SIDE, STEPS) for shapes in SHAPES}
    pictures, kernels = [], []
    for gpu in GPUS:
        predictor = Predictor(gpu, instructions, library)
        for shapes in SHAPES:
            seconds = picture(predictor, schedules[shapes])
            setting = {"gpu": gpu.name, "shapes": shapes, "side": SIDE, "steps": STEPS}
            pictures.append({**setting, "seconds": {key: round(value, 5) for key, value in seconds.items()}})
            for stage, schedule in schedules[shapes].items():
                kernels += [{**setting, **row} for row in predictor.rows(stage, schedule)]
    return {
        "assumptions": ASSUMPTIONS,
        "gpus": [gpu.facts for gpu in GPUS],
        "stages": {s: {name: one.facts for name, one in found.items()} for s, found in schedules.items()},
        "pictures": pictures,
        "kernels": kernels,
        "instructions": {name: code.facts for name, code in instructions.items()},
    }


def tile_file(library: Library) -> dict[str, Any]:
    """All tile choices."""
    return {"gpus": [gpu.facts for gpu in GPUS], "choices": list(choices(library, GPUS))}


def tile_library(given: Path | None) -> Library:
    """The library that times tiles; without one, a small one that only does this is built for the CPU.

    Raises:
        SanaError: no C++ compiler.
    """
    if given is not None:
        return Library(given)
    place = ROOT / "build" / "tiles" / "libsana_edge_tiles.so"
    command = [sys.executable, str(ROOT / "csrc" / "compile.py"), "--emulated", "890", "--only", "tiles"]
    done = subprocess.run([*command, "--output", str(place)], capture_output=True, text=True)
    if done.returncode:
        raise SanaError(f"the tile model does not compile: {done.stderr}", "give --library a built one")
    return Library(place)


def measured(results: Path) -> Iterator[dict[str, Any]]:
    """Kernels in the files of `gpu_check.py`, as `bench_kernels.py` writes them."""
    for path in sorted(results.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for call in data.get("calls", []) if isinstance(data, dict) else []:
            found = [
                step["figures"] for step in call["steps"] if step["name"] == "kernels" and step["figures"]
            ]
            for figures in found:
                keys = ("kernel", "size", "shapes", "side", "pictures", "seconds")
                rows = [{key: row[key] for key in keys} for row in figures["kernels"]]
                yield from ({**row, "file": path.name, "gpu": data["machine"]["gpu"]} for row in rows)


def _instructions(files: Sequence[Path], output: Path) -> dict[str, machine_code.Code]:
    if files:
        found = [machine_code.kernels(path, ARCHITECTURE) for path in files]
        return {name: one for each in found for name, one in each.items() if "BFloat16" in name}
    if not output.exists():
        raise InvalidInput(f"{output.name} does not exist", "count instructions: --code FILE")
    return machine_code.read(json.loads(output.read_text(encoding="utf-8"))["instructions"])


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--code", type=Path, nargs="*", default=[], help="library for 8.9 whose instructions are counted")
    add("--library", type=Path, help="library that times tiles (default: build one for the CPU)")
    add("--output", type=Path, default=RESULTS / "roofline.json", help="(default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
