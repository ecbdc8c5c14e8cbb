"""The first steps of a public architecture's training on this machine: memory and seconds of a step.

    python benchmarks/first_steps.py random-0.6b --recipe sana-0.6b --work steps-0.6b

The model folder has the frozen parts; `benchmarks/random_model.py` makes one with random weights where no
checkpoint can be had. The denoiser starts on random weights, as the recipe says; its pictures are scenes of
`sana_edge.training.scenes` at the stage's resolution. Batch and steps are changed, nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from record import ended, header, positive, write_json
from scene_folder import write_scenes

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given), "interrupted; the same command goes on from here")


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    import torch

    from sana_edge.training.frozen import Frozen
    from sana_edge.training.processes import device_memory, make_accelerator
    from sana_edge.training.recipe import load_recipe
    from sana_edge.training.train import Task, train

    begun = header("benchmarks/first_steps.py", given)
    changes = [f"stage.batch={options.batch}", f"stage.steps={options.steps}", *options.set]
    recipe = load_recipe(options.recipe, changes)
    stage = recipe.stage[0]
    data = options.work / "data"
    write_scenes(data, options.pictures, stage.resolution)
    frozen = Frozen.find(options.model)
    task = Task(recipe, frozen, data, options.work / "out", options.work / "latents", log_steps=1)
    train(task, 1)
    log = (task.folder(1) / "log.jsonl").read_text().splitlines()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = json.loads((frozen.folder / "text_encoder" / "config.json").read_text())
    result = {
        **begun,
        "recipe": options.recipe,
        "changes": changes,
        "resolution": stage.resolution,
        "parameters": parameters(task.folder(1) / "model" / "transformer"),
        "text_encoder_layers": text["num_hidden_layers"],
        "precision": make_accelerator(recipe.training.precision).mixed_precision,
        "threads": torch.get_num_threads(),
        "peak_memory_gb": round(device_memory(device) / 2**30, 2),
        "seconds_per_step": round(seconds(task.folder(1)) / stage.steps, 1),
        "steps": [json.loads(line) for line in log],
    }
    write_json(options.output, result)
    print(options.output)


def parameters(folder: Path) -> int:
    """Of a component, by the shapes in its file."""
    from safetensors import safe_open

    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def seconds(folder: Path) -> float:
    """What the steps of a stage took."""
    from safetensors import safe_open

    with safe_open(folder / "state.safetensors", "pt") as file:
        return float(file.metadata()["seconds"])


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the first steps of a training: memory and seconds")
    parser.add_argument("model", help="model folder with autoencoder and text encoder")
    parser.add_argument("--recipe", default="sana-0.6b")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, latents and states")
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=2)
    parser.add_argument("--pictures", type=positive, default=4)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=RESULTS / "first_steps-0.6b-512px.json")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
