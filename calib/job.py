"""One model on its way into a package: what is read, what is written, and what that took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sana_edge.calib import package_component
from sana_edge.calib.calibrate import Calibration
from sana_edge.calib.package_component import Named
from sana_edge.calib.package_writer import copy_files
from sana_edge.calib.report.report import Layer, Report, Sizes
from sana_edge.calib.settings import Settings
from sana_edge.config import DenoiserConfig
from sana_edge.errors import DamagedWeights
from sana_edge.nets.parameter_names import names
from sana_edge.nets.quantize import stacked
from sana_edge.nets.text_weights import quantize_text_state
from sana_edge.progress import Progress
from sana_edge.store import package
from sana_edge.store.folder import needed_files, read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.package import Quantization
from sana_edge.store.weights import StoredState, weight_files
from sana_edge.torch_runtime.load import clamps, denoiser_layers

_COMPONENTS = ("transformer", "vae", "text_encoder")
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")


@dataclass(frozen=True)
class Job:
    """A model, the folder that its package is written in, and what has been spent."""

    model: ResolvedModel
    folder: Path
    settings: Settings
    device: torch.device
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Tell and time a part of the work."""
        self.progress(name, 0, 0)
        start = time.perf_counter()
        try:
            yield
        except DamagedWeights:
            self.check()
            raise
        # of the denoiser, and again of the decoder
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)

    @property
    def denoiser_config(self) -> DenoiserConfig:
        return DenoiserConfig.from_dict(read_json(self.model.path / "transformer" / "config.json"))

    def state(self, name: str) -> StoredState:
        """The float tensors of a component."""
        return StoredState(self.model.path / name, variant=self.model.component_variant(name))

    def check(self) -> None:
        """Raise `CheckpointError` with the file and name of a tensor that has a NaN or infinite value."""
        for name in _COMPONENTS:
            self.state(name).check_values()

    def write(self, name: str, tensors: Iterable[Named], calibration: Calibration | None = None) -> None:
        """Write one component."""
        self.write_config(name, self.write_weights(name, tensors), calibration)

    def write_weights(self, name: str, tensors: Iterable[Named]) -> str:
        """Write one component's weights; returns the checksum of the float ones."""
        files = weight_files(self.model.path / name, variant=self.model.component_variant(name))
        with ThreadPoolExecutor(1) as hashing:
            checksum = hashing.submit(package.digest, files)
            package_component.write_weights(self.folder / name, tensors)
        return checksum.result()

    def write_config(self, name: str, checksum: str, calibration: Calibration | None) -> None:
        """Write what describes a component's weights, which are there."""
        denoiser = name == "transformer"
        # a calibrated decoder uses its scales in any case; the text encoder's activations are not INT8
        static = calibration is not None and (name == "vae" or self.settings.activations == "tensor")
        made = Quantization(
            activations="tensor" if static else "token",
            kept=_kept(self, name, calibration.kept) if calibration else (),
            calibration=calibration.info if calibration else None,
            source={"name": self.model.name, "checksum": checksum},
            clamp=clamps(self.model, self.denoiser_config, self.state(name)) if denoiser else None,
        )
        config = read_json(self.model.path / name / "config.json")
        package_component.write_config(self.folder / name, config, made)

    def write_rest(self) -> None:
        """Write the text encoder, and copy what has no weights."""
        path, variant = self.model.path, self.model.component_variant("text_encoder")
        self.write("text_encoder", quantize_text_state(path / "text_encoder", variant=variant))
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        needed = needed_files(files, self.model.variant)
        rest = [file for file in needed if not file.startswith(_COMPONENTS)]
        # the terms of the weights go where the weights go
        rest += [file for file in files if file.upper().startswith(_TERMS)]
        copy_files(rest, path, self.folder)

    def report(self, layers: list[Layer], calibration: Calibration | None, **measured: Any) -> Report:
        """The report of what has been written."""
        settings = {
            "activations": self.settings.activations,
            "keep_fp16": self.settings.keep,
            "device": self.device.type,
            "calibration": calibration.info if calibration else None,
        }
        sizes = {
            title: Sizes(_size(self.state(name), prefix), _size(StoredState(self.folder / name), prefix))
            for title, name, prefix in (
                ("denoiser", "transformer", ""),
                ("decoder", "vae", "decoder."),
                ("text encoder", "text_encoder", ""),
            )
        }
        return Report(
            model=self.model.name,
            settings=settings,
            layers=layers,
            sizes=sizes,
            seconds=self.seconds,
            **measured,
        )


def layer_names(config: DenoiserConfig) -> dict[str, tuple[str, ...]]:
    """The denoiser's layers by the names in `Statistics`, as diffusers' modules, in their order."""
    modules = set(denoiser_layers(config))
    result = {}
    for ours, theirs in names(config).items():
        layer = tuple(name.removesuffix(".weight") for name in theirs)
        if layer in modules:
            result[f"denoiser.{ours.removesuffix('.weight')}"] = layer
    return result


def _kept(job: Job, name: str, kept: Iterable[str]) -> tuple[str, ...]:
    """The modules of one component, by diffusers' names, of the layers that stay in 16 bit."""
    if name == "vae":
        return tuple(part for layer in kept if layer.startswith("decoder.") for part in stacked(layer))
    modules = layer_names(job.denoiser_config)
    return tuple(part for layer in kept if layer in modules for part in modules[layer])


def _size(state: StoredState, prefix: str = "") -> int:
    return sum(state[name].nbytes for name in state if name.startswith(prefix))
