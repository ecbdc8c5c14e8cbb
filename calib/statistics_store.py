"""Statistics of unfinished and finished observations in a folder, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana_edge.calib.statistics import Statistics
from sana_edge.errors import CheckpointError, SanaError
from sana_edge.system.atomic import check_writable

# of ``info``: names, and how far it is, do not change what an observation sees
_NOT_IDENTITY = ("model", "prompt_set", "observed")


class StatisticsStore:
    """One file for each identity: the weights, prompts and options in ``info`` decide its name.

    So an observation with other options begins anew, and going back to the first ones finds them again.

    Args:
        folder: made if it is missing.
        empty: statistics of nothing, with the layers and the ``info`` of what will be stored.
        note: is told of stored statistics that are used, or cannot be.

    Raises:
        SanaError: the folder cannot be written. It is tried at once, not after the first prompt.
    """

    def __init__(self, folder: Path, empty: Statistics, note: Callable[[str], None]) -> None:
        self._folder, self._empty, self._note = folder, empty, note
        identity = {key: value for key, value in empty.info.items() if key not in _NOT_IDENTITY}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"statistics-{digest[:16]}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SanaError(f"cannot make the folder {folder}: {error}", "choose another folder") from error
        check_writable(self.path)

    def load(self) -> Statistics:
        """What was stored before; the empty statistics if nothing was, or the file is damaged."""
        if not self.path.exists():
            others = len(list(self._folder.glob("statistics-*.safetensors")))
            if others:
                self._note(
                    f"observing anew: {others} stored statistics are of other weights, prompts or options, "
                    "and stay as they are"
                )
            return self._empty
        try:
            statistics = Statistics.load(self.path)
        except CheckpointError as error:
            # notes go into reports, which name no folder of this machine
            self._note(f"observing anew: {error}".replace(str(self.path), self.path.name))
            return self._empty
        if _shapes(statistics) != _shapes(self._empty):
            self._note(f"observing anew: {self.path.name} is of other layers")
            return self._empty
        observed = statistics.info.get("observed", 0)
        if type(observed) is not int or not 0 <= observed <= self._empty.info.get("prompts", 0):
            self._note(f"observing anew: {self.path.name} is damaged")
            return self._empty
        info: dict[str, Any] = {**self._empty.info, "observed": observed}
        statistics.info = info
        self._note(f"{info['observed']} of {info['prompts']} prompts were observed before")
        return statistics

    def save(self, statistics: Statistics) -> None:
        """Take the place of what was stored before; whole or not at all."""
        statistics.save(self.path)


def _shapes(statistics: Statistics) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.absmax.shape) for name, layer in statistics.layers.items()}
