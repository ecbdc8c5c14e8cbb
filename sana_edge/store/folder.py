"""What a model folder in diffusers layout holds: its components, the names of weight files, what is missing.

A component's weights may be there several times, as variants ("fp16", "bf16" or without a name), each in
one file or in shards with an index. This module knows the names only and needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sana_edge.errors import CheckpointError, ModelNotFound
from sana_edge.store.identify import explain, identify, lora_files
from sana_edge.store.tensor_names import is_lora_file
from sana_edge.system import json_values

WEIGHT_COMPONENTS = ("transformer", "vae", "text_encoder")
# diffusers' pipelines whose parts are read, and what of them is not done
PIPELINES = {
    "SanaPipeline": "",
    "SanaSprintPipeline": "",
    "SanaPAGPipeline": "perturbed-attention guidance is not done, only plain guidance",
    "SanaSprintImg2ImgPipeline": "",
    "SanaControlNetPipeline": "its ControlNet is not used",
}

# see `sana_edge.store.preview_map`
PREVIEW_MAP = "preview.json"

_CONFIGS = (
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    *(f"{component}/config.json" for component in WEIGHT_COMPONENTS),
)
# of a tokenizer and an image processor of transformers
_PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")

_STEM = r"(?:diffusion_pytorch_model|model)"
_VARIANT = r"[A-Za-z0-9_]+"
_SINGLE = re.compile(rf"{_STEM}(?:\.({_VARIANT}))?\.safetensors")
# older files name the variant before "index", newer ones after it
_INDEX = re.compile(rf"{_STEM}\.safetensors(?:\.({_VARIANT}))?\.index(?:\.({_VARIANT}))?\.json")
_SHARD = re.compile(rf"{_STEM}(?:\.({_VARIANT}))?-\d{{5}}-of-\d{{5}}(?:\.({_VARIANT}))?\.safetensors")

# where a folder has several, half the size of fp32 and made for it
_PREFERRED_VARIANTS = ("bf16", "fp16")


def weight_entries(names: Iterable[str]) -> dict[str | None, str]:
    """The file to open for each variant among a component's file names: a shard index or a single file.

    The key None is the weights without a variant name, or a single file of another name.
    Where both forms are there, the index is taken for
    diffusers' stem and the single file for transformers', as the two libraries do.
    """
    entries: dict[str | None, str] = {}
    names = sorted(names)
    for name in names:
        single, index = _SINGLE.fullmatch(name), _INDEX.fullmatch(name)
        if single:
            variant = single.group(1)
            if variant not in entries or name.startswith("model"):
                entries[variant] = name
        elif index:
            variant = index.group(1) or index.group(2)
            if variant not in entries or name.startswith("diffusion"):
                entries[variant] = name
    others = [name for name in names if name.endswith(".safetensors") and not is_lora_file(name)]
    # fine-tunings go by names of their own
    return entries or ({None: others[0]} if len(others) == 1 and not _SHARD.fullmatch(others[0]) else {})


def choose_entry(names: Iterable[str], variant: str | None, where: str) -> str:
    """The name of the file to open for ``variant``.

    Without a variant the unnamed weights are taken, or the only variant that is there.

    Raises:
        CheckpointError: no such weights; says which variants there are, or that there are only pickles.
    """
    names = list(names)
    entries = weight_entries(names)
    if variant in entries:
        return entries[variant]
    if variant is None and len(entries) == 1:
        return next(iter(entries.values()))
    if entries:
        known = ", ".join(sorted(str(name or "without a variant") for name in entries))
        missing = f"{variant} weights" if variant else "weights without a variant"
        raise CheckpointError(f"{where} has no {missing}", f"there are: {known}")
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"{where} has only pickled weights ({pickles[0]}), which may run code when they are loaded",
            "use safetensors; `sana-edge convert` translates an NVlabs .pth",
        )
    others = sorted(name for name in names if name.endswith(".safetensors") and not is_lora_file(name))
    if others and all(map(_SHARD.fullmatch, others)):
        whole = others[0].partition("-00")[0]
        raise CheckpointError(
            f"{where} has {len(others)} shards, but not their index {whole}.safetensors.index.json",
            "download the model again",
        )
    if others:
        stem = "model" if Path(where).name == "text_encoder" else "diffusion_pytorch_model"
        raise CheckpointError(
            f"{where} has several weights ({', '.join(others[:3])}), none of the name that is expected",
            f"call the one that is meant {stem}.safetensors",
        )
    raise CheckpointError(f"{where} has no .safetensors weights", "download the model again")


def component_variant(names: Iterable[str], wanted: str | None) -> str | None:
    """The variant of one component when ``wanted`` is asked of the whole model.

    As in diffusers, a component without that variant falls back to its weights without a name. Without a
    wish a 16-bit variant is preferred.
    """
    entries = weight_entries(names)
    for variant in (wanted,) if wanted else _PREFERRED_VARIANTS:
        if variant in entries:
            return variant
    return next(iter(entries)) if len(entries) == 1 else None


def needed_files(names: Iterable[str], variant: str | None) -> list[str]:
    """The files of a repository (paths with slashes) that the pipeline reads: one variant, no duplicates."""
    names = sorted(names)
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    alone = ("model_index.json", PREVIEW_MAP, "scheduler/scheduler_config.json")
    files: list[str] = [name for name in alone if name in names]
    files += [
        f"tokenizer/{file}" for file in folders.get("tokenizer", []) if file.endswith((".json", ".jinja"))
    ]
    for component in WEIGHT_COMPONENTS:
        here = folders.get(component, [])
        chosen = component_variant(here, variant)
        entry = weight_entries(here).get(chosen)
        wanted = {"config.json", "generation_config.json", entry}
        if entry and _INDEX.fullmatch(entry):
            shards = ((file, _SHARD.fullmatch(file)) for file in here)
            wanted |= {
                file for file, match in shards if match and (match.group(1) or match.group(2)) == chosen
            }
        files += [f"{component}/{file}" for file in here if file in wanted]
    return files


def foreign_parts(folder: Path) -> tuple[str, ...]:
    """Sentences about what a model folder has, or was made for, that has no effect here."""
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    missing = PIPELINES.get(str(pipeline), "")
    notes = [f"the model was made for {pipeline}: {missing}"] if missing else []
    lora = [path.relative_to(folder).as_posix() for path in lora_files(folder)]
    if lora:
        notes.append(f"{', '.join(lora)} is a LoRA, which is not applied: merge it into the weights")
    return tuple(notes)


def component_files(names: Iterable[str]) -> list[str]:
    """`needed_files` of a repository that holds one component alone, with its processor if it has one."""
    here = [name for name in names if "/" not in name]
    inside = needed_files((f"vae/{name}" for name in here), None)
    return [*(name.removeprefix("vae/") for name in inside), *(n for n in here if n in _PROCESSOR)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable or not a JSON object; the message names it.
    """
    try:
        data = json_values.read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", "download the model again") from None
    except (OSError, ValueError) as error:
        known, hint = explain(path, "download the model again")
        raise CheckpointError(f"cannot read {path}{known or f': {error}'}", hint) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object", "download the model again")
    return data


def read_text(path: Path, most: int) -> str:
    """A JSON file's text, in whichever encoding JSON may have, without a byte order mark.

    Raises:
        OSError, ValueError: it cannot be read, or has more than ``most`` bytes.
    """
    content = json_values.read_bounded(path, most)
    return content.decode(json.detect_encoding(content))


def shard_names(index: Path) -> list[str]:
    """The shards that an index file names, in order.

    Raises:
        CheckpointError: the index is damaged or names a file outside of its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", "download the model again")
    names = sorted(
        {name if isinstance(name, str) else json_values.shown(name) for name in weight_map.values()}
    )
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            shown = json_values.shown(name)
            raise CheckpointError(f"{index} names {shown}, which is not a .safetensors file beside it")
    return names


def check_component(folder: Path) -> None:
    """Check that a folder holds the config and weights of one component.

    Raises:
        CheckpointError: a file is missing.
    """
    if not (folder / "config.json").is_file():
        found = identify(folder)
        raise CheckpointError(f"{folder} has no config.json: it is {found.words}", found.hint)
    _check_weights(folder, None)


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Check that a folder holds a whole SANA pipeline with weights for ``variant``; reads no weights.

    Raises:
        ModelNotFound: there is no such folder.
        CheckpointError: it is no SANA pipeline, or a file is missing; the message names the first.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"no folder {folder}", "check the path")
    if not (folder / "model_index.json").is_file():
        found = identify(folder)
        raise CheckpointError(f"{folder} has no model_index.json: it is {found.words}", found.hint)
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        shown = pipeline if isinstance(pipeline, str) and len(pipeline) < 80 else json_values.shown(pipeline)
        raise CheckpointError(f"{folder} holds a {shown}, expected one of {', '.join(PIPELINES)}")
    for name in _CONFIGS:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}", "download the model again")
    for component in WEIGHT_COMPONENTS:
        _check_weights(folder / component, variant)


def _check_weights(component: Path, variant: str | None) -> None:
    here = [path.name for path in component.iterdir()]
    entry = choose_entry(here, component_variant(here, variant), str(component))
    shards = shard_names(component / entry) if entry.endswith(".json") else []
    missing = [name for name in shards if name not in here]
    if missing:
        raise CheckpointError(f"{component} lacks the shard {missing[0]}", "download the model again")
