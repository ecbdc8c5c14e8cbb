"""``sana-edge quantize``: its options, its progress and its table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sana_edge.cli.arguments import add_revision, size
from sana_edge.errors import one_line, torch_extra
from sana_edge.progress import bar

HELP = "make an INT8 package of a float model"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a float model: a name from `models list`, a folder or a repository")
    add("--output", type=Path, required=True, metavar="DIR", help="the package's folder, which is made")
    prompts = "prompts to calibrate with, one per line: a file or a bundled set (default: the model's)"
    add("--prompts", metavar="FILE", help=prompts)
    add("--steps", type=int, metavar="N", help="denoising steps of calibration (default: the model's)")
    add("--size", type=size, metavar="WxH", help="of its pictures (default: the model's native size)")
    add("--guidance", type=float, metavar="F", help="of its pictures (default: 4.5)")
    add("--seed", type=int, default=0, metavar="N", help="of its first picture (default: %(default)s)")
    alpha = "how far outliers move from activations to weights, 0 to 1 (default: %(default)s, per layer)"
    add("--alpha", default="auto", metavar="F", help=alpha)
    keep = "layers that stay in 16 bit: auto, by their error; none; or how many of the denoiser, and as many"
    add("--keep-fp16", default="auto", metavar="N", help=f"{keep} of the decoder (default: %(default)s)")
    scales = "one dynamic scale for each token, or one calibrated scale for each layer (default: %(default)s)"
    add("--activations", choices=("token", "tensor"), default="token", help=scales)
    skipped = "take the weights only: needs little memory and time, and compares no pictures"
    add("--no-calibration", action="store_true", help=skipped)
    pictures = "that the report compares, INT8 beside float (default: 6, or 2 when quick)"
    add("--pictures", type=int, metavar="N", help=pictures)
    presets = (
        "few prompts, few steps and small pictures, where they are not given, or all (default: %(default)s)"
    )
    add("--preset", choices=("quick", "full"), default="full", help=presets)
    devices = "of calibration (default: %(default)s, cuda where it can be used)"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=devices)
    add("--force", action="store_true", help="replace a model folder at DIR")
    add("--offline", action="store_true", help="never use the network")
    add_revision(parser)


def run(arguments: argparse.Namespace) -> None:
    """Quantize; print the report's table and, last, the package's folder."""
    from sana_edge.calib.settings import Settings, parse_alpha, parse_keep

    names = ("prompts", "steps", "size", "guidance", "seed", "activations", "pictures", "preset")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    # what is wrong shows here, before torch is loaded
    settings = Settings(
        **options,
        alpha=parse_alpha(arguments.alpha),
        keep=parse_keep(arguments.keep_fp16),
        calibrate=not arguments.no_calibration,
    )
    with torch_extra():
        from sana_edge.calib.quantize import quantize
        from sana_edge.calib.report.table import table
    with _resumable(arguments), bar(arguments.quiet) as progress:
        report = quantize(
            arguments.model,
            arguments.output,
            settings,
            device=arguments.device,
            offline=arguments.offline,
            revision=arguments.revision,
            force=arguments.force,
            progress=None if arguments.quiet else progress,
            say=(lambda text: None) if arguments.quiet else (lambda text: print(text, file=sys.stderr)),
        )
    # it has the model's name, which may be a stranger's
    print("\n".join(map(one_line, table(report).split("\n"))), end="\n\n")
    print(arguments.output)


@contextmanager
def _resumable(arguments: argparse.Namespace) -> Iterator[None]:
    """Ctrl-C inside says that the work is not lost, where it is not."""
    from sana_edge.calib.settings import calibration_folder

    try:
        yield
    except KeyboardInterrupt:
        kept = any(calibration_folder(arguments.output.absolute()).glob("*.safetensors"))
        if kept and not arguments.quiet:
            print("what has been observed is kept: the same command goes on from there", file=sys.stderr)
        raise
