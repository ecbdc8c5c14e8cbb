"""The report's numbers as text for a terminal, at most 100 columns wide."""

from __future__ import annotations

import math
import statistics

from sana_edge.calib.report.report import (
    BLOCK_LAYERS,
    Layer,
    Report,
    block_grid,
    decibels,
    decoder_stages,
    megabytes,
)

WIDTH = 100


def table(report: Report) -> str:
    """Layers, steps, pictures and costs; parts that were not measured are left out."""
    parts = [
        [f"{report.model}: {report.subtitle()}"],
        _layer_lines(report),
        _step_lines(report),
        _picture_lines(report),
        _cost_lines(report),
        [f"note: {note}" for note in report.notes],
    ]
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in parts if lines)


def _layer_lines(report: Report) -> list[str]:
    what = "outputs" if report.calibrated else "weights"
    lines = [f"SQNR of the layers' {what} in dB; * stays in 16 bit: alone it changes the result most"]
    grid = block_grid(report.layers)
    if grid:
        lines.append("  denoiser " + "".join(f"{name:>11}" for name in BLOCK_LAYERS))
    for block, layers in enumerate(grid):
        cells = (_cell(layers[name]) if name in layers else "" for name in BLOCK_LAYERS)
        lines.append(f"  block {block:<3}" + "".join(f"{cell:>11}" for cell in cells))
    stages = decoder_stages(report.layers)
    if stages:
        lines.append(f"  {'decoder':9}{'layers':>11}{'mean':>11}{'lowest':>11}")
    for name, members in stages.items():
        mean = statistics.fmean(min(layer.sqnr, 999.0) for layer in members)
        low = min(members, key=lambda layer: layer.sqnr)
        where = low.name.removeprefix("decoder.").removeprefix("up_blocks.")
        lines.append(f"  {name:9}{len(members):>11}{mean:>11.1f}{_cell(low):>11}  {where}")
    kept = [layer.name for layer in report.layers if layer.kept]
    lines.append(f"  in 16 bit: {len(kept)} of {len(report.layers)} layers")
    return lines


def _cell(layer: Layer) -> str:
    value = "exact" if math.isinf(layer.sqnr) else f"{layer.sqnr:.1f}"
    return value + ("*" if layer.kept else " ")


def _step_lines(report: Report) -> list[str]:
    steps = report.steps()
    if not steps:
        return []
    lines = [
        f"relative L2 error by step, mean of {len(report.comparisons)} pictures",
        f"  {'step':>4}{'timestep':>11}{'velocity':>12}{'largest':>12}{'latent, added up':>20}",
    ]
    for number, step in enumerate(steps, start=1):
        errors = (step["velocity_error"], step["largest_velocity_error"])
        columns = "".join(f"{100 * error:>10.2f} %" for error in errors)
        latent = f"{100 * step['latent_error']:>18.2f} %"
        lines.append(f"  {number:>4}{step['timestep']:>11.4g}{columns}{latent}")
    return lines


def _picture_lines(report: Report) -> list[str]:
    numbers, worst = report.picture_numbers(), report.worst
    if worst is None:
        return []
    psnr, ssim, decoder = numbers["psnr"], numbers["ssim"], numbers["decoder_psnr"]
    plan = report.comparisons[worst].plan
    prompt = plan.prompt if len(plan.prompt) <= 40 else plan.prompt[:37] + "..."
    return [
        f"INT8 against float, {len(report.comparisons)} pictures of calibration prompts, with new noise",
        f"  {'':14}{'mean':>11}{'worst':>11}",
        f"  {'PSNR':14}{decibels(psnr['mean']):>11}{decibels(psnr['worst']):>11}  seed {plan.seed}: {prompt}",
        f"  {'SSIM':14}{ssim['mean']:>11.4f}{ssim['worst']:>11.4f}",
        f"  {'PSNR, decoder':14}{decibels(decoder['mean']):>11}{decibels(decoder['worst']):>11}"
        "  both decoders on the float model's latent",
    ]


def _cost_lines(report: Report) -> list[str]:
    lines = [f"  {'':18}{'float':>12}{'INT8':>12}{'ratio':>9}"]
    for name, size in {**report.sizes, "weights, all": report.bytes}.items():
        lines.append(_row(name, megabytes(size.float), megabytes(size.int8), size.int8 / max(size.float, 1)))
    full, small = report.runs.get("float"), report.runs.get("int8")
    if full and small:
        if full.peak_memory and small.peak_memory:
            peaks = megabytes(full.peak_memory), megabytes(small.peak_memory)
            lines.append(_row("peak memory", *peaks, small.peak_memory / full.peak_memory))
        times = f"{full.seconds:.2f} s", f"{small.seconds:.2f} s"
        lines.append(_row("time per picture", *times, small.seconds / full.seconds))
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    return [*lines, f"  spent: {spent}"] if spent else lines


def _row(name: str, before: str, after: str, ratio: float) -> str:
    return f"  {name:18}{before:>12}{after:>12}{ratio:>9.2f}"
