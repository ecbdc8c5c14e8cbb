"""The report as one picture: its numbers, the layers, the steps, and pairs of pictures side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sana_edge.calib.report import canvas as c
from sana_edge.calib.report.canvas import Canvas
from sana_edge.calib.report.report import (
    BLOCK_LAYERS,
    Layer,
    Report,
    block_grid,
    decibels,
    decoder_stages,
    megabytes,
)
from sana_edge.calib.trajectory import Comparison

WIDTH, MARGIN = 1600, 48
HEADER, TILES, CHARTS_TITLE = 112, 132, 52
ROW, MOST_ROWS = 26, 30

# of a chart with its title, legend and axis; what it has to be at least
CHART_FRAME, CHART = 136, 200

# pairs in the contact sheet, two in a row; each is float, INT8 and their difference
MOST_PAIRS = 12
AMPLIFIED = 8
_GAP = 6
_PAIR = (WIDTH - 3 * MARGIN) // 2
_CAPTION = 62


def draw(report: Report) -> bytes:
    """The report as PNG; parts that were not measured are left out."""
    grid, stages = block_grid(report.layers), decoder_stages(report.layers)
    left = (min(len(grid), MOST_ROWS) + 1) * ROW
    right = len(stages) * ROW + (CHART_FRAME + CHART if report.comparisons else 0)
    fields = max(left, right)
    charts = CHARTS_TITLE + fields + 56
    pairs = _shown(report)
    sheet = _sheet_height(pairs)
    page = Canvas(WIDTH, HEADER + TILES + charts + sheet + 22 * len(report.notes) + 24)
    page.text((MARGIN, 36), f"{report.model} in INT8", 34)
    page.text((MARGIN, 82), report.subtitle(), 17, c.SOFT)
    _tiles(page, HEADER + 8, report)
    top, middle = HEADER + TILES, WIDTH // 2 + MARGIN // 2
    _blocks(page, (MARGIN, top), fields, grid, report.calibrated)
    _decoder(page, (middle, top), stages)
    if report.comparisons:
        taken = len(stages) * ROW
        _errors(page, (middle, top + CHARTS_TITLE + taken + 34), fields - taken - CHART_FRAME, report)
    _sheet(page, top + charts, pairs)
    for n, note in enumerate(report.notes):
        page.text((MARGIN, top + charts + sheet + 22 * n), f"note: {note}", 14, c.SOFT)
    return page.png()


def _tiles(page: Canvas, top: float, report: Report) -> None:
    """The numbers that matter most, in a row."""
    tiles = list(_headline(report))
    width = min((WIDTH - 2 * MARGIN - 16 * (len(tiles) - 1)) / len(tiles), 280)
    for n, (value, name, detail) in enumerate(tiles):
        x = MARGIN + n * (width + 16)
        page.box((x, top), (width, TILES - 32), fill=(244, 246, 250))
        page.text((x + 16, top + 14), name, 14, c.SOFT)
        page.text((x + 16, top + 34), value, 28)
        page.text((x + 16, top + 74), detail, 13, c.SOFT)


def _headline(report: Report) -> list[tuple[str, str, str]]:
    tiles = []
    numbers = report.picture_numbers()
    if numbers:
        psnr, ssim = numbers["psnr"], numbers["ssim"]
        tiles.append((decibels(psnr["mean"]), "PSNR, mean", f"worst {decibels(psnr['worst'])}"))
        tiles.append((f"{ssim['mean']:.4f}", "SSIM, mean", f"worst {ssim['worst']:.4f}"))
        errors = [step["velocity_error"] for step in report.steps()]
        detail = f"largest step {100 * max(errors):.2f} %"
        tiles.append((f"{100 * statistics.fmean(errors):.2f} %", "velocity error, mean", detail))
    size = report.bytes
    tiles.append((megabytes(size.int8), "weights", f"of {megabytes(size.float)} float"))
    full, small = report.runs.get("float"), report.runs.get("int8")
    if full and small:
        if full.peak_memory and small.peak_memory:
            detail = f"of {megabytes(full.peak_memory)} float"
            tiles.append((megabytes(small.peak_memory), "peak memory", detail))
        tiles.append((f"{small.seconds:.2f} s", "time per picture", f"{full.seconds:.2f} s float"))
    kept = sum(layer.kept for layer in report.layers)
    tiles.append((str(kept), "layers in 16 bit", f"of {len(report.layers)}"))
    return tiles


def _blocks(
    page: Canvas, at: c.Point, height: float, grid: Sequence[dict[str, Layer]], calibrated: bool
) -> None:
    """The denoiser's layers in so many pixels: a row for each block, a column for each kind."""
    x, y = at
    shown = grid[:MOST_ROWS]
    high = min((height - ROW) / max(len(shown), 1), 2 * ROW)
    what = "output" if calibrated else "weight"
    page.text((x, y), f"Denoiser: SQNR of each layer's {what}, dB", 19)
    left, width = x + 70, (WIDTH / 2 - MARGIN * 1.5 - 70) / len(BLOCK_LAYERS)
    y += CHARTS_TITLE
    for n, name in enumerate(BLOCK_LAYERS):
        page.text((left + (n + 0.5) * width, y + ROW - 8), name, 14, c.SOFT, "ms")
    for row, layers in enumerate(shown):
        above = y + ROW + row * high
        page.text((left - 12, above + high / 2), f"block {row}", 13, c.SOFT, "rm")
        for n, name in enumerate(BLOCK_LAYERS):
            if name in layers:
                _cell(page, (left + n * width, above), (width, high), layers[name])
    end = y + ROW + len(shown) * high
    more = f"{len(grid) - MOST_ROWS} more blocks are in report.json; " if len(grid) > MOST_ROWS else ""
    page.text(
        (left, end + 8),
        f"{more}framed layers stay in 16 bit: alone they change the velocity most",
        13,
        c.SOFT,
    )


def _cell(page: Canvas, at: c.Point, size: c.Point, layer: Layer) -> None:
    inner = (at[0] + 1, at[1] + 1), (size[0] - 2, size[1] - 2)
    page.box(*inner, fill=c.ramp(layer.sqnr), outline=c.INK if layer.kept else None, width=2)
    text = "exact" if math.isinf(layer.sqnr) else f"{layer.sqnr:.1f}"
    page.text((at[0] + size[0] / 2, at[1] + size[1] / 2), text, 13, c.INK, "mm")


def _decoder(page: Canvas, at: c.Point, stages: dict[str, list[Layer]]) -> None:
    """The decoder's layers: a row for each stage, a field for each layer."""
    x, y = at
    page.text((x, y), "Decoder: its layers in the order of computation, dB", 19)
    left = x + 84
    most = max((len(members) for members in stages.values()), default=1)
    width = min((WIDTH - MARGIN - left) / most, 72.0)
    y += CHARTS_TITLE
    for row, (name, members) in enumerate(stages.items()):
        above = y + row * ROW
        page.text((left - 12, above + ROW / 2), name, 13, c.SOFT, "rm")
        for n, layer in enumerate(members):
            _cell(page, (left + n * width, above), (width, ROW), layer)


def _errors(page: Canvas, at: c.Point, height: float, report: Report) -> None:
    """Velocity error of each step, and how the latent's error grows; axes of so many pixels."""
    x, y = at
    page.text((x, y), "Relative L2 error by step", 19)
    steps = report.steps()
    curves = (
        ("velocity, on the float model's latent", c.BLUE, [step["velocity_error"] for step in steps]),
        ("latent, each model on its own way", c.ORANGE, [step["latent_error"] for step in steps]),
    )
    legend = x
    for name, colour, _ in curves:
        page.line([(legend, y + 40), (legend + 26, y + 40)], colour, 3)
        page.text((legend + 34, y + 40), name, 14, c.SOFT, "lm")
        legend += 34 + c.text_width(name, 14) + 30
    left, top, width = x + 62, y + 62, WIDTH - MARGIN - x - 74
    peak = max(max(values) for _, _, values in curves) or 1e-9
    unit = _tick(peak / 4)
    limit = unit * math.ceil(peak / unit * 1.02)
    for n in range(round(limit / unit) + 1):
        level = top + height - height * n * unit / limit
        page.line([(left, level), (left + width, level)])
        page.text((left - 10, level), f"{100 * n * unit:.3g} %", 13, c.SOFT, "rm")
    places = [left + width * (i + 0.5) / len(steps) for i in range(len(steps))]
    for i in range(0, len(steps), max(1, len(steps) // 10)):
        page.text((places[i], top + height + 8), str(i + 1), 13, c.SOFT, "ma")
    page.text((left + width / 2, top + height + 28), "denoising step", 13, c.SOFT, "ma")
    for _, colour, values in curves:
        points = [
            (place, top + height - height * value / limit)
            for place, value in zip(places, values, strict=True)
        ]
        page.line(points, colour, 2.5)
        for point in points:
            page.dot(point, 3.5, colour)


def _tick(least: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _shown(report: Report) -> list[tuple[Comparison, bool]]:
    """The pairs of the contact sheet, each with whether it is the worst; that comes first."""
    if report.worst is None:
        return []
    rest = [pair for i, pair in enumerate(report.comparisons) if i != report.worst]
    return [(report.comparisons[report.worst], True), *((pair, False) for pair in rest)][:MOST_PAIRS]


def _picture_size(comparison: Comparison) -> tuple[int, int]:
    height, width = comparison.picture.shape[:2]
    side = (_PAIR - 2 * _GAP) // 3
    return side, round(side * height / width)


def _sheet_height(pairs: Sequence[tuple[Comparison, bool]]) -> int:
    if not pairs:
        return 0
    return 52 + -(-len(pairs) // 2) * (_picture_size(pairs[0][0])[1] + _CAPTION + 14)


def _sheet(page: Canvas, top: float, pairs: Sequence[tuple[Comparison, bool]]) -> None:
    """Pairs of pictures from the same noise."""
    if not pairs:
        return
    title = f"Pairs from the same seeds: float, INT8, their difference times {AMPLIFIED}"
    page.text((MARGIN, top), title, 19)
    row = _picture_size(pairs[0][0])[1] + _CAPTION + 14
    for n, (comparison, worst) in enumerate(pairs):
        _pair(page, (MARGIN + n % 2 * (_PAIR + MARGIN), top + 42 + n // 2 * row), comparison, worst)


def _pair(page: Canvas, at: c.Point, comparison: Comparison, worst: bool) -> None:
    x, y = at
    width, height = size = _picture_size(comparison)
    distance = np.abs(comparison.picture.astype(np.int16) - comparison.reference)
    amplified = (distance * AMPLIFIED).clip(0, 255).astype(np.uint8)
    for n, pixels in enumerate((comparison.reference, comparison.picture, amplified)):
        page.paste(Image.fromarray(pixels), (x + n * (width + _GAP), y), size)
    if worst:
        page.box((x - 5, y - 5), (3 * width + 2 * _GAP + 10, height + 10), outline=c.RED, width=3)
    numbers = f"PSNR {decibels(comparison.psnr)}, SSIM {comparison.ssim:.4f}, seed {comparison.plan.seed}"
    if worst:
        numbers = f"worst: {numbers}"
    page.text((x, y + height + 12), numbers, 15, c.RED if worst else c.INK)
    for n, line in enumerate(c.wrapped(comparison.plan.prompt, 13, _PAIR, 1)):
        page.text((x, y + height + 34 + 18 * n), line, 13, c.SOFT)
