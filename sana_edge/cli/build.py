"""``sana-edge build``: its options, its progress and what it prints."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from sana_edge.cli.arguments import size
from sana_edge.engines.tensorrt import cache
from sana_edge.progress import bar
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
    add("--force", action="store_true", help="build also engines that are there already")


def run(arguments: argparse.Namespace) -> None:
    """Build; report on stderr what is done, and print the engines' paths."""
    from sana_edge.engines.tensorrt import cuda as cuda_memory
    from sana_edge.export.build import build_engines, picture_sizes
    from sana_edge.export.tensorrt import check_workspace

    # what is wrong shows here, before TensorRT is loaded
    check_workspace(arguments.workspace)
    exported = manifest.read(arguments.folder)
    sizes = picture_sizes(exported, arguments.min, arguments.opt, arguments.max)
    own = cache.engine_folder()
    output = arguments.output or own
    trt, cuda = cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")
    manifest_files.verify(arguments.folder, exported)

    def write(line: str) -> None:
        if not arguments.quiet:
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)

    with bar(arguments.quiet) as progress:
        entries = build_engines(
            arguments.folder,
            output,
            exported,
            sizes,
            trt=trt,
            cuda=cuda,
            workspace=arguments.workspace,
            precision=arguments.precision,
            force=arguments.force,
            progress=progress,
            on_message=write,
        )
    use = ["sana-edge", "generate", "--backend", "tensorrt", "--model", str(arguments.folder)]
    if output.resolve() != own.resolve():
        write(f"note:  engines outside of {own} are loaded only with --trust-engine")
        use += ["--engines", str(output), "--trust-engine"]
    write(f"next:  {shlex.join(use)} --prompt TEXT")
    for entry in entries:
        print(entry.path)
