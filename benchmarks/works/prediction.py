"""A picture's time on a GPU, from the recorded schedules of its stages and the limits of their kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sana_edge.kernels.cuda import tiles
from sana_edge.kernels.cuda.library import Library
from works.gpus import GRAPH, HOST, SYNCHRONISATION, Gpu
from works.limits import LIMITS, Cost, Instructions, price
from works.schedules import Launch

STAGES = ("text", "context", "step", "decode")


@dataclass(frozen=True)
class Schedule:
    """The launches of a stage, and those around it.

    graph: it is recorded, and starts with one call of the host; queued: the host is ahead of the GPU, which
    does not wait for it; times: how often a picture runs it.
    """

    launches: Sequence[Launch]
    around: Sequence[Launch] = ()
    graph: bool = False
    queued: bool = False
    times: int = 1

    @property
    def kernels(self) -> int:
        return sum(launch.kernels for launch in self.launches)

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        names = Counter(launch.kernel for launch in self.launches)
        return {
            "kernels": self.kernels,
            "around": sum(launch.kernels for launch in self.around),
            "graph": self.graph,
            "queued": self.queued,
            "times": self.times,
            "operations": dict(sorted(names.items())),
        }


@dataclass(frozen=True)
class Predictor:
    """A GPU, its kernels' instructions, and the library that times tiles; equal launches are priced once."""

    gpu: Gpu
    instructions: Instructions
    library: Library

    def costs(self, launches: Sequence[Launch]) -> Iterator[tuple[Launch, int, Cost]]:
        """Each kind of launch, how often it is there, and what one takes."""
        for launch, count in Counter(launches).items():
            yield launch, count, price(launch, self.gpu, self.instructions, self.library)

    def seconds(self, schedule: Schedule) -> tuple[float, float]:
        """Of a stage in a picture: the GPU's or, where it is longer, the host's; and what it waits."""
        launches = [*schedule.launches, *schedule.around]
        device = sum(count * cost.total for _, count, cost in self.costs(launches))
        host = GRAPH if schedule.graph else HOST * len(schedule.launches)
        host += HOST * len(schedule.around)
        waits = 0.0 if schedule.queued else SYNCHRONISATION
        return schedule.times * max(device, host), schedule.times * waits

    def rows(self, stage: str, schedule: Schedule) -> list[dict[str, Any]]:
        """The kernels of a stage with their limits in microseconds, as JSON values, the costliest first."""
        found = [
            {
                "stage": stage,
                "kernel": launch.kernel,
                "size": size_of(launch),
                "count": count,
                "us": round(cost.total * 1e6, 2),
                **{name: round(cost.limits[name] * 1e6, 2) for name in LIMITS},
                "bound": cost.bound,
                "tile": tiles.NAMES.get(cost.tile.tile) if cost.tile else None,
            }
            for launch, count, cost in self.costs(schedule.launches)
        ]
        return sorted(found, key=lambda row: -row["count"] * row["us"])


def picture(predictor: Predictor, schedules: Mapping[str, Schedule]) -> dict[str, float]:
    """Seconds by stage, of waiting between them, of all, and of a picture whose prompt was read before."""
    parts: dict[str, float] = {}
    waits = 0.0
    for name, schedule in schedules.items():
        parts[name], waited = predictor.seconds(schedule)
        waits += waited
    parts["waits"] = waits
    whole = sum(parts.values())
    return {**parts, "picture": whole, "again": whole - parts.get("text", 0.0)}


def size_of(launch: Launch) -> str:
    """As `works.kernel_cases` writes sizes, for the kernels of a step."""
    n = launch.numbers
    if launch.kernel in ("w8a8_linear", "w8a8_linear_quantize"):
        return f"{n['rows']}x{n['columns']}x{n['depth']}"
    if launch.kernel == "qkv_linear_attention":
        return f"{n['images'] * n['tokens']}x{3 * 32 * n['heads']}x{n['depth']}"
    if launch.kernel in ("norm_modulate_quantize", "quantize_rows"):
        return f"{n['rows']}x{n['columns']}"
    if launch.kernel == "linear_attention_finish":
        return f"{n['images'] * n['tokens']}x{32 * n['heads']}"
    if launch.kernel == "cross_attention_quantize":
        return f"{n['prompts'] * n['tokens']}x{n['heads'] * n['head_dim']}, 60 keys"
    if launch.kernel == "dwconv_glu_quantize":
        return f"{n['images'] * n['height'] * n['width']}x{2 * n['hidden']}"
    if launch.kernel == "w8a8_conv2d":
        return f"{n['height']}x{n['width']}x{n['depth']} to {n['columns']}, {n['kernel']}x{n['kernel']}"
    return f"{(launch.weights + launch.maps) / 1e6:.2f} MB"
