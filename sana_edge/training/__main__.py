"""``python -m sana_edge.training``: train a denoiser by a recipe, and caption and score its pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sana_edge.errors import extra

from . import caption, score
from .command import add_model_options, start
from .recipe import load_recipe, names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sana_edge.training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "train a denoiser by a recipe; Ctrl-C saves, and the same command goes on"
    command = commands.add_parser("train", help=about, description=about)
    _add_train_options(command)
    about = "write captions of an image-text-to-text model into metadata.jsonl"
    command = commands.add_parser("caption", help=about, description=about)
    caption.add_options(command)
    command.set_defaults(run=caption.run)
    about = "write CLIP scores of captions into metadata.jsonl"
    command = commands.add_parser("score", help=about, description=about)
    add_model_options(command, "a CLIP")
    command.set_defaults(run=score.run)
    return start(parser, lambda arguments: arguments.run(arguments))


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help=f"{', '.join(names())}, or the path of a .toml")
    add("--data", type=Path, required=True, metavar="DIR", help="pictures and metadata.jsonl (imagefolder)")
    add("--output", type=Path, required=True, metavar="DIR", help="states, logs and models of the stages")
    add("--stage", type=int, metavar="N", help="train this one (default: all that are not finished)")
    frozen = "model whose text encoder and autoencoder are used (default: the recipe's)"
    add("--model", metavar="MODEL", help=frozen)
    add("--split", default="train", metavar="NAME", help="of the data (default: %(default)s)")
    add("--latents", type=Path, metavar="DIR", help="cache of latents (default: latents/ in --output)")
    changes = "change the recipe, such as stage.batch=8 or optimizer.name='\"adamw\"'; may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=changes)
    save = "minutes between two saved states (default: %(default)s)"
    add("--save-minutes", type=float, default=5.0, metavar="F", help=save)
    lines = "steps between two lines of log.jsonl (default: %(default)s)"
    add("--log-steps", type=int, default=50, metavar="N", help=lines)
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    # what is wrong in it shows before torch is asked for anything
    recipe = load_recipe(arguments.recipe, arguments.set)
    with extra("train", "accelerate"):
        from .frozen import Frozen
        from .train import Task, train
    task = Task(
        recipe,
        Frozen.find(arguments.model or recipe.model),
        arguments.data,
        arguments.output,
        arguments.latents or arguments.output / "latents",
        arguments.split,
        arguments.save_minutes,
        arguments.log_steps,
    )
    if not train(task, arguments.stage):
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
