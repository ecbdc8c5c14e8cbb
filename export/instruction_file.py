"""instruction.safetensors: what the instruction before every prompt leaves in the text encoder.

The instruction is the same for every prompt and attention is causal: its keys and values are computed once,
at export, and a prompt costs only its own tokens. How a runtime reads a prompt with it, as
`sana_edge.nets.text_encoder` does (``graph`` is text_encoder.onnx):

    text = "\\n".join(CHI) + prompt.lower().strip()        # lone surrogates replaced before
    row = tokens of text, at most len(ids) + 298           # 300 minus the first and the instruction's last
    # the instruction's end may merge with the prompt into other tokens, and one token must be left to run
    known = min(length of the common beginning of row and ids, len(row) - 1)
    new = graph(ids=row[known:], past_keys=keys[:, :, :known], past_values=values[:, :, :known])
    hidden = concatenate([hidden[:, :known], new], axis=1)
    embeddings = concatenate([hidden[:, :1], hidden[:, len(ids) - 1 :]], axis=1)

A negative prompt has no instruction: at most 300 tokens, P = 0, and all of ``hidden`` are its embeddings.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.prompt import CHI
from sana_edge.system import atomic


@torch.no_grad()
def instruction(encoder: TextEncoder) -> dict[str, Tensor]:
    """The tensors of the file.

    Args:
        encoder: with the weights that the graph has, and best in fp32: what is stored is what it computes.

    Returns:
        ids int64 (P,), hidden (1, P, C), keys and values (layers, kv heads, P, d); float32.
    """
    prefix = encoder._prefix("\n".join(CHI))
    keys, values = (torch.cat([pair[which] for pair in prefix.layers]) for which in (0, 1))
    floats = {"hidden": prefix.hidden, "keys": keys, "values": values}
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in floats.items()}
    return {"ids": torch.tensor(prefix.ids), **stored}


def write_instruction(path: Path, encoder: TextEncoder) -> None:
    """Write `instruction` to a file, whole or not at all.

    Raises:
        CheckpointError: the tokenizer does not belong to the text encoder.
        SanaError: the file cannot be written.
    """
    tensors = instruction(encoder)
    with atomic.new_file(path, failures=(SafetensorError,)) as temporary:
        save_file(tensors, temporary)
