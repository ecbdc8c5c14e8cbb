"""What a file or folder is, in words, and what to do with it: what the errors of every command say.

Nothing of a file is run and no torch is needed: names of tensors are found by `headers`.
"""

from __future__ import annotations

import os
import shlex
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sana_edge.store import tensor_names
from sana_edge.store.headers import (
    MOST,
    TooMuch,
    header_length,
    open_archive,
    open_pickle,
    pickle_in,
    pickled_text,
    safetensors_header,
    stored_names,
)
from sana_edge.system.json_values import parse
from sana_edge.system.regular import open_regular

AGAIN = "download it again"
_HEAD = 512
SAFETENSORS = "a safetensors file"
# before the first letter of a text, a byte order mark among it
_BLANK = b"\xef\xbb\xbf \r\n\t"
_LAYOUT = "give a folder in diffusers layout, with transformer/, vae/, text_encoder/ and so on"
_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_LORA_HINT = "LoRA is not applied here: merge it into its model with the program that made it"

# how files begin, what they are, what to do
_BEGINNINGS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    (
        (b"version https://git-lfs", b"version https://hawser"),
        "a Git LFS pointer, not the file itself",
        "`git lfs pull` in its folder fetches the file",
    ),
    ((b"/annex/objects/",), "a git-annex pointer, not the file itself", "`git annex get` fetches the file"),
    (
        (b"<!doctype html", b"<html", b"<head", b"<body"),
        "a web page, such as the login of a network or a message of the server, not the file",
        f"open a browser to see whether the network asks for a login, then {AGAIN}",
    ),
    ((b"<?xml",), "an XML message of a server, not the file", AGAIN),
    (
        (b"GGUF",),
        "a GGUF file, which sana-edge does not read",
        "give the .safetensors or .pth that it was made of; `sana-edge quantize` makes INT8 of a model",
    ),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"(\xb5/\xfd"), "an archive", "unpack it first"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"), "a picture", ""),
)
_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_PARTIAL = (".incomplete", ".part", ".crdownload", ".download", ".aria2")


@dataclass(frozen=True)
class Identified:
    """``words`` continue "it is", ``hint`` is the next thing to do.

    Attributes:
        whole: whether it can be what it seems to be: it is neither cut off nor another file in its place.
        convertible: whether ``sana-edge convert`` takes it.
    """

    words: str
    hint: str = ""
    whole: bool = False
    convertible: bool = False


def identify(path: Path) -> Identified:
    """Look at a file or folder, whatever it is; raises nothing."""
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            return Identified("missing", AGAIN)
        if not path.is_file():
            return Identified("no regular file", "give a file or a folder")
        with open_regular(path) as file:
            return _file(path, file)
    except OSError as error:
        return Identified(f"unreadable ({error.strerror or error})", "see who may read it")
    except TooMuch as error:
        return Identified(f"no checkpoint of a network: {error}", "take it from its publisher")
    # damaged bytes make the readers of zip, pickle and JSON raise what they happen to meet
    except Exception:
        return Identified("damaged", AGAIN)


def explain(path: Path, otherwise: str) -> tuple[str, str]:
    """For the error of a file that cannot be read: ": it is ..." or nothing, and a hint.

    Args:
        otherwise: the hint where a look at the file tells no more.
    """
    found = identify(path)
    renamed = path.suffix == ".safetensors" and "safetensors" not in found.words
    if found.words == "missing" or (found.whole and not renamed):
        return "", otherwise
    return f": it is {found.words}", otherwise if found.hint in ("", AGAIN) else found.hint


def lora_files(folder: Path) -> list[Path]:
    """The low-rank updates that lie in a model folder or its components, and that nothing here applies."""
    patterns = ("*.safetensors", "*/*.safetensors")
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return [
        p for p in found if tensor_names.is_lora_file(p.name) or tensor_names.is_lora(stored_names(p)[:8])
    ]


def _file(path: Path, file: IO[bytes]) -> Identified:
    head, size = file.read(_HEAD), os.fstat(file.fileno()).st_size
    if not size:
        return Identified("an empty file", AGAIN)
    if path.suffix in _PARTIAL:
        return Identified("an unfinished download", AGAIN)
    begin = head.lstrip(_BLANK).lower()
    for beginnings, words, hint in _BEGINNINGS:
        if any(begin.startswith(text.lower()) or head.startswith(text) for text in beginnings):
            return Identified(words, hint)
    if not head.strip(b"\0"):
        return Identified("zeros, as of a download that broke off", AGAIN)
    if path.suffix == ".onnx":
        hint = "give a folder that `sana-edge export MODEL --output DIR` made"
        return Identified("an ONNX graph", hint, True)
    if head.startswith(b"PK\3\4"):
        return _zip(path, file)
    if head.lstrip(_BLANK)[:1] not in (b"{", b"[") and (
        path.suffix == ".safetensors" or header_length(head, size) is not None
    ):
        return _safetensors(path, file, size)
    if head.startswith(b"\x80"):
        file.seek(0)
        return _weights(path, "a pickled checkpoint", pickled_text(file))
    return _text(path, file, head)


def _zip(path: Path, file: IO[bytes]) -> Identified:
    if not zipfile.is_zipfile(path):
        return Identified("a .pth or zip file that is cut off", AGAIN)
    with open_archive(file) as archive:
        if not pickle_in(archive):
            return Identified("a zip archive", "unpack it first")
        with open_pickle(archive) as content:
            return _weights(path, "a checkpoint of torch", pickled_text(content))


def _safetensors(path: Path, file: IO[bytes], size: int) -> Identified:
    header = safetensors_header(file, size)
    if header is None:
        return Identified(f"a damaged safetensors file of {size} bytes, or none", AGAIN)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    offsets = (entry.get("data_offsets") for entry in entries.values() if isinstance(entry, dict))
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2]
    file.seek(0)
    expected = 8 + struct.unpack("<Q", file.read(8))[0] + max(ends, default=0)
    if size < expected:
        return Identified(f"a safetensors file that is cut off at {size} of {expected} bytes", AGAIN)
    return _weights(path, SAFETENSORS, list(entries))


def _weights(path: Path, container: str, names: Iterable[str]) -> Identified:
    """What is in a checkpoint, by the names of its tensors."""
    names = [tensor_names.plain_name(name) for name in names]
    found = tensor_names.networks(names)
    if tensor_names.is_lora(names):
        kind = "LoRA layers that are not merged" if found else "a LoRA"
        return Identified(f"{container} with {kind}", _LORA_HINT, True)
    if tensor_names.is_foreign_package(names):
        hint = "give the float model; `sana-edge quantize` makes INT8 of it"
        return Identified(f"{container} that another program quantized", hint, True)
    if any(name.startswith(("controlnet_blocks.", "controlnet.")) for name in names):
        return Identified(f"{container} of a ControlNet, which sana-edge does not run", _LAYOUT, True)
    if not found and tensor_names.is_tiny_encoder(names):
        hint = "give the file of the decoder, such as taesana_decoder.pth"
        return Identified(f"{container} with a tiny autoencoder's encoder, which is not run", hint, True)
    if not found:
        first = _short(next((name for name in names if "." in name), "none"))
        return Identified(f"{container} without a SANA network (its first tensor is {first})", _LAYOUT, True)
    network = found[0]
    if network.network == tensor_names.TEXT:
        hint = "it belongs into text_encoder/ of a model folder, as model.safetensors"
        return Identified(f"{container} with a Gemma-2 text encoder alone", hint, True)
    names_of = "diffusers'" if network.published else "its authors'"
    words = f"{container} with a SANA {network.network} in {names_of} names, one part of a model"
    hint = f"`{_convert(path)}` makes a whole model folder of it, with the rest of MODEL"
    if network.network in (tensor_names.AUTOENCODER, tensor_names.TINY):
        hint += "; or give it to a model as --decoder"
    return Identified(words, hint, True, convertible=True)


def _convert(path: Path | str) -> str:
    return f"sana-edge convert {shlex.quote(str(path))} --output DIR --base MODEL"


def _text(path: Path, file: IO[bytes], head: bytes) -> Identified:
    if head.lstrip(_BLANK)[:1] in (b"{", b"["):
        file.seek(0)
        try:
            content = parse(file.read(MOST))
        except ValueError:
            return Identified("a JSON file that is damaged or cut off", AGAIN)
        if isinstance(content, dict) and {"error", "message"} & set(content):
            message = str(content.get("error") or content.get("message"))
            return Identified(f"a server's message ({_short(message)}), not the file", AGAIN)
        if isinstance(content, dict) and "_class_name" in content:
            return Identified("a JSON description of a model", f"give its folder: {path.parent}", True)
        return Identified("a JSON file", "", True)
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        return Identified("a file of an unknown kind", "")
    if not all(c.isprintable() or c.isspace() for c in text):
        return Identified("a file of an unknown kind", "")
    return Identified(f"a text file ({_short(text)})", AGAIN)


def _short(text: str) -> str:
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _folder(folder: Path) -> Identified:
    names = {path.name for path in folder.iterdir()}
    if not names:
        return Identified("an empty folder", _LAYOUT)
    if "manifest.json" in names:
        words = "an exported folder, which `sana-edge generate` runs"
        return Identified(words, "give the model that it was made of", "model_index.json" not in names)
    if "model_index.json" in names:
        return Identified("a model folder in diffusers layout", "", True)
    if any(name.endswith(".onnx") for name in names):
        return Identified("ONNX graphs without their manifest.json", "copy the whole exported folder")
    weights = sorted(name for name in names if name.endswith(_WEIGHTS))
    if "adapter_config.json" in names or any(map(tensor_names.is_lora_file, weights)):
        return Identified("the folder of a LoRA", _LORA_HINT)
    if "config.json" in names:
        hint = f"{folder.name}/ is one component; give the folder above it"
        return Identified("one component of a model", hint)
    here = [name for name in _COMPONENTS if name in names]
    if here in (["transformer"], ["vae"]):
        hint = f"convert again with --base, which adds the other parts: `{_convert('FILE')}`, MODEL a whole"
        hint += " SANA of the same family, such as sana-1.6b-1024"
        return Identified(f"{here[0]}/ alone, as `sana-edge convert` writes it without --base", hint)
    if here:
        return Identified(f"a part of a model ({', '.join(f'{name}/' for name in here)})", f"{AGAIN}, whole")
    if "refs" in names or "snapshots" in names:
        hint = "give the repository's name, or a folder in its snapshots/"
        return Identified("a repository of the download cache", hint)
    if weights:
        hint = f"an NVlabs .pth must go through `{_convert(folder / weights[0])}` first"
        return Identified(f"a folder of checkpoints ({weights[0]})", hint)
    if inner := [name for name in sorted(names) if (folder / name / "model_index.json").is_file()]:
        return Identified("a folder with model folders in it", f"give {folder / inner[0]}")
    return Identified("no model folder", _LAYOUT)
