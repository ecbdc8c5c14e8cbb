"""Instructions of kernels, read from the machine code of a built CUDA library with cuobjdump."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sana_edge.errors import UnsupportedDevice

# of one warp: special functions and their kind take a scheduler's unit for 8 clocks, 16 lanes in an SM
SPECIAL, SPECIAL_CLOCKS = ("MUFU", "F2I", "I2F.", "F2F"), 8
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Code:
    """Instructions of a kernel, each once: ``outside`` and inside of its main ``loop``, which is the one that
    multiplies INT8 or, if none does, the largest; ``products`` are INT8 multiplications of a warp in it."""

    outside: int
    loop: int
    products: int = 0
    special_outside: int = 0
    special_loop: int = 0

    def issued(self, trips: float, run: float = 1) -> float:
        """Clocks of a scheduler for a warp whose loop runs so often, and of what is outside a share."""
        plain = run * self.outside + trips * self.loop
        special = SPECIAL_CLOCKS * (run * self.special_outside + trips * self.special_loop)
        return max(plain, special)

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def kernels(library: Path, architecture: int) -> dict[str, Code]:
    """Every kernel of a library by its mangled name.

    Raises:
        UnsupportedDevice: there is no cuobjdump, or the library has no code for the architecture.
    """
    command = [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {short(name): code_of(text) for name, text in functions(done.stdout)}
    if not found:
        raise UnsupportedDevice(
            f"{library.name} has no machine code for {architecture / 10}",
            f"SANA_EDGE_CUDA_ARCHS={architecture} python csrc/compile.py --output FILE",
        )
    return found


def short(name: str) -> str:
    """A kernel's name without what its file's compilation adds."""
    return re.sub(r"^_ZN\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}\d+", "", name)


def cuobjdump() -> str:
    """The toolkit's, or the one that Triton carries."""
    found = shutil.which("cuobjdump")
    triton = None if found else importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None:
        raise UnsupportedDevice("there is no cuobjdump", "install the CUDA toolkit, or triton")
    return found


def functions(text: str) -> Iterator[tuple[str, str]]:
    """Names and lines of the kernels in what cuobjdump says."""
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def code_of(text: str) -> Code:
    """The instructions of one kernel."""
    lines = [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(text)]
    # a jump to itself pads the end
    end = next(
        (n for n, (at, name, rest) in enumerate(lines) if name == "BRA" and _jump(rest) == at), len(lines)
    )
    lines = [line for line in lines[:end] if line[1] != "NOP"]
    loops = [
        (target, at)
        for at, name, rest in lines
        if name.startswith("BRA") and (target := _jump(rest)) is not None and target < at
    ]
    inside = [[line for line in lines if first <= line[0] <= last] for first, last in loops]
    multiplying = [loop for loop in inside if _count(loop, "IMMA")]
    # of loops around each other the inner one
    main = min(multiplying, key=len) if multiplying else max(inside, key=len, default=[])
    if not multiplying and inside:
        main = max(_innermost(inside), key=len)
    special = _count(main, *SPECIAL)
    return Code(
        len(lines) - len(main), len(main), _count(main, "IMMA"), _count(lines, *SPECIAL) - special, special
    )


def _innermost(loops: list[list[tuple[int, str, str]]]) -> list[list[tuple[int, str, str]]]:
    spans = [(loop[0][0], loop[-1][0]) for loop in loops]
    return [
        loop
        for loop, (first, last) in zip(loops, spans, strict=True)
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]


def _jump(rest: str) -> int | None:
    found = _TARGET.findall(rest)
    return int(found[-1], 16) if found else None


def _count(lines: list[tuple[int, str, str]], *names: str) -> int:
    return sum(name.startswith(names) for _, name, _ in lines)


def read(facts: Mapping[str, Mapping[str, int]]) -> dict[str, Code]:
    """What `Code.facts` gave."""
    return {name: Code(**numbers) for name, numbers in facts.items()}
