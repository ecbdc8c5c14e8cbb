"""Pictures with captions from a folder in the imagefolder convention, read through `datasets`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sana_edge.errors import InvalidInput, extra
from sana_edge.init_image import FORMATS, MAX_PIXELS
from sana_edge.system.regular import open_regular

from . import metadata

_CAPTION = "`python -m sana_edge.training.caption --data {} --model FOLDER` writes some"
# names of left-out files that are said, of possibly thousands
NAMED = 5


@dataclass(frozen=True)
class Entry:
    """A picture's path, its captions, none empty, and their CLIP scores, 100 cos; () without scores."""

    path: Path
    captions: tuple[str, ...]
    scores: tuple[float, ...] = ()


@dataclass
class LeftOut:
    """What of the data is not used, and why; said once, after it has been read."""

    broken: dict[str, str] = field(default_factory=dict)
    empty: int = 0
    without: list[str] = field(default_factory=list)
    enlarged: int = 0

    def lines(self) -> Iterator[str]:
        """One line for each kind."""
        if self.broken:
            first = [f"{name} ({why})" for name, why in list(self.broken.items())[:NAMED]]
            yield f"skipped {_count(len(self.broken), 'broken picture')}: {_some(first, len(self.broken))}"
        if self.without:
            named = _some(self.without[:NAMED], len(self.without))
            yield f"skipped {_count(len(self.without), 'picture')} without a caption: {named}"
        if self.empty:
            yield f"left out {_count(self.empty, 'empty caption')}"
        if self.enlarged:
            yield f"{_count(self.enlarged, 'picture')} smaller than the resolution: enlarged"


def read_entries(folder: Path, split: str, left_out: LeftOut) -> list[Entry]:
    """The captioned pictures of a split, in the order of the metadata; files are not opened yet.

    Raises:
        InvalidInput: no folder, no such split, no captions in it, or a line of metadata that is no row.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder", "give a folder with pictures and a metadata.jsonl")
    # the parser of the library ends the process where values are nested deeply
    for file in folder.rglob(metadata.NAME):
        metadata.Metadata(file)
    with extra("train", "datasets"):
        import datasets
    # it tells its publisher of each folder that is read
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        rows = datasets.load_dataset(
            "imagefolder", data_dir=str(folder), split=split, drop_labels=True, streaming=True
        ).cast_column("image", datasets.Image(decode=False))
        found = [(Path(row["image"]["path"]), row) for row in rows]
    except Exception as error:  # the library raises whatever its parsers and the file system meet
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"cannot read {folder} as an imagefolder with a split {split}: {reason}",
            "it has pictures and a metadata.jsonl whose rows have file_name and captions",
        ) from error
    entries = [entry for path, row in found if (entry := _entry(folder, path, row, left_out)) is not None]
    if not entries:
        raise InvalidInput(f"{folder} has {len(found)} pictures and no captions", _CAPTION.format(folder))
    return entries


def _entry(folder: Path, path: Path, row: metadata.Row, left_out: LeftOut) -> Entry | None:
    texts = [text.strip() for text in metadata.captions(row)]
    scores = row.get("clip_scores") or []
    kept = [number for number, text in enumerate(texts) if text]
    left_out.empty += len(texts) - len(kept)
    if not kept:
        left_out.without.append(_name(folder, path))
        return None
    scored = isinstance(scores, list) and len(scores) == len(texts) and all(map(_is_score, scores))
    chosen = tuple(float(scores[number]) for number in kept) if scored else ()
    return Entry(path, tuple(texts[number] for number in kept), chosen)


def _is_score(score: object) -> bool:
    return isinstance(score, int | float) and abs(score) < 1e4


def open_picture(path: Path) -> Image.Image:
    """Decode a picture.

    Raises:
        OSError, ValueError: it is missing, damaged or too large.
    """
    try:
        return _decoded(path)
    except (OSError, ValueError):
        raise
    # decoders of many formats, with errors of their own
    except Exception as error:
        raise ValueError(f"{error or type(error).__name__}") from error


def _decoded(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Image.Image
        # a pipe would wait for its writer, and Pillow knows formats that start programs
        if not path.is_file():
            raise ValueError("it is no regular file")
        with Image.open(path, formats=(*FORMATS, "JPEG2000", "PPM")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            image.load()
        return image


BROKEN = (OSError, ValueError)
"""What `open_picture` raises."""


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, 32 of its hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _name(folder: Path, path: Path) -> str:
    return (
        path.relative_to(folder.resolve()).as_posix() if path.is_relative_to(folder.resolve()) else str(path)
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: list[str], count: int) -> str:
    return ", ".join(names) + (", ..." if count > len(names) else "")
