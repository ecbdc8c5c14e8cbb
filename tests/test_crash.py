"""Commands killed at random moments leave the old output or the new one, and the next run nothing else."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import pytest
from safetensors import safe_open

from sana_edge.image import read_metadata
from sana_edge.store import manifest, manifest_files, package

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SANA_EDGE_KILLS", "50"))


def whole_model(folder: Path) -> None:
    """Every weight file can be read to its end, and packages have their checksums."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                file.get_tensor(name)
    for name in ("transformer", "vae"):
        quantization = package.read(folder / name)
        if quantization is not None:
            package.verify(folder / name, quantization)
    assert (folder / "model_index.json").is_file()


def whole_export(folder: Path) -> None:
    manifest_files.verify(folder, manifest.read(folder))


def whole_picture(path: Path) -> None:
    with PIL.Image.open(path) as image:
        image.load()
    assert read_metadata(path)["prompt"] == "a"


COMMANDS: dict[str, tuple[Sequence[str], Callable[[Path], None]]] = {
    "generate": (
        ("generate", "a", "--model", "MODEL", "--steps", "1", "--offline", "--force"),
        whole_picture,
    ),
    "convert": (("convert", "MODEL/transformer", "--base", "MODEL", "--force"), whole_model),
    "quantize": (("quantize", "MODEL", "--no-calibration", "--force"), whole_model),
    "export": (("export", "MODEL", "--no-verify", "--force"), whole_export),
}


@pytest.mark.parametrize(("command", "check"), COMMANDS.values(), ids=COMMANDS)
def test_killed_at_any_moment(
    tmp_path: Path, tiny_folder: Path, command: Sequence[str], check: Callable[[Path], None]
) -> None:
    output = tmp_path / "out" / ("made.png" if command[0] == "generate" else "made")
    output.parent.mkdir()
    words = [word.replace("MODEL", str(tiny_folder)) for word in command]
    run = [sys.executable, "-m", "sana_edge", *words, "--output", str(output), "--quiet"]
    start = time.monotonic()
    subprocess.run(run, check=True, capture_output=True)
    seconds = time.monotonic() - start
    check(output)
    moments = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # most of the time goes into imports: the moments lie in what comes after
            process.wait(timeout=seconds * moments.uniform(0.5, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if output.exists():
            check(output)
    subprocess.run(run, check=True, capture_output=True)
    check(output)
    assert os.listdir(output.parent) == [output.name]
