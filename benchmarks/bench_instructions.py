"""Machine instructions of the CUDA kernels, counted in what nvcc made: no GPU is needed.

    SANA_EDGE_CUDA_ARCHS=89 python csrc/compile.py --objects objects --output objects/library.so
    python benchmarks/bench_instructions.py objects --output benchmarks/results/instructions.json

Of every kernel of every object: all instructions, those behind the last product of the tensor cores (what
follows the sums), comparisons of NaN-maxima, and what waits for the kernel before (programmatic dependent
launch). Counts are of the code, not of what runs: a loop counts once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import needs

needs("torch")

from harness.results import ended
from sana_edge.bench.results import header, write_json
from works.machine_code import cuobjdump, functions

TENSOR = re.compile(r"\b(?:IMMA|HMMA)\.")
# names of SASS instructions: how many of them are counted
COUNTED = {
    "nan_maxima": re.compile(r"\bFMNMX\.NAN\b"),
    "maxima": re.compile(r"\bFMNMX"),
    "comparisons": re.compile(r"\bFSETP\b"),
    "reciprocals": re.compile(r"\bMUFU\.RCP"),
    "early_waits": re.compile(r"\bACQBULK\b"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", type=Path, help="folder of the objects that csrc/compile.py left")
    parser.add_argument("--built-from", help="commit of the objects, where it is not the checkout's")
    parser.add_argument("--output", type=Path, help="results file")
    return parser.parse_args(given)


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    rows = [row for path in sorted(options.objects.glob("*.o")) for row in kernels(_disassembled(path))]
    for row in rows:
        print(f"sm_{row['architecture']} {row['instructions']:6} {row['behind_products']:6} {row['kernel']}")
    if options.output:
        head = header("benchmarks/bench_instructions.py", given)
        built = options.built_from or head["commit"]
        write_json(options.output, {**head, "built_from": built, "kernels": rows})


def kernels(text: str) -> Iterator[dict[str, Any]]:
    """The counts of every kernel in what cuobjdump says of an object."""
    for part in re.split(r"^Fatbin elf code:$", text, flags=re.MULTILINE)[1:]:
        (architecture,) = re.findall(r"^arch = sm_(\d+)\w?$", part, re.MULTILINE)
        for name, code in functions(part):
            lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.+?);", code, re.MULTILINE)
            lines = [line for line in lines if line != "NOP"]
            products = [n for n, line in enumerate(lines) if TENSOR.search(line)]
            yield {
                # without the file's mark and the arguments
                "kernel": re.sub(r"^\w*_cu_[0-9a-f]{8}\d\d|EEv.*$", "", name),
                "architecture": architecture,
                "instructions": len(lines),
                "behind_products": len(lines) - products[-1] - 1 if products else 0,
                **{what: sum(bool(p.search(line)) for line in lines) for what, p in COUNTED.items()},
            }


def _disassembled(path: Path) -> str:
    command = [cuobjdump(), "-sass", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
