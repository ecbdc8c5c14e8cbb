"""Decodes recorded as CUDA graphs, one for each size that is decoded again and again."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from sana_edge.errors import OutOfMemory
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.torch_runtime.cuda_graph import Recorder, StepGraph

# sizes whose graphs are kept, such as those of a preview and of a picture
KEPT = 2


class DecodeGraphs:
    """The decodes of an autoencoder that never waits for the device; not for two threads at once.

    A size is recorded when it comes for the second time, which takes as long as three decodes: a picture
    alone would not get that back.
    """

    def __init__(self, autoencoder: LatentDecoder, recorder: Recorder) -> None:
        self._autoencoder, self._recorder = autoencoder, recorder
        self._graphs: OrderedDict[torch.Size, StepGraph] = OrderedDict()
        # how often each size came; what is too large to record never counts
        self._came: dict[torch.Size, int] = {}

    def recorded(self, latent: Tensor) -> bool:
        """Whether a latent's size has a graph, and so the memory that its decode takes."""
        return latent.shape in self._graphs

    def takes(self, latent: Tensor, *, room: bool) -> bool:
        """Whether this decode is one to record or to replay; it is counted.

        Args:
            room: whether there is memory for a graph to keep.
        """
        came = self._came[latent.shape] = self._came.get(latent.shape, 0) + 1
        return self.recorded(latent) or (room and came > 1)

    def __call__(self, latent: Tensor) -> Tensor:
        """`LatentDecoder.decode`; the next call may overwrite the pixels."""
        graph = self._graphs.pop(latent.shape, None)
        if graph is None:
            while len(self._graphs) >= KEPT:
                self._graphs.popitem(last=False)
            decode = self._autoencoder.decode
            try:
                graph = StepGraph(
                    lambda step, _: decode(step[0]), [latent], [], self._recorder, "decoding runs"
                )
            except (torch.OutOfMemoryError, OutOfMemory):
                self._came[latent.shape] = 0
                return decode(latent)
        self._graphs[latent.shape] = graph
        return graph([latent])

    def release(self) -> None:
        """Let go of everything that was recorded."""
        self._graphs.clear()
