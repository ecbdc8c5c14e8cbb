"""Fits the linear map from a latent's cells to colours that previews of every step use; measures its error.

    python benchmarks/fit_preview.py sana-tiny
    python benchmarks/fit_preview.py MODEL --pictures DIR --write

encodes pictures, decodes the latents again, and takes the map of least squares from each latent cell to the
mean colour of its decoded pixels. The error is that of pictures that were not fitted to: the PSNR between the
mapped cells and the decoded picture scaled down to as many pixels, beside that of one mean colour, and that
of the map the model has had so far. Times of previews by the map, by a small decode and of a step take turns.
sana-tiny's pictures are scenes of its training, which need the art. --write puts `preview.json` into the
model's folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers")

import numpy as np
import torch
from numpy.typing import NDArray

from harness.results import ended, output_for, positive
from sana_edge import Sana
from sana_edge.bench.results import header, load, write_json
from sana_edge.errors import InvalidInput
from sana_edge.init_image import FORMATS, read_image, to_size
from sana_edge.store import hub
from sana_edge.store.folder import PREVIEW_MAP
from sana_edge.store.preview_map import PreviewMap, read_map
from sana_edge.torch_runtime.runtime import TorchRuntime
from sana_edge.training.art.layout import training_scene
from sana_edge.training.art.scenes import render

# of the pictures, those that are not fitted to
HELD_OUT = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the fit: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


@torch.inference_mode()
def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    found = hub.resolve(options.model, int8=False, offline=True, progress=False)
    output = output_for(options, f"fit_preview-{found.name}")
    runtime = TorchRuntime.load(found, device=torch.device("cpu"), dtype="fp32")
    pairs = [cells(runtime, pixels) for pixels in pictures(options, runtime.trained_side)]
    split = round(len(pairs) * (1 - HELD_OUT))
    if not 0 < split < len(pairs):
        raise InvalidInput(f"{len(pairs)} pictures are too few", "give some hundreds")
    fitted = fit(pairs[:split], f"{split} pictures, decoded by {found.name}")
    before = read_map(found.path, runtime.denoiser.config.in_channels)
    grey = PreviewMap(tuple((0.0, 0.0, 0.0) for _ in fitted.matrix), _mean(pairs[:split]))
    known = {"fitted": fitted, "one colour": grey, **({"before": before} if before else {})}
    errors = {name: psnr(made, pairs[split:]) for name, made in known.items()}
    fitted = dataclasses.replace(fitted, psnr=round(errors["fitted"], 2))
    data = {
        **header("benchmarks/fit_preview.py", given),
        "load_before": load(),
        "model": found.name,
        "pictures": {"fitted": split, "held out": len(pairs) - split},
        "psnr": {name: round(value, 2) for name, value in errors.items()},
        "before": before.source if before else None,
        "map": dataclasses.asdict(fitted),
        "milliseconds": times(options.model, fitted, options.repeat),
    }
    write_json(output, data)
    if options.write:
        write_json(found.path / PREVIEW_MAP, dataclasses.asdict(fitted))
    for name, value in data["psnr"].items():
        print(f"{name}: {value} dB")
    for name, value in data["milliseconds"].items():
        print(f"{name}: {value['median']} ms")


def pictures(options: argparse.Namespace, side: int) -> Iterator[NDArray[np.uint8]]:
    """(side, side, 3) uint8.

    Raises: InvalidInput: there is nothing to fit to.
    """
    if options.pictures is None:
        if options.model != "sana-tiny":
            raise InvalidInput(f"no pictures for {options.model}", "give a folder of them with --pictures")
        for number in range(options.count):
            yield np.asarray(render(training_scene(random.Random(f"preview {number}")), side))
        return
    kinds = {f".{name.lower()}" for name in (*FORMATS, "jpg")}
    names = sorted(path for path in options.pictures.rglob("*") if path.suffix.lower() in kinds)
    for path in names[: options.count]:
        yield to_size(read_image(path), (side, side))


def cells(runtime: TorchRuntime, pixels: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Latents (N, C) of a picture's cells as a sampler has them, and their mean decoded colours (N, 3)."""
    encoder = runtime.networks.encoder
    given = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    latent = encoder(given.contiguous(memory_format=torch.channels_last)).float() * encoder.scaling_factor
    decoded = runtime.decode(latent).astype(np.float64) / 127.5 - 1
    height, width = latent.shape[2:]
    means = decoded.reshape(height, len(decoded) // height, width, -1, 3).mean((1, 3))
    return latent[0].permute(1, 2, 0).reshape(-1, latent.shape[1]).double().numpy(), means.reshape(-1, 3)


def fit(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], source: str) -> PreviewMap:
    """The map of least squares."""
    latents, colours = (np.concatenate(part) for part in zip(*pairs, strict=True))
    columns = np.concatenate([latents, np.ones((len(latents), 1))], 1)
    solved, *_ = np.linalg.lstsq(columns, colours, rcond=None)
    rows = [tuple(round(float(value), 6) for value in row) for row in solved]
    return PreviewMap(tuple(rows[:-1]), rows[-1], source)  # type: ignore[arg-type]


def psnr(made: PreviewMap, pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> float:
    """Of mapped cells to decoded ones, in dB; a range of colours is 2."""
    latents, colours = (np.concatenate(part) for part in zip(*pairs, strict=True))
    mapped = made.colours(latents.T[None, :, :, None].astype(np.float32)).reshape(-1, 3)
    return float(10 * np.log10(4 / np.mean((np.clip(mapped, -1, 1) - colours) ** 2)))


def _mean(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> Any:
    return tuple(float(value) for value in np.concatenate([colours for _, colours in pairs]).mean(0))


def times(model: str, fitted: PreviewMap, repeat: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a preview by the map, of one by a small decode, and of a step, in turns."""
    found: dict[str, list[float]] = {"linear preview": [], "decoded preview": [], "step": []}
    with Sana.load(model, prompt_cache=False) as sana:
        object.__setattr__(sana._runtime, "preview_map", fitted)
        # the first warms up
        for turn in range(repeat + 1):
            start = time.perf_counter()
            for step in sana.stream("a red house", seed=7, steps=4):
                taken = [time.perf_counter() - start]
                for linear in (True, False):
                    start = time.perf_counter()
                    step.preview(linear)
                    taken.append(time.perf_counter() - start)
                if turn and 0 < step.index < step.total - 1:
                    for name, seconds in zip(
                        ("step", "linear preview", "decoded preview"), taken, strict=True
                    ):
                        found[name].append(seconds * 1e3)
                start = time.perf_counter()
    return {
        name: {"median": round(statistics.median(values), 3), "most": round(max(values), 3)}
        for name, values in found.items()
    }


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fit_preview.py", description="Fit the map of linear previews.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name or a folder; its encoder and its float weights are used")
    add("--pictures", type=Path, metavar="DIR", help="what to fit to (default: sana-tiny's scenes)")
    add("--count", type=positive, default=400, metavar="N", help="at most so many (default: %(default)s)")
    add(
        "--repeat",
        type=positive,
        default=10,
        metavar="N",
        help="pictures that are timed (default: %(default)s)",
    )
    add("--write", action="store_true", help=f"write {PREVIEW_MAP} into the model's folder")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/fit_preview-MODEL.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
