"""Recipes as data: what the packaged ones say, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sana_edge.errors import InvalidInput
from sana_edge.nets.denoiser import Denoiser
from sana_edge.training import recipe
from sana_edge.training.optimizers import make_optimizers
from sana_edge.training.processes import split_batch
from sana_edge.training.trained_denoiser import TrainedDenoiser

SMALL = """
model = "sana-tiny"
[denoiser]
num_layers = 1
num_attention_heads = 2
attention_head_dim = 16
num_cross_attention_heads = 1
cross_attention_head_dim = 32
cross_attention_dim = 32
caption_channels = 8
[[stage]]
resolution = 256
batch = 4
steps = 2
learning_rate = 1e-3
start = "random"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text)
    return str(path)


# sana_reference: 591,747,872 and 1,604,462,752 parameters, computed from the public checkpoints' shapes
@pytest.mark.parametrize(
    ("name", "count"), [("sana-0.6b", 591_747_872), ("sana-1.6b", 1_604_462_752)], ids=str
)
def test_the_public_recipes_train_the_public_architectures(name: str, count: int) -> None:
    found = recipe.load_recipe(name)
    assert [stage.resolution for stage in found.stage] == [512, 1024, 2048, 4096]
    assert [stage.interpolation_scale for stage in found.stage] == [None, None, 1.0, 2.0]
    assert [stage.flow_shift for stage in found.stage] == [3.0, 3.0, 3.0, 6.0]
    assert [stage.start for stage in found.stage] == ["random", "previous", "previous", "previous"]
    assert [found.config(stage).sample_size for stage in found.stage] == [16, 32, 64, 128]
    assert found.training.caption_norm == 0.01 and found.captions.dropout == 0.1
    with torch.device("meta"):
        model = Denoiser(found.config(found.stage[0]))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_our_own_goes_from_256_to_512() -> None:
    found = recipe.load_recipe("sana-tiny")
    assert [stage.resolution for stage in found.stage] == [256, 512]


def test_an_unknown_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"unknown key stage\.learnig_rate") as caught:
        recipe.load_recipe(write(tmp_path, SMALL.replace("learning_rate", "learnig_rate")))
    assert "learning_rate" in caught.value.hint and "flow_shift" in caught.value.hint
    with pytest.raises(InvalidInput, match=r"unknown key denoiser\.layers") as caught:
        recipe.load_recipe(write(tmp_path, SMALL.replace("num_layers", "layers")))
    assert "num_layers" in caught.value.hint and "sample_size" not in caught.value.hint
    with pytest.raises(InvalidInput, match="unknown key stages") as caught:
        recipe.load_recipe(write(tmp_path, SMALL.replace("[[stage]]", "[[stages]]")))
    assert "captions, denoiser, model, optimizer, stage, training" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage.resolution=300", r"stage\.resolution is 300"),
        ("stage.batch=0", r"stage\.batch is 0"),
        ("stage.batch=2.5", r"stage\.batch is 2\.5"),
        ("stage.minutes=5", r"stage\.steps is 2"),
        ('stage.start="previous"', r"stage\.start is 'previous'"),
        ('optimizer.name="sgd"', r"optimizer\.name is 'sgd'"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas is \[0\.9\]"),
        ("captions.tau=0", r"captions\.tau is 0"),
        ("training.precision=16", r"training\.precision is 16"),
        ("denoiser=3", r"denoiser is 3"),
        ("stage.batch=", "changes nothing"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        recipe.load_recipe(write(tmp_path, SMALL), [change])


def test_changes_reach_every_stage_and_new_tables(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + SMALL[SMALL.index("[[stage]]") :])
    found = recipe.load_recipe(path, ["stage.batch=8", "captions.tau=1", 'model="other"'])
    assert [stage.batch for stage in found.stage] == [8, 8]
    assert found.captions.tau == 1.0 and found.model == "other"


def test_a_recipe_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no recipe is named 'sana-2b'") as caught:
        recipe.load_recipe("sana-2b")
    assert "sana-0.6b" in caught.value.hint
    with pytest.raises(InvalidInput, match="is not TOML"):
        recipe.load_recipe(write(tmp_path, "model = "))


@pytest.mark.parametrize("name", recipe.OPTIMIZERS)
def test_every_optimizer_trains_every_parameter(tmp_path: Path, name: str) -> None:
    found = recipe.load_recipe(write(tmp_path, SMALL), [f'optimizer.name="{name}"'])
    model = TrainedDenoiser(found.config(found.stage[0]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for optimizer in make_optimizers(model, found.optimizer, 1e-2):
        optimizer.step()
    assert not [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]


def test_a_batch_is_split_evenly_or_not_at_all(tmp_path: Path) -> None:
    stage = recipe.load_recipe(write(tmp_path, SMALL), ["stage.batch=24", "stage.micro_batch=4"]).stage[0]
    assert split_batch(stage, 2) == (4, 3)
    with pytest.raises(InvalidInput, match="24 cannot be split over 5"):
        split_batch(stage, 5)
    with pytest.raises(InvalidInput, match="6 pictures of a process cannot be split into parts of 4"):
        split_batch(stage, 4)


def test_came_does_not_shard(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"training\.shard"):
        recipe.load_recipe(write(tmp_path, SMALL), ['optimizer.name="came"', "training.shard=true"])
