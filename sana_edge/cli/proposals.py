"""What `sana-edge plan` proposes where a picture does not fit, or not as a whole; each is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sana_edge.config import LATENT_CELL, AutoencoderConfig
from sana_edge.plan.memory import Stage, Work, engine_stages, exported_stages, in_turn, order, torch_stages
from sana_edge.plan.model import Facts
from sana_edge.request.loading import LoadOptions
from sana_edge.request.plan import Plan
from sana_edge.store.manifest import Manifest

# sides in pixels that are proposed in place of one that does not fit
_SIDES = (1024, 768, 512, 256)


@dataclass(frozen=True)
class Proposal:
    """Options that make a picture fit, and the bytes that it then takes at its peak."""

    options: str
    why: str
    peak: int


@dataclass(frozen=True)
class Ask:
    """What was asked for, to be asked again with one thing changed."""

    facts: Facts
    plan: Plan
    dtype: str
    int8: bool
    host: bool
    image: bool
    options: LoadOptions

    def stages(self, **changed: Any) -> list[Stage]:
        ask = dataclasses.replace(self, **changed)
        work = work_of(ask.plan, ask.image)
        return torch_stages(ask.facts, work, dtype=ask.dtype, int8=ask.int8, host=ask.host)


def proposals_of(ask: Ask, room: int) -> Iterator[Proposal]:
    """Changes with which a picture fits, each computed; the ones that cost least quality first."""
    changes: list[tuple[str, str, dict[str, Any]]] = []
    if not ask.int8:
        changes.append(("--int8", "INT8 weights and activations", {"int8": True}))
    if ask.dtype == "fp32":
        changes.append(("--dtype bf16", "16 bit, slow on CPUs without it", {"dtype": "bf16"}))
    lite = _with_lite(ask)
    if lite is not None:
        changes.append(("--decoder dc-ae-lite", "a smaller decoder", {"facts": lite}))
    if ask.plan.tile != 512:
        tiled = dataclasses.replace(ask.plan, tile=512)
        changes.append(("--tile 512", "decoded in tiles, which change pixels a little", {"plan": tiled}))
    pairs = [
        (f"{a} {b}", f"{x}; {y}", {**one, **two})
        for n, (a, x, one) in enumerate(changes)
        for b, y, two in changes[n + 1 :]
    ]
    found = list(_fitting(ask, changes, room)) or list(_fitting(ask, pairs, room))[:2]
    yield from found
    if ask.host:
        for engine, int8 in (("openvino", True), ("onnxruntime", True)):
            stages = exported_stages(ask.facts, work_of(ask.plan, ask.image), engine, int8=int8)
            way = order(stages, room)
            if way is not None:
                why = "an export, which needs no torch"
                yield Proposal(f"export --int8, then --backend {engine}", why, way[1])
                break
    if not found and order(ask.stages(), room) is None:
        yield from smaller(ask.plan, lambda plan: in_turn(ask.stages(plan=plan, int8=True), tiles=True), room)


def _fitting(ask: Ask, changes: Sequence[tuple[str, str, dict[str, Any]]], room: int) -> Iterator[Proposal]:
    before = order(ask.stages(), room)
    for options, why, changed in changes:
        way = order(ask.stages(**changed), room)
        # where it fits already, only what lets it stay in memory
        if way is not None and (before is None or (way[0] == "together" and before[0] != "together")):
            yield Proposal(options, why, way[1])


def _with_lite(ask: Ask) -> Facts | None:
    """The same model with the smaller decoder, where that decodes its latents."""
    decoder = ask.facts.decoder
    if ask.options.decoder is not None or not isinstance(decoder, AutoencoderConfig):
        return None
    if decoder.decoder_block_out_channels != AutoencoderConfig().decoder_block_out_channels:
        return None
    from sana_edge.plan.model import with_lite_decoder

    return with_lite_decoder(ask.facts)


def smaller(plan: Plan, least: Any, room: int) -> Iterator[Proposal]:
    """The largest of some usual sizes that fits."""
    for side in _SIDES:
        if side * side < plan.width * plan.height:
            needed = least(dataclasses.replace(plan, width=side, height=side, size=(side, side)))
            if needed <= room:
                yield Proposal(f"--size {side}x{side} --exact-size", "a smaller picture", needed)
                return


def least_of(described: Manifest, plan: Plan, kind: Any, image: bool) -> int:
    return in_turn(engine_stages(described, work_of(plan, image), kind.name, kind.precision), tiles=True)


def work_of(plan: Plan, image: bool) -> Work:
    height, width = plan.height // LATENT_CELL, plan.width // LATENT_CELL
    return Work(height, width, plan.guided, plan.tile, image or plan.init is not None)
