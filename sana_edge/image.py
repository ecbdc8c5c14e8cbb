"""A finished picture: its pixels, how they were made, and the PNG that carries both."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL.Image import fromarray
from PIL.Image import open as open_image
from PIL.PngImagePlugin import PngInfo

from sana_edge import atomic
from sana_edge.errors import InvalidInput

# keyword of the PNG text chunk that holds the metadata as JSON
METADATA_KEY = "sana_edge"


@dataclass(frozen=True, eq=False)
class Image:
    """One generated picture.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        seed: the seed its noise was drawn from.
        metadata: what is needed to make it again: prompt, negative_prompt, seed, model, steps, guidance,
            size [W, H], sampler, dtype, version; quantization where the model is INT8. JSON values only.
        timings: seconds spent in "text", "denoise" and "decode".
        notes: what the caller should know, such as a truncated prompt; usually empty.
    """

    pixels: NDArray[np.uint8]
    seed: int
    metadata: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def png(self) -> bytes:
        """Encode as PNG with the metadata in text chunks; equal pictures give equal bytes."""
        chunks = PngInfo()
        chunks.add_text(METADATA_KEY, json.dumps(self.metadata))
        # keywords of the PNG specification, shown by image viewers; a text chunk holds UTF-8 without NUL
        prompt = str(self.metadata.get("prompt", "")).replace("\0", "")
        chunks.add_itxt("Description", prompt.encode(errors="replace").decode())
        chunks.add_text("Software", f"sana-edge {self.metadata.get('version', '')}".rstrip())
        buffer = io.BytesIO()
        fromarray(self.pixels).save(buffer, format="PNG", pnginfo=chunks)
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the PNG, whole or not at all, and return where it is.

        Raises:
            InvalidInput: ``path`` exists and ``force`` is false, or is not a regular file.
            SanaError: the folder is missing or read-only, or the disk is full.
        """
        path = Path(path)
        refuse_overwrite(path, force=force)
        try:
            with atomic.new_file(path, force=force, parents=False) as temporary:
                temporary.write_bytes(self.png())
        except FileExistsError as error:
            raise _taken(path) from error
        return path


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a PNG that `Image.save` wrote.

    Raises:
        InvalidInput: the file is missing, is no image, or does not come from sana-edge.
    """
    hint = "give a PNG that sana-edge wrote and no other program has saved since"
    try:
        with open_image(path) as image:
            text = image.info.get(METADATA_KEY)
    except (OSError, PIL.UnidentifiedImageError) as error:
        raise InvalidInput(f"cannot read {path}: {error}", hint) from error
    try:
        metadata = json.loads(text or "")
    except ValueError as error:
        raise InvalidInput(f"{path} has no sana-edge metadata", hint) from error
    return dict(metadata)


def refuse_overwrite(path: Path, *, force: bool) -> None:
    """Raise `InvalidInput` where a picture may not take the place of what is at ``path``."""
    if os.path.isdir(path):
        raise InvalidInput(f"{path} is a folder", "add a file name that ends in .png")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InvalidInput(f"{path} is not a regular file", "choose another name")
    if os.path.exists(path) and not force:
        raise _taken(path)


def _taken(path: Path) -> InvalidInput:
    return InvalidInput(
        f"{path} already exists", "choose another name, or replace it with --force, in Python force=True"
    )
