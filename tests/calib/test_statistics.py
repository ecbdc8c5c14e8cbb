"""Streaming statistics: what they hold, whatever the order, and as files; which rows are sampled."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sana_edge.calib.sampling import Reservoir, generator, quota, strata
from sana_edge.calib.statistics import BINS, LayerStatistics, Statistics, checksum
from sana_edge.errors import CheckpointError, SanaError

CHANNELS = 7


def growing(count: int = 6) -> list[Tensor]:
    """Batches (13, CHANNELS) whose ranges grow by 1000 from the first to the last, the first all zero."""
    batches = [torch.randn(13, CHANNELS) * 10 ** (3 * n / (count - 1)) for n in range(count)]
    batches[0].zero_()
    # exactly on a bin's edge, and on the end of a range
    batches[1][0, 0], batches[2][0, 0] = 0.5, -8.0
    return batches


def seen(batches: list[Tensor], steps: int = 2) -> LayerStatistics:
    layer = LayerStatistics.empty(steps, CHANNELS)
    for n, batch in enumerate(batches):
        layer.update(n % steps, batch)
        layer.add_samples(n % steps, list(batch[:2]))
    return layer


def assert_equal(layer: LayerStatistics, other: LayerStatistics, *, samples: bool = True) -> None:
    for name, tensor in layer.tensors().items():
        if samples or "sample" not in name:
            assert torch.equal(tensor, other.tensors()[name]), name


def test_absmax_and_histogram_are_those_of_all_values_at_once() -> None:
    batches = growing()
    layer = seen(batches)
    for step in range(2):
        values = torch.cat(batches[step::2]).abs()
        assert torch.equal(layer.absmax[step], values.amax(0))
        limit = float(layer.limit[step])
        assert limit / 2 <= values.max() < limit
        # the bins' edges are fp32 numbers, and a division by a power of two is exact
        expected = torch.bincount((values / limit * BINS).long().flatten(), minlength=BINS)
        assert torch.equal(layer.histogram[step], expected)


def test_the_order_of_the_ranges_does_not_matter() -> None:
    batches = growing(5)
    expected = seen(batches, steps=1)
    for order in itertools.permutations(batches):
        assert_equal(seen(list(order), steps=1), expected, samples=False)


def test_memory_does_not_grow_with_what_is_seen() -> None:
    layer = LayerStatistics.empty(3, CHANNELS)
    before = {name: tensor.shape for name, tensor in layer.tensors().items()}
    for batch in growing(40):
        layer.update(1, batch)
    assert {name: tensor.shape for name, tensor in layer.tensors().items()} == before


def test_skipped_rows_count_as_their_neighbours() -> None:
    layer = LayerStatistics.empty(1, CHANNELS)
    x = torch.randn(40, CHANNELS)
    x[1, 3] = -1000.0
    layer.update(0, x, counted=torch.arange(0, 40, 4), weight=4)
    assert int(layer.histogram.sum()) == x.numel()
    # the largest value is in a row that the histogram did not see
    assert layer.absmax[0, 3] == 1000 and layer.limit[0] == 1024 and layer.histogram[0, 900:].sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(9, CHANNELS).to(dtype)
    layer, expected = LayerStatistics.empty(1, CHANNELS), LayerStatistics.empty(1, CHANNELS)
    layer.update(0, x)
    expected.update(0, x.float())
    assert_equal(layer, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    layer, x = LayerStatistics.empty(4, CHANNELS), torch.randn(5, CHANNELS)
    x[3, 2] = value
    with pytest.raises(SanaError, match=r"not finite at step 3 of 4 \(channel 2\)"):
        layer.update(2, x)
    assert_equal(layer, LayerStatistics.empty(4, CHANNELS))


@pytest.mark.parametrize("value", [1e-40, 2.0**-101, 3e38])
def test_values_at_the_ends_of_fp32(value: float) -> None:
    layer = LayerStatistics.empty(1, 1)
    layer.update(0, torch.tensor([[value], [0.0]]))
    layer.update(0, torch.tensor([[1.0]]))
    assert int(layer.histogram.sum()) == 3 and layer.limit.isfinite().all()
    assert layer.absmax[0, 0] == torch.tensor(max(value, 1.0))


def statistics(order: int = 1) -> Statistics:
    torch.manual_seed(5)
    layers = {f"denoiser.blocks.{n}.qkv": seen(growing()) for n in range(3)}
    return Statistics(dict(list(layers.items())[::order]), {"model": "tiny", "size": [64, 32], "seed": 3})


def test_files_hold_everything(tmp_path: Path) -> None:
    made = statistics()
    made.save(tmp_path / "new" / "a.safetensors")
    loaded = Statistics.load(tmp_path / "new" / "a.safetensors")
    assert loaded.info == made.info and set(loaded.layers) == set(made.layers)
    for name, layer in loaded.layers.items():
        assert_equal(layer, made.layers[name])
    assert loaded.checksum() == made.checksum()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_checksum_is_of_the_content() -> None:
    expected = statistics().checksum()
    assert statistics(order=-1).checksum() == expected
    for field in ("absmax", "histogram", "limit", "samples", "sample_steps"):
        changed = statistics()
        changed.layers["denoiser.blocks.1.qkv"].tensors()[field].view(-1)[-1] += 1
        assert changed.checksum() != expected, field
    changed = statistics()
    changed.info["seed"] = 4
    assert changed.checksum() != expected


def test_checksum_of_tensors_tells_what_they_are() -> None:
    x = torch.arange(6.0).view(2, 3)
    strided = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert checksum({"a": x, "b": x[0]}) == checksum({"b": strided[0], "a": strided})
    others = ({"c": x}, {"a": x.view(3, 2)}, {"a": x.int()}, {"a": x.bfloat16()}, {"a": -x})
    assert len({checksum(other) for other in ({"a": x}, *others)}) == 6
    assert checksum({"a": torch.zeros(())}) != checksum({"a": torch.zeros(0)})


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    statistics().save(whole)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            Statistics.load(path)
        assert str(path) in error.value.message and error.value.hint

    refused("cannot read")
    path.mkdir()
    refused("cannot read")
    path.rmdir()
    path.write_bytes(whole.read_bytes()[:-100])
    refused("cannot read")
    save_file({"weight": torch.zeros(2)}, path)
    refused("version None")
    save_file({"a.absmax": torch.zeros(2)}, path, {"statistics_version": "1", "info": "{}"})
    refused("not hold whole")
    save_file({}, path, {"statistics_version": "2"})
    refused("version 2, expected 1")
    shutil.copy(whole, path)
    Statistics.load(path)


@pytest.mark.parametrize(
    ("rows", "steps", "prompts"),
    [(256, 20, 32), (256, 20, 8), (256, 1, 32), (256, 2, 1), (7, 20, 32), (256, 1, 1), (5, 3, 1000)],
)
def test_quotas_are_even_over_steps_and_prompts(rows: int, steps: int, prompts: int) -> None:
    table = torch.tensor(
        [[quota(rows, s, steps, p, prompts) for p in range(prompts)] for s in range(steps)]
    ).double()
    assert table.min() >= 0 and table.sum() == rows
    assert (table.sum(1) - rows / steps).abs().max() < 1
    # the prompts' shares differ by at most one row, in each step and in all
    assert (table.amax(1) - table.amin(1)).max() <= 1
    assert table.sum(0).max() - table.sum(0).min() <= 1
    # and the prompts of one step are no neighbours: of 4 quarters of the prompts each has its share
    quarters = torch.stack([part.sum(1) for part in table.chunk(4, dim=1)])
    if prompts % 4 == 0:
        assert (quarters - rows / steps / 4).abs().max() <= 2


def test_strata_are_one_row_of_each_part() -> None:
    rows = strata(50, 501, generator("a"))
    # a part may begin within a row
    assert all(10.02 * part - 1 < row < 10.02 * (part + 1) for part, row in enumerate(rows.tolist()))
    # a fixed distance would see the same phase of a picture again and again
    assert len(set((rows % 2).tolist())) == 2
    assert strata(8, 3, generator("a")).tolist() == sorted(strata(8, 3, generator("a")).tolist())
    assert not torch.equal(rows, strata(50, 501, generator("b")))


def test_a_reservoir_keeps_all_rows_with_the_same_chance() -> None:
    # two rows kept of 30, which come in calls of 5, 20 and 5
    rows, trials, wanted = 30, 4000, 2
    x = torch.arange(float(rows)).view(rows, 1)
    kept = torch.zeros(rows)
    for trial in range(trials):
        reservoir = Reservoir(wanted)
        for call, part in enumerate(x.split([5, 20, 5])):
            reservoir.offer(part, generator(trial, call))
        for row in reservoir.rows():
            kept[int(row)] += 1
    expected = trials * wanted / rows
    # binomial: five standard deviations for the worst of 30 rows
    assert (kept - expected).abs().max() < 5 * expected**0.5


def test_a_reservoir_copies_and_takes_what_there_is() -> None:
    x = torch.randn(3, CHANNELS, dtype=torch.bfloat16)
    reservoir, before = Reservoir(10), x.float().clone()
    reservoir.offer(x, generator(0))
    x.zero_()
    assert torch.equal(torch.stack(reservoir.rows()), before)
    nothing = Reservoir(0)
    nothing.offer(before, generator(0))
    assert nothing.rows() == []
