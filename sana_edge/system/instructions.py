"""The CPU's instructions that decide how fast INT8 and 16 bit are."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# the products of INT8 and of bf16: on x86, then on ARM
INT8_PRODUCTS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")
INSTRUCTIONS = ("avx2", "avx512f", *INT8_PRODUCTS, *BF16_PRODUCTS)
_APPLE = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}


def instructions() -> set[str] | None:
    """Those of `INSTRUCTIONS` that the CPU has; None where nobody tells. Of torch too, where it is loaded."""
    told = getattr(getattr(sys.modules.get("torch"), "cpu", None), "get_capabilities", dict[str, bool])()
    words = {name for name, there in told.items() if there is True}
    words |= _apple() if sys.platform == "darwin" else set()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
        words |= set(listed[1].split() if listed else ())
    return words & set(INSTRUCTIONS) if words else None


def lacks_int8() -> bool:
    """Whether the CPU is known to have no INT8 products."""
    known = instructions()
    return known is not None and known.isdisjoint(INT8_PRODUCTS)


def _apple() -> set[str]:
    said = ""
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(
            ["sysctl", "hw.optional.arm"], capture_output=True, text=True, timeout=5, check=True
        ).stdout
    there = {line.partition(":")[0].rpartition(".")[2] for line in said.splitlines() if line.endswith(": 1")}
    return {"neon", *(word for name, word in _APPLE.items() if name in there)}
