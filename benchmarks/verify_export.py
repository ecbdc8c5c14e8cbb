"""How far exported graphs are from the model they were made of: what `sana-edge export` compares, in numbers.

    python benchmarks/verify_export.py

exports sana-tiny as fp32, fp16, bf16 and INT8 into a temporary folder and writes as JSON what each manifest
says of the comparison, the seconds of each part of the work, and the bytes of each file of graphs. An export
that fails is written down, and ends the command with 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, needs

needs("torch", "transformers", "onnx", "onnxruntime")

from harness import engine_tables
from harness.results import ended
from sana_edge.bench.results import header, write_json
from sana_edge.errors import SanaError
from sana_edge.export.onnx import export
from sana_edge.export.settings import Settings
from sana_edge.store.manifest import Manifest

EXPORTS = {
    "fp32": Settings(),
    "fp16": Settings(dtype="fp16"),
    "bf16": Settings(dtype="bf16"),
    "int8": Settings(int8=True),
}
# see `sana_edge.export.verify.runner`
_NOTES = {"bf16": "compared with its bf16 weights, but in fp32: onnxruntime has no bf16 products on a CPU"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    exports = [exported(options.model, name, settings) for name, settings in EXPORTS.items()]
    data = {**header("benchmarks/verify_export.py", given), "exports": exports}
    write_json(options.output, data)
    print(engine_tables.verification(data).text())
    failed = [found["name"] for found in exports if found["failure"] is not None]
    if failed:
        raise SanaError(f"not exported: {', '.join(failed)}", f"the reasons are in {options.output}")


def exported(model: str, name: str, settings: Settings) -> dict[str, Any]:
    """An export with its comparison, as JSON values; "failure" is its error, else None."""
    shown = Path(model).name if Path(model).is_dir() else model
    found: dict[str, Any] = {"name": name, "command": _command(shown, settings), "failure": None}
    starts: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        try:
            made = export(
                model,
                Path(place) / "onnx",
                settings,
                progress=lambda part, done, count: starts.append((part, time.perf_counter())),
            )
        except SanaError as error:
            # no folders of this machine
            return {**found, "failure": error.message.replace(place, "DIR").replace(model, shown)}
        ends = [*(start for _, start in starts[1:]), time.perf_counter()]
    return {
        **found,
        "model": made.name,
        "note": _NOTES.get(made.dtype),
        "seconds": {part: round(end - start, 3) for (part, start), end in zip(starts, ends, strict=True)},
        "bytes": _bytes(made),
        "verification": made.verification,
    }


def _bytes(made: Manifest) -> dict[str, int]:
    """Of graphs, and of the files of their weights, which some share."""
    return {name: file.bytes for name, file in made.files.items() if name.endswith((".onnx", ".data"))}


def _command(model: str, settings: Settings) -> str:
    """The same on the command line."""
    kind = ["--int8"] if settings.int8 else ["--dtype", settings.dtype]
    return shlex.join(["sana-edge", "export", model, *kind, "--output", "DIR"])


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="verify_export.py", description="Compare exports with the model.")
    add = parser.add_argument
    add("--model", default="sana-tiny", help="what is exported (default: %(default)s)")
    output = RESULTS / "verify_export.json"
    add("--output", type=Path, default=output, metavar="PATH", help="(default: results/)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
