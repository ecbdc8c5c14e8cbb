"""Safetensors in and out: a component's weights from its folder, into a module, and back to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as _load_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError, DamagedWeights
from sana_edge.store import tensor_names
from sana_edge.store.folder import choose_entry, shard_names
from sana_edge.store.identify import explain
from sana_edge.store.package_tensors import keeps_fp32
from sana_edge.system import atomic
from sana_edge.system.memory import is_memory
from sana_edge.system.regular import open_regular, utf8_name

_DAMAGED = "the file is damaged or its download was interrupted; download it again"
FP8_SCALES = (".scale_weight", ".weight_scale")
"""Of scaled FP8 files, in place of ``.weight``; a package's INT8 weights have the second, too."""
# bytes of a header, which is read anew with each tensor, and that safetensors itself takes; and tensors
_LONGEST, _LARGEST, _MOST = 8 << 20, 100_000_000, 4096
_VALUES = "the weights are damaged; download the model again"
# two values in a byte, which torch cannot convert
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)


def load_state(folder: Path, *, variant: str | None = None) -> dict[str, Tensor]:
    """Read the weights of one component (``transformer/``, ``vae/`` or ``text_encoder/``) onto the CPU.

    The tensors are mapped from the file: pages are read when they are first used. FP8 tensors become fp32,
    which nothing else here has to know of; prefixes that a training put before all names are left out.

    Args:
        folder: holds one ``*.safetensors``, or shards and their index.
        variant: "fp16", "bf16" and so on; None takes the weights without a variant name, or the only
            variant where there is just one.

    Raises:
        CheckpointError: nothing to load, a missing shard, a damaged file, or only pickles.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(folder, variant=variant):
        tensors = load_file(path)
        _refuse_twice(path, state, tensors)
        state |= tensors
    names = _own_names(folder, state)
    _refuse_scaled(folder, names, lambda weight: is_float8(state[weight]))
    return {name: _widened(state[stored]) for stored, name in names.items()}


def weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    """The files that `load_state` reads; arguments and errors are the same, but the files are not opened."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing", "download the model again")
    entry = folder / choose_entry((path.name for path in folder.iterdir()), variant, str(folder))
    if entry.suffix != ".json":
        # a pipe would wait for its writer
        if not entry.is_file():
            raise CheckpointError(f"{entry} is no regular file", "download the model again")
        return [entry]
    names = shard_names(entry)
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the shard {name} that {entry.name} names", _DAMAGED)
    return [folder / name for name in names]


class StoredState(Mapping[str, Tensor]):
    """The weights of one component by name, mapped from their file anew at every access.

    What was read of a tensor leaves the memory with it, while all the tensors of `load_state` share one
    mapping for each file, which lasts as long as any of them.
    """

    def __init__(
        self, folder: Path, *, variant: str | None = None, name: Callable[[str], str | None] = str
    ) -> None:
        """Read the names; arguments and errors are those of `load_state`.

        Args:
            name: gives a tensor another name than its own, or None to leave it out.
        """
        paths: dict[str, Path] = {}
        for path in weight_files(folder, variant=variant):
            with _damage_named(path):
                _check_header(path)
                with _opened(path) as file:
                    own = list(file.keys())
            _refuse_twice(path, paths, own)
            paths |= dict.fromkeys(own, path)
            if len(paths) > _MOST:
                raise CheckpointError(f"{path.parent} has more than {_MOST} tensors, as no SANA has")
        names = _own_names(folder, paths)
        _refuse_scaled(folder, names, lambda weight: _dtype(paths[weight], weight).startswith("F8"))
        found = ((name(own), (paths[stored], stored)) for stored, own in names.items())
        # the file and the stored name
        self._places = {known: place for known, place in found if known is not None}

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        with _damage_named(path), _opened(path) as file:
            return _widened(file.get_tensor(stored))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; nothing else of it is read."""
        path, stored = self._places[name]
        with _damage_named(path), _opened(path) as file:
            return tuple(file.get_slice(stored).get_shape())

    def check_values(self) -> None:
        """See that all values are finite, and scales above 0; reads each tensor once.

        Raises:
            CheckpointError: they are not; names the file, and the first tensor as it is called there.
        """
        for name, (path, stored) in self._places.items():
            tensor = self[name]
            if not is_finite(tensor):
                raise CheckpointError(f"{path}: {stored} has NaN or infinite values", _VALUES)
            if keeps_fp32(name) and not bool((tensor > 0).all()):
                raise CheckpointError(f"{path}: {stored} has values that are not above 0", _VALUES)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Give a module the tensors of ``state``, without a copy: dtype and memory are those of ``state``.

    Suits a module built on the meta device. ``where`` is the folder or component, for messages; errors are
    those of `check_state`.
    """
    check_state(module.state_dict(), state, where=where)
    module.load_state_dict(dict(state), assign=True)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str) -> None:
    """Compare keys, shapes and kinds of numbers with those ``expected``, which may be on the meta device.

    Raises:
        CheckpointError: missing keys, unexpected keys, other shapes, or floats that are none, or the other
            way round; names the first of them.
    """
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes, kinds = list[str](), list[str]()
    for key, tensor in expected.items():
        found = state.get(key, tensor)
        if found.shape != tensor.shape:
            shapes.append(f"{key} is {tuple(found.shape)}, expected {tuple(tensor.shape)}")
        if found.is_floating_point() != tensor.is_floating_point():
            kinds.append(f"{key} is {str(found.dtype).removeprefix('torch.')}")
    lists = {"missing keys": missing, "unexpected keys": unexpected}
    lists |= {"wrong shapes": shapes, "wrong dtypes": kinds}
    problems = [f"{len(items)} {name} ({_first(items)})" for name, items in lists.items() if items]
    if problems:
        raise CheckpointError(
            f"{where} does not fit its config: {'; '.join(problems)}",
            "the weights do not belong to config.json; download the model again",
        )


def check_values(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """See that all floating-point values are finite; reads them once.

    Raises:
        DamagedWeights: they are not; names the first tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DamagedWeights(f"{where}: {name} has NaN or infinite values", _VALUES)


@contextmanager
def values_named(folder: Path, variant: str | None = None) -> Iterator[None]:
    """Let `DamagedWeights` name the file of a component, and the tensor as it is called there.

    What is computed with has other names; the file is read again only where something is wrong with it.

    Raises:
        CheckpointError: in place of `DamagedWeights`.
    """
    try:
        yield
    except DamagedWeights:
        if folder.is_dir():
            StoredState(folder, variant=variant).check_values()
        raise


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity: extremes keep both, and `isfinite` makes a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = _widened(tensor)
    return all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


def save_state(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to one safetensors file; until it is complete, ``path`` is not touched.

    Args:
        metadata: strings for the header, added to the ``format`` entry that diffusers asks for.

    Raises:
        SanaError: the file cannot be written; the message has the reason (no space, no permission).
    """
    tensors = _storable(state)
    with atomic.new_file(path, follow=False, failures=(SafetensorError,)) as temporary:
        save_file(tensors, temporary, {"format": "pt", **(metadata or {})})


def needs_clamp(config: DenoiserConfig, state: Mapping[str, Tensor]) -> bool:
    """Whether a denoiser's self-attention output must be clamped to +-65504 in every dtype.

    The fp16-trained SANA 1.0 models overflow there, were trained with the overflow clipped, and break
    without it in other dtypes. Training precision is not stored, but these models are known by what they
    lack: SANA-1.5 and Sprint have qk-norm, and the bf16-trained 1.0 models are stored in bf16. What remains
    is clamped, fp32 copies of fp16-trained weights included: the outputs of a model that does not need it
    stay far below the bound, so there the clamp changes nothing.
    """
    bf16 = any(tensor.dtype == torch.bfloat16 for tensor in state.values())
    return config.qk_norm is None and not bf16


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, mapped, in their stored dtypes.

    Raises:
        CheckpointError: it cannot be read, and what it is, if that is another thing; or a dtype is not read.
    """
    with _damage_named(path):
        _check_header(path)
        with utf8_name(path) as name:
            tensors = _load_safetensors(name)
    return {name: _unpacked(tensor) for name, tensor in tensors.items()}


def is_float8(tensor: Tensor) -> bool:
    """Whether a tensor is in one of the FP8 formats, in which nothing can be computed."""
    return tensor.is_floating_point() and tensor.itemsize == 1


def _own_names(folder: Path, stored: Iterable[str]) -> dict[str, str]:
    """`tensor_names.own_names` of a component, which are diffusers' or transformers'.

    Raises:
        CheckpointError: they are those of a checkpoint that has to be converted.
    """
    names = tensor_names.own_names(stored)
    found = tensor_names.networks(names.values())
    convert = f"`sana-edge convert {folder} --output DIR --base MODEL` makes a model folder"
    if len(found) > 1 and found[0].prefix:
        among = ", ".join(network.prefix.rstrip(".") or "one without a prefix" for network in found)
        raise CheckpointError(f"{folder} holds several networks ({among})", f"{convert} of one")
    if found and not found[0].published:
        raise CheckpointError(
            f"{folder} holds a SANA {found[0].network} in its authors' names",
            f"{convert} of it",
        )
    return names


def _refuse_scaled(folder: Path, names: Mapping[str, str], float8: Callable[[str], bool]) -> None:
    """See that no FP8 weights have scales beside them, which have to be multiplied first.

    Args:
        names: by the name in the file.
        float8: whether a weight, by that name, is in FP8.
    """
    for stored in (name for name in names if name.endswith(FP8_SCALES)):
        weight = f"{stored.rpartition('.')[0]}.weight"
        if weight in names and float8(weight):
            raise CheckpointError(
                f"{folder} holds FP8 weights with scales beside them",
                f"`sana-edge convert {folder} --output DIR --base MODEL` makes a model folder of them",
            )
        if stored.endswith(FP8_SCALES[1]):
            # a package, whose others are like it
            return


def _dtype(path: Path, name: str) -> str:
    """As safetensors calls it."""
    with _damage_named(path), _opened(path) as file:
        return str(file.get_slice(name).get_dtype())


def _refuse_twice(path: Path, before: Iterable[str], names: Iterable[str]) -> None:
    """See that no shard has what one before it has: which was meant is not known."""
    twice = next(iter(set(before) & set(names)), None)
    if twice is not None:
        what = f"{path} has {twice}, which another shard of {path.parent} has, too"
        raise CheckpointError(what, "remove the shard that is of another model, or download the model again")


def _widened(tensor: Tensor) -> Tensor:
    return _unpacked(tensor).float() if is_float8(tensor) else tensor


def _unpacked(tensor: Tensor) -> Tensor:
    if tensor.dtype == _PACKED:
        raise CheckpointError(
            f"a weight is {tensor.dtype}, which is not read", "give the model in 16 bit or FP8"
        )
    return tensor


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    # RuntimeError, ValueError: torch on lengths that are none
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if is_memory(error):
            raise
        size = path.stat().st_size if path.exists() else 0
        known, hint = explain(path, _DAMAGED)
        raise CheckpointError(f"cannot read {path} ({size} bytes){known or f': {error}'}", hint) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with utf8_name(path) as name, safe_open(name, framework="pt") as file:
        yield file


def _check_header(path: Path) -> None:
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if _LONGEST < length <= _LARGEST:
        raise ValueError(f"its header has {length} bytes, at most {_LONGEST} are read")


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, which the format has no way to say."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        tensors[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors


def _first(items: Iterable[str], count: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
