"""A budget of memory: how people write it, and what it leaves of what is free."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sana_edge.errors import InvalidInput
from sana_edge.system.memory import used_memory

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "b": 1, "bytes": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_WRITTEN = re.compile(r"\+?(\d{1,20})([.,]\d+)?\s*([a-z]*)")
_HINT = "give a whole number with its unit, such as 8GB, 7500MB or 8GiB"
# no process with a network in it is smaller
_LEAST = 1_000_000
_MOST = 1 << 50


def parse_memory(value: Any) -> int:
    """Bytes of a number of bytes, or of a text such as "8GB", "8 GiB" or "7500MB".

    Raises:
        InvalidInput: another text, a fraction, 0, or more than there can be.
    """
    text = str(value).strip().lower() if not isinstance(value, bool) else repr(value)
    match = _WRITTEN.fullmatch(text)
    if match is None or match[3] not in _UNITS:
        raise InvalidInput(f"memory is {str(value)[:40]!r}", _HINT)
    number, fraction, unit = match.groups()
    if fraction:
        # "1.5gb" as people mean it
        bytes_ = float(f"{number}.{fraction[1:]}") * _UNITS[unit]
        hint = f"{_HINT}: that is {round(bytes_ / 1e6)}MB" if 1e6 <= bytes_ < _MOST else _HINT
        raise InvalidInput(f"memory is {str(value)[:40]!r}, a fraction", hint)
    count = int(number) * _UNITS[unit]
    if not _LEAST <= count <= _MOST:
        what = "more than any machine has" if count > _MOST else "less than any model takes"
        raise InvalidInput(f"memory is {str(value)[:40]!r}, {what}", _HINT)
    return count


def within(free: int | None, limit: int | None, device: torch.device | None = None) -> int | None:
    """What is left of ``free`` bytes where this process may take ``limit`` in all; None: unknown, unlimited.

    On a CPU, which no device stands for too, its resident memory counts, on CUDA its tensors.
    """
    used = None if limit is None else used_memory(device)
    if limit is None or used is None:
        return free
    left = max(limit - used, 0)
    return left if free is None else min(free, left)
