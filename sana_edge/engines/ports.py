"""What engines share: checks of what goes into a graph, shapes of what comes out, the words of failures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.store.manifest import DAMAGED, FILE, REMAKE, Port, export_command
from sana_edge.system.memory import is_memory, out_of_memory
from sana_edge.system.regular import open_regular

Arrays = Mapping[str, NDArray[Any]]

# a side that may have any length
ANY = "?"

# lines that say where in an engine's source an error was raised, not what it is
_PLACES = ("exception from src/", "check '", 'check "', "frontend api failed", "loading input model")


def check_inputs(graph: str, inputs: Arrays, ports: Mapping[str, Port]) -> dict[str, int]:
    """The lengths of the sides that have a name, from arrays that a graph can take.

    Args:
        graph: its name, for messages.
        ports: dtype and shape of every input, with names, numbers and `ANY`.

    Raises:
        InvalidInput: a name, dtype or shape that the graph does not have, or one name with two lengths.
    """
    wanted, given = ", ".join(ports), ", ".join(inputs)
    for name in ports.keys() - inputs.keys():
        raise InvalidInput(f"{graph} has no input for {name}", f"give all of {wanted}; given were {given}")
    for name in inputs.keys() - ports.keys():
        raise InvalidInput(f"{graph} has no input {name}", f"it takes {wanted}")
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in ports.items():
        array = inputs[name]
        if array.dtype != np.dtype(dtype):
            raise InvalidInput(f"{graph}: {name} is {array.dtype}", f"give {dtype}")
        before = dict(sizes)
        fits = len(shape) == array.ndim
        for side, length in zip(shape, array.shape, strict=False):
            expected = (
                length if side == ANY else sizes.setdefault(side, length) if isinstance(side, str) else side
            )
            fits = fits and length == expected
        if not fits:
            where = ", ".join(f"{side} = {length}" for side, length in before.items() if side in shape)
            hint = f"give {written(shape)}" + (f" with {where}, as in what comes before" if where else "")
            raise InvalidInput(f"{graph}: {name} is {written(array.shape)}", hint)
    return sizes


def check_graph(path: Path, declared: Mapping[str, Port] | None, found: Mapping[str, Port]) -> None:
    """See that a graph has the inputs, or outputs, that its folder's manifest says.

    Raises:
        CheckpointError: it has others; it is another graph.
    """
    if declared is None:
        return
    for name in declared.keys() | found.keys():
        wanted, there = declared.get(name), found.get(name)
        if wanted is None or there is None or wanted[0] != there[0] or not _same(wanted[1], there[1]):
            said = ("none" if port is None else f"{port[0]} {written(port[1])}" for port in (there, wanted))
            found_and_wanted = f", {FILE} says ".join(said)
            raise CheckpointError(f"{path} is another graph: its {name} is {found_and_wanted}", DAMAGED)


def _same(wanted: tuple[int | str, ...], found: tuple[int | str, ...]) -> bool:
    """Whether two shapes may be one; engines know not all sides by the names that were exported."""
    sides = zip(wanted, found, strict=False)
    known = ((a, b) for a, b in sides if isinstance(a, int) and isinstance(b, int))
    return len(wanted) == len(found) and all(a == b for a, b in known)


def known_shape(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """A shape in numbers, such as ("B", 3, "32h") where B and h are known; None where a side is not."""
    sides = []
    for side in shape:
        if isinstance(side, str):
            factor = side[: len(side) - len(side.lstrip("0123456789"))]
            name = side[len(factor) :].lstrip("*")
            if name not in sizes:
                return None
            side = int(factor or 1) * sizes[name]
        sides.append(side)
    return tuple(sides)


def written(shape: tuple[int | str, ...]) -> str:
    """As in (1, 32, h, w)."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def check_file(path: Path) -> None:
    """That a graph's file can be opened and is not empty, which not every engine notices.

    Raises:
        CheckpointError: it cannot, or it is empty.
    """
    try:
        with open_regular(path) as file:
            empty = not file.read(1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", DAMAGED) from error
    if empty:
        raise CheckpointError(f"{path} is empty", DAMAGED)


def load_failure(path: Path, engine: str, error: Exception) -> SanaError:
    """What to raise where an engine cannot load a graph: memory, an operation it lacks, or damage."""
    text, reason = str(error).lower(), said(error)
    if is_memory(error):
        weights = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}*.data"))
        what = f"{path.name} in {engine}"
        return out_of_memory(what, error, needed=weights or None, hint="close other programs")
    if "external" in text or "data_length" in text:
        hint = f"the file of its weights, {path.stem}*.data, is missing or incomplete; {DAMAGED}"
        return CheckpointError(f"{engine} cannot load the weights of {path}: {reason}", hint)
    if "could not find an implementation" in text or "not_implemented" in text:
        hint = f"`{export_command(dtype='fp32')}`, or use another engine"
        return CheckpointError(f"{engine} cannot compute {path.name} in its dtype: {reason}", hint)
    if any(words in text for words in ("no op registered", "no conversion rule", "opset version")):
        hint = f"export again with this version of sana-edge, {REMAKE}, or install a newer {engine}"
        return CheckpointError(f"{engine} does not know an operation of {path.name}: {reason}", hint)
    return CheckpointError(f"{engine} cannot load {path}: {reason}", DAMAGED)


def run_failure(graph: str, engine: str, sizes: Mapping[str, int], error: Exception) -> SanaError:
    """What to raise where a loaded graph does not run."""
    where = ", ".join(f"{name} = {length}" for name, length in sizes.items())
    what = f"{graph} with {where}" if where else graph
    if is_memory(error):
        return out_of_memory(f"{what} in {engine}", error)
    return SanaError(f"{engine} failed in {what}: {said(error)}", "try another --backend, or report this")


def said(error: Exception) -> str:
    """The first line of an engine's error that says something, at most 200 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.lower().startswith(_PLACES)]
    line = next(iter(telling or lines), type(error).__name__)
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x failed:Protobuf parsing failed."
    line = line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line
    return line if len(line) <= 200 else f"{line[:197]}..."
