"""An evaluation from its prompts to its report: draw what is missing, measure, keep the results."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_edge.errors import InvalidInput, OutOfMemory, SanaError
from sana_edge.evaluate import metrics
from sana_edge.evaluate.draw import Load, Say, draw
from sana_edge.evaluate.measured import Measured
from sana_edge.evaluate.metrics import Drawn, MetricOptions
from sana_edge.evaluate.pictures import RESULTS, SHEET, Pictures, Source
from sana_edge.evaluate.prompts import PromptSet
from sana_edge.evaluate.report import Report
from sana_edge.progress import Progress
from sana_edge.system import atomic


@dataclass(frozen=True)
class Evaluation:
    """What is asked for.

    Attributes:
        folder: of the pictures and the results.
        options: of `Sana.generate`, JSON values; "seed" is the first prompt's, counting up.
        loading: of `Sana.load`, JSON values; a change of either needs ``force``.
        limit: how many prompts; all if left out.
        force: draw anew what is there.
    """

    prompts: PromptSet
    sources: Sequence[Source]
    folder: Path
    options: Mapping[str, Any]
    loading: Mapping[str, Any] = field(default_factory=dict)
    metrics: MetricOptions = field(default_factory=MetricOptions)
    limit: int | None = None
    force: bool = False

    def run(self, load: Load, *, tell: Progress, say: Say) -> Report:
        """Draw, measure, and write ``results.json`` and ``worst.png``.

        Args:
            tell: progress.
            say: is told what the user should know.

        Raises:
            SanaError: nothing can be drawn, kept or measured.
        """
        names = metrics.wanted(self.metrics, self.prompts, pair=len(self.sources) == 2)
        measures, left_out = metrics.prepare(names, self.metrics, say)
        pictures = Pictures(self.folder, self.prompts, {**self.options, **self.loading})
        pictures.open(list(self.sources), force=self.force)
        chosen = self.prompts.choose(self.limit)
        options = {
            name: value for name, value in self.options.items() if name != "seed" and value is not None
        }
        failed = {
            source.label: draw(pictures, source, chosen, load, options, tell=tell, say=say)
            for source in self.sources
        }
        numbers = [number for number in chosen if not any(number in of for of in failed.values())]
        if not numbers:
            raise InvalidInput("no prompt has a picture of every model", "see what is said of each above")
        drawn = Drawn(
            tuple([pictures.path(source, number) for number in numbers] for source in self.sources),
            [self.prompts.texts[number] for number in numbers],
            [self.prompts.facts[number] for number in numbers] if self.prompts.facts else (),
        )
        measured: dict[str, Measured] = {}
        for name, measure in measures.items():
            try:
                measured[name] = measure(drawn, tell, say)
            except OutOfMemory:
                raise
            except SanaError as error:
                left_out[name] = error.message
                say(f"{name} is left out: {error.message}{f' ({error.hint})' if error.hint else ''}")
        if not measured:
            raise SanaError(
                "no metric could be measured; the pictures are kept", "see what is said of each above"
            )
        report = Report(self.sources, self.prompts.name, numbers, drawn, measured, left_out, failed)
        self._write(report)
        return report

    def facts(self, report: Report) -> dict[str, Any]:
        """The results as JSON values, with what was asked for."""
        return {"options": {**self.options, **self.loading}, **report.facts()}

    def _write(self, report: Report) -> None:
        atomic.write_json(self.folder / RESULTS, self.facts(report), follow=False)
        sheet = report.sheet()
        if sheet is not None:
            atomic.write_bytes(self.folder / SHEET, sheet, follow=False)
        else:
            # of an earlier run
            with contextlib.suppress(OSError):
                (self.folder / SHEET).unlink()
