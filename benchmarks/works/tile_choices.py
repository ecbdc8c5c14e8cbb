"""The tiles of every INT8 product of SANA's denoisers on every GPU, with the predicted time of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sana_edge.bench.shapes import DENOISERS
from sana_edge.config import LATENT_CELL, DenoiserConfig
from sana_edge.kernels.cuda.library import Library
from sana_edge.kernels.cuda.tiles import NAMES, TileTime, linear_tiles
from works.gpus import Gpu

SIDES = (512, 1024, 2048, 4096)
SHAPES = ("0.6b", "1.6b")
# what counting before L2 and epilogues were in it gave a byte, in products
_BALANCE = {86: 16, 89: 16, 90: 40, 120: 16}


def products(config: DenoiserConfig, side: int) -> dict[str, tuple[dict[str, int | float], frozenset[str]]]:
    """Numbers and tensors of each `w8a8_linear` of a guided step for one picture."""
    tokens, dim = (side // LATENT_CELL) ** 2, config.dim
    inner = config.num_cross_attention_heads * config.cross_attention_head_dim
    both, one = 2 * tokens, tokens
    made = frozenset(("bias", "residual"))
    return {
        "out": ({"rows": both, "columns": dim, "depth": dim, "limit": 65504.0}, made | {"gate", "constant"}),
        "cross_q": ({"rows": one, "columns": inner, "depth": dim}, frozenset({"bias"})),
        "cross_out": ({"rows": one, "columns": dim, "depth": inner}, made),
        "expand": (
            {"rows": both, "columns": 2 * config.ffn_dim, "depth": dim, "silu": 1},
            frozenset({"bias"}),
        ),
        "project": ({"rows": both, "columns": dim, "depth": config.ffn_dim}, frozenset({"gate", "residual"})),
    }


def choices(library: Library, gpus: Sequence[Gpu], sides: Sequence[int] = SIDES) -> Iterator[dict[str, Any]]:
    """Each choice as JSON values: ``us`` of every tile, the chosen first; ``before`` what was chosen once."""
    for shapes in SHAPES:
        for side in sides:
            for name, (numbers, given) in products(DENOISERS[shapes], side).items():
                for gpu in gpus:
                    found = linear_tiles(library, numbers, given, gpu.device)
                    us = {NAMES[tile.tile]: round(tile.total / gpu.clock / 1e3, 2) for tile in found}
                    size = "x".join(str(numbers[key]) for key in ("rows", "columns", "depth"))
                    yield {
                        "shapes": shapes,
                        "side": side,
                        "product": name,
                        "size": size,
                        "gpu": gpu.name,
                        "tile": NAMES[found[0].tile],
                        "us": us,
                        "before": before(found, numbers, gpu),
                    }


def before(found: Sequence[TileTime], numbers: dict[str, int | float], gpu: Gpu) -> str:
    """The choice of counting rounds, products, and bytes of 64 a clock: no L2, no epilogue."""

    def cost(tile: TileTime) -> int:
        balance = _BALANCE[gpu.capability]
        count = -(-int(numbers["rows"]) // tile.rows) * -(-int(numbers["columns"]) // tile.columns)
        down = 4 if tile.rows == 256 else 2
        busy = max(tile.rows * tile.columns, (2 * tile.rows + down * tile.columns) * balance // 2)
        return -(-count // gpu.processors) * (busy + balance * (tile.rows + tile.columns))

    return NAMES[min(sorted(found, key=lambda tile: tile.tile), key=cost).tile]
