"""``sana-edge convert``: checkpoints become model folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sana_edge.cli.arguments import add_revision
from sana_edge.errors import InvalidInput, torch_extra

HELP = "turn a checkpoint, such as an NVlabs .pth, into a diffusers model folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    files = "a denoiser or an autoencoder: a .pth or .safetensors, published or of a training"
    add("file", type=Path, metavar="FILE", help=files)
    add("--output", type=Path, required=True, metavar="DIR", help="the model folder to write into")
    sizes = "side of the pictures it was trained on, where the file does not tell (default: read from it)"
    add("--size", type=int, choices=(512, 1024, 2048, 4096), help=sizes)
    heads = "for other widths than the published ones (default: read from the width)"
    add("--cross-attention-heads", type=int, metavar="N", help=heads)
    base = "a model to take the other components from (default: none, only this component is written)"
    add("--base", metavar="NAME", help=base)
    weights = "of a training's checkpoint its moving average or the weights themselves"
    add("--weights", choices=("ema", "raw"), help=f"{weights} (default: ema where there is one)")
    add("--force", action="store_true", help="replace existing files")
    add("--offline", action="store_true", help="never use the network")
    add_revision(parser, "--base where it is a repository")


def run(arguments: argparse.Namespace) -> None:
    """Convert; print what was written."""
    from sana_edge.store import hub

    if arguments.revision is not None and arguments.base is None:
        raise InvalidInput("--revision without --base", "leave it out: a checkpoint file has no revisions")
    with torch_extra():
        from sana_edge.nets.convert import convert
    base = None
    if arguments.base:
        base = hub.resolve(arguments.base, offline=arguments.offline, revision=arguments.revision).path
    written = convert(
        arguments.file,
        arguments.output,
        size=arguments.size,
        cross_attention_heads=arguments.cross_attention_heads,
        base=base,
        weights=arguments.weights,
        force=arguments.force,
        tell=lambda note: None if arguments.quiet else print(f"note:  {note}", file=sys.stderr),
    )
    for path in written:
        print(path)
