"""How fast a model draws, and so how long a job will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from sana_edge.request.bounds import DEFAULT_STRENGTH
from sana_edge.request.request import Request

# sizes that are remembered
_MOST = 256

_Key = tuple[tuple[int, int] | None, bool, bool, float | None]


@dataclass(frozen=True)
class _Known:
    """``taken`` of ``steps``: an image leaves some out."""

    steps: int
    taken: int
    step_seconds: float
    decode_seconds: float


class Pace:
    """Seconds of a step and of a decode at each size that a model has drawn."""

    def __init__(self) -> None:
        self._known: dict[_Key, _Known] = {}

    def learn(self, request: Request, steps: int, taken: int, timings: Mapping[str, float]) -> None:
        """Take the times of a finished picture, those of `sana_edge.Image`, and how many steps it took."""
        key = _key(request)
        self._known.pop(key, None)
        if len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        self._known[key] = _Known(steps, taken, timings["denoise"] / taken, timings["decode"])

    def seconds(self, request: Request) -> float | None:
        """How long a request will take from its first step; None at a size that was never drawn."""
        known = self._known.get(_key(request))
        if known is None:
            return None
        steps = (request.steps or known.steps) * known.taken / known.steps
        return request.images * (steps * known.step_seconds + known.decode_seconds)

    def clock(self, request: Request) -> Clock:
        """A clock that starts now."""
        return Clock(self._known.get(_key(request)))


class Clock:
    """The time that is left of one job, from what is known and from its own steps so far."""

    def __init__(self, known: _Known | None) -> None:
        self._known = known
        self._start: float | None = None

    def left(self, done: int, total: int, pictures: int) -> float | None:
        """Seconds until ``pictures`` more are decoded, after ``done`` of ``total`` steps."""
        now = time.perf_counter()
        if self._known is not None:
            return (total - done) * self._known.step_seconds + pictures * self._known.decode_seconds
        if self._start is None:
            # the first step has the reading of the prompt in it
            self._start = now
            return None
        return (total - done) * (now - self._start) / (done - 1)


def _key(request: Request) -> _Key:
    guided = request.guidance is None or request.guidance > 1
    share = None if request.image is None else request.strength or DEFAULT_STRENGTH
    return request.size, request.exact_size, guided, share
