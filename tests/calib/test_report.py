"""What is measured between a float and an INT8 model, and how the report shows it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana_edge import Sana
from sana_edge.calib.report import canvas
from sana_edge.calib.report.measure import Run
from sana_edge.calib.report.picture import AMPLIFIED, MOST_PAIRS, draw
from sana_edge.calib.report.report import BLOCK_LAYERS, Layer, Report, Sizes, block_grid, decoder_stages
from sana_edge.calib.report.table import WIDTH, table
from sana_edge.calib.trajectory import Comparison, compare, follow
from sana_edge.image_metrics import psnr
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub
from sana_edge.torch_runtime.runtime import TorchRuntime

STEPS = 3


def load(folder: Path) -> TorchRuntime:
    return TorchRuntime.load(hub.resolve(str(folder)), device=torch.device("cpu"), dtype="fp32")


def plan_of(runtime: TorchRuntime, seed: int = 5) -> Plan:
    request = Request("a cat on a mat", steps=STEPS, size=(96, 64), seed=seed)
    return request.plan(runtime.denoiser.config.native_size, runtime.sampler.kind)


def test_a_trajectory_is_that_of_a_picture(tiny_folder: Path, tiny_sprint_folder: Path) -> None:
    for folder in (tiny_folder, tiny_sprint_folder):
        runtime = load(folder)
        plan = plan_of(runtime)
        followed = follow(runtime, plan)
        image = Sana(runtime).generate(plan.prompt, steps=STEPS, size=(96, 64), seed=plan.seed)
        assert np.array_equal(followed.pixels, image.pixels)
        assert followed.latents.shape == (STEPS + 1, 32, 2, 3)
        assert followed.velocities.shape == (STEPS, 32, 2, 3)


def test_a_model_equals_itself(tiny_sprint_folder: Path) -> None:
    # Sprint's sampler draws noise at every step: the same in both runs
    runtime = load(tiny_sprint_folder)
    same = compare(runtime, follow(runtime, plan_of(runtime)))
    assert same.velocity_errors == same.latent_errors == [0.0] * STEPS
    assert same.psnr == same.decoder_psnr == math.inf
    assert same.ssim == pytest.approx(1)


def test_a_difference_of_the_denoiser_is_found_where_it_is(tiny_folder: Path) -> None:
    runtime = load(tiny_folder)
    reference = follow(runtime, plan_of(runtime))
    with torch.no_grad():
        runtime.denoiser.head.weight.mul_(1.01)
        runtime.denoiser.head.bias.mul_(1.01)
    compared = compare(runtime, reference)
    # a factor on the head is a factor on the velocity; 1e-4 is about a thousand fp32 roundings
    assert compared.velocity_errors == pytest.approx([0.01] * STEPS, rel=1e-2)
    assert 0 < compared.latent_errors[0] < compared.latent_errors[-1]
    assert compared.psnr == psnr(compared.picture, compared.reference) < math.inf
    assert compared.decoder_psnr == math.inf


def test_a_difference_of_the_decoder_is_found_where_it_is(tiny_folder: Path) -> None:
    runtime = load(tiny_folder)
    reference = follow(runtime, plan_of(runtime))
    with torch.no_grad():
        next(runtime.autoencoder.parameters()).mul_(1.05)
    compared = compare(runtime, reference)
    assert compared.velocity_errors == compared.latent_errors == [0.0] * STEPS
    assert compared.psnr == compared.decoder_psnr < math.inf


def comparison(error: int, *, seed: int = 0, prompt: str = "a cat on a mat") -> Comparison:
    reference = np.random.default_rng(seed).integers(0, 200, (64, 96, 3), dtype=np.uint8)
    picture = reference + np.uint8(error)
    distance = psnr(picture, reference)
    return Comparison(
        plan=Request(prompt, steps=STEPS, seed=seed).plan(128, "flow-dpm"),
        velocity_errors=[0.01 * error, 0.02 * error, 0.04 * error],
        latent_errors=[0.001 * error, 0.002 * error, 0.003 * error],
        psnr=distance,
        ssim=1 - 0.01 * error,
        decoder_psnr=distance,
        reference=reference,
        picture=picture,
    )


def example(comparisons: list[Comparison], blocks: int = 3) -> Report:
    layers = [
        Layer(f"denoiser.blocks.{i}.{name}", 20.0 + 5 * i + n, kept=i == n == 1)
        for i in range(blocks)
        for n, name in enumerate(BLOCK_LAYERS)
    ]
    parts = ("conv_out", "up_blocks.2.0.conv1", "up_blocks.2.0.conv2", "up_blocks.10.0.conv", "conv_in")
    layers += [Layer(f"decoder.{part}", 30.0 + n) for n, part in enumerate(parts)]
    observed = {"prompts": 2, "prompt_set": "own", "steps": STEPS, "size": [96, 64]}
    return Report(
        model="tiny",
        settings={"activations": "token", "calibration": observed if comparisons else None},
        layers=layers,
        sizes={"denoiser": Sizes(10_000_000, 5_000_000), "decoder": Sizes(2_000_000_000, 1_500_000_000)},
        timesteps=[999.0, 800.0, 300.0] if comparisons else [],
        comparisons=comparisons,
        runs={"float": Run(2.0, {}, 500_000_000), "int8": Run(1.0, {}, None)} if comparisons else {},
        seconds={"quantize": 1.25},
        notes=["something to know"],
    )


def test_layers_are_in_the_order_of_computation() -> None:
    grid = block_grid(example([], blocks=12).layers)
    assert len(grid) == 12
    assert grid[10]["out"].name == "denoiser.blocks.10.out"
    stages = decoder_stages(example([]).layers)
    assert list(stages) == ["conv_in", "stage 10", "stage 2", "conv_out"]
    assert len(stages["stage 2"]) == 2


def test_numbers_are_means_over_pictures_and_the_worst_is_found() -> None:
    report = example([comparison(1, seed=1), comparison(3, seed=2), comparison(2, seed=3)])
    assert report.worst == 1
    first = report.steps()[0]
    assert first["velocity_error"] == pytest.approx(0.02)
    assert first["largest_velocity_error"] == pytest.approx(0.03)
    assert first["latent_error"] == pytest.approx(0.002)
    numbers = report.picture_numbers()
    # a difference of e everywhere: 20 log10(255 / e)
    decibels = [20 * math.log10(255 / error) for error in (1, 3, 2)]
    assert numbers["psnr"]["worst"] == pytest.approx(decibels[1])
    assert numbers["psnr"]["mean"] == pytest.approx(sum(decibels) / 3)
    assert numbers["ssim"]["worst"] == pytest.approx(0.97)


def test_json_has_no_infinity() -> None:
    report = example([comparison(0), comparison(2)])
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["pictures"]["pairs"][0]["psnr"] is None
    assert content["pictures"]["pairs"][1]["psnr"] == pytest.approx(20 * math.log10(255 / 2))
    assert content["bytes"]["all"] == {"float": 2_010_000_000, "int8": 1_505_000_000}
    assert content["layers"][7] == dataclasses.asdict(report.layers[7])
    assert content["sqnr_of"] == "output"
    assert example([]).to_dict()["sqnr_of"] == "weight"


def test_the_table_says_all_and_fits() -> None:
    long = "a very long prompt " * 20
    text = table(example([comparison(1), comparison(4, seed=77, prompt=long)], blocks=28))
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for part in ("block 27", "26.0*", "seed 77", "0.50", "2.00 s", "1.00 s", "note: something to know"):
        assert part in text, part
    steps = [line.split() for line in lines if line.split()[:1] == ["3"]]
    assert ["3", "300", "10.00", "%", "16.00", "%", "0.75", "%"] in steps


def test_without_pictures_the_table_has_no_empty_parts() -> None:
    text = table(example([]))
    assert "not calibrated" in text
    assert "PSNR" not in text
    assert "step" not in text
    assert "\n\n\n" not in text


def page(report: Report) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draw(report))).convert("RGB"))


def test_the_picture_shows_pairs_and_marks_the_worst() -> None:
    without, one = page(example([])), page(example([comparison(1)]))
    assert without.shape[1] == one.shape[1]
    assert len(one) > len(without)
    red = np.abs(one.astype(int) - canvas.RED).sum(-1) == 0
    assert red.sum() > 1000
    assert not (np.abs(without.astype(int) - canvas.RED).sum(-1) == 0).any()
    # the difference of 1 everywhere, amplified, is a grey of its own
    grey = (one == AMPLIFIED).all(-1)
    assert grey.sum() > 10_000


def test_the_worst_pair_is_shown_however_many_there_are() -> None:
    many = [comparison(1, seed=i) for i in range(MOST_PAIRS + 3)] + [comparison(9, seed=99)]
    shown = page(example(many))
    assert (shown == 9 * AMPLIFIED).all(-1).sum() > 10_000


def test_the_picture_is_drawn_for_odd_reports() -> None:
    infinite = [Layer("decoder.conv_in", math.inf), Layer("denoiser.blocks.0.qkv", -3.0)]
    equal = [comparison(0)]
    for report in (
        dataclasses.replace(example(equal, blocks=60), notes=[]),
        dataclasses.replace(example(equal), layers=infinite),
        dataclasses.replace(example([]), layers=[]),
    ):
        assert page(report).std() > 0
        assert max(map(len, table(report).splitlines())) <= WIDTH
