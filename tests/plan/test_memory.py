"""How stages fit: all together, one after the other, in pieces, or not at all."""

from __future__ import annotations

import dataclasses

import pytest

from sana_edge.errors import OutOfMemory
from sana_edge.plan import memory
from sana_edge.plan.memory import Stage, Work
from sana_edge.plan.model import facts_of
from sana_edge.store import manifest
from sana_edge.store.catalogue import bundled_exports

STAGES = [Stage("text", 100, 50, 5, 5), Stage("denoiser", 40, 0, 10, 10), Stage("decoder", 10, 0, 90, 20)]
BIG = Work(32, 32, guided=True)


@pytest.mark.parametrize(
    ("free", "way"),
    [
        (None, ("together", 240)),
        (240, ("together", 240)),
        (239, ("in turn", 150)),
        (150, ("in turn", 150)),
        (149, None),
    ],
)
def test_the_first_way_that_fits(free: int | None, way: tuple[str, int] | None) -> None:
    assert memory.order(STAGES, free) == way


def test_in_pieces_where_at_once_is_too_much() -> None:
    stages = [Stage("denoiser", 40, 0, 10, 10), Stage("decoder", 10, 0, 90, 20)]
    assert memory.order(stages, 60) == ("in turn, in tiles", 50)


def test_int8_smaller_pictures_and_decoders_take_less() -> None:
    public = facts_of("sana-0.6b-1024")
    stages = memory.torch_stages(public, BIG, dtype="fp32", int8=False)
    int8 = memory.torch_stages(public, BIG, dtype="fp32", int8=True)
    assert [stage.name for stage in stages] == ["text", "denoiser", "decoder"]
    assert memory.in_turn(int8) < 0.3 * memory.in_turn(stages)
    small = memory.torch_stages(public, Work(16, 16, guided=False), dtype="fp32", int8=True)
    assert small[1].working < int8[1].working and small[2].working < int8[2].working / 2
    lite = memory.torch_stages(facts_of("sana-0.6b-1024", decoder="dc-ae-lite"), BIG, dtype="fp32", int8=True)
    assert lite[2].peak < int8[2].peak
    half = memory.torch_stages(public, BIG, dtype="bf16", int8=False)
    assert half[0].weights == stages[0].weights / 2 and half[0].loading == 0


def test_tiles_and_images() -> None:
    public = facts_of("sana-1.6b-4096")
    whole, tiled, never = (
        memory.torch_stages(public, Work(128, 128, True, tile), dtype="bf16", int8=False)[-1]
        for tile in (None, 1024, 0)
    )
    assert whole.least == tiled.least == tiled.working < whole.working == never.working == never.least
    names = [
        s.name for s in memory.torch_stages(public, Work(8, 8, True, image=True), dtype="bf16", int8=False)
    ]
    assert names == ["text", "encoder", "denoiser", "decoder"]
    large = memory.torch_stages(public, Work(128, 128, True, image=True), dtype="bf16", int8=False)[1]
    # its maps of full resolution are computed in strips
    assert large.least < 0.6 * large.working


def test_a_budget_that_no_picture_fits() -> None:
    with pytest.raises(
        OutOfMemory, match=r"m needs 0\.1 MB for its text alone, 0\.1 MB of 1\.0 MB"
    ) as caught:
        memory.check_smallest("m", [Stage("text", 150_000, 0, 0, 0)], 100_000, 1_000_000)
    assert (caught.value.needed, caught.value.free) == (150_000, 100_000)
    assert "`sana-edge plan MODEL --memory 1MB`" in caught.value.hint
    memory.check_smallest("m", STAGES, None, 1)


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    described = manifest.read(bundled_exports()["sana-tiny-int8-onnx"])
    stages = memory.engine_stages(described, Work(8, 8, True, image=True), "onnxruntime", "fp32")
    assert [stage.name for stage in stages] == ["text", "encoder", "denoiser", "decoder"]
    assert all(stage.weights > 0 and stage.working >= stage.least > 0 for stage in stages)
    twice = memory.engine_stages(described, Work(8, 8, True), "openvino", "fp32")
    assert twice[1].weights > stages[2].weights
    # of an embedding table it reads a few rows, where they lie in the file
    told = dataclasses.replace(described, text_table_bytes=500_000)
    for engine, less in (("openvino", 2.2 * 500_000), ("onnxruntime", 0)):
        before, after = (memory.engine_stages(d, Work(8, 8, True), engine, "fp32") for d in (described, told))
        assert before[0].weights - after[0].weights == pytest.approx(less, abs=2)
        assert before[1:] == after[1:]
    # where OpenVINO makes INT8 weights fp32
    by_cpu = []
    for lacks in (False, True):
        monkeypatch.setattr(memory, "lacks_int8", lambda lacks=lacks: lacks)
        by_cpu.append(memory.engine_stages(described, Work(8, 8, True), "openvino", "fp32")[0].weights)
        float_model = memory.exported_stages(facts_of("sana-tiny"), Work(8, 8, True), "openvino", int8=False)
        by_cpu.append(float_model[0].weights)
    assert by_cpu[2] > 1.5 * by_cpu[0] and by_cpu[1] == by_cpu[3]
    # what an export would take, from configs alone
    guessed = memory.exported_stages(facts_of("sana-tiny"), Work(8, 8, True), "onnxruntime", int8=True)
    for real, guess in zip([stages[0], *stages[2:]], guessed, strict=True):
        assert 0.5 < guess.weights / real.weights < 2
