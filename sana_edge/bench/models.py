"""What is measured: a model's float folder, its INT8 package and the graphs of both, given or made once.

What is made lies in a scratch folder, is written whole or not at all, and is found there by the next run.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sana_edge.bench.results import digest
from sana_edge.config import DenoiserConfig, SamplerConfig, SamplerKind
from sana_edge.errors import InvalidInput
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub, manifest, package
from sana_edge.store.folder import read_json
from sana_edge.store.manifest import Manifest

FLOAT, PACKAGE, GRAPHS, INT8_GRAPHS = "float", "int8", "onnx", "onnx-int8"
# what each is made of, and by which order of `sana_edge.bench.worker`
_FROM = {PACKAGE: FLOAT, GRAPHS: FLOAT, INT8_GRAPHS: PACKAGE}
MAKERS = {FLOAT: "random", PACKAGE: "package", GRAPHS: "graphs", INT8_GRAPHS: "graphs"}
# shapes of the public models, and whether they are Sprint's: random weights
RANDOM = {
    "0.6b": ("0.6b", False),
    "1.6b": ("1.6b", False),
    "sprint": ("0.6b", True),
    "sprint-0.6b": ("0.6b", True),
    "sprint-1.6b": ("1.6b", True),
    "tiny": ("tiny", False),
    "sprint-tiny": ("tiny", True),
}
# about what all four folders of random weights take
_BYTES = {"0.6b": 24e9, "1.6b": 32e9, "tiny": 1e8}


@dataclass(frozen=True)
class Subject:
    """One model in all its forms.

    Attributes:
        name: for people.
        folders: models as `sana_edge.Sana.load` takes them, by form, `FLOAT` and the others.
        place: where forms that are missing are made.
        random: a name of `RANDOM`, of weights that are drawn; None for a real model.
        native: side in pixels; fixed: the only size that graphs know.
    """

    name: str
    folders: Mapping[str, str]
    place: Path
    native: int
    sampler: SamplerKind
    random: str | None = None
    fixed: tuple[int, int] | None = None
    notes: tuple[str, ...] = field(default=())

    def can(self, form: str) -> bool:
        """Whether there is this form, or what it is made of."""
        if form in self.folders or (form == FLOAT and self.random is not None):
            return True
        return form in _FROM and self.can(_FROM[form])

    def found(self, form: str) -> str | None:
        """The form where it is already."""
        made = self.place / form
        return self.folders.get(form) or (str(made) if made.is_dir() else None)

    def missing(self, form: str) -> Iterator[tuple[str, str]]:
        """What has to be made for a form, in order: the form, and what it is made of."""
        if self.found(form) is not None:
            return
        if form == FLOAT:
            yield form, str(self.random)
            return
        source = _FROM[form]
        yield from self.missing(source)
        yield form, self.found(source) or str(self.place / source)

    def plan(self, size: tuple[int, int] | None, steps: int | None) -> Plan:
        """Size and steps with the model's defaults.

        Raises:
            InvalidInput: a size or steps that the model has not.
        """
        request = Request("a picture", size=size, exact_size=size is not None, steps=steps)
        plan = request.plan(self.native, self.sampler, self.fixed)
        if self.fixed is not None and (plan.width, plan.height) != self.fixed:
            raise InvalidInput(
                f"{self.name} draws only {self.fixed[0]}x{self.fixed[1]}, not {plan.width}x{plan.height}",
                "leave out --size, or export the model for any size",
            )
        return plan


def subjects(
    models: Sequence[str], random: Sequence[str], scratch: Path, *, progress: bool = False
) -> list[Subject]:
    """What the names given stand for; public models are downloaded where they are not here.

    A package and the float model that it was made of are one subject, and so are exported folders of the same
    networks.

    Raises:
        InvalidInput: an unknown name of random weights.
        SanaError: as `sana_edge.store.hub.resolve`.
    """
    for name in random:
        if name not in RANDOM:
            raise InvalidInput(f"no random weights {name!r}", f"choose {', '.join(RANDOM)}")
    # all names before the first download
    exported = {model: _exported(model) for model in models}
    for model in (model for model, folder in exported.items() if folder is None):
        hub.check_name(model)
    found: list[Subject] = []
    for model, folder in exported.items():
        if folder is not None:
            _join(found, _graphs(folder, model, scratch))
        else:
            _join(found, _model(model, scratch, progress))
    names = Counter(subject.name for subject in found)
    alike = [replace(s, name=f"{s.name} ({_folders(s)})") if names[s.name] > 1 else s for s in found]
    return [*alike, *(_random(name, scratch) for name in random)]


def _folders(subject: Subject) -> str:
    return ", ".join(Path(folder).name for folder in subject.folders.values())


def torch_missing() -> str | None:
    """The first package of torch's backends that is not installed."""
    return next((name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None), None)


def _exported(model: str) -> Path | None:
    folder = hub.exported(model)
    return hub.bundled_graphs(model, int8=True) if folder is None and torch_missing() else folder


def _random(name: str, scratch: Path) -> Subject:
    shapes, sprint = RANDOM[name]
    kind: SamplerKind = "scm" if sprint else "flow-dpm"
    title = f"{'Sprint ' if sprint else ''}{shapes.upper()}, random weights"
    place = scratch / f"random-{'sprint-' if sprint else ''}{shapes}"
    return Subject(title, {}, place, DenoiserConfig().native_size, kind, name)


def bytes_of_random(name: str) -> float:
    """About what its folders take on the disk."""
    return _BYTES[RANDOM[name][0]]


def _model(model: str, scratch: Path, progress: bool) -> Subject:
    found = hub.resolve(model, progress=progress)
    config = DenoiserConfig.from_dict(read_json(found.path / "transformer" / "config.json"))
    sampler = SamplerConfig.from_dict(read_json(found.path / "scheduler" / "scheduler_config.json"))
    # the folder itself, which a name may not mean tomorrow; a name tells which variant's files are loaded
    given = str(found.path) if found.info is None else model
    forms = {PACKAGE if package.is_package(found.path) else FLOAT: given}
    if FLOAT in forms:
        small = hub.resolve(model, int8=True, progress=False)
        if package.is_package(small.path):
            forms[PACKAGE] = str(small.path)
    graphs = hub.bundled_graphs(model, int8=True)
    forms |= {} if graphs is None else {INT8_GRAPHS: str(graphs)}
    name, known = found.name, digest(found.path.rglob("*.safetensors"))
    place = scratch / f"{re.sub(r'[^A-Za-z0-9.-]', '-', name)}-{known[:12]}"
    return Subject(name, forms, place, config.native_size, sampler.kind)


def _graphs(folder: Path, model: str, scratch: Path) -> Subject:
    read = manifest.read(folder)
    form = GRAPHS if read.quantization is None else INT8_GRAPHS
    notes = () if str(folder) == model or model == folder.name else (f"{folder.name} stands in for {model}",)
    place = scratch / "none"
    return Subject(
        _origin(read), {form: str(folder)}, place, read.native_size, read.sampler.kind, None, read.size, notes
    )


def _origin(read: Manifest) -> str:
    """The model that graphs began as: a package is usually called as its model with an end."""
    return re.sub(r"[-_]int8$", "", read.name)


def _join(found: list[Subject], new: Subject) -> None:
    """Add a subject, to the one that it is another form of where there is."""
    for number, other in enumerate(found):
        same = (other.native, other.sampler, other.fixed, other.random) == (
            *(new.native, new.sampler, new.fixed),
            None,
        )
        if same and _related(other, new) and not set(other.folders) & set(new.folders):
            place = other.place if FLOAT in other.folders else new.place
            name = other.name if FLOAT in other.folders else new.name
            forms = {**other.folders, **new.folders}
            found[number] = replace(
                other, name=name, folders=forms, place=place, notes=(*other.notes, *new.notes)
            )
            return
    found.append(new)


def _related(one: Subject, other: Subject) -> bool:
    """Whether one is called as the other, or is the package that was made of it."""
    names = {one.name, other.name}
    for subject in (one, other):
        folder = subject.folders.get(PACKAGE)
        if folder is not None and FLOAT not in subject.folders:
            made = package.read(Path(folder) / "transformer")
            names |= {str(made.source.get("name"))} if made is not None else set()
            names.discard(subject.name)
    return len(names) == 1
