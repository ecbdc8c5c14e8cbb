"""``sana-edge generate``: its options, its progress and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sana_edge
from sana_edge.cli.arguments import size
from sana_edge.cli.fastest import fastest, on_stderr, quiet
from sana_edge.errors import InvalidInput
from sana_edge.progress import bar
from sana_edge.request import BACKENDS, DEVICES, SAMPLERS, LoadOptions, Request, random_seed

if TYPE_CHECKING:
    from sana_edge.image import Image
    from sana_edge.pipeline import Sana

HELP = "make pictures from a prompt and print their paths"
OUTPUT = "sana-{seed}.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what the picture shows")
    add("--negative-prompt", default="", metavar="TEXT", help="what it should not show (default: nothing)")
    names = "a name from `models list`, a folder, also one that `export` made, or a repository"
    names += " (default: %(default)s)"
    add("--model", default="sana-tiny", metavar="NAME", help=names)
    sizes = (
        "in pixels (default: the model's native size); drawn at the nearest size that the model was trained"
    )
    add("--size", type=size, metavar="WxH", help=f"{sizes} on, then resized and cropped, as diffusers does")
    add("--exact-size", action="store_true", help="draw at just this size, multiples of 32")
    add("--steps", type=int, metavar="N", help="denoising steps (default: 20, or 2 for Sprint models)")
    add("--guidance", type=float, metavar="F", help="how strictly to follow the prompt (default: 4.5)")
    add("--seed", type=int, metavar="N", help="of the first picture (default: random, reported)")
    count = "how many, counting seeds up (default: %(default)s)"
    add("--images", type=int, default=1, metavar="N", help=count)
    add("--sampler", choices=SAMPLERS, help="(default: what the model was made for)")
    dtypes = "of the denoiser (default: %(default)s, the checkpoint's own; on the CPU fp32 in place of fp16;"
    dtypes += " what suits an engine)"
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=dtypes)
    eight = "INT8 layers: the bundled package, or quantized while loading; packages are INT8 without it"
    add("--int8", action="store_true", help=eight)
    backend = "of the denoiser: triton and cuda need --int8 and a GPU; of exported folders: tensorrt, which"
    backend += " runs what `build` made, onnxruntime or openvino (default: %(default)s, the best that works)"
    add("--backend", choices=BACKENDS, default="auto", help=backend)
    devices = "for exported folders also gpu and npu, which are Intel's, and tensorrt, onnxruntime's own"
    devices += " TensorRT (default: %(default)s, cuda where it can be used)"
    add("--device", choices=DEVICES, default="auto", help=devices)
    engines = "of --backend tensorrt: what `build --output` wrote (default: your own engine folder)"
    add("--engines", type=Path, metavar="DIR", help=engines)
    trust = "load engines also from elsewhere than your own engine folder, which runs the code in them"
    add("--trust-engine", action="store_true", help=trust)
    counted = "that compute on a CPU (default: OMP_NUM_THREADS or the cores, within a container's quota)"
    add("--threads", type=int, metavar="N", help=counted)
    place = "a .png file or an existing folder; the seed takes the place of {seed}, or stands at the end of"
    add("--output", default=OUTPUT, metavar="PATH", help=f"{place} several names (default: %(default)s)")
    add("--json", action="store_true", help="print a JSON object for each picture instead of its path")
    add("--force", action="store_true", help="replace existing files")
    add("--offline", action="store_true", help="never use the network")
    _add_model_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """What differs from how the model was made."""
    add = parser.add_argument
    revision = "of a repository: a branch, a tag or a commit (default: main, or the only one that is cached)"
    add("--revision", metavar="NAME", help=revision)
    decoder = "an autoencoder in place of the model's own: dc-ae-lite, a folder or a repository"
    add("--decoder", metavar="NAME|DIR", help=f"{decoder} (default: its own)")
    shift = "of the noise levels, in place of the model's (default: the model's, usually 3)"
    add("--flow-shift", type=float, metavar="F", help=shift)
    instruction = "right before the prompt, as it is, or none (default: SANA's own)"
    add("--instruction", type=_instruction, metavar="TEXT|none", help=instruction)


def _instruction(text: str) -> str:
    return "" if text == "none" else text


def run(arguments: argparse.Namespace) -> None:
    """Draw; print each picture's path, or its JSON line."""
    from sana_edge.atomic import check_writable
    from sana_edge.image import refuse_overwrite

    seed = random_seed() if arguments.seed is None else arguments.seed
    names = ["negative_prompt", "size", "exact_size", "steps", "guidance", "sampler", "images"]
    names += ["flow_shift", "instruction"]
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    # what is wrong shows here, before torch is loaded and anything is computed
    Request(arguments.prompt, seed=seed, **options)
    paths = _output_paths(arguments.output, seed, arguments.images)
    for path in paths:
        refuse_overwrite(path, force=arguments.force)
    check_writable(paths[0])
    with _load(arguments) as sana:
        remaining, said = iter(paths), set[str]()
        steps = sana.stream(arguments.prompt, seed=seed, **options)
        with closing(steps), bar(arguments.quiet, "step") as progress:
            for step in steps:
                progress("", step.index + 1, step.total)
                if step.image is not None:
                    path = step.image.save(next(remaining), force=arguments.force)
                    _announce(step.image, path, sana.peak_memory, said, arguments)


def _load(arguments: argparse.Namespace) -> Sana:
    names = (field.name for field in dataclasses.fields(LoadOptions) if field.name != "progress")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    options["progress"] = not arguments.quiet
    with bar(arguments.quiet) as progress:
        say = quiet if arguments.quiet else on_stderr
        model = fastest(arguments.model, LoadOptions(**options), say, progress)
    return sana_edge.Sana.load(model, **options)


def _output_paths(output: str, seed: int, images: int) -> list[Path]:
    """One path for each picture: the seed stands where {seed} does, or at the end if there are several."""
    path = Path(output)
    if os.path.isdir(path):
        path = path / OUTPUT
    if path.suffix.lower() != ".png":
        raise InvalidInput(f"output {output} does not end in .png", "give a .png file or an existing folder")
    if images > 1 and "{seed}" not in path.name:
        path = path.with_name(f"{path.stem}-{{seed}}{path.suffix}")
    return [path.with_name(path.name.replace("{seed}", str(seed + i))) for i in range(images)]


def _announce(
    image: Image, path: Path, peak_memory: int | None, said: set[str], arguments: argparse.Namespace
) -> None:
    """Print a picture's path, or its JSON line, and on stderr its times and the notes not ``said`` yet."""
    from tqdm import tqdm

    seconds = {stage: round(value, 3) for stage, value in image.timings.items()}
    line = str(path)
    if arguments.json:
        entry = {"path": line, **image.metadata, "timings": seconds, "peak_memory": peak_memory}
        line = json.dumps({**entry, "notes": image.notes})
    # tqdm.write keeps a bar on the same terminal intact
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
    if not arguments.quiet:
        width, height = image.metadata["size"]
        spent = ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())
        made = f"{width}x{height}, seed {image.seed}, {image.metadata['backend']}"
        tqdm.write(f"{made}: {spent}", file=sys.stderr)
        for note in dict.fromkeys(image.notes):
            if note not in said:
                tqdm.write(f"note:  {note}", file=sys.stderr)
        said.update(image.notes)
