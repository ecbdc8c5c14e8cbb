"""What `sana-edge plan` says, beside what then happens: peak memory and seconds of a picture.

    python benchmarks/bench_plan.py

Each combination runs `plan` and right behind it `generate`, each in a process of its own: resident memory and
the picture's seconds are those of the second. Models in full size have random weights, and text encoders of
two layers; they are made once, in ``--folder``. An interrupted run goes on where it stopped. Memory may be
off by 15 %, time by 30 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers", "safetensors")

import torch
from tqdm import tqdm

from harness.results import Diary, ended, output_for, positive
from harness.run_tables import plans
from random_model import write_model
from sana_edge.bench.process import run
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import decoder_shapes, weights
from sana_edge.calib.package_writer import new_folder, write_shards
from sana_edge.errors import InvalidInput
from sana_edge.nets.tiny_autoencoder import latent_decoder
from sana_edge.system.atomic import write_json as write_config

PROMPT = "a red house left of a yellow star"
MEMORY, TIME = 0.15, 0.30
# layers of the text encoders, of 26
TEXT_LAYERS = 2


@dataclass(frozen=True)
class Combination:
    """A model, as `plan` and `generate` take it.

    ``model`` is a bundled name, or that of a random one; ``decoder`` one of `works.shapes.DECODERS`.
    """

    name: str
    model: str
    size: int
    steps: int
    options: tuple[str, ...] = ()
    decoder: str | None = None


TORCH = ("--backend", "torch")
COMBINATIONS = (
    Combination("sana-tiny, torch", "sana-tiny", 256, 20, TORCH),
    Combination("sana-tiny INT8, torch", "sana-tiny", 256, 20, (*TORCH, "--int8")),
    Combination("sana-tiny INT8, onnxruntime", "sana-tiny-int8-onnx", 256, 20, ("--backend", "onnxruntime")),
    Combination("sana-tiny INT8, openvino", "sana-tiny-int8-onnx", 256, 20, ("--backend", "openvino")),
    Combination("0.6B at 512 px", "0.6b", 512, 4, TORCH),
    Combination("0.6B INT8 at 512 px", "0.6b", 512, 4, (*TORCH, "--int8")),
    Combination(
        "0.6B INT8 at 512 px within 1.8 GB", "0.6b", 512, 2, (*TORCH, "--int8", "--memory", "1800MB")
    ),
    Combination("0.6B at 1024 px, decoder taesana", "0.6b", 1024, 2, TORCH, "taesana"),
    Combination(
        "0.6B INT8 at 1024 px, decoder dc-ae-lite", "0.6b", 1024, 1, (*TORCH, "--int8"), "dc-ae-lite"
    ),
    Combination("Sprint 0.6B at 1024 px", "sprint-0.6b", 1024, 2, TORCH),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the results: 0, 1 for an error, 2 for usage, 130 for Ctrl-C, which a next call goes on from."""
    given = sys.argv[1:] if argv is None else list(argv)
    return ended(lambda: _run(_options(given), given), "interrupted: the same command goes on from here")


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    output = output_for(options, "bench_plan")
    chosen = [each for each in COMBINATIONS if not options.only or each.name in options.only]
    if not chosen:
        hint = f"choose {'; '.join(each.name for each in COMBINATIONS)}"
        raise InvalidInput(f"no combination is called {' or '.join(options.only)}", hint)
    about = header("benchmarks/bench_plan.py", given)
    identity = {name: about[name] for name in ("command", "commit", "machine", "versions")}
    with Diary(output, identity) as diary:
        done = {row["name"] for row in diary.rows}
        for each in tqdm(chosen, unit="combination", disable=not sys.stderr.isatty()):
            if each.name not in done:
                diary.add(measured(each, options.folder, options.threads))
        data = {
            **about,
            "threads": options.threads or torch.get_num_threads(),
            "int8_products": _int8_products(),
            "bounds": {"memory": MEMORY, "time": TIME},
            "rows": diary.rows,
        }
        write_json(output, data)
        diary.finish()
    print(plans(data).text())
    print(output)


def measured(each: Combination, folder: Path, threads: int | None = None) -> dict[str, Any]:
    """What was said and what happened, in bytes and seconds."""
    model, decoder = place(each, folder)
    size = f"{each.size}x{each.size}"
    shared = ["--size", size, "--exact-size", "--steps", str(each.steps), *each.options]
    shared += ["--decoder", str(decoder)] if decoder else []
    before = load()
    said = _command("plan", model, *shared, "--json", threads=threads)
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as place_:
        target = ["--output", str(Path(place_) / "a.png"), "--seed", "1", "--model", model]
        done = _command("generate", PROMPT, *target, *shared, "--no-prompt-cache", "--json", threads=threads)
    spent = {name: done["timings"].get(name, 0.0) for name in ("text", "denoise", "decode")}
    found = {
        "memory": {"said": said["peak"], "found": done["peak_memory"]},
        "time": {"said": sum(said["seconds"].values()), "found": sum(spent.values())},
    }
    for numbers in found.values():
        numbers["ratio"] = round(numbers["said"] / numbers["found"], 3)
    return {
        **asdict(each),
        **found,
        "way": said["way"],
        "seconds": {"said": said["seconds"], "found": spent},
        "stages": said["stages"],
        "base": said["base"],
        "load": before,
    }


def place(each: Combination, folder: Path) -> tuple[str, Path | None]:
    """The model as commands take it, and its other decoder; made where they are not there yet."""
    if each.model.startswith("sana-tiny"):
        return each.model, None
    sprint, shapes = each.model.startswith("sprint"), each.model.removeprefix("sprint-")
    model = folder / each.model
    folder.mkdir(parents=True, exist_ok=True)
    if not model.is_dir():
        write_model(
            model,
            shapes,
            dtype=torch.bfloat16 if sprint else torch.float16,
            text_layers=TEXT_LAYERS,
            text_width=2304 if shapes != "tiny" else 48,
            force=False,
            sprint=sprint,
        )
    if each.decoder is None:
        return str(model), None
    decoder = folder / f"{shapes}-{each.decoder}"
    if not decoder.is_dir():
        config = decoder_shapes(shapes, each.decoder)
        with torch.device("meta"):
            state = latent_decoder(config).state_dict()
        with new_folder(decoder, force=False) as made:
            write_config(made / "config.json", config.to_dict())
            write_shards(weights(state, torch.float32), made, stem="diffusion_pytorch_model")
    return str(model), decoder


def _command(name: str, *arguments: str, threads: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "sana_edge", name, *arguments]
    if threads is not None:
        command += ["--threads", str(threads)]
    done = run(command, f"sana-edge {name}")
    return dict(json.loads(done.printed.splitlines()[-1]))


def _int8_products() -> str:
    """What multiplies INT8 here: on a CPU without VNNI it saves no time."""
    from sana_edge.int8.matmul import describe

    return describe("cpu")[1]


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_plan.py", description="Compare plans with what happens.")
    add = parser.add_argument
    folder = Path(tempfile.gettempdir()) / "sana-edge-plan"
    add("--folder", type=Path, default=folder, metavar="DIR", help="of random models, 8 GB, which are kept")
    add("--only", type=_names, metavar="NAME;NAME", help="these combinations")
    add("--threads", type=positive, metavar="N", help="(default: the cores)")
    add("--output", type=Path, metavar="FILE", help="(default: in results/)")
    return parser.parse_args(given)


def _names(text: str) -> list[str]:
    return text.split(";")


if __name__ == "__main__":
    sys.exit(main())
