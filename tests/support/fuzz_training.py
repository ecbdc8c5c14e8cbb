"""What a training reads: recipes, captions, latents, its own state, and the CLIP that scores."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import fuzz
import PIL.Image
import tiny_clip
import torch
from fuzz import Parser
from safetensors.torch import save_file
from torch import Tensor

from sana_edge.training.curves import read_log
from sana_edge.training.imagefolder import LeftOut, read_entries
from sana_edge.training.latent_cache import LatentCache
from sana_edge.training.loop import Loop
from sana_edge.training.metadata import Metadata, captions
from sana_edge.training.recipe import load_recipe
from sana_edge.training.score import Scorer
from sana_edge.training.state import ema_state


def write_recipe(folder: Path) -> None:
    place = resources.files("sana_edge.training") / "recipes" / "sana-tiny.toml"
    (folder / "r.toml").write_text(place.read_text())


def write_lines(folder: Path) -> None:
    rows = [{"file_name": f"{n}.png", "captions": ["a", "b"], "clip_scores": [1.5, 2.0]} for n in range(3)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def read_lines(folder: Path) -> None:
    for row in Metadata(folder / "metadata.jsonl").rows.values():
        captions(row)


def read_journal(folder: Path) -> None:
    shutil.copy(folder / "metadata.jsonl", folder / ".metadata.jsonl.journal")
    (folder / "metadata.jsonl").unlink()
    read_lines(folder)


def write_pictures(folder: Path) -> None:
    write_lines(folder)
    for number in range(3):
        PIL.Image.new("RGB", (8, 8)).save(folder / f"{number}.png")


def write_latents(folder: Path) -> None:
    place = folder / f"{'ab' * 8}-256px"
    place.mkdir()
    save_file({"k": torch.zeros(32, 8, 8)}, place / "latents-k.safetensors")
    (place / "files.jsonl").write_text(
        json.dumps(["/a.png", 1, 2, "k"]) + "\n" + json.dumps(["/b", 1, 2, "k"])
    )


def read_latents(folder: Path) -> None:
    cache = LatentCache(folder, "ab" * 32, 256, 32)
    for key in ("k", "x"):
        if key in cache:
            cache.size(key)
            cache[key]


def loop(folder: Path) -> Loop:
    model = torch.nn.Linear(4, 4)
    optimizers = [torch.optim.AdamW(model.parameters(), 0.05), torch.optim.SGD(model.parameters(), 0.1, 0.9)]
    return Loop(model, optimizers, folder, steps=2, precision="no", warmup=0)


def write_state(folder: Path) -> None:
    made = loop(folder)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        return made.model(torch.ones(2, 4)).square().mean(), {"progress": progress}

    made.run(loss, log_steps=1)


def read_state(folder: Path) -> None:
    ema_state(folder)
    found = loop(folder)
    assert 0 <= found.progress <= 1


@functools.cache
def clip() -> Path:
    folder = Path(tempfile.mkdtemp())
    tiny_clip.write_clip(folder)
    return folder


def write_clip(folder: Path) -> None:
    shutil.copytree(clip(), folder, dirs_exist_ok=True)


def read_clip(folder: Path) -> None:
    Scorer(folder, device="cpu").score([PIL.Image.new("RGB", (40, 32))], [["a red house", "x"]])


BYTES, JSON = fuzz.any_bytes, fuzz.json_file
PARSERS: dict[str, Parser] = {
    "recipe": Parser("r.toml", fuzz.toml_file, write_recipe, lambda f: load_recipe(str(f / "r.toml"))),
    "recipe bytes": Parser("r.toml", BYTES, write_recipe, lambda f: load_recipe(str(f / "r.toml"))),
    "metadata.jsonl": Parser("metadata.jsonl", fuzz.lines_file, write_lines, read_lines),
    "journal": Parser("metadata.jsonl", fuzz.lines_file, write_lines, read_journal),
    "imagefolder": Parser(
        "metadata.jsonl",
        fuzz.lines_file,
        write_pictures,
        lambda f: read_entries(f, "train", LeftOut()),
        0.05,
    ),
    "latents": Parser(
        f"{'ab' * 8}-256px/latents-k.safetensors", fuzz.safetensors_file, write_latents, read_latents
    ),
    "files.jsonl": Parser(f"{'ab' * 8}-256px/files.jsonl", fuzz.lines_file, write_latents, read_latents),
    "state": Parser("state.safetensors", fuzz.statistics_file, write_state, read_state, 0.3),
    "state bytes": Parser("state.safetensors", BYTES, write_state, read_state, 0.3),
    "log.jsonl": Parser("log.jsonl", fuzz.lines_file, write_state, read_log),
    "clip config": Parser("config.json", JSON, write_clip, read_clip, 0.05),
    "clip processor": Parser("processor_config.json", JSON, write_clip, read_clip, 0.05),
    "clip tokenizer": Parser("tokenizer.json", JSON, write_clip, read_clip, 0.05),
}
