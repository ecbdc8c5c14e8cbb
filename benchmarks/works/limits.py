"""What a launch takes on a GPU: tensor cores, L2, DRAM, issue slots and the launch, each by itself, then all.

Products ask csrc/tile_times.h, which also chooses their tiles; what other kernels do stands here, one
function each. An operation that is not known here is priced by its bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sana_edge.kernels.cuda.library import Library
from sana_edge.kernels.cuda.tiles import Tile, TileTime, linear_tiles, time_tile
from works.gpus import DRAM, LATENCY, Gpu
from works.machine_code import Code
from works.schedules import Launch

LIMITS = ("tensor cores", "L2", "DRAM", "issue slots", "launch")
# FMAs in fp32 per clock and SM
_FP32 = 128
_SCHEDULERS = 4
Instructions = Mapping[str, Code]


@dataclass(frozen=True)
class Cost:
    """Seconds of one launch: of each limit alone, and of all together; tile: of a product."""

    limits: Mapping[str, float]
    total: float
    tile: TileTime | None = None

    @property
    def bound(self) -> str:
        """The limit that takes most."""
        return max(self.limits, key=lambda name: self.limits[name])


@dataclass(frozen=True)
class Grid:
    """Blocks of a kernel that is no product: warps of each, trips of their loop, and what follows from them.

    code: part of the kernel's mangled name; l2: bytes of all blocks where they are more than the tensors';
    resident: blocks on an SM; half: multiply-adds in 16 bit on tensor cores, of all; run: how much of what
    is outside of the loop rows of this length have work for, beyond 1 where that has loops as well.
    """

    code: str
    blocks: int
    warps: int
    trips: float = 1
    l2: int = 0
    resident: int = 2
    half: int = 0
    run: float = 1


def price(launch: Launch, gpu: Gpu, instructions: Instructions, library: Library | None) -> Cost:
    """A launch in a recorded schedule."""
    product = PRODUCTS.get(launch.kernel)
    if product is not None and library is not None:
        tail = _tail(launch, gpu, instructions) if launch.kernel == "w8a8_linear_quantize" else 0.0
        return _product(launch, product(launch, gpu, instructions, library), gpu, tail)
    grid = GRIDS[launch.kernel](launch, gpu) if launch.kernel in GRIDS else None
    return _other(launch, grid, gpu, instructions)


def four_norm(*limits: float) -> float:
    """As csrc/tile_times.h."""
    return math.sqrt(math.sqrt(sum(limit**4 for limit in limits)))


def dram_seconds(launch: Launch, gpu: Gpu) -> float:
    """Weights, and the share of the maps for which half of L2 is too small."""
    held = gpu.l2 * 1e6 / 2
    missing = max(0.0, 1 - held / launch.maps) if launch.maps else 0.0
    return (launch.weights + missing * launch.maps) / (DRAM * gpu.bandwidth * 1e9)


def _product(launch: Launch, time: TileTime, gpu: Gpu, tail: float) -> Cost:
    each = time.rounds / gpu.hertz
    dram = dram_seconds(launch, gpu)
    limits = {
        "tensor cores": each * time.products,
        "L2": each * time.l2,
        "DRAM": dram,
        "issue slots": each * time.epilogue + tail,
        "launch": gpu.gap(True),
    }
    return Cost(limits, four_norm(time.total / gpu.hertz, dram) + gpu.gap(True) + tail, time)


def _other(launch: Launch, grid: Grid | None, gpu: Gpu, instructions: Instructions) -> Cost:
    moved = max(launch.weights + launch.maps, grid.l2 if grid else 0)
    # of the SM that has most
    blocks = grid.blocks if grid else gpu.processors
    share = -(-blocks // gpu.processors) / blocks
    rate = {90: 28, 80: 32}.get(gpu.capability, 16)
    l2 = moved * share / rate / gpu.hertz
    issued = tensor = 0.0
    if grid is not None:
        code = next((code for name, code in instructions.items() if grid.code in name), None)
        resident = min(grid.resident, max(1, math.ceil(blocks / gpu.processors)))
        warps = resident * grid.warps / _SCHEDULERS
        each = 0.0 if code is None else code.issued(grid.trips, grid.run)
        work = blocks * share * grid.warps * each / _SCHEDULERS
        issued = work * (warps + 1) / warps / gpu.hertz
        tensor = grid.half * share / gpu.half / gpu.hertz
    elif launch.multiplications:
        rate = {"int8": 1024, "half": gpu.half, "fp32": _FP32}[launch.kind]
        tensor = launch.multiplications / (rate * gpu.processors * gpu.hertz)
    dram = dram_seconds(launch, gpu)
    gap = gpu.gap(launch.recordable)
    limits = {"tensor cores": tensor, "L2": l2, "DRAM": dram, "issue slots": issued, "launch": gap}
    waits = launch.kernels * (LATENCY / gpu.hertz + gap)
    return Cost(limits, four_norm(tensor, l2, dram, issued) + waits)


# ---- products ----


def _linear(launch: Launch, gpu: Gpu, instructions: Instructions, library: Library) -> TileTime:
    return linear_tiles(library, launch.numbers, launch.given, gpu.device)[0]


def _tail(launch: Launch, gpu: Gpu, instructions: Instructions) -> float:
    """Seconds of rows to INT8 behind a product: those of a norm's issue slots and L2, without its launch."""
    numbers = {key: launch.numbers[key] for key in ("rows", "columns")}
    moved = int(3 * numbers["rows"] * numbers["columns"])
    norm = Launch("norm_modulate_quantize", numbers, frozenset(), 0, moved)
    found = price(norm, gpu, instructions, None)
    return four_norm(found.limits["L2"], found.limits["issue slots"])


def _qkv(launch: Launch, gpu: Gpu, instructions: Instructions, library: Library) -> TileTime:
    """As csrc/qkv_linear_attention.cu chooses: of q 2 bytes leave, of k and v sums."""
    images, tokens, heads, depth = (int(launch.numbers[n]) for n in ("images", "tokens", "heads", "depth"))

    def count(side: int) -> int:
        keys = -(-heads // (side // 64))
        return -(-tokens // side) * images * (keys + -(-heads * 32 // side))

    side = 64 if count(128) < 96 else 128
    warps, stages = 2, 4 if side == 64 else 3
    code = _epilogue(instructions, rf"qkv_linear\w+I8BFloat164TileILi{side}", side * side // 128)
    tile = Tile(count(side), side, side, depth, warps, warps, stages, code, 1)
    return time_tile(library, tile, gpu.device)


def _conv(launch: Launch, gpu: Gpu, instructions: Instructions, library: Library) -> TileTime:
    """As csrc/w8a8_conv2d.cu chooses; a launch has all four corners of an upsampling."""
    n = {key: int(launch.numbers[key]) for key in ("images", "height", "width", "depth", "columns", "kernel")}
    pixels = n["images"] * n["height"] * n["width"]
    corners = 4 if launch.numbers["upsample"] else 1
    columns, normed = n["columns"], "norm_weight" in launch.given
    wide = -(-pixels // 128) * -(-columns // 128) * corners
    if columns <= 32:
        shape = (128, 32, 4, 1, 4)
    elif normed and columns > 128:
        shape = (64, 256, 1, 4, 2)
    elif columns <= 64 or (not normed and wide <= gpu.processors):
        shape = (128, 64, 2, 2, 4)
    else:
        shape = (128, 128, 2, 2, 3)
    rows, width, down, across, stages = shape
    count = -(-pixels // rows) * -(-columns // width) * corners
    moved = (1 if "out_scale" in launch.given else 2) + 2 * bool({"residual", "shortcut"} & launch.given)
    moved += "next_scale" in launch.given
    code = _epilogue(instructions, f"conv2d_kernel.*Li{rows}ELi{width}", rows * width // (32 * down * across))
    depth = n["kernel"] ** 2 * n["depth"]
    tile = Tile(count, rows, width, depth, down, across, stages, code, moved)
    return time_tile(library, tile, gpu.device)


def _epilogue(instructions: Instructions, name: str, results: int) -> int:
    """Instructions of a warp for 32 of its results, behind the sums; results: of a thread."""
    code = next((code for kernel, code in instructions.items() if re.search(name, kernel)), None)
    return 12 if code is None else max(1, round(code.issued(0) / results))


PRODUCTS: dict[str, Callable[[Launch, Gpu, Instructions, Library], TileTime]] = {
    "w8a8_linear": _linear,
    "w8a8_linear_quantize": _linear,
    "qkv_linear_attention": _qkv,
    "w8a8_conv2d": _conv,
}


# ---- the others ----


def _norm(launch: Launch, gpu: Gpu) -> Grid:
    rows, columns = int(launch.numbers["rows"]), int(launch.numbers["columns"])
    # 8 warps; a row takes as many as have 1280 columns
    each = next(n for n in (1, 2, 4, 8) if columns <= n * 1280)
    return Grid(f"norm_modulate_quantize_kernelI8BFloat16Li{each}E", -(-rows * each // 8), 8, resident=4)


def _rows(launch: Launch, gpu: Gpu) -> Grid:
    rows, columns = int(launch.numbers["rows"]), int(launch.numbers["columns"])
    # a lane has up to 4 groups of 16 numbers
    each = 1 if columns <= 2048 else 8
    run = -(-columns // (512 * each)) / 4
    return Grid(f"quantize_rows_kernelI8BFloat16Li{32 * each}E", -(-rows * each // 8), 8, resident=4, run=run)


def _finish(launch: Launch, gpu: Gpu) -> Grid:
    """As csrc/linear_attention_finish.cu chooses: every block reads the state, as much as 44 tokens."""
    images, tokens, heads = (int(launch.numbers[name]) for name in ("images", "tokens", "heads"))
    warps, state = 12, heads * 33 * 32 * 4

    def blocks(of: int) -> int:
        return images * -(-tokens // of)

    def moved(of: int) -> int:
        return -(-blocks(of) // gpu.processors) * (44 + of)

    large = 32 * ((heads * 32 + 8) * 2 + (warps + 2) * 4) <= gpu.shared << 10 and moved(32) <= moved(16)
    each = 32 if large else 16
    kind = f"Lb{int('roots' in launch.given)}ELi{each}E"
    read = launch.maps + blocks(each) * state
    # q times 8 columns for each of the state's, and of its sums of keys, in both halves
    half = blocks(each) * each * heads * 32 * (2 * 32 + 8)
    # q and outputs pass in smaller loops, which are a third of what is outside of the large one
    run = max(1.0, heads * each / 576)
    code = f"linear_attention_finish_kernelI8BFloat16{kind}"
    return Grid(code, blocks(each), warps, heads / warps, read, 1, half, run)


def _cross(launch: Launch, gpu: Gpu) -> Grid:
    """Keys and values of the prompt's tokens are read by every block of 16 tokens."""
    n = {key: int(launch.numbers[key]) for key in ("prompts", "tokens", "heads", "head_dim")}
    width, keys = n["heads"] * n["head_dim"], 60
    blocks, trips = n["prompts"] * -(-n["tokens"] // 16), -(-keys // 16)
    each = 1 if n["head_dim"] <= 72 else 2
    read = blocks * 2 * keys * width * 2 + n["prompts"] * n["tokens"] * width * 3
    code = f"cross_attention_kernelI8BFloat16Li{-(-n['head_dim'] // 8)}E"
    half = 2 * n["prompts"] * n["tokens"] * keys * width
    return Grid(code, blocks, n["heads"] // each, trips, read, 1, half)


def _depthwise(launch: Launch, gpu: Gpu) -> Grid:
    """Patches of 4 x 4 pixels, which read 6 x 6 and all taps."""
    n = {key: int(launch.numbers[key]) for key in ("images", "height", "width", "hidden")}
    blocks = n["images"] * -(-n["height"] // 4) * -(-n["width"] // 4)
    # pixels and taps of 2 bytes, a bias of 4
    read = blocks * 2 * n["hidden"] * (36 * 2 + 9 * 2 + 4)
    written = n["images"] * n["height"] * n["width"] * n["hidden"]
    code = "dwconv_glu_quantize_kernelI8BFloat16Li4E"
    return Grid(code, blocks, 16, n["hidden"] / 1024, read + written, 1)


GRIDS: dict[str, Callable[[Launch, Gpu], Grid]] = {
    "norm_modulate_quantize": _norm,
    "quantize_rows": _rows,
    "linear_attention_finish": _finish,
    "cross_attention_quantize": _cross,
    "dwconv_glu_quantize": _depthwise,
}
