"""The quantized package: what its components say about themselves, read and verified.

A package is a model folder in diffusers layout whose ``config.json`` files have a ``quantization_config``.
A quantized module has an int8 ``weight``, an fp32 ``weight_scale`` (one per output channel) and, where it was
calibrated, an fp32 ``input_scale`` (one per tensor); everything else is in 16 bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sana_edge.errors import CheckpointError
from sana_edge.store.folder import read_json
from sana_edge.store.headers import is_covered
from sana_edge.system.json_values import shown
from sana_edge.system.regular import open_regular

METHOD = "sana-edge-w8a8"
VERSION = 1
KEY = "quantization_config"

Activations = Literal["token", "tensor"]

_COMPONENTS = ("transformer", "vae")
_REQUIRED = ("version", "activations", "kept", "calibration", "source", "checksum")
_BLOCK = 1 << 20
DAMAGED = "the file is damaged or was changed; make the package again with `sana-edge quantize`"


@dataclass(frozen=True)
class Quantization:
    """The ``quantization_config`` of one component.

    Attributes:
        activations: "token", one dynamic scale for each token, or "tensor", one calibrated scale.
        kept: modules, by diffusers' names, that could be INT8 and stay in 16 bit.
        calibration: where the calibrated scales and the smoothing come from; None without calibration.
        source: the float model's ``name`` and ``checksum``.
        clamp: of the denoiser, see `weights.needs_clamp`; None for other components. A package
            has to say it: its dtypes are no longer those of the source.
        checksum: SHA-256 over the weight files, see `checksum`.
    """

    activations: Activations
    kept: tuple[str, ...] = ()
    calibration: Mapping[str, Any] | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    clamp: bool | None = None
    checksum: str = ""
    version: int = VERSION

    @classmethod
    def from_dict(cls, data: object, *, where: str) -> Quantization:
        """Read a parsed ``quantization_config``; ``where`` is the file, for messages.

        Raises:
            CheckpointError: another method, a version newer than this program's, a missing key, a value of
                the wrong type.
        """
        where = f"{where}: {KEY}"
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{where} is {shown(data)}, expected an object", DAMAGED)
        if data.get("quant_method") != METHOD:
            raise CheckpointError(
                f"{where}: quant_method is {shown(data.get('quant_method'))}, only {METHOD!r} can be read",
                "give the float model; `sana-edge quantize` makes a package of it",
            )
        _check_version(data.get("version"), where)
        for key in _REQUIRED:
            if key not in data:
                raise CheckpointError(f"{where} lacks {key}", DAMAGED)
        kept, clamp = data["kept"], data.get("clamp")
        for key, fits, expected in (
            ("activations", data["activations"] in ("token", "tensor"), "'token' or 'tensor'"),
            ("kept", _is_names(kept), "a list of names"),
            ("calibration", isinstance(data["calibration"], dict | None), "an object or null"),
            ("source", isinstance(data["source"], dict), "an object"),
            ("clamp", isinstance(clamp, bool | None), "true or false"),
            ("checksum", _is_sha256(data["checksum"]), "64 hexadecimal digits"),
        ):
            if not fits:
                raise CheckpointError(
                    f"{where}: {key} is {shown(data.get(key))}, expected {expected}", DAMAGED
                )
        return cls(**{key: data[key] for key in _REQUIRED} | {"kept": tuple(kept), "clamp": clamp})

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        content = {"quant_method": METHOD, **dataclasses.asdict(self), "kept": list(self.kept)}
        return content if self.clamp is not None else {k: v for k, v in content.items() if k != "clamp"}

    @property
    def summary(self) -> str:
        """One phrase for people and for a picture's metadata, such as "w8a8, per token, calibrated"."""
        return f"w8a8, per {self.activations}" + (", calibrated" if self.calibration is not None else "")


@dataclass(frozen=True)
class Description:
    """A component's config.json, read once: its values, and its quantization or None where it is float."""

    values: Mapping[str, Any]
    quantization: Quantization | None


def is_package(folder: Path) -> bool:
    """Whether the denoiser or the decoder of a model folder is quantized, by whatever method."""
    configs = (folder / component / "config.json" for component in _COMPONENTS)
    return any(path.is_file() and read_json(path).get(KEY) is not None for path in configs)


def read(component: Path) -> Quantization | None:
    """The quantization of a component's folder, None where its weights are float.

    Raises:
        CheckpointError: see `Quantization.from_dict`.
    """
    return describe(component).quantization


def describe(component: Path) -> Description:
    """A component's config.json; errors are those of `read`."""
    path = component / "config.json"
    values = read_json(path)
    data = values.get(KEY)
    return Description(values, None if data is None else Quantization.from_dict(data, where=str(path)))


def checksum(component: Path) -> str:
    """`digest` of a component's ``*.safetensors`` in the order of their names."""
    return digest(sorted(component.glob("*.safetensors"), key=lambda path: path.name))


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, one after the other.

    Raises:
        CheckpointError: one cannot be read, or is no whole file of safetensors.
    """
    sha256, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    for path in files:
        try:
            # fresh memory for every block would cost as much as hashing it
            with open_regular(path) as file:
                if path.suffix == ".safetensors" and not is_covered(file):
                    raise CheckpointError(f"{path} has more or less than its header says", DAMAGED)
                while count := file.readinto(block):
                    sha256.update(block[:count])
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}", DAMAGED) from error
    return sha256.hexdigest()


def verify(component: Path, quantization: Quantization) -> None:
    """Compare a component's weight files with the checksum of its config.

    Raises:
        CheckpointError: they are not what was written.
    """
    found = checksum(component)
    if found != quantization.checksum:
        raise CheckpointError(
            f"the weights in {component} have checksum {found[:12]}..., "
            f"its config.json says {quantization.checksum[:12]}...",
            DAMAGED,
        )


def _check_version(version: object, where: str) -> None:
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: version is {shown(version)}, expected {VERSION}", DAMAGED)
    if version > VERSION:
        raise CheckpointError(
            f"{where}: version is {shown(version)}, this sana-edge reads up to {VERSION}", "upgrade sana-edge"
        )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
