"""A whole training by a recipe on tiny real parts: resumed, interrupted, sharded, and its model."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sana_edge import Sana
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.store import weights
from sana_edge.torch_runtime import device
from sana_edge.training import __main__ as command
from sana_edge.training import processes
from sana_edge.training import train as train_module
from sana_edge.training.frozen import Frozen
from sana_edge.training.recipe import load_recipe
from sana_edge.training.state import STATE
from sana_edge.training.train import StageLoss, Task, train

# the denoiser of conftest's tiny_denoiser, in fp32
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
batch = 4
steps = 4
learning_rate = 1e-3
start = "random"
[[stage]]
resolution = 512
batch = 2
steps = 2
learning_rate = 1e-3
interpolation_scale = 1.0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of two shapes with two or three captions, some scored."""
    folder = tmp_path_factory.mktemp("train") / "data"
    folder.mkdir()
    rng, rows = random.Random(0), []
    for n in range(6):
        Image.effect_noise((64, 64 if n % 2 else 40), 80).convert("RGB").save(folder / f"{n}.png")
        captions = [
            f"a {rng.choice(['red', 'blue'])} {what}" for what in ("house", "fish", "tree")[: 2 + n % 2]
        ]
        row: dict[str, Any] = {"file_name": f"{n}.png", "captions": captions}
        if n < 4:
            row["clip_scores"] = [20 + rng.random() for _ in captions]
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def task(tiny_folder: Path, data: Path, tmp_path: Path) -> Callable[..., Task]:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)

    def make(output: str, *changes: str, **options: Any) -> Task:
        recipe = load_recipe(str(path), changes)
        latents = data.parent / "latents"
        place = tmp_path / output
        return Task(recipe, Frozen.find(str(tiny_folder)), data, place, latents, log_steps=1, **options)

    return make


def state(task: Task, stage: int = 1) -> dict[str, torch.Tensor]:
    return load_file(task.folder(stage) / STATE)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_both_stages_leave_models_that_generate(task: Callable[..., Task]) -> None:
    found = task("out")
    assert train(found)
    trained = state(found)
    assert any(not torch.equal(trained[f"ema.{k[6:]}"], v) for k, v in trained.items() if k[:6] == "model.")
    config = json.loads((found.folder(2) / "model" / "transformer" / "config.json").read_text())
    assert config["interpolation_scale"] == 1.0 and config["sample_size"] == 16
    with_sana = Sana.load(str(found.folder(1) / "model"), device="cpu", dtype="fp32")
    picture = with_sana.generate("a red house", steps=1, seed=0, size=(64, 64))
    assert np.asarray(picture.pixels).shape == (64, 64, 3)


def test_the_second_stage_starts_where_the_first_ended(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = task("out")
    with pytest.raises(InvalidInput, match="stage 2 starts from stage 1"):
        train(found, 2)
    train(found, 1)
    seen = []

    def look(self: StageLoss, step: int, progress: float) -> Any:
        seen.append({k: v.clone() for k, v in self._loop.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(StageLoss, "__call__", look)
    with pytest.raises(KeyboardInterrupt):
        train(found)
    before = state(found)
    assert all(torch.equal(value, before[f"ema.{name}"]) for name, value in seen[0].items())


def test_a_killed_training_goes_on_to_the_same_weights(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (
        task("whole", 'optimizer.name="came"'),
        task("parts", 'optimizer.name="came"', save_minutes=0.0),
    )
    train(whole, 1)
    inner = StageLoss.__call__

    def killed(self: StageLoss, step: int, progress: float) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return inner(self, step, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageLoss, "__call__", killed)
        train(parts, 1)
    train(parts, 1)
    expected, found = state(whole), state(parts)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.alone
def test_ctrl_c_saves_and_the_same_command_goes_on(
    task: Callable[..., Task],
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, inner = task("out"), StageLoss.__call__
    names = ("--data", str(found.data), "--output", str(found.output), "--latents", str(found.latents))
    argv = ["x", "train", str(tmp_path / "recipe.toml"), *names, "--model", str(tiny_folder), "--stage", "1"]
    monkeypatch.setattr(sys, "argv", argv)

    def interrupted(self: StageLoss, step: int, progress: float) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoss, "__call__", interrupted)
        assert command.main() == 130
    assert "stopped at step 2; the same command goes on from here" in capsys.readouterr().err
    assert command.main() == 0
    assert "stage 1 is finished" in capsys.readouterr().err
    whole = task("whole")
    train(whole, 1)
    expected, resumed = state(whole), state(found)
    assert not [name for name in expected if not torch.equal(expected[name], resumed[name])]


def test_a_full_disk_keeps_the_state_before(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, save = task("out", save_minutes=0.0), weights.save_file
    saved = []

    def third(tensors: Any, path: Path, metadata: Any) -> None:
        if STATE in path.name and len(saved) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(tensors, path, metadata)

    train(replace(found, recipe=load_recipe(str(found.output.parent / "recipe.toml"))), 1)
    expected = state(found)
    (found.folder(1) / STATE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", third)
        with pytest.raises(SanaError, match="No space left"):
            train(found, 1)
    assert not list(found.folder(1).glob("*.partial")) and (found.folder(1) / STATE).exists()
    train(found, 1)
    resumed = state(found)
    assert not [name for name in expected if not torch.equal(expected[name], resumed[name])]


def test_parts_of_a_batch_and_checkpointing_change_no_loss(task: Callable[..., Task]) -> None:
    whole = task("whole", "stage.steps=2")
    parts = task("parts", "stage.steps=2", "stage.micro_batch=1", "training.checkpointing=true")
    train(whole, 1)
    train(parts, 1)
    # log.jsonl has five decimals; sums in another order differ by less than the last
    assert losses(parts.folder(1)) == pytest.approx(losses(whole.folder(1)), abs=2e-5)
    changed = [n for n, v in state(parts).items() if (v - state(whole)[n]).abs().max() > 1e-3]
    assert not changed


@pytest.mark.ci
@pytest.mark.slow
def test_two_processes_have_the_loss_of_one_with_twice_the_batch(
    task: Callable[..., Task], tiny_folder: Path, tmp_path: Path
) -> None:
    one = task("one")
    train(one, 1)
    script = Path(__file__).parents[1] / "support" / "two_processes.py"
    outputs = (f"{tmp_path / 'two'}:", f"{tmp_path / 'sharded'}:training.shard=true")
    given = (tmp_path / "recipe.toml", tiny_folder, one.data, tmp_path / "latents", *outputs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # what torchrun tells its processes
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, given)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for output in ("two", "sharded"):
        # five decimals of a running mean: half of the last place each, and fp32 sums in another order
        assert losses(tmp_path / output / "stage-1") == pytest.approx(losses(one.folder(1)), abs=2e-5)
        there, here = load_file(tmp_path / output / "stage-1" / STATE), state(one)
        assert {n: v.shape for n, v in there.items()} == {n: v.shape for n, v in here.items()}


def test_machines_with_latents_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        num_processes = 2

    monkeypatch.setattr(processes, "gather_object", lambda own: [*own, 5])
    processes.check_shared(5, Two())  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="see from 4 to 5 pictures"):
        processes.check_shared(4, Two())  # type: ignore[arg-type]


def test_a_state_of_another_model_is_refused(task: Callable[..., Task]) -> None:
    train(task("out"), 1)
    with pytest.raises(CheckpointError, match=r"state\.safetensors does not fit its config"):
        train(task("out", "denoiser.num_layers=1"), 1)


def test_a_loss_that_is_not_finite_ends_the_training(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = task("out", save_minutes=0.0)
    inner = StageLoss.__call__

    def broken(self: StageLoss, step: int, progress: float) -> Any:
        value, figures = inner(self, step, progress)
        return value * (torch.nan if step == 2 else 1), figures

    monkeypatch.setattr(StageLoss, "__call__", broken)
    with pytest.raises(SanaError, match="the loss is nan at step 3"):
        train(found, 1)
    assert all(value.isfinite().all() for value in state(found).values())


@pytest.mark.parametrize(
    ("wanted", "found", "used"),
    [
        ("bf16", {"avx512_bf16"}, "bf16"),
        ("bf16", {"avx2"}, "no"),
        ("fp16", {"avx512_bf16"}, "no"),
        ("no", set(), "no"),
    ],
)
def test_a_cpu_takes_bf16_only_where_it_is_fast(
    wanted: str, found: set[str], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "instructions", lambda: found)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert processes.cpu_precision(wanted) == used


def test_a_training_starts_from_a_model(task: Callable[..., Task], tiny_folder: Path) -> None:
    found = task("out", f'stage.start="{tiny_folder}"', "stage.steps=1", "training.whiten=4")
    recipe = found.recipe
    data = train_module.prepare_data(found, recipe.stage[0], train_module.make_accelerator("no"))
    encoder = found.frozen.text_encoder(torch.device("cpu"))
    model = train_module.start_model(found, 1, data, encoder)
    stored = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(model.caption_norm, stored["caption_norm.weight"])
    whitened = train_module.start_model(task("new", "training.whiten=4"), 1, data, encoder)
    assert not torch.equal(whitened.caption_expand.bias, torch.zeros(64))
    with pytest.raises(InvalidInput, match="has no stage 3"):
        train(found, 3)
