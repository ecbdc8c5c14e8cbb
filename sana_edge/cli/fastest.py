"""The fastest way to draw with a large INT8 model on a CPU: OpenVINO, from an export that is made once.

OpenVINO takes a fraction of torch's time a step there (docs/engines.md). The export lies in the user's cache,
under the checksums of the package and this version, and is used by the next call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import sana_edge
from sana_edge.errors import MissingDependency, SanaError
from sana_edge.progress import Progress
from sana_edge.request.loading import LoadOptions
from sana_edge.store import hub, package
from sana_edge.store.cache import user_cache
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.manifest import is_exported
from sana_edge.system.instructions import lacks_int8

_COMPONENTS = ("transformer", "vae", "text_encoder")


def fastest(model: str, options: LoadOptions, say: Callable[[str], None], progress: Progress) -> str:
    """What to load in place of ``model``: its export for OpenVINO, or itself where torch suits it as well.

    Only where nothing else is asked for: not with a backend, a GPU, or engines.

    Args:
        say: is told what is done, and what would help.
    """
    found = suited(model, options)
    if found is None:
        return model
    if options.int8 and not any(package.read(found.path / name) for name in _COMPONENTS):
        say(
            "on this CPU a calibrated package is drawn faster, by OpenVINO: "
            f"`sana-edge quantize {model} --output DIR`, then give DIR as the model"
        )
    folder = export_place(found)
    if folder is None:
        return model
    if not is_exported(folder) and not _export(found, folder, options, say, progress):
        return model
    say(
        f"drawn by OpenVINO, which is faster than torch on this CPU, from {folder}; or choose --backend torch"
    )
    return str(folder)


def suited(model: str, options: LoadOptions) -> ResolvedModel | None:
    """The model, where OpenVINO would draw a calibrated package of it; None: torch suits it as well."""
    if options.backend != "auto" or options.device not in ("auto", "cpu") or options.engines is not None:
        return None
    # an export has its own decoder
    if options.dtype == "fp16" or options.decoder is not None or hub.exported(model) is not None:
        return None
    found = hub.resolve(
        model,
        int8=options.int8,
        offline=options.offline,
        progress=options.progress,
        revision=options.revision,
    )
    return None if _size(found.path) < _small() or not _openvino_suits(options) else found


def export_place(found: ResolvedModel) -> Path | None:
    """Where the export of a calibrated package belongs; None where it is none, or the user has no home."""
    made = [package.read(found.path / name) for name in _COMPONENTS]
    if any(part is None or part.calibration is None for part in made[:2]):
        return None
    return _place(found, [part.checksum for part in made if part is not None])


def _openvino_suits(options: LoadOptions) -> bool:
    """Whether OpenVINO is there, its INT8 sums are exact and quick on this CPU, and no GPU would be taken.

    Without INT8 products OpenVINO keeps all weights in fp32, which torch reads as INT8.
    """
    from sana_edge.engines.openvino.backend import sums_are_exact

    if lacks_int8():
        return False
    try:
        if not sums_are_exact():
            return False
    except MissingDependency:
        return False
    if options.device == "cpu":
        return True
    try:
        import torch
    except ImportError:
        return False
    return not torch.cuda.is_available()


def _small() -> int:
    from sana_edge.engines.choose import SMALL

    return SMALL


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for name in _COMPONENTS for file in (folder / name).glob("*.safetensors"))


def _place(found: ResolvedModel, checksums: list[str]) -> Path | None:
    home = user_cache()
    identity = hashlib.sha256("\n".join([sana_edge.__version__, *checksums]).encode()).hexdigest()
    name = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in found.name)
    return home / "exported" / f"{name}-{identity[:16]}" if home else None


def _export(
    found: ResolvedModel,
    folder: Path,
    options: LoadOptions,
    say: Callable[[str], None],
    progress: Progress,
) -> bool:
    """Whether the export could be made."""
    say(f"exporting {found.name} for OpenVINO, once, to {folder}; --backend torch draws without it")
    try:
        from sana_edge.export.onnx import export
        from sana_edge.export.settings import Settings

        folder.parent.mkdir(parents=True, exist_ok=True)
        # what is exported is what `export` verifies in the tests; its comparison takes longer than a picture
        settings = Settings(int8=True, verify=False)
        export(str(found.path), folder, settings, offline=options.offline, progress=progress)
    except (ImportError, OSError, SanaError) as error:
        say(f"drawn by torch, as the export failed: {error}")
        return False
    return True
