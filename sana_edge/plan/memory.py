"""The memory of each stage of a picture, and how the stages fit into what a process may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.decoding import DEFAULT_TILE
from sana_edge.errors import OutOfMemory
from sana_edge.plan import layers, maps
from sana_edge.plan.model import Facts
from sana_edge.store.manifest import DecoderPart, Manifest
from sana_edge.store.tiny_autoencoder import DecoderConfig
from sana_edge.system.instructions import lacks_int8
from sana_edge.system.memory import HINT, shown

ITEMS = {"fp32": 4, "bf16": 2, "fp16": 2}
# A denoising step in units of its token stream, by the bytes of a value: what was measured.
_TOKEN_COPIES = {4: 7, 2: 12}
# tokens of the instruction and a usual prompt
TEXT_TOKENS = 300
# What libraries take before a model is loaded: resident memory of a process that has imported them, on Linux.
BASE = {"torch": 440_000_000, "onnxruntime": 75_000_000, "openvino": 150_000_000, "tensorrt": 400_000_000}
# What they take besides once they compute: threads, generated code, buffers that they keep.
RUNNING = {"torch": 50_000_000, "onnxruntime": 32_000_000, "openvino": 175_000_000, "tensorrt": 100_000_000}
# an engine's memory for a byte of its graph's file: OpenVINO keeps the file's weights and its own layout
_HELD = {"onnxruntime": 1.2, "openvino": 2.2, "tensorrt": 1.2}
# the same of INT8 graphs where the CPU has no INT8 products: OpenVINO's own are in fp32 then
_HELD_WIDE = 3.8

# where INT8 is convolved in fp32: strips of maps that are padded, widened and convolved
_WIDE_STRIPS = 32 << 20
# the least that maps of an engine's strips take
_STRIP_BYTES = 256 << 20
# alive for each pixel in the public decoder
_VALUES = 640

Order = Literal["together", "in turn", "in turn, in tiles"]


@dataclass(frozen=True)
class Stage:
    """A network in memory, in bytes.

    Attributes:
        weights: while it is loaded.
        loading: the most while it is being loaded, without what ``weights`` are of it.
        working: the most of a picture.
        least: the same in the smallest pieces that it can work in.
    """

    name: str
    weights: int
    loading: int
    working: int
    least: int

    @property
    def peak(self) -> int:
        return self.weights + max(self.loading, self.working)


@dataclass(frozen=True)
class Work:
    """What of a picture decides its memory: sides in latent cells, a second prediction, an image.

    ``tile`` is that of `sana_edge.request.plan.Plan`, ``count`` how many go through the denoiser together.
    """

    height: int
    width: int
    guided: bool
    tile: int | None = None
    image: bool = False
    count: int = 1


def torch_stages(
    facts: Facts, work: Work, dtype: str, text_dtype: str | None = None, *, int8: bool, host: bool = True
) -> list[Stage]:
    """The stages of a model that torch runs, in the order of their work.

    Args:
        dtype: short name of the denoiser's, never "auto".
        text_dtype: of the text encoder, where it is another than the decoder's.
        int8: a package, or made INT8 while it is loaded.
        host: on a CPU, where weights can stay mapped from their files.
    """
    item, other = ITEMS[dtype], 4 if dtype == "fp32" else 2
    packed = {name: stored.int8 for name, stored in facts.stored.items()}
    # a package's other parts may be float
    read = other if text_dtype is None else ITEMS[text_dtype]
    found = [_network(facts, "text", read, int8 or packed["text"], host)]
    # activations of the widest layer for all tokens, three of them, beside the token stream
    text = TEXT_TOKENS * (3 * facts.text["intermediate_size"] + 8 * facts.text["hidden_size"]) * 4
    found[0] = dataclasses.replace(found[0], working=text, least=text)
    if work.image and facts.encoder is not None:
        weights = layers.weight_bytes(facts.layers["encoder"], other, int8=int8 or packed["decoder"])
        found.append(_encoding(facts.encoder, work, other, weights))
    denoiser = _network(facts, "denoiser", item, int8 or packed["denoiser"], host)
    steps = denoising_bytes(facts.denoiser, work, item)
    found.append(dataclasses.replace(denoiser, working=steps, least=steps))
    decoder = _network(facts, "decoder", other, int8 or packed["decoder"], host)
    # sums of INT8 layers are INT32
    wide = 4 if int8 or packed["decoder"] else other
    whole, least = decoding_bytes(facts.decoder, work, wide, int8=int8 or packed["decoder"])
    if host and (int8 or packed["decoder"]) and lacks_int8():
        # a layer's weight in fp32, and as a library orders it
        largest = max(layer.weights * layer.folded for layer in facts.layers["decoder"] if layer.int8)
        extra = int(8 * largest) + _WIDE_STRIPS
        whole, least = whole + extra, least + extra
    return [*found, dataclasses.replace(decoder, working=whole, least=least)]


def denoising_bytes(config: DenoiserConfig, work: Work, item: int) -> int:
    """Of a step, and the text that it reads."""
    inner = config.num_cross_attention_heads * config.cross_attention_head_dim
    tokens = work.height * work.width * (2 if work.guided else 1)
    each = tokens * config.dim * _TOKEN_COPIES[item] + 2 * config.num_layers * inner * TEXT_TOKENS
    return work.count * each * item


def decoding_bytes(
    config: DecoderConfig, work: Work, item: int, *, int8: bool = False, whole_maps: bool = False
) -> tuple[int, int]:
    """Of a decode at once where no tile was asked for, and of one in tiles where they are not forbidden."""
    cell = config.spatial_compression
    pixels = config.in_channels * work.height * work.width * cell**2 * item

    def peak(side: int) -> int:
        height, width = min(work.height, side), min(work.width, side)
        return pixels + maps.decode_bytes(config, height, width, item, int8=int8, whole_maps=whole_maps)

    longest = max(work.height, work.width)
    if work.tile:
        return (peak(work.tile // cell),) * 2
    return peak(longest), peak(longest if work.tile == 0 else min(longest, DEFAULT_TILE // cell))


def engine_stages(described: Manifest, work: Work, engine: str, precision: str) -> list[Stage]:
    """The stages of an exported folder: what engines take is known from runs, not from their insides."""
    # (layers, 1, heads, d, L)
    *_, heads, channels, _ = described.graphs["text_projection"].outputs["keys"][1]
    sizes: dict[str, int] = {
        name: read_bytes(described, name, engine)
        for name in ("text_encoder", "encoder", "denoiser", "decoder")
        if name in described.graphs
    }
    return _engine_stages(
        sizes,
        work,
        engine,
        precision,
        text=described.text.channels,
        dim=int(heads) * int(channels),
        cell=described.cell,
        parts=described.decoder_parts,
        int8=described.quantization is not None,
    )


def exported_stages(facts: Facts, work: Work, engine: str, *, int8: bool) -> list[Stage]:
    """`engine_stages` of a model that was not exported yet, in fp32 or INT8."""
    found = {name: layers.weight_bytes(facts.layers[name], 4, int8=int8) for name in facts.layers}
    sizes = {"text_encoder" if name == "text" else name: size for name, size in found.items()}
    return _engine_stages(
        sizes,
        work,
        engine,
        "fp32",
        text=facts.text["hidden_size"],
        dim=facts.denoiser.dim,
        cell=facts.decoder.spatial_compression,
        parts=(),
        int8=int8,
    )


def _engine_stages(
    sizes: Mapping[str, int],
    work: Work,
    engine: str,
    precision: str,
    *,
    text: int,
    dim: int,
    cell: int,
    parts: Sequence[DecoderPart],
    int8: bool,
) -> list[Stage]:
    """Of graphs that read so many bytes, by name."""
    values = 4 if precision == "fp32" else 3
    wide = engine == "openvino" and int8 and lacks_int8()
    cells, pixels = work.height * work.width, work.height * work.width * cell**2

    def stage(name: str, working: int, least: int | None = None) -> Stage:
        held = int(sizes[name] * (_HELD_WIDE if wide else _HELD[engine]))
        return Stage(name.partition("_")[0], held, 0, working, working if least is None else least)

    steps = cells * (2 if work.guided else 1) * dim * _TOKEN_COPIES[4] * 4
    picture, each = 2 * 3 * 4 * pixels, pixel_bytes(parts, cell, values)
    whole = picture + each * pixels
    head = values * parts[0].values * cells if parts else whole
    tile = picture + each * DEFAULT_TILE**2
    strips = picture + max(head, _STRIP_BYTES) if parts else tile
    encoding = [stage("encoder", whole, min(whole, tile))] if work.image and "encoder" in sizes else []
    return [
        stage("text_encoder", TEXT_TOKENS * text * 16 * 4),
        *encoding,
        stage("denoiser", steps),
        stage("decoder", whole, min(whole, strips)),
    ]


def graph_bytes(described: Manifest, name: str) -> int:
    """What a graph's file and the weights of its own name take on disk.

    Those that read another graph's weights have none of that name: text_projection and denoiser_folded,
    which read denoiser.data, and the decoder's parts. Of them it is the graph's file alone.
    """
    stem = described.graphs[name].file.removesuffix(".onnx")
    return sum(file.bytes for path, file in described.files.items() if path.partition(".")[0] == stem)


def read_bytes(described: Manifest, name: str, engine: str) -> int:
    """`graph_bytes` without what OpenVINO leaves in the file: of an embedding table it reads rows there."""
    left = described.text_table_bytes if (name, engine) == ("text_encoder", "openvino") else 0
    return graph_bytes(described, name) - left


def pixel_bytes(parts: Sequence[DecoderPart], cell: int, value_bytes: int) -> int:
    """Bytes alive at the peak of a whole decode, for each pixel; the DC-AE's where no part says it."""
    found, rows = 0, 1
    for part in parts:
        found, rows = max(found, part.values * rows**2), rows * part.scale
    return value_bytes * -(-(found or _VALUES * cell**2) // cell**2)


def together(stages: Sequence[Stage]) -> int:
    """The peak of stages that are loaded one after the other and all stay."""
    held, most = 0, 0
    for stage in stages:
        most = max(most, held + stage.weights + stage.loading)
        held += stage.weights
    return max(most, held + max(stage.working for stage in stages))


def in_turn(stages: Sequence[Stage], *, tiles: bool = False) -> int:
    """The peak where each is loaded when it is needed, and freed."""
    return max(s.weights + max(s.loading, s.least if tiles else s.working) for s in stages)


def order(stages: Sequence[Stage], free: int | None) -> tuple[Order, int] | None:
    """How stages fit into so many bytes, the fastest way that does, and its peak; None: in none."""
    ways: tuple[tuple[Order, int], ...] = (
        ("together", together(stages)),
        ("in turn", in_turn(stages)),
        ("in turn, in tiles", in_turn(stages, tiles=True)),
    )
    return next((way for way in ways if free is None or way[1] <= free), None)


def fitting_dtypes(facts: Facts, dtype: str, *, int8: bool, free: int | None) -> tuple[str, str]:
    """What a CPU computes in, and what its text encoder does: ``dtype``, or bf16 where that has no room.

    Of bf16 weights, for a usual picture. Without instructions for bf16 that is slow: so the text encoder
    alone, which is the largest and works once a picture, and all only where that is not enough.
    """
    if dtype != "fp32" or facts.stored["denoiser"].dtype != "bf16":
        return dtype, dtype
    cells = facts.denoiser.sample_size
    work = Work(cells, cells, facts.sampler != "scm")
    ways = (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))
    fitting = (way for way in ways if order(torch_stages(facts, work, way[0], way[1], int8=int8), free))
    return next(fitting, ways[0])


def fit_hint(free: int) -> str:
    """What to do where a picture does not fit."""
    return f"{HINT}; `sana-edge plan MODEL --memory {max(free // 1_000_000, 1)}MB` says what would fit"


def check_smallest(name: str, stages: Sequence[Stage], free: int | None, memory: int) -> None:
    """Raise `OutOfMemory` where a picture's stages do not fit into what is left of a budget."""
    needed = in_turn(stages, tiles=True)
    if free is not None and needed > free:
        largest = max(stages, key=lambda stage: stage.peak)
        raise OutOfMemory(
            f"{name} needs {shown(needed)} for its {largest.name} alone, {shown(free)} of {shown(memory)} are"
            " left",
            fit_hint(memory),
            needed=needed,
            free=free,
        )


def _network(facts: Facts, name: str, item: int, int8: bool, host: bool) -> Stage:
    """Its weights, and what loading takes beside them: the file's pages, while they are converted."""
    stored = facts.stored[name]
    weights = layers.weight_bytes(facts.layers[name], item, int8=int8)
    if int8:
        # tensors are mapped one by one
        largest = max(layer.weights for layer in facts.layers[name])
        return Stage(name, weights, 2 * largest, 0, 0)
    kept = item == ITEMS[stored.dtype] and host
    used = layers.count(facts.layers[name]) * ITEMS[stored.dtype]
    return Stage(name, weights, 0 if kept else used, 0, 0)


def _encoding(config: AutoencoderConfig, work: Work, item: int, weights: int) -> Stage:
    whole = maps.encode_bytes(config, work.height, work.width, item)
    rows, columns = (side * config.spatial_compression for side in (work.height, work.width))
    strip = maps.front_bytes(config, min(rows, 256), columns, item)
    strip += maps.middle_bytes(config, rows, columns, item)
    least = max(maps.back_bytes(config, rows, columns, item), strip)
    return Stage("encoder", weights, weights, whole, min(whole, least))
