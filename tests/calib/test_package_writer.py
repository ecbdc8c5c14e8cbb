"""The streaming writer: shards, bounded memory, and folders that appear whole or not at all."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana_edge.calib.package_writer import check_output, new_folder, write_shards
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.store.weights import load_state
from sana_edge.system import scratch

STEM = "diffusion_pytorch_model"


def numbers(count: int = 7) -> dict[str, Tensor]:
    """Tensors of 1 to 7 KB whose dtypes have other alignments than their neighbours'."""
    dtypes = (torch.int8, torch.float32, torch.float16, torch.bfloat16)
    return {
        f"layer.{i}": (torch.randn(1 + 2 * i, 101) * 50).to(dtypes[i % len(dtypes)]) for i in range(count)
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_one_file_where_all_fits(tmp_path: Path) -> None:
    state = numbers()
    size = write_shards(state.items(), tmp_path, stem=STEM)
    assert [path.name for path in tmp_path.iterdir()] == [f"{STEM}.safetensors"]
    assert size == sum(tensor.nbytes for tensor in state.values())
    assert equal(load_state(tmp_path), state)


@pytest.mark.parametrize("stem", [STEM, "model"])
def test_shards_load_as_diffusers_name_them(tmp_path: Path, stem: str) -> None:
    state = numbers()
    write_shards(state.items(), tmp_path, stem=stem, shard_bytes=3000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"{stem}-00001-of-{len(shards):05}.safetensors"
    assert (tmp_path / f"{stem}.safetensors.index.json").is_file()
    assert len(list(tmp_path.iterdir())) == len(shards) + 1
    assert equal(load_state(tmp_path), state)


def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    limit, size, alive = 10_000, 4_000, weakref.WeakSet[Tensor]()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(20):
            tensor = torch.zeros(size, dtype=torch.int8)
            alive.add(tensor)
            # what the shard holds, this tensor, and the one before it that the loop's variable keeps
            assert len(alive) * size <= limit + 2 * size
            yield f"layer.{i}", tensor

    write_shards(tensors(), tmp_path, stem=STEM, shard_bytes=limit)
    assert len(load_state(tmp_path)) == 20


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    write_shards(numbers().items(), folder, stem=STEM)
    (folder / "plain").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    state = numbers()
    state["layer.3"][2, 5] = value
    with pytest.raises(CheckpointError, match=r"layer\.3 has values that are not finite"):
        write_shards(state.items(), tmp_path, stem=STEM)


def test_a_name_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    pair = [("layer", torch.zeros(2)), ("layer", torch.ones(2))]
    with pytest.raises(CheckpointError, match="layer is there twice"):
        write_shards(pair, tmp_path, stem=STEM)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_is_whole_or_not_there(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "package") as folder:
        (folder / "config.json").write_text("{}")
        raise error
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "package") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "package").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert (tmp_path / "package" / "config.json").is_file()


def model_folder(path: Path) -> Path:
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    return path


def test_force_replaces_a_model_only_when_the_new_one_is_done(tmp_path: Path) -> None:
    old = model_folder(tmp_path / "package")
    with pytest.raises(InvalidInput, match="exists"):
        check_output(old, force=False)
    with pytest.raises(RuntimeError), new_folder(old, force=True):
        raise RuntimeError
    assert (old / "model_index.json").is_file()
    with new_folder(old, force=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in old.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_what_is_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, rename = model_folder(tmp_path / "package"), os.rename

    def interrupted(source: Path, target: Path) -> None:
        if source.name == "new":
            raise KeyboardInterrupt
        rename(source, target)

    # where two folders cannot change places in one step
    monkeypatch.setattr(scratch, "exchange", lambda path, other: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(old, force=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    assert (old / "model_index.json").is_file()


def test_force_spares_what_is_no_model(tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "file"
    folder.mkdir()
    (folder / "holiday.png").touch()
    file.touch()
    for path in (folder, file):
        with pytest.raises(InvalidInput):
            check_output(path, force=True)
        assert path.exists()


def test_an_output_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SanaError, match="cannot write"):
        check_output(tmp_path / "file" / "package", force=False)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SanaError, match="cannot write"):
        check_output(tmp_path / "package", force=False)
