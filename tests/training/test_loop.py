"""The training loop and the steps around it, at sizes of a second."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sana_edge.errors import CheckpointError, SanaError
from sana_edge.store import weights
from sana_edge.training import loop, train_autoencoder, train_denoiser
from sana_edge.training.curves import read_log
from sana_edge.training.latents import numbered_scene
from sana_edge.training.layout import held_out
from sana_edge.training.state import ema_state


class Clock:
    """Every reading is a second later, so that a budget of minutes is a number of steps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    yield clock


def make(folder: Path, seconds: int) -> tuple[loop.Loop, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    return loop.Loop(model, [optimizer], folder, minutes=seconds / 60, precision="no", warmup=2), model


def run(trainer: loop.Loop, model: nn.Linear) -> None:
    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(batch) - 2 * batch).square().mean(), {"progress": progress}

    trainer.run(loss, log_steps=10)


def test_a_training_learns_logs_and_keeps_its_average(tmp_path: Path) -> None:
    trainer, model = make(tmp_path, 200)
    run(trainer, model)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.2 * records[0]["loss"]
    assert [r["step"] for r in records] == list(range(10, 201, 10))
    average = ema_state(tmp_path)
    assert torch.allclose(average["weight"], 2 * torch.eye(4), atol=0.3)
    assert not torch.equal(average["weight"], model.weight)


@pytest.mark.alone
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, model = make(tmp_path / "whole", 60)
    run(whole, model)
    stopped, other = make(tmp_path / "parts", 60)
    inner = stopped._update

    def interrupted(loss: loop.Loss) -> tuple[float, dict[str, float]]:
        if stopped.step == 22:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(loss)

    stopped._update = interrupted  # type: ignore[method-assign]
    run(stopped, other)
    assert stopped.step == 23
    resumed, third = make(tmp_path / "parts", 60)
    assert resumed.step == 23
    run(resumed, third)
    assert resumed.step == whole.step
    assert torch.allclose(third.weight, model.weight, atol=1e-6)
    assert torch.allclose(resumed.ema["weight"], whole.ema["weight"], atol=1e-6)


def test_a_save_that_fails_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, model = make(tmp_path, 20)
    run(trainer, model)
    before = trainer.state_file.read_bytes()

    def full(_: object, path: Path, *__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(SanaError, match="No space"):
        trainer.save()
    assert trainer.state_file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors", "log.jsonl"}


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    trainer, model = make(tmp_path, 20)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(SanaError, match=r"cannot write .*log\.jsonl: ") as caught:
        run(trainer, model)
    assert "goes on from" in caught.value.hint


@pytest.mark.parametrize(
    "change", [b"", b"\xff" * 64, {"step": "-1"}, {"step": "x"}, {"seconds": "nan"}, None]
)
def test_a_damaged_state_is_named(tmp_path: Path, change: bytes | dict[str, str] | None) -> None:
    trainer, model = make(tmp_path, 20)
    run(trainer, model)
    file = trainer.state_file
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        numbers = None if change is None else {"step": "1", "seconds": "1", **change}
        save_file(load_file(file), file, numbers)
    with pytest.raises(CheckpointError, match=r"state\.safetensors") as caught:
        make(tmp_path, 20)
    assert "remove it" in caught.value.hint


def test_links_in_a_training_folder_stay_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    log, state = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "state.safetensors"
    log.symlink_to("../mine")
    trainer, model = make(tmp_path / "run", 20)
    with pytest.raises(SanaError, match=r"cannot write .*log\.jsonl: it is a link"):
        run(trainer, model)
    log.unlink()
    state.symlink_to("../mine")
    run(trainer, model)
    assert not state.is_symlink() and (tmp_path / "mine").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes by name")
def test_a_log_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    trainer, model = make(tmp_path, 20)
    with pytest.raises(SanaError, match="no regular file"):
        run(trainer, model)
    with pytest.raises(OSError, match="no regular file"):
        read_log(tmp_path)


def test_a_log_whose_last_line_was_cut(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "minutes": 0.1 * step, "loss": 1.0}) for step in (1, 2, 3, 2)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, "[1]", '{"step": 9, "minutes": 1']))
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    trainer, model = make(tmp_path, 20)
    run(trainer, model)
    steps = [record["step"] for record in read_log(tmp_path)]
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[6:]]
    assert kept and [record["step"] for record in kept] == steps[-len(kept) :], "a line went with the cut one"


def test_numbered_scenes_are_fixed_and_never_held_out() -> None:
    for number in range(50):
        assert numbered_scene(number) == numbered_scene(number)
        assert not held_out().holds(numbered_scene(number))


def test_crops_come_from_scenes_in_the_range_of_the_autoencoder() -> None:
    dataset = train_autoencoder.Crops(side=64, crop=32, seed=0)
    parts = [part for part, _ in zip(dataset, range(6), strict=False)]
    assert all(part.shape == (3, 32, 32) and part.dtype == torch.uint8 for part in parts)
    assert not torch.equal(parts[0], parts[1])


def test_reconstruction_loss_is_zero_only_for_the_picture_itself() -> None:
    picture = torch.rand(1, 3, 8, 8)
    assert train_autoencoder.reconstruction_loss(picture, picture) == 0
    # an offset has no gradient: L1 + 2 L2 of 0.1
    assert train_autoencoder.reconstruction_loss(picture + 0.1, picture) == pytest.approx(0.12, rel=1e-3)


def test_a_new_denoiser_predicts_nothing_and_all_of_it_can_learn() -> None:
    config = train_denoiser.CONFIG
    model = train_denoiser.Denoiser(config)
    train_denoiser.initialise(model)
    features = train_denoiser.TextFeatures(torch.randn(2, 5, config.caption_channels), torch.ones(2, 5) > 0)
    velocity = model(
        torch.randn(2, 32, 4, 4),
        model.modulation(torch.tensor([10.0, 900.0])),
        model.text_context([features]),
    )
    assert velocity.abs().max() == 0
    grouped = {
        id(p) for o in train_denoiser.optimizers(model, 1e-3) for g in o.param_groups for p in g["params"]
    }
    assert grouped == {id(p) for p in model.parameters()}
