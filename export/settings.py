"""What a caller asks of `sana_edge.export.onnx.export`, checked before anything heavy is loaded or run."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from sana_edge.errors import InvalidInput
from sana_edge.request.bounds import plain
from sana_edge.request.request import Request
from sana_edge.store.manifest import Dtype

DTYPES: tuple[Dtype, ...] = typing.get_args(Dtype)


@dataclass(frozen=True)
class Settings:
    """How graphs are made.

    Attributes:
        dtype: what the denoiser computes in where it is not INT8. The text encoder and the decoder overflow
            in fp16 and are fp32 then.
        size: (width, height) in pixels for graphs that know no other; None for any.
        int8: of a bundled model take its package; a package is INT8 anyway.
        encoder: also a graph of the autoencoder's encoder, for pictures to start from.
        verify: run every graph in onnxruntime beside the torch module.

    Raises:
        InvalidInput: an unknown dtype, or a size that no model has.
    """

    dtype: Dtype = "fp32"
    size: tuple[int, int] | None = None
    int8: bool = False
    encoder: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidInput(f"unknown dtype {self.dtype!r}", f"choose {', '.join(DTYPES)}")
        object.__setattr__(self, "size", plain(self.size))
        if self.size is not None:
            # which knows what a size may be
            Request("a picture", size=self.size, exact_size=True)
