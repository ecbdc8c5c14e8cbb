"""``sana-edge generate``: its options, and the way from them to pictures."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sana_edge
from sana_edge.cli import again, many
from sana_edge.cli.arguments import (
    add_load_options,
    add_prompt_cache,
    add_revision,
    prompt_from_stdin,
    size,
    tile,
)
from sana_edge.cli.fastest import fastest
from sana_edge.cli.output import NAME, Output
from sana_edge.errors import InvalidInput, MissingDependency, ModelNotFound, UnsupportedDevice
from sana_edge.progress import bar
from sana_edge.request.loading import LoadOptions
from sana_edge.request.plan import random_seed
from sana_edge.request.request import SAMPLERS, Request

if TYPE_CHECKING:
    from sana_edge.pipeline import Sana

HELP = "make pictures from a prompt and print their paths"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("text", nargs="?", metavar="PROMPT", help="what the picture shows; - reads it from stdin")
    add("--prompt", metavar="TEXT", help="the same as an option")
    made = "a picture of sana-edge, which is made again: what is not given is taken from it (default: none)"
    add("--from", dest="made", type=Path, metavar="FILE", help=made)
    add("--negative-prompt", metavar="TEXT", help="what it should not show (default: nothing)")
    names = "a name from `models list`, a folder, also one that `export` made, or a repository"
    add("--model", metavar="NAME", help=f"{names} (default: sana-tiny)")
    sizes = (
        "in pixels (default: the model's native size); drawn at the nearest size that the model was trained"
    )
    add("--size", type=size, metavar="WxH", help=f"{sizes} on, then resized and cropped, as diffusers does")
    add("--exact-size", action="store_true", default=None, help="draw at just this size, multiples of 32")
    add("--steps", type=int, metavar="N", help="denoising steps (default: 20, or 2 for Sprint models)")
    add("--guidance", type=float, metavar="F", help="how strictly to follow the prompt (default: 4.5)")
    add("--seed", type=int, metavar="N", help="of the first picture (default: random, reported)")
    count = "how many, counting seeds up (default: %(default)s)"
    add("--images", type=int, default=1, metavar="N", help=count)
    near = "how many pictures near the one of --seed, --from or --image (default: none, only that one)"
    add("--variations", type=int, metavar="N", help=near)
    far = "how far from it, above 0 to 1 (default: 0.2; 0.3 of --image without --strength)"
    add("--variation-strength", type=float, metavar="F", help=far)
    mixed = "whose noise is mixed in, of the first variation (default: the one after --seed)"
    add("--variation-seed", type=int, metavar="N", help=mixed)
    # which --from brings
    parser.set_defaults(variation=None)
    add("--sampler", choices=SAMPLERS, help="(default: what the model was made for)")
    add_load_options(parser)
    add_prompt_cache(parser)
    place = "a .png, .jpg or .webp file, an existing folder, or - for a PNG on stdout; the seed takes the"
    place += " place of {seed}, or stands at the end of several names (default: %(default)s)"
    add("--output", default=NAME, metavar="PATH", help=place)
    add("--quality", type=int, metavar="N", help="of .jpg and .webp, 1 to 100 (default: 95)")
    add(
        "--json",
        action="store_true",
        help="print a JSON object for each picture, or an error, instead of its path",
    )
    add("--force", action="store_true", help="replace existing files")
    add("--offline", action="store_true", help="never use the network")
    tiles = "decode in tiles of so many pixels, or never in tiles (default: in tiles of 1024 where memory is"
    add("--tile", type=tile, metavar="N|off", help=f"{tiles} short, which the metadata says)")
    _add_image_options(parser)
    _add_model_options(parser)
    many.add_options(parser)


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    """A picture to start from."""
    add = parser.add_argument
    given = "start from this picture, whose size is the default of --size"
    add("--image", type=Path, metavar="FILE", help=f"{given} (default: noise)")
    share = "how much of --image is drawn anew: the share of the steps that are taken, above 0 to 1"
    add("--strength", type=float, metavar="F", help=f"{share} (default: 0.6)")
    mask = "white where --image is drawn anew, black where it stays as it is (default: all anew)"
    add("--mask", type=Path, metavar="FILE", help=mask)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """What differs from how the model was made."""
    add = parser.add_argument
    add_revision(parser)
    decoder = "an autoencoder in place of the model's own: dc-ae-lite, a folder, a file or a repository"
    add("--decoder", metavar="NAME|DIR|FILE", help=f"{decoder} (default: its own)")
    shift = "of the noise levels, in place of the model's (default: the model's, usually 3)"
    add("--flow-shift", type=float, metavar="F", help=shift)
    instruction = "right before the prompt, as it is, or none (default: SANA's own)"
    add("--instruction", type=_instruction, metavar="TEXT|none", help=instruction)


def _instruction(text: str) -> str:
    return "" if text == "none" else text


def run(arguments: argparse.Namespace) -> None:
    """Draw; print each picture's path, or its JSON line."""
    taken = again.fill(arguments)
    names = ["negative_prompt", "size", "exact_size", "steps", "guidance", "sampler"]
    names += ["flow_shift", "instruction", "tile", "image", "strength", "mask"]
    names += ["variation"]
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if arguments.prompts is not None:
        note = partial(many.note, arguments)
        load, chosen = partial(_load, arguments, taken, note), partial(_fastest, arguments, note)
        many.run(arguments, options, load, LoadOptions(**_load_options(arguments)), chosen)
        return
    many.check_single(arguments)
    prompt = _prompt(arguments, taken)
    seed = random_seed() if arguments.seed is None else arguments.seed
    for name in ("images", "variations", "variation_strength", "variation_seed"):
        options[name] = getattr(arguments, name)
    # what is wrong shows here, before torch is loaded and anything is computed
    output = Output(arguments, Request(prompt, seed=seed, **options).labels)
    with _load(arguments, taken, output.note) as sana, bar(arguments.quiet, "step") as progress:
        steps = sana.stream(prompt, seed=seed, on_progress=progress, **options)
        with closing(steps):
            for step in steps:
                if step.image is not None:
                    output.write(step.image, sana.peak_memory)


def _prompt(arguments: argparse.Namespace, taken: dict[str, Any]) -> str:
    """The prompt, wherever it stands."""
    if arguments.text is not None and arguments.prompt is not None and "prompt" not in taken:
        arguments.parser.error("there are two prompts: give PROMPT or --prompt")
    if arguments.text is None and "prompt" in taken:
        # a stranger's picture may have anything there, which the request refuses
        prompt: str = taken["prompt"]
        return prompt
    given = arguments.prompt if arguments.text is None else arguments.text
    if given is None:
        arguments.parser.error("the following arguments are required: PROMPT")
    return prompt_from_stdin() if given == "-" else str(given)


def _load(arguments: argparse.Namespace, taken: dict[str, Any], note: Callable[[str], None]) -> Sana:
    """Load the model, on another backend where that of ``--from`` cannot be used."""
    options = _load_options(arguments)
    try:
        return sana_edge.Sana.load(_fastest(arguments, note), **options)
    except ModelNotFound as error:
        if "model" not in taken:
            raise
        hint = f"{arguments.made} was made with it: give its folder with --model"
        raise ModelNotFound(error.message, hint) from error
    except (InvalidInput, MissingDependency, UnsupportedDevice) as error:
        if "backend" not in taken:
            raise
        made = f"{arguments.made} was made on backend {arguments.backend}"
        note(f"{made}, pixels may differ a little: {error.message}")
    del taken["backend"]
    arguments.backend = "auto"
    return _load(arguments, taken, note)


def _fastest(arguments: argparse.Namespace, note: Callable[[str], None]) -> str:
    """The model, or the export that stands in for it."""
    with bar(arguments.quiet) as progress:
        return fastest(arguments.model, LoadOptions(**_load_options(arguments)), note, progress)


def _load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(LoadOptions) if field.name != "progress")
    return {**{name: getattr(arguments, name) for name in names}, "progress": not arguments.quiet}
