"""Drawing what is not there yet: one model after the other, so that only one is in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_edge.errors import InvalidInput, OutOfMemory, SanaError
from sana_edge.evaluate.pictures import Pictures, Source, fingerprint
from sana_edge.progress import Progress
from sana_edge.store import hub
from sana_edge.store.package import is_package

if TYPE_CHECKING:
    from sana_edge.pipeline import Sana

TRIES = 3
"""So many failures before the first picture end the run: it is not the prompts."""


Load = Callable[[Source], "Sana"]
Say = Callable[[str], None]


def sources(
    model: str, *, int8: bool, against: str | None, offline: bool, revision: str | None, progress: bool
) -> list[Source]:
    """Who draws: the model, and it in INT8, or another model; all are looked up, and downloaded, here.

    Raises:
        InvalidInput: both or neither can be compared.
        SanaError: a model is not there, or not whole.
    """
    if int8 and against is not None:
        raise InvalidInput("there are two comparisons: with INT8 and with another model", "give one of them")

    def source(name: str, eight: bool, label: str) -> Source:
        return Source(label, name, eight, fingerprint(_folder(name, eight, offline, revision, progress)))

    first = source(model, False, _label(model))
    if int8:
        _check_float(model, _folder(model, False, offline, revision, progress))
        return [first, source(model, True, f"{first.label}-int8")]
    if against is None:
        return [first]
    label = _label(against)
    second = source(against, False, label if label != first.label else f"{label}-2")
    if second.files == first.files:
        raise InvalidInput(f"{against} and {model} are the same model", "give another one to compare with")
    return [first, second]


def draw(
    pictures: Pictures,
    source: Source,
    numbers: Sequence[int],
    load: Load,
    options: dict[str, Any],
    *,
    tell: Progress,
    say: Say,
) -> dict[int, str]:
    """Draw what is missing or damaged; returns why prompts have no picture, by number.

    Args:
        options: of `Sana.generate`.
        tell: progress: the pictures that are there.
        say: is told what the user should know.

    Raises:
        SanaError: nothing can be drawn, or kept.
    """
    missing = [number for number in numbers if not pictures.has(source, number)]
    done = len(numbers) - len(missing)
    if done:
        say(f"{source.label}: {done} of {len(numbers)} pictures are there already")
    if not missing:
        return {}
    failed: dict[int, str] = {}
    with load(source) as model:
        tell(f"drawing {source.label}", done, len(numbers))
        for number in missing:
            prompt, seed = pictures.prompts.texts[number], pictures.seed(number)
            try:
                image = model.generate(prompt, seed=seed, **options)
            except OutOfMemory:
                raise
            except SanaError as error:
                failed[number] = error.message
                if done == 0 and len(failed) == TRIES:
                    raise
                say(f"{source.label}: prompt {number} has no picture: {error.message}")
                continue
            pictures.add(source, number, image)
            done += 1
            tell(f"drawing {source.label}", done, len(numbers))
    return failed


def _folder(model: str, int8: bool, offline: bool, revision: str | None, progress: bool) -> Path:
    exported = hub.exported(model)
    if exported is not None:
        return exported
    return hub.resolve(model, int8=int8, offline=offline, revision=revision, progress=progress).path


def _check_float(model: str, folder: Path) -> None:
    if hub.exported(model) is not None:
        hint = "compare two exported folders with --against"
        raise InvalidInput(f"{model} is an exported folder, which is float or INT8 as it was made", hint)
    if is_package(folder):
        hint = "give the float model, or compare with another model by --against"
        raise InvalidInput(f"{model} is INT8 already", hint)


def _label(model: str) -> str:
    """A folder's name for a model's."""
    folder = os.path.expanduser(model)
    # os.path's functions answer for names that no file system accepts
    name = os.path.basename(os.path.realpath(folder)) if os.path.isdir(folder) else model
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip(".-")[:80] or "model"
