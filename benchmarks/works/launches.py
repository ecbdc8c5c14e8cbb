"""What a GPU would be told to start, counted without one: everything runs on torch's meta device.

Nothing is computed there, so that networks of any size take seconds, and what depends on the device chooses
what it would on a GPU. A call of the CUDA library is a launch, and so is an operation of torch, but for views
and for memory that is only allocated; those of torch that start several kernels count once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sana_edge.kernels.cuda import library

META = torch.device("meta")
# of the library's operations that launch more than one kernel
KERNELS = {"qk_norm_linear_attention": 2}
# they give memory, or another view of it, which their schemas do not say
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}


@dataclass
class Counted:
    """A library in the place of the CUDA one, for tensors on the meta device."""

    launches: Counter[str] = field(default_factory=Counter)
    device_type: str = "meta"

    def call(self, operation: str, device: torch.device, **fields: Any) -> None:
        """`Library.call`, but nothing is done."""
        self.launches[f"sana_edge {operation}"] += KERNELS.get(operation, 1)

    def workspace(self, images: int, tokens: int, heads: int) -> int:
        """`Library.workspace`: any size."""
        return 16


class _Operations(TorchDispatchMode):
    """Adds torch's operations to what is counted."""

    def __init__(self, launches: Counter[str]) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        views = any(found.alias_info is not None and not found.alias_info.is_write for found in returned)
        name = func._schema.name.removeprefix("aten::")
        if not views and name not in _FREE:
            self._launches[f"torch {name}"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Inside the CUDA library is there, and what would be started is counted by name."""
    counted = Counted()
    library_there = mock.patch.object(library, "load", lambda: counted)
    # which the meta device has none of
    no_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext())
    with library_there, no_autocast, _Operations(counted.launches):
        yield counted.launches


def launches(run: Callable[[], Tensor]) -> dict[str, int]:
    """What a call on the meta device starts, most frequent first: its second call, which makes nothing."""
    with torch.no_grad(), counting() as found:
        run()
        found.clear()
        run()
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
