"""The benchmarks of training, on models of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_clip

import bench_training
from bench_training import write_scenes
from sana_edge.training.score import Scorer, write_scores

RECIPE = """
model = "replaced"
[denoiser]
num_layers = 1
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
[[stage]]
resolution = 256
batch = 2
steps = 3
learning_rate = 1e-3
start = "random"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return str(path)


def test_first_steps_tell_memory_and_seconds(tiny_folder: Path, tmp_path: Path, recipe: str) -> None:
    output = tmp_path / "steps.json"
    options = ["--recipe", recipe, "--work", str(tmp_path / "work"), "--output", str(output)]
    assert bench_training.main(["steps", str(tiny_folder), *options, "--pictures", "2"]) == 0
    found = json.loads(output.read_text())
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert found["peak_memory_gb"] > 0 and found["seconds_per_step"] >= 0
    assert found["text_encoder_layers"] == 2 and found["resolution"] == 256


@pytest.mark.slow
def test_both_arms_start_alike_and_end_with_numbers_and_a_figure(
    tiny_folder: Path, tmp_path: Path, recipe: str
) -> None:
    clip, mixed, held_out = (tmp_path / name for name in ("clip", "mixed", "held-out"))
    tiny_clip.write_clip(clip)
    for folder, count in ((mixed, 4), (held_out, 2)):
        write_scenes(folder, count, 256)
    rows = [json.loads(line) for line in (mixed / "metadata.jsonl").read_text().splitlines()]
    marked = [json.dumps({**row, "wrong": [False, True]}) for row in rows]
    (mixed / "metadata.jsonl").write_text("\n".join(marked) + "\n")
    output = tmp_path / "sampler.json"
    given = [
        "captions",
        str(mixed),
        str(held_out),
        "--clip",
        str(clip),
        "--model",
        str(tiny_folder),
        "--recipe",
        recipe,
    ]
    given += ["--work", str(tmp_path / "work"), "--minutes", "0.002", "--rounds", "2", "--pictures", "1"]
    assert bench_training.main([*given, "--output", str(output)]) == 1
    write_scores(mixed, Scorer(clip), 4)
    assert bench_training.main([*given, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["captions"]["wrong"] == 4 and found["captions"]["drawn_wrong_uniform"] == 0.5
    assert 0 < found["captions"]["drawn_wrong_clip_score"] < 1
    for arm in found["arms"].values():
        assert len(arm["rounds"]) == 2 and all(r["held_out_loss"] > 0 for r in arm["rounds"])
    equal = [*given, "--work", str(tmp_path / "equal"), "--steps", "4", "--output", str(output)]
    assert bench_training.main(equal) == 0
    for arm in json.loads(output.read_text())["arms"].values():
        assert [r["steps"] for r in arm["rounds"]] == [2, 4]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
