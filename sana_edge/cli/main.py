"""The ``sana-edge`` command: arguments, progress, exit codes. What it does lives in the library."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sana_edge
from sana_edge.cli import build, export, quantize
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.extras import torch_extra
from sana_edge.request import BACKENDS, DEVICES, SAMPLERS, Request, random_seed

if TYPE_CHECKING:
    from sana_edge.image import Image
    from sana_edge.pipeline import Sana, Step

OUTPUT = "sana-{seed}.png"

_SIZE = re.compile(r"(-?\d+)x(-?\d+)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # a file name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # nobody reads on; what is still buffered must not fail again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SanaError as error:
        _report(error.message, error.hint, arguments.verbose)
        return 1
    except Exception as error:  # also what nobody foresaw is one line to the user
        message = " ".join(f"{type(error).__name__}: {error}".split())
        _report(message, "run it again with -v to see where this comes from", arguments.verbose)
        return 1
    return 0


def _joined(argv: Sequence[str]) -> list[str]:
    """Write ``--size -64x64`` as one argument, or argparse would take its value for an option."""
    joined: list[str] = []
    for argument in argv:
        if joined[-1:] == ["--size"] and _SIZE.fullmatch(argument):
            argument = f"{joined.pop()}={argument}"
        joined.append(argument)
    return joined


def _report(message: str, hint: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint:  {hint}", file=sys.stderr)


def _generate(arguments: argparse.Namespace) -> None:
    from sana_edge.atomic import check_writable
    from sana_edge.image import refuse_overwrite

    seed = random_seed() if arguments.seed is None else arguments.seed
    names = ("negative_prompt", "size", "steps", "guidance", "sampler", "images")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    # what is wrong shows here, before torch is loaded and anything is computed
    Request(arguments.prompt, seed=seed, **options)
    paths = _output_paths(arguments.output, seed, arguments.images)
    for path in paths:
        refuse_overwrite(path, force=arguments.force)
    check_writable(paths[0])
    with _load(arguments) as sana:
        remaining, said = iter(paths), set[str]()
        with closing(sana.stream(arguments.prompt, seed=seed, **options)) as steps:
            for step in _shown(steps, arguments.quiet):
                if step.image is not None:
                    path = step.image.save(next(remaining), force=arguments.force)
                    _announce(step.image, path, sana.peak_memory, said, arguments)


def _load(arguments: argparse.Namespace) -> Sana:
    return sana_edge.Sana.load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        int8=arguments.int8,
        backend=arguments.backend,
        engines=arguments.engines,
        trust_engine=arguments.trust_engine,
        offline=arguments.offline,
        progress=not arguments.quiet,
    )


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


def _shown(steps: Iterable[Step], quiet: bool) -> Iterator[Step]:
    """Pass steps on, with a progress bar on stderr where that is a terminal."""
    from tqdm import tqdm

    with tqdm(disable=quiet or not sys.stderr.isatty(), unit="step", leave=False) as bar:
        for step in steps:
            bar.total = step.total
            bar.update()
            yield step


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


def _models(arguments: argparse.Namespace) -> None:
    from sana_edge.store import hub

    if arguments.action == "pull":
        if arguments.name is None:
            raise InvalidInput("no model to pull", "`sana-edge models list` shows the names")
        print(hub.resolve(arguments.name, refresh=True, progress=not arguments.quiet).path)
        return
    if arguments.name is not None:
        arguments.usage_error(f"unrecognized arguments: {arguments.name}")
    licences: list[str] = []
    for model in hub.list_models():
        state = f"{model.size / 1e6:.0f} MB" if model.size is not None else "not downloaded"
        source = ""
        if model.info is not None:
            if model.info.licence not in licences:
                licences.append(model.info.licence)
            source = f"{model.info.repository} [{licences.index(model.info.licence) + 1}]"
        print(f"{model.name:26} {model.origin:8} {state:15} {source}".rstrip())
    for number, licence in enumerate(licences, start=1):
        print(f"[{number}] licence: {licence}")


def _convert(arguments: argparse.Namespace) -> None:
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


def _doctor(arguments: argparse.Namespace) -> None:
    from sana_edge.cli.doctor import report

    print(report())


def _size(text: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x512")
    return int(match.group(1)), int(match.group(2))


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what the picture shows")
    add("--negative-prompt", default="", metavar="TEXT", help="what it should not show (default: nothing)")
    names = "a name from `models list`, a folder, also one that `export` made, or a repository"
    names += " (default: %(default)s)"
    add("--model", default="sana-tiny", metavar="NAME", help=names)
    add("--size", type=_size, metavar="WxH", help="in pixels (default: the model's native size)")
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
    place = "a .png file or an existing folder; the seed takes the place of {seed}, or stands at the end of"
    add("--output", default=OUTPUT, metavar="PATH", help=f"{place} several names (default: %(default)s)")
    add("--json", action="store_true", help="print a JSON object for each picture instead of its path")
    add("--force", action="store_true", help="replace existing files")
    add("--offline", action="store_true", help="never use the network")


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
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


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="log on stderr, and show tracebacks")
    common.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    parser = argparse.ArgumentParser(
        prog="sana-edge", description="SANA text-to-image: from a prompt to a picture.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {sana_edge.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, parents=[common], allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    _add_generate_options(command("generate", _generate, "make pictures from a prompt and print their paths"))
    models = command("models", _models, "list the models with a name, or download one")
    models.add_argument("action", nargs="?", choices=("list", "pull"), default="list", help="(default: list)")
    models.add_argument("name", nargs="?", help="the model to pull: a name from the list or a repository")
    models.set_defaults(usage_error=models.error)
    _add_convert_options(command("convert", _convert, "turn an NVlabs .pth into a diffusers model folder"))
    quantizing = command("quantize", quantize.run, "make an INT8 package of a float model")
    quantize.add_options(quantizing, _size)
    exporting = command("export", export.run, "make ONNX graphs that run without torch")
    export.add_options(exporting, _size)
    building = command("build", build.run, "build TensorRT engines of an exported folder")
    build.add_options(building, _size)
    command("doctor", _doctor, "show what this machine can run, and why not")
    return parser
