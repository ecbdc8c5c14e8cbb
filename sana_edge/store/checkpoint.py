"""One network's tensors out of a file or folder of weights, however a training has wrapped them."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.store import tensor_names
from sana_edge.store.headers import check_archive, pickled_objects
from sana_edge.store.identify import SAFETENSORS, explain, identify
from sana_edge.store.tensor_names import DENOISER, Network
from sana_edge.store.weights import FP8_SCALES, is_float8, load_file, weight_files
from sana_edge.system.memory import is_memory
from sana_edge.system.regular import open_regular

Weights = Literal["ema", "raw"]

# what trainings save beside weights: never needed, and stood in for by `_Ignored`, so that none of it is run
_IGNORED = re.compile(
    r"builtins\.(?:bool|bytes|complex|dict|float|frozenset|int|list|object|range|slice|str|tuple)|"
    r"(?:accelerate|addict|antlr4|argparse|_codecs|collections|datetime|deepspeed|diffusers|diffusion|easydict|"
    r"(?:pytorch_)?lightning(?:_fabric)?|mmcv|mmengine|numpy|omegaconf|pathlib|torch\.(?:distributed|optim)|"
    r"transformers|types)\..*"
)
# whose objects tensors are made of
_TENSORS = ("torch.", "collections.", "builtins.set", "_codecs.")
# tensors of a network itself whose names have no dot
_WITHOUT_DOTS = ("pos_embed", "scale_shift_table")
# of scaled FP8 files, beside the scales of weights
_SCALED = re.compile(r"(?:.*\.)?(?:scaled_fp8|scale_input|comfy_quant)")
_DEPTH = 8
# weights, their average and the optimizer's copies may begin as one
_SHARED = 4


class _Ignored:
    """Stands in for an object that no tensor needs; whatever is done to it has no effect."""

    def __new__(cls, *args: object, **options: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: object, **options: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A network's tensors by its own names, without prefixes; ``notes`` say what was chosen."""

    network: Network
    state: dict[str, Tensor]
    notes: tuple[str, ...]


def read_checkpoint(file: Path, weights: Weights | None = None) -> Checkpoint:
    """Read the SANA denoiser or DC-AE in a file, or in a folder with a component's weights.

    Tensors are mapped from the file. A .pth is opened with ``weights_only``: numpy's random state and what
    else trainings are known to save beside weights is passed over, other objects are refused, none is run.

    Args:
        weights: of a training's checkpoint the moving average ("ema") or the weights themselves ("raw"); None
            takes the average where there is one.

    Raises:
        CheckpointError: no such file, one that cannot be read, or of something else; the message says what.
        InvalidInput: it has no such weights.
    """
    tensors = {tensor_names.plain_name(name): tensor for name, tensor in _tensors(file)}
    found = [n for n in tensor_names.networks(tensors) if n.network != tensor_names.TEXT]
    if not found or tensor_names.is_lora(tensors):
        known = identify(file)
        first = next(iter(tensors), "none")
        what = f"{file} holds no SANA denoiser and no DC-AE (its first key is {first}): it is {known.words}"
        raise CheckpointError(what, "" if known.convertible else known.hint)
    chosen, notes = _choose(file, [n for n in found if n.network == found[0].network], weights)
    if chosen.network == DENOISER and any(n.network != DENOISER for n in found):
        notes = (*notes, "its autoencoder is not taken, only its denoiser")
    prefix = chosen.prefix
    inner = [n.prefix for n in found if n.prefix != prefix and n.prefix.startswith(prefix)]
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not any(name.startswith(other) for other in inner)
    }
    if not prefix:
        # counters and the like of a training, beside a bare state dict
        state = {name: tensor for name, tensor in state.items() if "." in name or name in _WITHOUT_DOTS}
    return Checkpoint(chosen, _unscaled(state), notes)


def _choose(file: Path, found: list[Network], weights: Weights | None) -> tuple[Network, tuple[str, ...]]:
    averaged, raw = ([n for n in found if n.averaged == wanted] for wanted in (True, False))
    wanted = {"ema": averaged, "raw": raw, None: averaged or raw}[weights]
    if not wanted:
        other = "raw" if weights == "ema" else "ema"
        raise InvalidInput(f"{file} has no {weights} weights", f"leave out --weights, or choose {other}")
    chosen, notes = wanted[0], []
    if averaged and raw:
        kind, rest = ("EMA", "raw") if chosen.averaged else ("raw", "ema")
        others = _shown((raw if chosen.averaged else averaged)[0])
        notes.append(f"the {kind} weights are taken ({_shown(chosen)}); --weights {rest} takes {others}")
    elif averaged:
        notes.append(f"the EMA weights are taken ({_shown(chosen)}), there are no others")
    if len(wanted) > 1:
        left = ", ".join(map(_shown, wanted[1:]))
        notes.append(f"{_shown(chosen)} is taken of several networks of this kind; left out: {left}")
    return chosen, tuple(notes)


def _shown(network: Network) -> str:
    return network.prefix.rstrip(".") or "those without a prefix"


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file by the path of keys that leads to them."""
    if file.is_dir():
        inner = [file / name for name in ("transformer", "vae") if (file / name / "config.json").is_file()]
        if inner:
            raise CheckpointError(f"{file} holds several parts of a model", f"give one: {inner[0]}")
        for path in weight_files(file):
            yield from load_file(path).items()
    elif not file.is_file():
        raise CheckpointError(f"{file} is no file", "give a .pth or .safetensors, or a component's folder")
    elif identify(file).words.startswith(SAFETENSORS):
        yield from load_file(file).items()
    else:
        # several names may share a storage, and one value may stand for many
        room = _SHARED * file.stat().st_size
        for name, tensor in _walk(_unpickled(file), "", _DEPTH):
            room -= tensor.nbytes
            if room < 0:
                what = f"the tensors of {file} are more than {_SHARED} times the file"
                raise CheckpointError(what, "save each with all of its own values")
            yield name, tensor


def _walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise CheckpointError(
                f"{name or 'the file'} is no plain tensor but {_layout(value)}",
                "save it with all of its values",
            )
        yield name, value.detach()
    elif isinstance(value, Mapping) and depth:
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _walk(inner, f"{name}.{key}" if name else key, depth - 1)


def _layout(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "one without values (meta)"
    return "a quantized one" if tensor.is_quantized else f"a {str(tensor.layout).removeprefix('torch.')} one"


def _unpickled(file: Path) -> Any:
    asked: list[str] = []
    try:
        check_archive(file)
        asked = pickled_objects(file)
        stand_ins: list[Any] = [(_stand_in(name), name) for name in asked if _IGNORED.fullmatch(name)]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            # of protocols that a file has, which is no concern of its user
            warnings.simplefilter("ignore")
            if file.suffix == ".safetensors":
                # a name that torch believes
                with open_regular(file) as content:
                    return torch.load(content, map_location="cpu", weights_only=True)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    # on damaged bytes the unpickler fails with whatever the step it is at raises
    except Exception as error:
        if is_memory(error):
            raise
        foreign = [n for n in asked if not _IGNORED.fullmatch(n) and not n.startswith(_TENSORS)]
        known, hint = explain(file, "it is damaged, or holds more than tensors; take it from its publisher")
        if foreign and not known:
            raise CheckpointError(
                f"cannot read {file}: it holds {foreign[0]}, which is no tensor and may run code",
                "take it from its publisher, or save its state dict alone, as .safetensors",
            ) from error
        raise CheckpointError(f"cannot read {file}{known or f': {_reason(error)}'}", hint) from error


def _stand_in(name: str) -> object:
    """What takes an object's place: of the type that the unpickler lets be filled as that object is."""
    if name == "collections.defaultdict":
        return _empty
    return OrderedDict if name.endswith("Dict") else _Ignored


def _empty(factory: object = None) -> dict[object, object]:
    return {}


def _reason(error: Exception) -> str:
    """One line without the advice of torch, which is to run what the file holds."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).rpartition("WeightsUnpickler error:")[2]
    return next(iter(text.split("\n\n")[0].split("Please use")[0].strip().splitlines()), type(error).__name__)


def _unscaled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of scaled FP8 files multiplied by their scales, in bf16; others as they are.

    Raises:
        CheckpointError: a scale is neither one number nor one for each row.
    """
    scaled = {name.removesuffix(".weight") for name, tensor in state.items() if is_float8(tensor)}
    beside = {f"{stem}{end}" for stem in scaled for end in (*FP8_SCALES, ".input_scale")}
    result = {}
    for name, tensor in state.items():
        if name in beside or name.endswith(FP8_SCALES[0]) or _SCALED.fullmatch(name):
            continue
        stem = name.removesuffix(".weight")
        scale = next((state[f"{stem}{end}"] for end in FP8_SCALES if f"{stem}{end}" in state), None)
        if scale is not None and is_float8(tensor):
            tensor = (tensor.float() * _per_row(name, tensor, scale)).to(torch.bfloat16)
        result[name] = tensor
    return result


def _per_row(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight's scale in fp32, in a shape that multiplies it."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    if scale.numel() == len(weight) == len(scale):
        return scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    raise CheckpointError(
        f"{name} is {list(weight.shape)} in FP8, its scale {list(scale.shape)}",
        "scales of a whole weight or of its rows are read; give the model in 16 bit",
    )
