"""One run of `sana-edge bench`: what was asked for, what has been found, and the files of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana_edge.bench import measure, models, summary
from sana_edge.bench.measure import Asked
from sana_edge.bench.models import Subject
from sana_edge.bench.page import page
from sana_edge.bench.results import header, load, write_json
from sana_edge.errors import SanaError
from sana_edge.progress import Progress
from sana_edge.system.atomic import write_bytes
from sana_edge.system.memory import shown


@dataclass(frozen=True)
class Session:
    """``data`` is what the JSON has; it grows while `measure` runs."""

    subjects: Sequence[Subject]
    asked: Asked
    data: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        names: Sequence[str],
        random: Sequence[str],
        asked: Asked,
        *,
        scratch: Path,
        arguments: Sequence[str],
        progress: bool = False,
    ) -> Session:
        """Find models and backends; nothing is loaded yet.

        Args:
            names, random: models, and names of random weights; without any the bundled model.
            asked: with backends as they were given.
            scratch: where forms of models that are missing are made.
            arguments: of the command line, for the record.
            progress: show a download on stderr.

        Raises:
            SanaError: an unknown name, size or backend; or none of what was asked for can run here.
        """
        usable, skipped = measure.usable(asked.backends)
        given = names or ([] if random else ["sana-tiny"])
        subjects = models.subjects(given, random, scratch, progress=progress)
        asked = replace(asked, backends=usable)
        works = measure.works(subjects, asked, usable)
        notes = _notes(works, subjects, asked)
        if not any(work["rows"] for work in works):
            reasons = [*(f"{skip['backend']}: {skip['reason']}" for skip in skipped), *notes]
            hint = "`sana-edge doctor` says what can run here"
            raise SanaError(f"nothing can be measured here: {'; '.join(reasons)}", hint)
        data = {
            **header("sana-edge bench", arguments),
            "load_before": load(),
            "repeat": asked.repeat,
            "threads": asked.threads,
            "partial": True,
            "done": 0,
            "total": asked.repeat * sum(len(work["rows"]) for work in works),
            "skipped": skipped,
            "notes": notes,
            "works": works,
        }
        return cls(subjects, asked, data)

    def measure(self, progress: Progress, json: Path | None, html: Path | None) -> None:
        """`measure.measure`, with the files written after each process; so are its errors, and `SanaError`
        where a file cannot be written."""

        def keep() -> None:
            self._count()
            self.write(json, html)

        measure.measure(self.data["works"], self.subjects, self.asked, progress, keep)

    def _count(self) -> None:
        rows = [row for work in self.data["works"] for row in work["rows"]]
        self.data["done"] = sum(len(row["runs"]) for row in rows)
        for row in rows:
            found = row.get("versions") or {}
            self.data["versions"] |= {name: version for name, version in found.items() if version}
            known = set(row.get("instructions") or ()) | set(self.data["machine"]["instructions"] or ())
            if row.get("instructions") is not None:
                self.data["machine"]["instructions"] = sorted(known)

    def write(self, json: Path | None, html: Path | None, *, ended: bool = False) -> None:
        """Both files, each whole; ``ended``: nothing more is to come.

        Raises:
            SanaError: one cannot be written.
        """
        self.data["partial"] = not ended
        self.data["sentences"] = self.sentences()
        if json is not None:
            write_json(json, self.data)
        if html is not None:
            write_bytes(html, page(self.data).encode(errors="replace"))

    def sentences(self) -> list[str]:
        """`summary.sentence` of each work; of several models with their names."""
        works = self.data["works"]
        several = len({work["model"] for work in works}) > 1
        found = [summary.sentence(work, self.data["machine"]) for work in works]
        return [
            f"{work['model']}: {line}" if several else line for work, line in zip(works, found, strict=True)
        ]

    def text(self) -> str:
        """All for a terminal."""
        return summary.text(self.data, self.sentences())

    def kept(self) -> str:
        """What lies in the scratch folder for the next run; empty where nothing was made."""
        places = [subject.place for subject in self.subjects if subject.place.is_dir()]
        sizes = [path.stat().st_size for place in places for path in place.rglob("*") if path.is_file()]
        if not sizes:
            return ""
        return f"{shown(sum(sizes))} are kept for the next run in {', '.join(map(str, places))}"

    def check(self) -> None:
        """Raise where nothing was measured."""
        if not any(row["runs"] for work in self.data["works"] for row in work["rows"]):
            raise SanaError("nothing was measured: every contender failed", "the lines above say why")


def _notes(works: Sequence[Mapping[str, Any]], subjects: Sequence[Subject], asked: Asked) -> list[str]:
    """What is not measured, and why."""
    said = [measure.diffusers_missing()] if asked.against else []
    if said == [None] and not any(subject.can(models.FLOAT) for subject in subjects):
        said = ["diffusers is not measured: it needs the float model's folder"]
    said += dict.fromkeys(_unmade(work, asked.backends) for work in works)
    return [line for line in said if line]


def _unmade(work: Mapping[str, Any], backends: Sequence[str]) -> str | None:
    """What is not measured since its form of the model is not there, nor what it is made of."""
    there = {(row["by"], row["kind"]) for row in work["rows"]}
    names = [f"{by} {kind}" for by in backends for kind in ("float", "int8") if (by, kind) not in there]
    if not names:
        return None
    missing = models.torch_missing()
    why = f"{missing} is not installed" if missing else "the folders given have no model for it"
    return f"{work['model']} is not measured by {', '.join(names)}: {why}"
