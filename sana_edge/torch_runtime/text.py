"""The text encoder on a backend: where Gemma-2 runs on the CUDA kernels, prompts are padded to a few lengths.

Each length is recorded once as a CUDA graph, behind each instruction; causal attention never sees padding.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.fused import gemma
from sana_edge.nets.text_encoder import KeysValues, TextEncoder
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.cuda_graph import Recorder, StepGraph

logger = logging.getLogger("sana_edge")

# tokens that prompts are padded to
LENGTHS = (32, 64, 128, 300)
# lengths behind the instruction, and without one, as negative prompts are
_KEPT = 2 * len(LENGTHS)


def load_text_encoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    variant: str | None = None,
    int8: bool = False,
) -> TextEncoder:
    """`TextEncoder.load`, on a backend of `sana_edge.fused.backends`; its ``note`` says why not.

    Raises:
        CheckpointError: as there.
    """
    fused = backend == "cuda"
    encoder = TextEncoder.load(folder, dtype=dtype, device=device, variant=variant, int8=int8, fused=fused)
    if not fused:
        return encoder
    refused = gemma.refusal(encoder.model)
    if refused:
        encoder.note = f"text is encoded by torch, not by the CUDA kernels: {refused}"
        logger.warning(encoder.note)
        return encoder
    recorder = cuda_graph.CudaGraphs(device) if device.type == "cuda" else cuda_graph.eager
    encoder.network = RecordedGemma(gemma.FusedGemma(encoder.model, backend), recorder)
    return encoder


class RecordedGemma:
    """A `TextNetwork` of a `FusedGemma`, with the graphs of the lengths used last; one text at a time."""

    def __init__(self, network: gemma.FusedGemma, recorder: Recorder) -> None:
        self._network, self._recorder = network, recorder
        # by length and by the prefix, which the graph keeps
        self._graphs: OrderedDict[tuple[int, int], tuple[KeysValues, StepGraph]] = OrderedDict()

    @torch.inference_mode()
    def instruct(self, ids: Tensor) -> tuple[Tensor, KeysValues]:
        """See `TextNetwork`."""
        layers: KeysValues = []
        return self._network.hidden_states(self._network.embed(ids), [], self._count(0), layers), layers

    @torch.inference_mode()
    def read(self, ids: Tensor, past: KeysValues, known: int) -> Tensor:
        """See `TextNetwork`."""
        count, tokens, network = self._count(known), ids.shape[1], self._network
        length = next((length for length in LENGTHS if length >= tokens), None)
        if length is None or len(ids) > 1:
            return network.hidden_states(network.embed(ids), past, count)
        rows = F.pad(network.embed(ids), (0, 0, 0, length - tokens))
        return self._graph(length, past, [rows, count])([rows, count])[:, :tokens].clone()

    def _count(self, known: int) -> Tensor:
        return torch.tensor(known, dtype=torch.int32, device=self._network.device)

    def _graph(self, length: int, past: KeysValues, example: Sequence[Tensor]) -> StepGraph:
        network, key = self._network, (length, id(past) if past else 0)

        def run(step: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
            return network.hidden_states(step[0], past, step[1])

        kept = self._graphs.pop(key, None)
        # what could not be recorded may be now
        if kept is None or kept[1].note:
            while len(self._graphs) >= _KEPT:
                self._graphs.popitem(last=False)
            kept = past, StepGraph(run, example, [], self._recorder, what="text is encoded")
        self._graphs[key] = kept
        return kept[1]

    def release(self) -> None:
        """Let go of everything that was recorded."""
        self._graphs.clear()
