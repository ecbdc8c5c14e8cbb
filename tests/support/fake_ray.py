"""Ray in one process: actors whose calls happen when they are waited for, and that die when told to."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from sana_edge.request.loading import LoadOptions


class RayError(Exception):
    pass


class Promise:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call


class Actor:
    def __init__(self, ray: FakeRay, make: Callable[[], Any]) -> None:
        self.ray, self.made, self.dead = ray, None, False
        self._make = make

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Promise:
            return Promise(lambda: self._call(name, arguments))

        return types.SimpleNamespace(remote=remote)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if self.dead:
            raise RayError("The actor is dead.\nmore")
        if self.made is None:
            self.made = self._make()
        self.ray.calls += 1
        if self.ray.dies(self.ray.calls):
            self.dead = True
            raise RayError("The actor died: SIGKILL.\nmore")
        return getattr(self.made, name)(*arguments)


class FakeRay:
    """Stands in for the module.

    Args:
        dies: whether the call of that number, from 1, kills its actor.
        resources: of the cluster.
    """

    exceptions = types.SimpleNamespace(RayError=RayError)

    def __init__(self, dies: Callable[[int], bool] = lambda call: False, **resources: float) -> None:
        self.dies, self.resources = dies, resources or {"CPU": 4.0}
        self.calls = 0
        self.actors: list[Actor] = []
        self.asked: dict[str, Any] = {}
        self.started: dict[str, Any] | None = None
        self.options: list[LoadOptions] = []

    def is_initialized(self) -> bool:
        return self.started is not None

    def init(self, **options: Any) -> None:
        self.started = options

    def shutdown(self) -> None:
        self.started = None

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, kind: Any) -> Any:
        def make(model: str, options: LoadOptions, *more: Any) -> Actor:
            self.options.append(options)
            self.actors.append(Actor(self, lambda: kind(model, options, *more)))
            return self.actors[-1]

        def with_options(**asked: Any) -> Any:
            self.asked = asked
            return types.SimpleNamespace(remote=make)

        return types.SimpleNamespace(options=with_options)

    def wait(self, promises: Sequence[Promise], **_: Any) -> tuple[list[Promise], list[Promise]]:
        # the newest first: no order may be counted on
        return [promises[-1]], list(promises[:-1])

    def get(self, promise: Promise) -> Any:
        return promise.call()

    def kill(self, actor: Actor) -> None:
        actor.dead = True
