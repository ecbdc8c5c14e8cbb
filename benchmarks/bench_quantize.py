"""What INT8 takes and costs in full size: time, memory and sizes of `sana-edge quantize`, and its error.

    python benchmarks/random_model.py random-0.6b --shapes 0.6b
    python benchmarks/bench_quantize.py random-0.6b --generate 256x256
    python benchmarks/bench_quantize.py random-0.6b --preset quick
    python benchmarks/bench_quantize.py --error 0.6b

The first quantizes a folder without calibration and makes a first picture from the package. Each command runs
in a process of its own, whose peak memory the system tells when it ends. The folder should have been read
once before, so that the disk is not what is measured. With --preset it is calibrated, and the result has what
the report says of layers, steps and pictures. The memory is that of the largest process: the command's own,
or the one that it makes pictures in from the package, while its own networks are gone.

--error measures what INT8 brings into the velocity of a denoiser whose weights are those that diffusers'
class starts with: no checkpoint can be had on a machine without a network. Weights of unit gain with large
gates, as `bench_image.py` draws them, let more rounding through; its results have their error.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import RESULTS, needs

needs("torch", "transformers", "safetensors")

import torch
from safetensors import safe_open

from harness import run_tables
from harness.results import ended, positive
from sana_edge.bench.process import run
from sana_edge.bench.results import header, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.calib.settings import PRESETS
from sana_edge.config import LATENT_CELL
from sana_edge.errors import InvalidInput
from sana_edge.int8 import quant
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.noise.schedules import make_sampler
from sana_edge.store.folder import read_json

COMPONENTS = ("transformer", "vae", "text_encoder")
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}
TOKENS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: (_error if options.error else _run)(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    if options.model is None:
        raise InvalidInput("no model folder", "name one, or measure the error with --error 0.6b")
    model = options.model.resolve()
    if options.preset:
        return _calibrated(model, options, given)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=model.parent) as name:
        folder = Path(name)
        package = folder / "int8"
        data: dict[str, Any] = {
            **header("benchmarks/bench_quantize.py", given),
            "quantize": command("quantize", str(model), "--no-calibration", "--output", str(package)),
            "bytes": {"float": sizes(model), "int8": sizes(package)},
        }
        if options.generate:
            place = ("--size", options.generate, "--steps", "1", "--output", str(folder / "picture.png"))
            made = ("--prompt", "a fox in the snow", "--seed", "0", *place)
            data["generate"] = command("generate", "--model", str(package), "--no-prompt-cache", *made)
    write_json(options.output or RESULTS / "bench_quantize.json", data)
    print(run_tables.quantize(data).text())


def _calibrated(model: Path, options: argparse.Namespace, given: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=model.parent) as name:
        package = (options.work or Path(name)) / "int8"
        made = ("quantize", str(model), "--preset", options.preset, "--output", str(package))
        made += tuple(shlex.split(options.also))
        data: dict[str, Any] = {
            **header("benchmarks/bench_quantize.py", given),
            "quantize": command(*made),
            "bytes": {"float": sizes(model), "int8": sizes(package)},
        }
        report = read_json(package / "report.json")
    kept = sum(layer["kept"] for layer in report["layers"])
    data["report"] = {
        **{name: report[name] for name in ("settings", "notes", "steps", "runs", "seconds")},
        "layers": {"all": len(report["layers"]), "kept": kept},
        "pictures": {key: report["pictures"].get(key) for key in ("psnr", "ssim", "decoder_psnr")},
    }
    name = f"quantize_calibrated-{model.name.removeprefix('random-')}.json"
    write_json(options.output or RESULTS / name, data)
    taken = data["quantize"]
    print(f"{taken['seconds']:.0f} s, {taken['peak_memory'] / 1e9:.2f} GB, {kept} layers in 16 bit")


def command(*arguments: str) -> dict[str, float]:
    """Runs ``sana-edge`` with these arguments: seconds, and bytes of peak memory.

    Raises: SanaError with what it wrote, if it fails.
    """
    done = run([sys.executable, "-m", "sana_edge", *arguments, "--quiet"], f"sana-edge {arguments[0]}")
    return {"seconds": round(done.seconds, 2), "peak_memory": done.peak or 0}


def sizes(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of the tensors that a picture needs: as they are stored, and what they would take in fp32.

    A quantized module's scales do not count in fp32. The autoencoder counts without its encoder.
    """
    found = {name: {"stored": 0, "fp32": 0} for name in COMPONENTS}
    for name in COMPONENTS:
        for path in (folder / name).glob("*.safetensors"):
            with safe_open(path, "numpy") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if name == "vae" and not key.startswith("decoder."):
                        continue
                    part = file.get_slice(key)
                    count = math.prod(part.get_shape())
                    found[name]["stored"] += count * BYTES[part.get_dtype()]
                    found[name]["fp32"] += 0 if key.endswith("_scale") else 4 * count
    return found


@torch.inference_mode()
def _error(options: argparse.Namespace, given: Sequence[str]) -> None:
    needs("diffusers")
    from diffusers import SanaTransformer2DModel

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = DENOISERS[options.error]
    state = SanaTransformer2DModel(**asdict(config)).state_dict()
    denoiser = Denoiser.from_diffusers(config, state).requires_grad_(False).eval()
    denoiser.clamp = True
    side = options.size // LATENT_CELL
    latent = torch.randn(1, config.in_channels, side, side).expand(2, -1, -1, -1)
    captions = torch.randn(2, TOKENS, config.caption_channels)
    groups = [
        TextFeatures(captions[:1, :1], torch.ones(1, 1)),
        TextFeatures(captions[1:], torch.ones(1, TOKENS)),
    ]
    times = torch.from_numpy(make_sampler("flow-dpm", steps=20).timesteps[[0, 10, 19]])

    def velocities() -> list[torch.Tensor]:
        texts, tables = denoiser.text_context(groups), denoiser.modulation(times)
        return [denoiser(latent, tables[step], texts) for step in range(len(times))]

    expected = velocities()
    quantize_denoiser(denoiser)
    errors = [quant.relative_error(*pair) for pair in zip(velocities(), expected, strict=True)]
    data = {
        **header("benchmarks/bench_quantize.py", given),
        "shapes": options.error,
        "layers": config.num_layers,
        "activations": "token",
        "errors": {f"{int(time)}": round(error, 5) for time, error in zip(times, errors, strict=True)},
    }
    write_json(options.output or RESULTS / f"velocity_error-{options.error}.json", data)
    for time, error in data["errors"].items():
        print(f"timestep {time:>3}: relative L2 error of the velocity {100 * error:.2f} %")


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_quantize.py", description="Measure what INT8 takes and costs."
    )
    add = parser.add_argument
    what = "a float model folder; the package is made beside it"
    add("model", type=Path, metavar="DIR", nargs="?", help=what)
    add("--generate", metavar="WxH", help="also make a picture in one step from the package")
    add("--preset", choices=PRESETS, help="calibrate, by this preset")
    add("--work", type=Path, metavar="DIR", help="where a calibrated package is made and stays, and goes on")
    add("--also", default="", metavar="OPTIONS", help="more of quantize's, such as '--keep-fp16 none'")
    add("--error", choices=DENOISERS, help="the error of the velocity instead, of these shapes")
    add(
        "--size", type=positive, default=1024, metavar="PX", help="side of the picture (default: %(default)s)"
    )
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and inputs (default: %(default)s)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
