"""The file that holds the large tensors of one or more ONNX graphs, each tensor once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from onnx import StringStringEntryProto, TensorProto
from torch import Tensor

from sana_edge.errors import SanaError

# what engines map into memory begins at a page; smaller tensors at a cache line
_PAGE, _LINE = 4096, 64
_MAPPED_BYTES = 1 << 16


class ExternalData:
    """Tensors streamed to one file; equal bytes are stored once, whichever graph they belong to.

    A context manager: the file has a temporary name until the block ends without an error. Models refer to
    it by its name, so they lie in its folder.

    Raises:
        SanaError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unfinished = path.with_name(f"{path.name}.unfinished")
        self._file: BinaryIO | None = None
        # (offset, length) by what the bytes are
        self._places: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> ExternalData:
        try:
            self._file = self._unfinished.open("wb")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
            if kind is None:
                self._unfinished.replace(self.path)
        except OSError as failure:
            kind = OSError
            raise _cannot_write(self.path, failure) from failure
        finally:
            if kind is not None:
                self._unfinished.unlink(missing_ok=True)

    def store(self, proto: TensorProto, tensor: Tensor) -> None:
        """Write a contiguous tensor's bytes and let ``proto`` point to them."""
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        offset, length = self._place(content)
        proto.data_location = TensorProto.EXTERNAL
        place = {"location": self.path.name, "offset": str(offset), "length": str(length)}
        proto.external_data.extend(StringStringEntryProto(key=key, value=place[key]) for key in place)

    def _place(self, content: memoryview) -> tuple[int, int]:
        digest = hashlib.blake2b(content, digest_size=32).digest()
        if digest not in self._places:
            if self._file is None:
                raise SanaError(f"{self.path} is not open", "store tensors inside its with block")
            try:
                alignment = _PAGE if content.nbytes >= _MAPPED_BYTES else _LINE
                self._file.write(bytes(-self._file.tell() % alignment))
                self._places[digest] = (self._file.tell(), content.nbytes)
                self._file.write(content)
            except OSError as error:
                raise _cannot_write(self.path, error) from error
        return self._places[digest]


def _cannot_write(path: Path, error: OSError) -> SanaError:
    reason = error.strerror or str(error)
    return SanaError(f"cannot write {path}: {reason}", "make room, or choose another folder with --output")
