"""Contenders take turns, each in a process of its own that loads, draws and ends; what fails is named.

Processes, not threads of one: a peak of memory is then the contender's own, and one that memory does not
suffice for takes no other with it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sana_edge.bench import models
from sana_edge.bench.models import FLOAT, GRAPHS, INT8_GRAPHS, MAKERS, PACKAGE, Subject, torch_missing
from sana_edge.bench.order import Order, command, failure
from sana_edge.bench.process import run
from sana_edge.bench.worker import STAGES
from sana_edge.engines import choose
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.image_metrics import psnr
from sana_edge.progress import Progress
from sana_edge.store import hub
from sana_edge.system.atomic import cannot_write

BACKENDS = ("torch", "onnxruntime", "openvino", "tensorrt")
DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Asked:
    """The options of a run; no sizes are the native one, and ``against`` is "diffusers" or None."""

    backends: Sequence[str]
    sizes: Sequence[tuple[int, int] | None]
    steps: int | None
    repeat: int
    threads: int | None
    against: str | None = None


def usable(names: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Which of `BACKENDS` run here, and of the others why not.

    Raises:
        InvalidInput: an unknown backend.
    """
    for name in names:
        if name not in ("all", *BACKENDS):
            raise InvalidInput(f"unknown backend {name!r}", f"choose all, {', '.join(BACKENDS)}")
    wanted = BACKENDS if "all" in names else tuple(dict.fromkeys(names))
    reasons = dict[str, str]()
    missing = torch_missing()
    if missing is not None:
        reasons["torch"] = f"{missing} is not installed: pip install 'sana-edge[torch]'"
    for name in set(wanted) - {"torch"}:
        told = [(there, detail) for key, there, detail in choose.survey() if key.split()[0] == name]
        if not any(there for there, _ in told):
            # that of the CPU, or the only one
            reasons[name] = min((detail for _, detail in told), key=len)
    skipped = [{"backend": name, "reason": reasons[name]} for name in wanted if name in reasons]
    return [name for name in wanted if name not in reasons], skipped


def works(subjects: Sequence[Subject], asked: Asked, backends: Sequence[str]) -> list[dict[str, Any]]:
    """One work for each model and size, with a row for each contender, nothing measured yet.

    Raises:
        InvalidInput: a size or steps that a model has not.
    """
    found = []
    for subject in subjects:
        for size in asked.sizes or (None,):
            plan = subject.plan(size, asked.steps)
            rows = [_row(by, kind, form) for by, kind, form in _contenders(subject, asked, backends)]
            facts = {"model": subject.name, "size": [plan.width, plan.height], "steps": plan.steps}
            facts |= {"random_weights": subject.random is not None, "notes": list(subject.notes)}
            found.append({**facts, "rows": rows})
    return found


def _contenders(subject: Subject, asked: Asked, backends: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Backend, "float" or "int8", and the form of the model."""
    if asked.against == DIFFUSERS and subject.can(FLOAT) and diffusers_missing() is None:
        yield DIFFUSERS, "float", FLOAT
    for name in backends:
        forms = (FLOAT, PACKAGE) if name == "torch" else (GRAPHS, INT8_GRAPHS)
        for kind, form in zip(("float", "int8"), forms, strict=True):
            # graphs are made by torch
            made = form in subject.folders or torch_missing() is None
            if subject.can(form) and made:
                yield name, kind, form


def diffusers_missing() -> str | None:
    """What to install before diffusers can be measured beside; None where it can."""
    there = importlib.util.find_spec(DIFFUSERS) is not None and torch_missing() is None
    return None if there else "diffusers is not measured: pip install diffusers 'sana-edge[torch]'"


def _row(by: str, kind: str, form: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": f"{by} {kind}", "by": by, "kind": kind, "form": form, "dtype": None}
    return {**row, "runs": [], "median": None, "psnr": None, "psnr_to": None, "failure": None}


def measure(
    found: Sequence[dict[str, Any]],
    subjects: Sequence[Subject],
    asked: Asked,
    progress: Progress,
    keep: Callable[[], object],
) -> None:
    """Fill in the rows of `works`, turn by turn.

    Args:
        progress: told of every process: what it does, and how many of all are done.
        keep: called after each process, to write what has been found.

    Raises:
        KeyboardInterrupt: Ctrl-C; the process under way has ended, the rows have what came before.
    """
    total, done = asked.repeat * sum(len(work["rows"]) for work in found), 0
    # as `works` has them
    owners = [subject for subject in subjects for _ in asked.sizes or (None,)]
    with tempfile.TemporaryDirectory() as pictures:
        for turn in range(asked.repeat):
            for number, (subject, work) in enumerate(zip(owners, found, strict=True)):
                for row in work["rows"]:
                    size = "x".join(map(str, work["size"]))
                    title = f"{row['name']}, {size}, turn {turn + 1} of {asked.repeat}"

                    def tell(at: str, title: str = title, done: int = done) -> None:
                        progress(f"{title}: {at}", done, total)

                    if row["failure"] is None:
                        output = Path(pictures) / f"{number}-{row['by']}-{row['kind']}.png"
                        try:
                            _one_run(row, work, subject, asked, output, tell)
                            _compare(row, work, number, Path(pictures))
                        except SanaError as error:
                            row["failure"] = failure(error)
                        keep()
                    done += 1


def _one_run(
    row: dict[str, Any],
    work: Mapping[str, Any],
    subject: Subject,
    asked: Asked,
    output: Path,
    tell: Callable[[str], None],
) -> None:
    model = _made(row["form"], subject, asked, tell)
    # of the turn before
    output.unlink(missing_ok=True)
    read_files(_folder(model))
    order = Order(
        by=row["by"],
        model=model,
        output=str(output),
        started=time.time(),
        size=tuple(work["size"]),
        steps=work["steps"],
        threads=asked.threads,
        dtype="half",
    )
    result = ordered(order, row["name"], tell)
    dtype = result.pop("dtype")
    row |= {"dtype": dtype, "name": f"{row['by']} {dtype if row['kind'] == 'float' else 'int8'}"}
    row |= {key: result.pop(key) for key in ("backend", "quantization", "notes")}
    row["instructions"], row["versions"] = result.pop("instructions"), result.pop("versions")
    row["joules_missing"] = result.pop("joules_missing")
    row["runs"].append(result)
    row |= spread(row["runs"])


def spread(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all runs of a row: median, least and most seconds by stage, the highest peaks, the median energy."""
    seconds = {stage: [run["seconds"][stage] for run in runs] for stage in STAGES}
    totals = [sum(run["joules"].values()) for run in runs if run["joules"]]
    return {
        "median": {stage: statistics.median(values) for stage, values in seconds.items()},
        "least": {stage: min(values) for stage, values in seconds.items()},
        "most": {stage: max(values) for stage, values in seconds.items()},
        "peak": max((run["peak"] for run in runs if run["peak"]), default=None),
        "device_peak": max((run["device_peak"] for run in runs if run["device_peak"]), default=None),
        "joules": statistics.median(totals) if totals else None,
    }


def ordered(order: Order, name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """The result of a process that does what is ordered.

    Raises:
        SanaError: it fails; OutOfMemory where it was killed.
    """
    last: list[dict[str, Any]] = []

    def line(text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            # what a library prints
            return
        if isinstance(value, dict) and set(value) == {"at"}:
            tell(str(value["at"]))
        elif isinstance(value, dict) and "seconds" in value:
            last[:] = [value]

    run(command(order), name, threads=order.threads, on_line=line)
    if not last:
        raise SanaError(f"{name} failed: its process ended without a result", "run it again with -v")
    return last[0]


def _made(form: str, subject: Subject, asked: Asked, tell: Callable[[str], None]) -> str:
    """The form of a model, made where it is missing.

    Raises:
        SanaError: it cannot be made; there is no room for it.
    """
    for name, source in subject.missing(form):
        _check_room(subject, name)
        output = str(subject.place / name)
        order = Order(MAKERS[name], source, output, time.time(), threads=asked.threads)
        ordered(order, f"making {name}", lambda at, name=name: tell(f"making {name}, {at}"))  # type: ignore[misc]
    return str(subject.found(form))


def _check_room(subject: Subject, form: str) -> None:
    """See that a form can be made, and that there is room for random weights and what is made of them."""
    try:
        subject.place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(subject.place).free
    except OSError as error:
        raise cannot_write(subject.place, error) from error
    needed = models.bytes_of_random(subject.random) if form == FLOAT and subject.random else 0
    if free < needed:
        room = f"{free / 1e9:.0f} GB are free in {subject.place}"
        what = f"random weights need about {needed / 1e9:.0f} GB, {room}"
        raise SanaError(what, "make room, or choose another --scratch")


def _folder(model: str) -> Path:
    path = Path(model)
    return path if path.is_dir() else hub.resolve(model, offline=True, progress=False).path


def read_files(folder: Path) -> None:
    """Read the files, so that none waits for the disk that another has read before."""
    block = bytearray(1 << 24)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def _compare(row: dict[str, Any], work: Mapping[str, Any], number: int, pictures: Path) -> None:
    """PSNR in dB of its first picture to that of the first row that drew; None where they are equal."""
    first = next(other for other in work["rows"] if other["runs"])
    if first is row:
        return
    paths = (pictures / f"{number}-{other['by']}-{other['kind']}.png" for other in (row, first))
    found = psnr(*(np.asarray(Image.open(path).convert("RGB")) for path in paths))
    row |= {"psnr_to": first["name"], "psnr": found if math.isfinite(found) else None}
