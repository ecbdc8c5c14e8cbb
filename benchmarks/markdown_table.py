"""Parts of Markdown tables, and the line below them that says where numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def heading(titles: Sequence[str]) -> list[str]:
    """A Markdown table's first two rows."""
    return [line(titles), line(["---"] * len(titles))]


def line(cells: Iterable[object]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def circumstances(data: Mapping[str, Any]) -> str:
    """Command, machine, commit and date on one line."""
    machine = data["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    commit = (data["commit"]["hash"] or "unknown")[:10]
    return f"`{data['command']}` at commit {commit}, {where}, {data['date'][:10]}.  "


def interval(score: Mapping[str, Any]) -> str:
    """A score's interval in words."""
    low, high = score["interval_95"]
    return f"{low:.3f} to {high:.3f}"
