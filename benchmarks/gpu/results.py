"""What `gpu_check` found: a JSON file that is whole after every step, and the summary of ten lines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sana_edge.bench.results import write_json

TAIL_LINES = 40
TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Outcome:
    """A step that ran, or did not.

    status: "passed", "failed", "timeout", "interrupted" or "skipped"; seconds: that it took, limit: that it
    had, estimate: that it was expected to take; figure: the one that matters, or the reason; figures: all
    that it measured, as its script wrote them; tail: the end of its log where it did not pass.
    """

    name: str
    status: str
    seconds: float
    limit: float
    estimate: float
    figure: str
    figures: Any = None
    tail: list[str] = field(default_factory=list)


class Results:
    """One file for all calls on a GPU and day: a call has its circumstances and its steps.

    Args:
        path: is written anew after each step.
        earlier: a file of earlier calls, which this one continues.
    """

    def __init__(self, path: Path, call: Mapping[str, Any], earlier: Path | None = None) -> None:
        self.path = path
        self.steps: list[Outcome] = []
        self._call = dict(call)
        self._earlier = _calls(earlier) if earlier is not None and earlier.exists() else []

    def add(self, outcome: Outcome) -> None:
        self.steps.append(outcome)
        self.write()

    def write(self) -> None:
        call = {**self._call, "steps": [asdict(step) for step in self.steps]}
        write_json(self.path, {"calls": [*self._earlier, call]})

    def summary(self) -> str:
        """One line for each step."""
        width = max((len(step.name) for step in self.steps), default=0)
        lines = [
            f"{step.name:{width}}  {step.status:11}  {step.seconds:5.0f} s  {step.figure}"
            for step in self.steps
        ]
        total = sum(step.seconds for step in self.steps)
        passed = sum(step.status == "passed" for step in self.steps)
        return "\n".join([*lines, f"{passed} of {len(self.steps)} passed, {total:.0f} s"])

    @property
    def passed(self) -> bool:
        """Whether something ran and nothing failed; what did not fit into the time did not fail."""
        statuses = {step.status for step in self.steps}
        return "passed" in statuses and statuses <= {"passed", "skipped"}


def _calls(path: Path) -> list[Any]:
    """Earlier calls; a file that is damaged is left alone, since those minutes cannot be had again."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["calls"])
    except (ValueError, KeyError, TypeError) as error:
        kept = path.with_suffix(".damaged.json")
        path.replace(kept)
        print(f"{path.name} cannot be read ({error}): kept as {kept.name}", file=sys.stderr)
        return []


def tail(log: Path, folders: Sequence[Path]) -> list[str]:
    """The last lines of a log, without folders of this machine."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        # a step may have printed without end
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        text = file.read().decode(errors="replace")
    lines = without_folders(text, folders).splitlines()[-TAIL_LINES:]
    while sum(map(len, lines)) > TAIL_CHARACTERS and len(lines) > 1:
        lines = lines[1:]
    return [line[:500] for line in lines]


def without_folders(text: str, folders: Sequence[Path] = ()) -> str:
    """A text whose absolute paths have lost these folders, or all but the file's name."""
    for folder in sorted(map(str, folders), key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return re.sub(r"(?<![\w.:/-])/(?:[\w.+@-]+/)+", "", text)


def scrubbed(value: Any, folders: Sequence[Path]) -> Any:
    """JSON values without folders of this machine."""
    if isinstance(value, str):
        return without_folders(value, folders)
    if isinstance(value, Mapping):
        return {key: scrubbed(entry, folders) for key, entry in value.items()}
    if isinstance(value, list):
        return [scrubbed(entry, folders) for entry in value]
    return value
