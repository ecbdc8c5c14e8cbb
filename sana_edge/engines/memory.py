"""The memory that a picture of the exported graphs takes, as far as it is known before they run."""

from __future__ import annotations

from sana_edge.engines.engine import EngineKind
from sana_edge.engines.sessions import Graphs
from sana_edge.engines.text import KnownText
from sana_edge.errors import OutOfMemory
from sana_edge.plan.memory import Stage, Work, check_smallest, engine_stages, fit_hint, in_turn
from sana_edge.prompt import texts_of
from sana_edge.request.plan import Plan
from sana_edge.store.manifest import Manifest
from sana_edge.system.budget import within
from sana_edge.system.memory import available_memory, used_memory


class Memory:
    """Of the process, for the graphs of a folder.

    What engines take besides is not known before they run: they map weights from files, hold them in
    another precision, and share buffers among maps.

    Args:
        known: texts that need no text encoder; None without a cache.
    """

    def __init__(self, graphs: Graphs, known: KnownText | None) -> None:
        self._graphs, self._known = graphs, known

    def free(self) -> int | None:
        """Bytes that engines may take now; None where nobody knows."""
        return self._graphs.free(available_memory())

    def stages(self, plan: Plan) -> list[Stage]:
        """What a picture's stages take."""
        described, kind = self._graphs.described, self._graphs.kind
        cell = described.cell
        work = Work(plan.height // cell, plan.width // cell, plan.guided, plan.tile, plan.init is not None)
        return engine_stages(described, work, kind.name, kind.precision)

    def check(self, plan: Plan) -> None:
        """See that a picture's pixels fit, and within a limit all of it; computes nothing.

        Raises:
            OutOfMemory: not even the decoded picture would fit.
        """
        # RGB in fp32, and before and after rounding
        needed, free = 2 * 3 * 4 * plan.width * plan.height, available_memory()
        kind = self._graphs.kind
        if kind.settings.memory is not None and kind.device == "cpu":
            stages, there = self.stages(plan), self._graphs.loaded
            known = self._known is not None and self._known.have(texts_of(plan))
            used = [stage for stage in stages if not (known and stage.name == "text")]
            free, needed = self._graphs.free(free), in_turn(used, tiles=plan.tile != 0)
            if free is not None:
                free += sum(s.weights for s in stages if any(name.startswith(s.name) for name in there))
        if free is not None and needed > free:
            asked = f"{plan.width}x{plan.height}"
            raise OutOfMemory(
                f"{asked} needs more than {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                fit_hint(free + (used_memory() or 0)),
                needed=needed,
                free=free,
            )


def check_limit(described: Manifest, kind: EngineKind) -> None:
    """Raise `OutOfMemory` where not even the smallest picture fits into the engines' limit."""
    memory = kind.settings.memory
    if memory is not None and kind.device == "cpu":
        smallest = engine_stages(described, Work(1, 1, guided=False), kind.name, kind.precision)
        check_smallest(described.name, smallest, within(available_memory(), memory), memory)
