"""A training's state on disk: model, average and optimizers as safetensors, read within bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors import safe_open
from torch import Tensor

from sana_edge.errors import CheckpointError, SanaError
from sana_edge.system.json_values import Between, Reader, parse
from sana_edge.system.memory import is_memory

STATE = "state.safetensors"
_DAMAGED = "put back a copy of it, or remove it to begin anew"
_AMOUNT = Between(0, 1 << 48)


@dataclass(frozen=True)
class Spent:
    """What has been used of a budget."""

    step: Annotated[int, _AMOUNT]
    seconds: Annotated[float, _AMOUNT]


@dataclass(frozen=True)
class State:
    """A state as `Loop.save` writes it.

    Attributes:
        mean: of the loss, NaN where there is none yet.
        scaler: of fp16's gradients.
        tensors: by "ema.NAME", "model.NAME" and "optimizerN.INDEX.NAME".
    """

    spent: Spent
    mean: float
    scaler: dict[str, Any] | None
    tensors: dict[str, Tensor]


def read_state(file: Path) -> State:
    """Read a state; call it inside of `damage_named`."""
    with safe_open(file, "pt") as opened:
        numbers: Mapping[str, str] = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    spent = {"step": int(numbers["step"]), "seconds": float(numbers["seconds"])}
    scaler = parse(numbers["scaler"]) if "scaler" in numbers else None
    known: Spent = Reader(str(file), _DAMAGED).convert(spent, Spent)
    return State(known, float(numbers.get("mean", "nan")), scaler, tensors)


def ema_state(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a training folder; the last ones where no average was kept.

    Raises:
        CheckpointError: the state cannot be read.
    """
    with damage_named(folder / STATE), safe_open(folder / STATE, "pt") as file:
        names = list(file.keys())
        kind = "ema." if any(name.startswith("ema.") for name in names) else "model."
        return {name.removeprefix(kind): file.get_tensor(name) for name in names if name.startswith(kind)}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Turn what damaged bytes raise in libraries into one error.

    Raises:
        CheckpointError: that one, or it is no regular file.
    """
    try:
        # a pipe would wait for its writer
        if not file.is_file():
            raise CheckpointError(f"{file} is no regular file", _DAMAGED)
        yield
    except SanaError:
        raise
    # the file's reader, torch and its optimizers raise whatever they meet first
    except Exception as error:
        if is_memory(error):
            raise
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"cannot go on from {file}: {reason}", _DAMAGED) from error
