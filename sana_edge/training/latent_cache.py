"""Latents of pictures, computed once: sharded safetensors by the autoencoder's and the files' checksums."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from sana_edge.errors import CheckpointError, SanaError
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.store.weights import save_state
from sana_edge.system.json_values import Reader, parse
from sana_edge.system.regular import append_regular, open_regular

from .buckets import Size, bucket, fit
from .imagefolder import BROKEN, Entry, LeftOut, checksum, open_picture

# pictures of a shard; what a killed process loses at most
SHARD = 256
# pixels that are encoded at a time: 32 pictures of 256 px, one of 2048 px at least
_PIXELS = 32 * 256**2


@dataclass(frozen=True)
class Picture:
    """A picture that has a latent: its checksum, and its size in pixels as it is trained."""

    key: str
    size: Size


class LatentCache:
    """Latents (C, h, w) fp16, unscaled, of one autoencoder at one resolution, in ``latents-*.safetensors``.

    A shard is whole or not there; what is in one is not computed again, whatever the picture's name.
    """

    def __init__(self, folder: Path, autoencoder: str, resolution: int, cell: int) -> None:
        """Open or begin a cache.

        Args:
            folder: of all caches.
            autoencoder: its checksum.
            cell: pixels per latent cell along a side.

        Raises:
            CheckpointError: a shard is damaged.
        """
        self.folder = folder / f"{autoencoder[:16]}-{resolution}px"
        self.resolution, self.cell = resolution, cell
        # safe_open by the names in it
        self._shards: dict[str, Any] = {}
        self._files = _Checksums(self.folder / "files.jsonl")
        self.refresh()

    def refresh(self) -> None:
        """Read which latents there are; other processes may have added some."""
        self._files.read()
        for path in sorted(self.folder.glob("latents-*.safetensors")):
            try:
                # a pipe would wait for its writer
                open_regular(path).close()
                shard: Any = safe_open(path, "pt")
            except Exception as error:
                raise CheckpointError(f"{path} is damaged: {error}", "remove it; it is made again") from error
            shapes = {len(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118 (no dict)
            if shapes - {3}:
                raise CheckpointError(
                    f"{path} is damaged: it holds no latents", "remove it; it is made again"
                )
            self._shards.update(dict.fromkeys(shard.keys(), shard))

    def __getitem__(self, key: str) -> Tensor:
        latent: Tensor = self._shards[key].get_tensor(key)
        return latent

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def size(self, key: str) -> Size:
        """A picture's height and width in pixels."""
        _, h, w = self._shards[key].get_slice(key).get_shape()
        return h * self.cell, w * self.cell

    def fill(
        self,
        entries: Sequence[Entry],
        load: Callable[[], Autoencoder],
        left_out: LeftOut,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Encode what is missing of this process' share of the entries; the model is loaded where any is.

        Broken pictures are left out, and named there. Ctrl-C writes what has been encoded first.

        Raises:
            SanaError: a shard cannot be written; those before it stay.
        """
        bar = tqdm(
            entries[rank::ranks], unit="picture", desc="latents", disable=rank > 0 or not sys.stderr.isatty()
        )
        load = functools.cache(load)
        shard: dict[str, Tensor] = {}
        waiting: dict[Size, dict[str, Tensor]] = {}
        try:
            for key, pixels in self._missing(bar, left_out):
                if key in shard:
                    continue
                same = waiting.setdefault((pixels.shape[1], pixels.shape[2]), {})
                same[key] = pixels
                if len(same) * pixels[0].numel() >= _PIXELS:
                    shard |= _encode(load(), waiting.pop((pixels.shape[1], pixels.shape[2])))
                if len(shard) >= SHARD:
                    self._write(shard)
                    shard = {}
            for same in waiting.values():
                shard |= _encode(load(), same)
        finally:
            if shard:
                self._write(shard)
            self._files.save()

    def lookup(self, entries: Sequence[Entry]) -> list[tuple[Entry, Picture]]:
        """The entries that have a latent, with it."""
        found = ((entry, self._files.known(entry.path)) for entry in entries)
        return [
            (entry, Picture(key, self.size(key))) for entry, key in found if key is not None and key in self
        ]

    def _missing(self, entries: Any, left_out: LeftOut) -> Iterator[tuple[str, Tensor]]:
        """Checksums and pixels (3, H, W) uint8 of entries without a latent."""
        for entry in entries:
            try:
                key = self._files.of(entry.path)
                if key in self:
                    continue
                image = open_picture(entry.path)
                size = bucket(image.width, image.height, self.resolution, self.cell)
                left_out.enlarged += image.width < size[1] or image.height < size[0]
                pixels = torch.from_numpy(np.array(fit(image, size))).permute(2, 0, 1)
            except BROKEN as error:
                left_out.broken[entry.path.name] = " ".join(str(error).split())
                continue
            yield key, pixels

    def _write(self, shard: dict[str, Tensor]) -> None:
        name = f"latents-{min(shard)}.safetensors"
        save_state(shard, self.folder / name)
        self._shards.update(dict.fromkeys(shard, safe_open(self.folder / name, "pt")))


class _Checksums:
    """Checksums of files, kept while size and time of change stay the same; one line of JSON for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, tuple[int, int, str]] = {}
        self._new: list[str] = []

    def of(self, file: Path) -> str:
        """The checksum, computed where it is not known."""
        return self.known(file) or self._add(file)

    def known(self, file: Path) -> str | None:
        """The checksum, None where it is not known or the file has changed."""
        try:
            status = file.stat()
        except OSError:
            return None
        entry = self._known.get(str(file))
        return entry[2] if entry and entry[:2] == (status.st_size, status.st_mtime_ns) else None

    def save(self) -> None:
        """Append what is new; several processes may."""
        if not self._new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with append_regular(self.path) as file:
                file.write(("\n" + "\n".join(self._new) + "\n").encode())
        except OSError as error:
            raise SanaError(f"cannot write {self.path}: {error}", "check the free space") from error
        self._new.clear()

    def _add(self, file: Path) -> str:
        status = file.stat()
        entry = (status.st_size, status.st_mtime_ns, checksum(file))
        self._known[str(file)] = entry
        self._new.append(json.dumps([str(file), *entry]))
        return entry[2]

    def read(self) -> None:
        """Read what is kept."""
        try:
            with open_regular(self.path) as file:
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            # checksums are computed again
            return
        for line in lines:
            try:
                name, size, changed, key = Reader("").convert(parse(line), tuple[str, int, int, str])
            except (ValueError, CheckpointError):
                # a line that a killed process cut: its file is read once more
                continue
            self._known[name] = (size, changed, key)


@torch.no_grad()
def _encode(model: Autoencoder, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latents of pictures of one size."""
    device = next(model.parameters()).device
    batch = torch.stack(list(pictures.values())).to(device).float() / 127.5 - 1
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        latents = model.encode(batch)
    return dict(zip(pictures, latents.half().cpu().contiguous().unbind(), strict=True))
