"""sana-tiny in INT8 by every backend from one seed: how near the pictures are, and whether any has a note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu.steps import Setting
from sana_edge import Sana, SanaError
from sana_edge.bench.results import write_json
from sana_edge.image_metrics import psnr

PROMPT = "a red house left of a yellow star"
SEED = 7
# in dB, of backends that round elsewhere; what INT8 itself costs this model's worst picture is 21 dB
ENOUGH = 25.0
# Triton's interpreter takes minutes for a picture
BACKENDS = {"cuda": ("torch", "cuda", "triton"), "cpu": ("torch", "cuda")}
SETTINGS: dict[str, dict[str, Any]] = {"cuda": {}, "cpu": {"size": (32, 32), "steps": 1}}
# one that is drawn again must be the same; an emulator takes its time
TURNS = {"cuda": 2, "cpu": 1}


def drawn(backend: str, device: str) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """A picture, the last from one model, and what to say of it."""
    dtype = "fp16" if device == "cuda" else "bf16"
    how = {"device": device, "backend": backend, "dtype": dtype}
    with Sana.load("sana-tiny", int8=True, prompt_cache=False, **how) as sana:
        pictures = [sana.generate(PROMPT, seed=SEED, **SETTINGS[device]) for _ in range(TURNS[device])]
    first, picture = pictures[0], pictures[-1]
    row = {
        "backend": picture.metadata["backend"],
        # a dry run is smaller than what the model was trained at
        "notes": [note for note in picture.notes if "was trained at" not in note],
        "seconds": {name: round(seconds, 4) for name, seconds in picture.timings.items()},
        "repeats": bool(np.array_equal(first.pixels, picture.pixels)),
        "spread": float(picture.pixels.std()),
    }
    # a picture of one colour is none
    passed = row["backend"] == backend and not row["notes"] and row["repeats"] and row["spread"] > 1
    return picture.pixels, {**row, "passed": passed}


def check(setting: Setting, output: Path) -> None:
    """All backends; one that fails is recorded, and the next drawn.

    Raises:
        SanaError: one failed, or is not near enough to torch's.
    """
    device, rows = setting.device, list[dict[str, Any]]()
    expected: NDArray[np.uint8] | None = None
    for backend in BACKENDS[device]:
        try:
            pixels, row = drawn(backend, device)
        # Triton and the driver raise what they like
        except Exception as problem:
            row = {"backend": backend, "passed": False, "error": f"{type(problem).__name__}: {problem}"[:300]}
        else:
            expected = pixels if backend == "torch" else expected
            if backend != "torch" and expected is not None:
                # JSON has no infinity, which is what equal pictures have
                row["psnr"] = round(min(psnr(pixels, expected), 138.0), 2)
                row["passed"] = row["passed"] and row["psnr"] > ENOUGH
        rows.append(row)
        print(row, flush=True)
        wrong = [row for row in rows if not row["passed"]]
        figure = ", ".join(f"{row['backend']} {row['psnr']:.1f} dB" for row in rows if "psnr" in row)
        figure = f"wrong: {wrong[0]}"[:200] if wrong else f"to torch: {figure}, no notes"
        write_json(output, {"figure": figure, "prompt": PROMPT, "seed": SEED, "pictures": rows})
    if wrong:
        raise SanaError(figure, f"pictures of backends are within {ENOUGH:g} dB, without notes")
