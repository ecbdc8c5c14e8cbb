"""``sana-edge convert``: NVlabs' checkpoints become model folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from sana_edge.errors import torch_extra

HELP = "turn an NVlabs .pth into a diffusers model folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the checkpoint of a denoiser or an autoencoder")
    add("--output", type=Path, required=True, metavar="DIR", help="the model folder to write into")
    sizes = "side of the pictures it was trained on, where the file does not tell (default: read from it)"
    add("--size", type=int, choices=(512, 1024, 2048, 4096), help=sizes)
    heads = "for other widths than the published ones (default: read from the width)"
    add("--cross-attention-heads", type=int, metavar="N", help=heads)
    base = "a model to take the other components from (default: none, only this component is written)"
    add("--base", metavar="NAME", help=base)
    add("--force", action="store_true", help="replace existing files")


def run(arguments: argparse.Namespace) -> None:
    """Convert; print what was written."""
    from sana_edge.store import hub

    with torch_extra():
        from sana_edge.nets.convert import convert
    written = convert(
        arguments.file,
        arguments.output,
        size=arguments.size,
        cross_attention_heads=arguments.cross_attention_heads,
        base=hub.resolve(arguments.base).path if arguments.base else None,
        force=arguments.force,
    )
    for path in written:
        print(path)
