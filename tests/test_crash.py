"""Commands killed at random moments leave the old output or the new one, and the next run nothing else.

Half of the moments are in time, half right before a change of the disk, however soon the next one follows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fake_export
import local_hub
import PIL.Image
import pytest
import tiny_clip
from safetensors import safe_open
from zygote import Zygote

from sana_edge.engines.tensorrt import cache as engine_cache
from sana_edge.image import read_metadata
from sana_edge.store import manifest, manifest_files, package
from sana_edge.training.metadata import Metadata

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SANA_EDGE_KILLS", "50"))
SUPPORT = Path(__file__).parent / "support"
RECIPE = """
model = "replaced"
[denoiser]
num_layers = 2
num_attention_heads = 2
attention_head_dim = 32
num_cross_attention_heads = 2
cross_attention_head_dim = 32
cross_attention_dim = 64
caption_channels = 32
[captions]
tau = 1.0
[training]
precision = "no"
stored = "fp32"
ema = 0.9
[[stage]]
resolution = 256
batch = 2
steps = 3
learning_rate = 1e-3
start = "random"
"""


def whole_weights(path: Path) -> None:
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            file.get_tensor(name)


def whole_model(folder: Path) -> None:
    """Every weight file can be read to its end, and packages have their checksums."""
    for path in folder.rglob("*.safetensors"):
        whole_weights(path)
    for name in ("transformer", "vae"):
        quantization = package.read(folder / name)
        if quantization is not None:
            package.verify(folder / name, quantization)
    assert (folder / "model_index.json").is_file()


def whole_export(folder: Path) -> None:
    manifest_files.verify(folder, manifest.read(folder), again=True)


def whole_picture(path: Path) -> None:
    with PIL.Image.open(path) as image:
        image.load()
    assert read_metadata(path)["prompt"] == "a"


def whole_engines(folder: Path) -> None:
    assert all(engine_cache.is_whole(entry) for entry in engine_cache.entries(folder))


def whole_training(folder: Path) -> None:
    """States, latents and the model that come of it; a log may have lost its last line."""
    for path in folder.rglob("*.safetensors"):
        if not path.parent.name.endswith(".sana-edge"):
            whole_weights(path)
    model = folder / "stage-1" / "model"
    if model.exists():
        whole_model(model)


def whole_rows(folder: Path) -> None:
    """No caption that was there is lost."""
    rows = Metadata(folder / "metadata.jsonl").rows
    assert len(rows) == 3 and all(row["captions"][:1] == ["a red house"] for row in rows.values())


def whole_download(cache: Path) -> None:
    """What a name stands for in a snapshot is there to its end."""
    for link in cache.rglob("snapshots/*/*/*"):
        remote = cache.parent / "remote" / link.relative_to(link.parents[1])
        assert link.read_bytes() == remote.read_bytes()


@dataclass(frozen=True)
class Command:
    """What is run in a zygote.

    ``prepare`` makes what it needs in a folder, beside the ``output``; ``left`` says of that whether nothing
    else is there at the end. ``begin`` makes an output anew that would be finished, and not touched again.
    """

    words: Sequence[str]
    check: Callable[[Path], None]
    output: str = "out/made"
    prepare: Callable[[Path], object] = lambda folder: None
    module: str = "sana_edge.cli.main"
    imports: Sequence[str] = ("sana_edge.pipeline", "sana_edge.torch_runtime.runtime")
    left: Callable[[Path], bool] = lambda output: os.listdir(output.parent) == [output.name]
    begin: Callable[[Path], object] = lambda output: None


def write_data(folder: Path) -> None:
    """Pictures with a caption each, a recipe and a CLIP."""
    (folder / "data").mkdir()
    for number in range(3):
        PIL.Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "data" / f"{number}.png")
    write_rows(folder / "data")
    (folder / "recipe.toml").write_text(RECIPE)
    tiny_clip.write_clip(folder / "clip")
    tiny_clip.write_llava(folder / "llava")


def write_rows(data: Path) -> None:
    rows = [{"file_name": f"{number}.png", "captions": ["a red house"]} for number in range(3)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def remove(output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)


def nothing_hidden(output: Path) -> bool:
    return not [path for path in output.rglob(".*") if path.suffix in (".sana-edge", ".journal")]


TRAINING = ("sana_edge.training.train", "sana_edge.training.frozen", "datasets", "transformers")
COMMANDS: dict[str, Command] = {
    "generate": Command(
        ("generate", "a", "--model", "MODEL", "--steps", "1", "--offline", "--force", "--output", "OUTPUT"),
        whole_picture,
        "out/made.png",
        # with the prompt's features, which the next run would read
        begin=lambda output: remove(output.parents[1] / "cache"),
    ),
    "convert": Command(
        ("convert", "MODEL/transformer", "--base", "MODEL", "--force", "--output", "OUTPUT"),
        whole_model,
        imports=("sana_edge.nets.convert",),
    ),
    "quantize": Command(
        ("quantize", "MODEL", "--no-calibration", "--force", "--output", "OUTPUT"),
        whole_model,
        imports=("sana_edge.calib.quantize", "sana_edge.pipeline"),
    ),
    "export": Command(
        ("export", "MODEL", "--no-verify", "--force", "--output", "OUTPUT"),
        whole_export,
        imports=("sana_edge.export.onnx",),
    ),
    "build": Command(
        ("build", "FOLDER/onnx", "--force", "--output", "OUTPUT"),
        whole_engines,
        prepare=lambda folder: fake_export.write_folder(folder / "onnx"),
        module="build_main",
        imports=("sana_edge.export.build", "onnxruntime"),
        left=nothing_hidden,
    ),
    "pull": Command(
        ("models", "pull", "someone/sana-mine"),
        whole_download,
        "hub",
        prepare=lambda folder: local_hub.write_model(folder / "remote", count=200_000),
        imports=("huggingface_hub", "sana_edge.store.downloads"),
        left=lambda output: not list(output.rglob("*.incomplete")),
        begin=remove,
    ),
    "train": Command(
        ("train", "FOLDER/recipe.toml", "--data", "FOLDER/data", "--output", "OUTPUT", "--model", "MODEL"),
        whole_training,
        prepare=write_data,
        module="sana_edge.training.__main__",
        imports=TRAINING,
        left=nothing_hidden,
        begin=remove,
    ),
    "score": Command(
        ("score", "--data", "FOLDER/data", "--model", "FOLDER/clip", "--batch", "1"),
        whole_rows,
        "data",
        prepare=write_data,
        module="sana_edge.training.__main__",
        imports=("transformers.models.clip.modeling_clip", *TRAINING),
        left=nothing_hidden,
        begin=write_rows,
    ),
    "caption": Command(
        ("caption", "--data", "FOLDER/data", "--model", "FOLDER/llava", "--batch", "1", "--tokens", "4"),
        whole_rows,
        "data",
        prepare=write_data,
        module="sana_edge.training.__main__",
        imports=("transformers.models.llava.modeling_llava", *TRAINING),
        left=nothing_hidden,
        begin=write_rows,
    ),
}


@pytest.fixture
def hub() -> Iterator[local_hub.Hub]:
    with local_hub.serving() as server:
        server.large = True
        yield server


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_killed_at_any_moment(
    tmp_path: Path,
    tiny_folder: Path,
    hub: local_hub.Hub,
    command: Command,
    figures: Callable[..., None],
) -> None:
    output = tmp_path / command.output
    output.parent.mkdir(exist_ok=True)
    command.prepare(tmp_path)
    hub.repositories["someone/sana-mine"] = tmp_path / "remote"
    named = {"MODEL": str(tiny_folder), "OUTPUT": str(output), "FOLDER": str(tmp_path)}
    words = list(command.words)
    for name, value in named.items():
        words = [word.replace(name, value) for word in words]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub")}
    environment |= {"SANA_EDGE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{SUPPORT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    zygote = Zygote(command.module, command.imports, environment)
    try:
        first = zygote.run(words)
        assert first["code"] == 0
        command.check(output)
        command.begin(output)
        moments, killed = random.Random(0), 0
        for number in range(KILLS):
            if number % 2:
                done = zygote.run(words, seconds=first["seconds"] * moments.random())
            else:
                done = zygote.run(words, change=moments.randint(1, int(first["changes"])))
            killed += done["code"] == -signal.SIGKILL
            if output.exists():
                command.check(output)
            if done["code"] == 0:
                command.begin(output)
        assert zygote.run(words)["code"] == 0
    finally:
        zygote.close()
    command.check(output)
    assert command.left(output), sorted(path for path in output.rglob("*") if path.is_file())
    figures(runs=KILLS, killed=killed, lost=0)


def test_a_server_that_keeps_pictures(tmp_path: Path, figures: Callable[..., None]) -> None:
    """Every picture in the folder is whole; what a dead server left goes with the next picture."""
    keep, moments = tmp_path / "keep", random.Random(0)
    keep.mkdir()
    command = [sys.executable, "-m", "sana_edge", "serve", "--stdio", "--offline", "--keep", str(keep)]
    command += ["--model", "sana-tiny-int8-onnx", "--threads", "1"]
    job = {"type": "generate", "prompt": "a red house", "size": "64x64", "exact_size": True, "steps": 1}

    def serve(most: float | None) -> None:
        """Draw ten pictures, and die after so many seconds from the first, or when all are there."""
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            for number in range(10):
                process.stdin.write(json.dumps({**job, "id": str(number)}) + "\n")
            process.stdin.flush()
            ended, start = 0, 0.0
            for line in process.stdout:
                kind = json.loads(line)["type"]
                start = start or (time.monotonic() if kind == "image" else 0.0)
                ended += kind in ("done", "error")
                if ended == 10 or (most is not None and start and time.monotonic() - start > most):
                    break
            process.kill()

    start = time.monotonic()
    serve(None)
    seconds = time.monotonic() - start
    for _ in range(KILLS):
        serve(seconds * moments.uniform(0, 0.5))
        for path in keep.glob("*.png"):
            with PIL.Image.open(path) as image:
                image.load()
    serve(None)
    assert not [path for path in keep.iterdir() if path.suffix != ".png"]
    figures(name="serve --keep", runs=KILLS, killed=KILLS, lost=0)
