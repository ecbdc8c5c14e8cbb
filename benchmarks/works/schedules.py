"""The kernels that stages of a picture start, recorded from the code that starts them, on the meta device.

Nothing is computed and no GPU is needed: the operations of the CUDA library are noted where they would start,
torch's own where they are dispatched.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sana_edge.int8 import matmul
from sana_edge.int8 import ops as int8_ops
from sana_edge.kernels.cuda import arguments, library
from sana_edge.kernels.cuda.operations import OPERATIONS

# kernels that an operation starts, where that is not one; tests/benchmarks/test_roofline.py asks the emulator
KERNELS = {"qk_norm_linear_attention": 2}
# operations of torch that give memory, or another view of it, which their schemas do not say
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}


@dataclass(frozen=True)
class Launch:
    """An operation, whatever the GPU.

    kernel: its name in sana_edge.h, or torch's with a point; numbers: of its struct; given: its optional
    tensors that are there; weights: bytes that no other launch made; maps: bytes of what others made, and of
    what it makes; multiplications: with their additions, of what ``kind``: "int8", "half" or "fp32".
    """

    kernel: str
    numbers: Mapping[str, int | float] = field(hash=False)
    given: frozenset[str]
    weights: int
    maps: int
    multiplications: int = 0
    kind: str = "fp32"

    @property
    def kernels(self) -> int:
        return KERNELS.get(self.kernel, 1)

    @property
    def recordable(self) -> bool:
        """Whether it is an operation of the library's."""
        return self.kernel in OPERATIONS


class _Library:
    """Stands where the CUDA library does."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def workspace(self, images: int, tokens: int, heads: int) -> int:
        # counters, and 33 x 32 sums of each head and 64 tokens
        return (1 << 16) + -(-tokens // 64) * images * heads * 33 * 32 * 4

    def call(self, operation: str, device: torch.device, **fields: Tensor | int | float | None) -> None:
        self._recorder.library_call(operation, fields)


class Recorder(TorchDispatchMode):
    """Notes what is started while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        # kept, lest another tensor take the place of one that is gone
        self._made: dict[int, object] = {}

    def settle(self) -> None:
        """What was made until now is there from now on, as weights are."""
        self._made.clear()

    def library_call(self, name: str, fields: Mapping[str, Tensor | int | float | None]) -> None:
        """An operation of sana_edge.h."""
        tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
        numbers = {k: v for k, v in fields.items() if isinstance(v, (int, float))}
        optional = {pointer.name for pointer in OPERATIONS[name].pointers if pointer.optional}
        weights, maps = self._bytes(value for key, value in tensors.items() if key != "workspace")
        self.launches.append(Launch(name, numbers, frozenset(optional & tensors.keys()), weights, maps))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = list(_tensors((args, kwargs or {}))), list(_tensors(out))
        aliases = (returned.alias_info for returned in func._schema.returns)
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and name not in _FREE:
            self._note(func, name.removeprefix("_"), inputs, outputs, args, kwargs or {}, out)
        for tensor in outputs:
            if not view:
                self._made[_storage(tensor)] = tensor.untyped_storage()
        return out

    def _note(
        self,
        func: Any,
        name: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        args: Any,
        named: Any,
        out: Any,
    ) -> None:
        if not any(tensor.is_meta for tensor in (*inputs, *outputs)):
            return
        # of a table only rows are read
        read = self._bytes(outputs if name.startswith("embedding") else inputs)
        written = sum(map(_size, outputs))
        count = flop_registry.get(func.overloadpacket)
        done = 0 if count is None else int(count(*args, **named, out_val=out)) // 2
        if name.startswith("int_mm"):
            done = args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        kind = (
            "int8" if name.startswith("int_mm") else "half" if inputs and inputs[0].itemsize == 2 else "fp32"
        )
        self.launches.append(Launch(f"torch.{name}", {}, frozenset(), read[0], read[1] + written, done, kind))

    def _bytes(self, tensors: Any) -> tuple[int, int]:
        """Of what no launch made, and of what one did."""
        weights = maps = 0
        for tensor in tensors:
            if _storage(tensor) in self._made:
                maps += _size(tensor)
            else:
                weights += _size(tensor)
        return weights, maps


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Notes all operations on tensors of the meta device inside; those of the backend "cuda" too."""
    recorder = Recorder()
    stand_in = _Library(recorder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(library, "load", lambda: stand_in))
        # as on a GPU: products of INT8, and autocast, which the meta device has none of
        stack.enter_context(mock.patch.object(matmul, "int8_refusal", lambda _: ""))
        stack.enter_context(mock.patch.object(int8_ops, "int8_refusal", lambda _: ""))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        arguments.plan.cache_clear()
        try:
            yield recorder
        finally:
            arguments.plan.cache_clear()


def recorded(run: Callable[[], object]) -> list[Launch]:
    """The launches of a function's second call: the first may make what stays."""
    with recording() as found:
        run()
        found.settle()
        first = len(found.launches)
        run()
    return found.launches[first:]


def launches(run: Callable[[], object]) -> dict[str, int]:
    """How many kernels the second call starts, by operation, most frequent first.

    Names of the library's begin with "sana_edge ", torch's with "torch "; those of torch that start several
    kernels count once.
    """
    found: Counter[str] = Counter()
    for one in recorded(run):
        name = f"sana_edge {one.kernel}" if one.recordable else one.kernel.replace(".", " ", 1)
        found[name] += one.kernels
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
