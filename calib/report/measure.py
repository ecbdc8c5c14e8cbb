"""What making a picture takes: seconds and memory of a process that does nothing else."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from sana_edge.request.plan import Plan

logger = logging.getLogger("sana_edge")

# the first picture also warms caches up and encodes the text
_PICTURES = 2


@dataclass(frozen=True)
class Run:
    """One model's costs.

    Attributes:
        seconds: of one picture, without loading and text.
        stages: seconds of "denoise" and "decode" in it.
        peak_memory: bytes, of the whole process on a CPU, of its tensors on CUDA; None where unknown.
    """

    seconds: float
    stages: dict[str, float]
    peak_memory: int | None


def measure(model: str, plan: Plan, *, device: str) -> Run | None:
    """Make pictures in a process of its own, as `sana-edge generate` does, and read what they took.

    Args:
        model: a name or a folder.
        device: "cpu" or "cuda".

    Returns:
        None where the process failed, for want of memory for instance; the log says why.
    """
    with tempfile.TemporaryDirectory(prefix="sana-edge-") as folder:
        command = [
            *(sys.executable, "-m", "sana_edge", "generate", "--model", model, "--prompt", plan.prompt),
            *("--size", f"{plan.width}x{plan.height}", "--exact-size", "--steps", str(plan.steps)),
            *("--guidance", str(plan.guidance), "--seed", str(plan.seed), "--sampler", plan.sampler),
            *("--images", str(_PICTURES), "--device", device, "--offline", "--json", "--quiet"),
            *("--output", folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        logger.warning("could not measure %s: %s", model, done.stderr.strip())
        return None
    picture = json.loads(done.stdout.splitlines()[-1])
    stages = {stage: picture["timings"][stage] for stage in ("denoise", "decode")}
    return Run(sum(stages.values()), stages, picture["peak_memory"])
