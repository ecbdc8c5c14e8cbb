"""A finished picture: its pixels, how they were made, and the file that carries both."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo

from sana_edge.errors import InvalidInput, SanaError, reason
from sana_edge.request.bounds import plain
from sana_edge.system import atomic
from sana_edge.system.json_values import parse
from sana_edge.system.regular import open_regular

logger = logging.getLogger("sana_edge")

# keyword of the PNG text chunk that holds the metadata as JSON, and its mark in the EXIF of other formats
METADATA_KEY = "sana_edge"

# Pillow's names of the formats, by the end of a file's name
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
QUALITY = 95

# tags of EXIF 2.32: ImageDescription, Software, the Exif IFD and its UserComment, whose text is marked ASCII
_DESCRIPTION, _SOFTWARE, _EXIF_IFD, _COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"
# of metadata, what would read a file that a stranger names, or draw more than one picture
_FOREIGN = ("image", "mask", "images", "variations", "variation_strength", "variation_seed")
# of a PNG, which its last chunk ends
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
# a JPEG segment holds 64 KB, and the rest of the EXIF needs some of it
_MOST_EXIF = 60_000


@dataclass(frozen=True, eq=False, repr=False)
class Image:
    """One generated picture, which Jupyter shows.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        seed: the seed its noise was drawn from.
        metadata: what is needed to make it again: prompt, negative_prompt, seed, model, steps, guidance,
            size [W, H], sampler, dtype, version; quantization where the model is INT8. JSON values only.
            ``sana.generate(**image.metadata)`` makes it again.
        timings: seconds spent in "text", "denoise" and "decode".
        notes: what the caller should know, such as a truncated prompt; usually empty.
    """

    pixels: NDArray[np.uint8]
    seed: int
    metadata: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        prompt = str(self.metadata.get("prompt", ""))
        shown = repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
        return f"Image({self.pixels.shape[1]}x{self.pixels.shape[0]}, seed {self.seed}, {shown})"

    def _repr_png_(self) -> bytes:
        """What Jupyter shows."""
        return self.png()

    def pil(self) -> PIL.Image.Image:
        """The pixels as an RGB image of Pillow, which knows no metadata."""
        return PIL.Image.fromarray(self.pixels)

    def png(self) -> bytes:
        """Encode as PNG with the metadata in text chunks; equal pictures give equal bytes."""
        return self.encode("PNG")

    def encode(self, kind: str, quality: int = QUALITY) -> bytes:
        """Encode as "PNG", "JPEG" or "WEBP", with the metadata; ``quality`` (1 to 100) is of the last two.

        A JPEG has its colours in full resolution. Metadata of more than 60 kB fits only a PNG: other formats
        then have the picture alone, and the log says so.

        Raises:
            SanaError: this Pillow was built without the format.
        """
        buffer = io.BytesIO()
        options: dict[str, Any] = {"pnginfo": self._png_chunks()}
        if kind != "PNG":
            options = {"exif": self._exif(), "quality": quality}
        if kind == "JPEG":
            options["subsampling"] = 0
        try:
            self.pil().save(buffer, format=kind, **options)
        except (KeyError, OSError) as error:
            raise SanaError(f"Pillow cannot write {kind}: {error}", "choose a .png file") from error
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str], *, force: bool = False, quality: int | None = None) -> Path:
        """Write the file, whole or not at all, and return where it is.

        Args:
            path: its end says the format: .png, .jpg, .jpeg or .webp; without one it is PNG.
            quality: of .jpg and .webp, 1 to 100; 95 if left out.

        Raises:
            InvalidInput: ``path`` exists and ``force`` is false, or is not a regular file, or ends in
                something else; or ``quality`` does not go with it.
            SanaError: the folder is missing or read-only, or the disk is full.
        """
        path, quality = Path(path), plain(quality)
        kind = format_of(path, quality)
        refuse_overwrite(path, force=force)
        try:
            with atomic.new_file(path, force=force, parents=False) as temporary:
                temporary.write_bytes(self.encode(kind, QUALITY if quality is None else quality))
        except FileExistsError as error:
            raise _taken(path) from error
        return path

    @property
    def _software(self) -> str:
        return f"sana-edge {self.metadata.get('version', '')}".rstrip()

    @property
    def _description(self) -> str:
        """The prompt for other programs, which want well-formed text without NUL."""
        return str(self.metadata.get("prompt", "")).replace("\0", "").encode(errors="replace").decode()

    def _png_chunks(self) -> PngInfo:
        chunks = PngInfo()
        chunks.add_text(METADATA_KEY, json.dumps(self.metadata))
        # keywords of the PNG specification, shown by image viewers
        chunks.add_itxt("Description", self._description)
        chunks.add_text("Software", self._software)
        return chunks

    def _exif(self) -> bytes:
        exif = PIL.Image.Exif()
        exif[_SOFTWARE] = self._software
        text = json.dumps({METADATA_KEY: self.metadata}).encode("ascii")
        description = self._description.encode()
        if len(text) + len(description) <= _MOST_EXIF:
            # UTF-8, as writers do in spite of the standard's ASCII
            exif[_DESCRIPTION] = description
            exif[_EXIF_IFD] = {_COMMENT: _ASCII + text}
        else:
            logger.warning("the metadata is too long for this format and is left out; a .png has it")
        return exif.tobytes()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a file that `Image.save` wrote; `Sana.generate` takes it as ``**metadata``.

    Raises:
        InvalidInput: the file is missing, is no image, or does not come from sana-edge.
    """
    hint = "give a picture that sana-edge wrote and no other program has saved since"
    try:
        # a pipe would wait for its writer, and Pillow knows formats that start programs
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError("it is no regular file")
        with warnings.catch_warnings(), PIL.Image.open(path, formats=[*FORMATS.values()]) as image:
            # of damaged tags; what is left of them is no metadata
            warnings.simplefilter("ignore")
            metadata = metadata_of(image)
    except PIL.UnidentifiedImageError as error:
        raise InvalidInput(f"cannot read {path}: it is no PNG, JPEG or WebP, or is cut off", hint) from error
    # decoders of several formats, with errors of their own
    except Exception as error:
        raise InvalidInput(f"cannot read {path}: {reason(error)}", hint) from error
    if metadata is None:
        raise InvalidInput(f"{path} has no sana-edge metadata", hint)
    return metadata


def is_whole(path: Path) -> bool:
    """Whether a picture can be read: one that ends as its format does, which is quick, or is read."""
    try:
        with open_regular(path) as file:
            head = file.read(12)
            file.seek(-min(12, os.fstat(file.fileno()).st_size), os.SEEK_END)
            tail = file.read()
            size = file.tell()
        if head.startswith(_PNG) and tail == _PNG_END:
            return True
        if head.startswith(b"\xff\xd8") and tail.endswith(b"\xff\xd9"):
            return True
        if head.startswith(b"RIFF") and int.from_bytes(head[4:8], "little") + 8 == size:
            return True
        with PIL.Image.open(path, formats=[*FORMATS.values()]) as image:
            image.load()
    # decoders of several formats, with errors of their own
    except Exception:
        return False
    return True


def metadata_of(image: PIL.Image.Image) -> dict[str, Any] | None:
    """The metadata of an open file that `Image.save` wrote; None where it has none."""
    text = image.info.get(METADATA_KEY)
    comment = None if text else image.getexif().get_ifd(_EXIF_IFD).get(_COMMENT)
    try:
        metadata = parse(text or "") if comment is None else _of_comment(comment)
    except (ValueError, TypeError):
        return None
    if not isinstance(metadata, dict):
        return None
    return {name: value for name, value in metadata.items() if name not in _FOREIGN}


def _of_comment(comment: bytes | str) -> Any:
    text = comment if isinstance(comment, bytes) else comment.encode(errors="replace")
    found = parse(text.removeprefix(_ASCII).decode(errors="replace"))
    return found.get(METADATA_KEY) if isinstance(found, dict) else None


def format_of(path: Path, quality: int | None = None) -> str:
    """The format that a file's name asks for, by Pillow's name; checks that ``quality`` goes with it.

    Raises:
        InvalidInput: neither; says which are known.
    """
    kind = FORMATS.get(path.suffix.lower() or ".png")
    known = ", ".join(FORMATS)
    if kind is None:
        raise InvalidInput(f"{path.name} does not end in {known}", f"end the file's name in {known}")
    if quality is not None and (type(quality) is not int or not 1 <= quality <= 100):
        raise InvalidInput(
            f"quality is {quality!r}", f"choose a whole number from 1 to 100; {QUALITY} is usual"
        )
    if quality is not None and kind == "PNG":
        raise InvalidInput(f"{path.name} has no quality: PNG loses nothing", "choose a .jpg or .webp file")
    return kind


def refuse_overwrite(path: Path, *, force: bool) -> None:
    """Raise `InvalidInput` where a picture may not take the place of what is at ``path``."""
    if os.path.isdir(path):
        raise InvalidInput(f"{path} is a folder", "add a file name that ends in .png, .jpg or .webp")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise InvalidInput(f"{path} is not a regular file", "choose another name")
    if os.path.exists(path) and not force:
        raise _taken(path)


def _taken(path: Path) -> InvalidInput:
    return InvalidInput(
        f"{path} already exists", "choose another name, or replace it with --force, in Python force=True"
    )
