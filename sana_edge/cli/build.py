"""``sana-edge build``: its options, its progress and what it prints."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sana_edge.cli.arguments import size
from sana_edge.engines.tensorrt import cache
from sana_edge.store import manifest, manifest_files

HELP = "build TensorRT engines of an exported folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a folder that `sana-edge export` made")
    place = "the folder of engines (default: your own, the only one that generate loads from without"
    place += " --trust-engine)"
    add("--output", type=Path, metavar="ENGINES", help=place)
    workspace = "GB of GPU memory that a layer may use while it runs (default: what TensorRT finds best)"
    add("--workspace", type=float, metavar="GB", help=workspace)
    types = parser.add_mutually_exclusive_group()
    for name in ("fp16", "bf16", "int8"):
        refused = f"refuse an export that is not {name}; engines compute in what was exported"
        types.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=refused)
    least = "of pictures (default: 512x512, and two profiles up to 1024x1024 and 2048x2048)"
    add("--min", type=size, metavar="WxH", help=f"the smallest {least}")
    add(
        "--opt",
        type=size,
        metavar="WxH",
        help="that engines are tuned for (default: the model's native size)",
    )
    add("--max", type=size, metavar="WxH", help="the largest (default: 2048x2048, or the native size above)")
    version = "engines that also run on later TensorRT versions of the same major number; slower"
    add("--version-compatible", action="store_true", help=version)
    hardware = "engines that also run on other GPUs since Ampere; slower"
    add("--hardware-compatible", action="store_true", help=hardware)
    add("--force", action="store_true", help="build also engines that are there already")


def run(arguments: argparse.Namespace) -> None:
    """Build; say on stderr what is done, and print the engines' paths."""
    from sana_edge.engines.tensorrt import cuda as cuda_memory
    from sana_edge.export.build import build_engines, picture_sizes
    from sana_edge.export.tensorrt import Options

    # what is wrong shows here, before TensorRT is loaded
    options = Options(arguments.workspace, arguments.version_compatible, arguments.hardware_compatible)
    exported = manifest.read(arguments.folder)
    sizes = picture_sizes(exported, arguments.min, arguments.opt, arguments.max)
    own = cache.engine_folder()
    output = arguments.output or own
    trt, cuda = cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")
    manifest_files.verify(arguments.folder, exported)

    def said(text: str) -> None:
        if not arguments.quiet:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    with _bar(arguments.quiet) as told:
        entries = build_engines(
            arguments.folder,
            output,
            exported,
            sizes,
            options,
            trt=trt,
            cuda=cuda,
            precision=arguments.precision,
            force=arguments.force,
            told=told,
            said=said,
        )
    use = ["sana-edge", "generate", "--backend", "tensorrt", "--model", str(arguments.folder)]
    if output.resolve() != own.resolve():
        said(f"note:  engines outside of {own} are loaded only with --trust-engine")
        use += ["--engines", str(output), "--trust-engine"]
    said(f"next:  {shlex.join(use)} --prompt TEXT")
    for entry in entries:
        print(entry.path)


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Gives what shows a phase of a build and how far it is: a bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    with tqdm(disable=quiet or not sys.stderr.isatty(), leave=False) as bar:

        def show(name: str, done: int, count: int) -> None:
            # phases nest: after an inner one the outer goes on where it was
            bar.set_description(name, refresh=False)
            bar.total, bar.n = count, done
            bar.refresh()

        yield show
