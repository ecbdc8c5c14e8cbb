"""Training on this machine: the first steps of a public architecture, and what captions are drawn by.

    python benchmarks/bench_training.py steps random-0.6b --recipe sana-0.6b --work steps-0.6b

measures memory and seconds of a step. The model folder has the frozen parts; `random_model.py` makes one with
random weights where no checkpoint can be had. The denoiser starts on random weights, as the recipe says; its
pictures are scenes of `sana_edge.training.scenes` at the stage's resolution. Batch and steps are changed,
nothing else.

    python -m sana_edge.training.art.folder --output runs/mixed --count 1000 --wrong 0.5
    python -m sana_edge.training.art.folder --output runs/held-out --first 900000 --count 64
    python -m sana_edge.training.score --data runs/mixed --model runs/clip-model
    python benchmarks/bench_training.py captions runs/mixed runs/held-out --clip runs/clip-model \
        --model runs/model --work runs/caption-sampler --minutes 60

compares captions of mixed quality drawn uniformly or by their CLIP scores (arXiv 2410.10629, section 3.1):
two denoisers with the same start, pictures, noise and minutes of training. Both are measured on true captions
of pictures that neither has seen: the loss of the velocity with the same noise for both, and the CLIP score
of pictures that they generate.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import RESULTS, needs

needs("torch", "transformers", "accelerate", "safetensors", "tqdm")

import torch
from PIL import Image
from safetensors import safe_open

from harness.results import ended, positive
from sana_edge import Sana
from sana_edge.bench.results import header, write_json
from sana_edge.errors import InvalidInput
from sana_edge.system.atomic import write_bytes
from sana_edge.training import flow
from sana_edge.training.batches import Item
from sana_edge.training.captions import caption
from sana_edge.training.frozen import Frozen
from sana_edge.training.imagefolder import LeftOut, open_picture, read_entries
from sana_edge.training.layout import training_scene
from sana_edge.training.metadata import find_metadata
from sana_edge.training.processes import device_memory, make_accelerator
from sana_edge.training.recipe import Recipe, load_recipe
from sana_edge.training.scenes import render
from sana_edge.training.score import Scorer, probabilities
from sana_edge.training.state import ema_state
from sana_edge.training.train import Data, Task, encode_captions, generator, prepare_data, train
from sana_edge.training.trained_denoiser import TrainedDenoiser

# a temperature at which all captions are equally likely
UNIFORM = 1e9
# draws of noise and timestep for every held-out picture
DRAWS = 8
ARMS = {"uniform": "#8a8f98", "clip score": "#3f7fdb"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: options.run(options, given), "interrupted; the same command goes on from here")


def first_steps(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Memory and seconds of a step."""
    begun = header("benchmarks/bench_training.py", given)
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
        "seconds_per_step": round(float(numbers(task.folder(1))["seconds"]) / stage.steps, 1),
        "steps": [json.loads(line) for line in log],
    }
    write_json(options.output, result)
    print(options.output)


def parameters(folder: Path) -> int:
    """Of a component, by the shapes in its file."""
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def numbers(folder: Path) -> dict[str, str]:
    """What a stage's state says of itself: "seconds" and "step"."""
    with safe_open(folder / "state.safetensors", "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


def write_scenes(folder: Path, count: int, side: int, *, captions: int = 2) -> None:
    """An imagefolder of flat scenes: pictures, and metadata.jsonl with true captions."""
    rng = random.Random("scene folder ")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        scene = training_scene(rng)
        render(scene, side).save(folder / f"{number:05d}.png")
        row = {"file_name": f"{number:05d}.png", "captions": [caption(scene, rng) for _ in range(captions)]}
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def caption_sampler(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Two trainings that draw captions differently."""
    recipe = load_recipe(options.recipe, options.set)
    frozen = Frozen.find(options.model)
    scorer = Scorer(options.clip)
    quality = caption_quality(options.data, recipe.captions.tau)
    arms = {}
    for arm in ARMS:
        tau = UNIFORM if arm == "uniform" else recipe.captions.tau
        own = replace(recipe, captions=replace(recipe.captions, tau=tau))
        arms[arm] = _arm(options, own, frozen, scorer, options.work / arm.replace(" ", "-"))
    result = {
        **header("benchmarks/bench_training.py", given),
        "tau": recipe.captions.tau,
        "captions": quality,
        "clip_score_of_true_pictures": round(_true_score(options, scorer), 3),
        "arms": arms,
    }
    write_json(options.output, result)
    write_bytes(options.output.with_suffix(".png"), figure(result))
    print(options.output)


def _arm(
    options: argparse.Namespace, recipe: Recipe, frozen: Frozen, scorer: Scorer, work: Path
) -> dict[str, Any]:
    """Train in rounds, and measure after each."""
    rounds = []
    held_out = Task(recipe, frozen, options.held_out, work, options.work / "latents")
    data = prepare_data(held_out, recipe.stage[0], make_accelerator(recipe.training.precision))
    for number in range(1, options.rounds + 1):
        share = number / options.rounds
        minutes, steps = options.minutes * share, round(options.steps * share)
        budget = {"minutes": 0.0, "steps": steps} if options.steps else {"minutes": minutes, "steps": 0}
        stage = replace(recipe.stage[0], **budget, decay_from=1.0)
        task = Task(replace(recipe, stage=(stage,)), frozen, options.data, work, options.work / "latents")
        if not train(task, 1):
            raise KeyboardInterrupt
        log = numbers(task.folder(1))
        loss = held_out_loss(task, data)
        rounds.append(
            {
                "minutes": round(float(log["seconds"]) / 60, 2),
                "steps": int(log["step"]),
                "held_out_loss": round(loss, 5),
            }
        )
    score = generated_score(task.folder(1) / "model", data, scorer, options.pictures, options.guidance)
    return {"rounds": rounds, "clip_score": round(score, 3), "pictures": options.pictures}


@torch.no_grad()
def held_out_loss(task: Task, data: Data) -> float:
    """Mean loss of the averaged weights on each picture's first caption, always with the same noise."""
    stage = task.recipe.stage[0]
    model = TrainedDenoiser(task.recipe.config(stage))
    model.load_state_dict(ema_state(task.folder(1)))
    encoder = task.frozen.text_encoder(torch.device("cpu"))
    total, count = 0.0, 0
    for row, (entry, picture) in enumerate(data.pictures):
        clean = data.cache[picture.key][None].float() * data.scale
        items = [Item(picture.key, entry.captions[0])]
        features = encode_captions(encoder, items, torch.device("cpu"))
        wide = replace(
            features,
            embeddings=features.embeddings.expand(DRAWS, -1, -1),
            mask=features.mask.expand(DRAWS, -1),
        )
        generators = [generator(-1, draw, row) for draw in range(DRAWS)]
        batch = flow.noised(clean.expand(DRAWS, -1, -1, -1), generators, stage.flow_shift)
        total += float(flow.loss(model(batch.x_t, batch.timesteps, wide), batch.target))
        count += 1
    return total / count


def generated_score(folder: Path, data: Data, scorer: Scorer, count: int, guidance: float) -> float:
    """Mean CLIP score of pictures generated for held-out captions, each with its own seed."""
    sana = Sana.load(str(folder), device="cpu", dtype="fp32", prompt_cache=False)
    total = 0.0
    prompts = [entry.captions[0] for entry, _ in data.pictures[:count]]
    for seed, prompt in enumerate(prompts):
        picture = sana.generate(prompt, seed=seed, guidance=guidance)
        total += scorer.score([Image.fromarray(picture.pixels)], [[prompt]])[0][0]
    return total / len(prompts)


def _true_score(options: argparse.Namespace, scorer: Scorer) -> float:
    """What the held-out pictures themselves have."""
    entries = read_entries(options.held_out, "train", LeftOut())[: options.pictures]
    scores = [scorer.score([open_picture(e.path).convert("RGB")], [e.captions[:1]])[0][0] for e in entries]
    return sum(scores) / len(scores)


def caption_quality(folder: Path, tau: float) -> dict[str, Any]:
    """How many captions are wrong, and how often one is drawn; rows say it in ``wrong``."""
    wrong, drawn, uniform, rows = 0, 0.0, 0.0, 0
    for metadata in find_metadata(folder):
        for row in metadata.rows.values():
            if "clip_scores" not in row or "wrong" not in row:
                raise InvalidInput(
                    f"{folder} has rows without clip_scores or wrong",
                    "`bench_training.py --help` says what makes them",
                )
            chances = probabilities(row["clip_scores"], tau)
            wrong += sum(row["wrong"])
            uniform += sum(row["wrong"]) / len(row["wrong"])
            drawn += sum(p for p, bad in zip(chances, row["wrong"], strict=True) if bad)
            rows += 1
    return {
        "pictures": rows,
        "wrong": wrong,
        "drawn_wrong_uniform": round(uniform / rows, 4),
        "drawn_wrong_clip_score": round(drawn / rows, 4),
    }


def figure(result: Mapping[str, Any]) -> bytes:
    """Held-out loss over the steps, and the CLIP scores of pictures: a PNG."""
    needs("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    for arm, colour in ARMS.items():
        rounds = result["arms"][arm]["rounds"]
        left.plot(
            [r["steps"] for r in rounds],
            [r["held_out_loss"] for r in rounds],
            "o-",
            color=colour,
            label=arm,
        )
    left.set(xlabel="steps", ylabel="held-out loss")
    left.grid(alpha=0.3)
    left.legend()
    scores = [result["arms"][arm]["clip_score"] for arm in ARMS]
    right.bar(list(ARMS), scores, color=list(ARMS.values()), width=0.6)
    right.axhline(result["clip_score_of_true_pictures"], color="#444", linewidth=1, linestyle="--")
    right.set(ylabel="CLIP score (dashed: true pictures)")
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    pyplot.close(drawing)
    return buffer.getvalue()


def _options(given: Sequence[str]) -> argparse.Namespace:
    kinds = argparse.ArgumentParser(prog="bench_training.py", description="Measure training on this machine.")
    commands = kinds.add_subparsers(required=True, metavar="steps|captions")
    for name, run, recipe, output in (
        ("steps", first_steps, "sana-0.6b", "first_steps-0.6b-512px"),
        ("captions", caption_sampler, "sana-tiny", "caption_sampler"),
    ):
        parser = commands.add_parser(name)
        parser.set_defaults(run=run)
        (_steps if name == "steps" else _captions)(parser)
        parser.add_argument("--recipe", default=recipe)
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe"
        )
        parser.add_argument("--work", type=Path, required=True, help="folder for latents, states and models")
        parser.add_argument("--output", type=Path, default=RESULTS / f"{output}.json")
    return kinds.parse_args(given)


def _steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder with autoencoder and text encoder")
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=2)
    parser.add_argument("--pictures", type=positive, default=4)


def _captions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, help="imagefolder whose rows have captions, clip_scores and wrong")
    add("held_out", type=Path, help="imagefolder with true captions")
    add("--clip", type=Path, required=True, help="folder of the CLIP that scored them")
    add("--model", required=True, help="frozen autoencoder and text encoder")
    add("--minutes", type=float, default=60.0, help="of each of the two (default: %(default)s)")
    equal = "of each instead of minutes, which differ in steps where other work shares the machine"
    add("--steps", type=positive, default=0, help=equal)
    add("--rounds", type=positive, default=4, help="measurements (default: %(default)s)")
    add("--pictures", type=positive, default=32, help="generated (default: %(default)s)")
    add("--guidance", type=float, default=4.5)


if __name__ == "__main__":
    sys.exit(main())
