"""How fast this machine is at a model's shapes: one layer of each kind, with weights of no meaning, is timed.

The layers are those that would run, float or INT8. What they take grows with tokens and pixels, so that a
small picture tells of a large one.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sana_edge.config import DenoiserConfig
from sana_edge.int8.text_linear import WeightOnlyLinear, quantize_weight
from sana_edge.nets.autoencoder_blocks import Upsample
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.quantize import quantize_decoder, quantize_denoiser
from sana_edge.nets.text_context import TextContext
from sana_edge.nets.text_weights import text_targets
from sana_edge.nets.tiny_autoencoder import latent_decoder
from sana_edge.plan.memory import Work
from sana_edge.plan.model import Facts
from sana_edge.store.tiny_autoencoder import DecoderConfig, TinyAutoencoderConfig
from sana_edge.torch_runtime.device import DTYPES

# products of a block of the denoiser that are timed, and cells of a side that are decoded
_PRODUCTS = 12e9
_CELLS = 5
# of a usual prompt
PROMPT_TOKENS = 30
# of one layer of the denoiser or the text encoder
_SECONDS = 0.3
# the largest weight of a row is so many times the mean of their sizes
_OUTLIER = 5


@torch.inference_mode()
def seconds(
    facts: Facts, work: Work, *, dtype: str, int8: bool, device: torch.device, instruction: int
) -> dict[str, float]:
    """Seconds for "text", a "step" and "decode" of a picture, of this machine's torch.

    Args:
        dtype: short name of the denoiser's, never "auto".
        int8: a package, or made INT8 while it is loaded.
        instruction: tokens in front of the first prompt, which are read once.
    """
    other = torch.float32 if dtype == "fp32" else torch.bfloat16
    return {
        "text": _text(facts, other, int8, device, instruction, work.guided),
        "step": _step(facts.denoiser, work, DTYPES[dtype], int8, device),
        "decode": _decode(facts.decoder, work, other, int8, device),
    }


def _step(config: DenoiserConfig, work: Work, dtype: torch.dtype, int8: bool, device: torch.device) -> float:
    """One block and what is around it, on as many rows of the picture as are soon done."""
    with torch.device("meta"):
        denoiser = Denoiser(dataclasses.replace(config, num_layers=1))
    block = denoiser.get_submodule("blocks.0")
    weights = sum(weight.numel() for name, weight in block.named_parameters() if "kv" not in name)
    batch = 2 if work.guided else 1
    rows = max(min(work.height, int(_PRODUCTS / (weights * batch * work.width))), 1)
    _fill(denoiser, dtype, device)
    if int8:
        quantize_denoiser(denoiser)
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    latent = torch.randn(batch, config.in_channels, rows, work.width, device=device)
    tables = Modulation(torch.full((1, 6, config.dim), 0.5, **like), torch.ones(2, config.dim, **like))
    shape = config.num_cross_attention_heads, PROMPT_TOKENS, config.cross_attention_head_dim
    keys = torch.randn(1, *shape, **like)
    read: tuple[KeysValues | Constant, ...] = (KeysValues(keys, keys, None),)
    if work.guided:
        read = (Constant(torch.zeros(1, 1, config.dim, **like)), *read)
    spent: list[float] = []

    def run() -> None:
        (_, inside), (_, all_) = _blocks_timed(
            [block], lambda: denoiser(latent, tables, TextContext((read,))), device
        )
        spent.append(all_ + inside * (config.num_layers - 1))

    _timed(run, device)
    return statistics.median(spent[1:]) * work.height / rows


def _decode(config: DecoderConfig, work: Work, dtype: torch.dtype, int8: bool, device: torch.device) -> float:
    """A small picture through one block of each stage, each counted as often as there are."""
    small, counts = config, [1] * 64
    if not isinstance(config, TinyAutoencoderConfig):
        layers = config.decoder_layers_per_block
        small = dataclasses.replace(config, decoder_layers_per_block=tuple(min(n, 1) for n in layers))
        counts = [n for n in reversed(layers) if n]
    with torch.device("meta"):
        decoder = latent_decoder(small)
    _fill(decoder, dtype, device)
    if int8:
        quantize_decoder(decoder)
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    height, width = min(work.height, _CELLS), min(work.width, _CELLS)
    latent = torch.randn(1, config.latent_channels, height, width, dtype=dtype, device=device)
    # first it is made ready: weights are packed
    decoder.decode(latent)
    spent = _blocks_timed(decoder.blocks(), lambda: decoder.decode(latent), device)
    blocks = [found for block, found in spent[:-1] if block is not None and not isinstance(block, Upsample)]
    once = spent[-1][1] - sum(blocks)
    each = sum(n * found for n, found in zip(counts, blocks, strict=False))
    return (once + each) * work.height * work.width / (height * width)


def _blocks_timed(
    blocks: Sequence[nn.Module], run: Callable[[], Any], device: torch.device
) -> list[tuple[nn.Module | None, float]]:
    """Seconds of each block, and at the end, with None, of the whole call."""
    spent: list[tuple[nn.Module | None, float]] = []
    started = 0.0

    def before(block: nn.Module, _: object) -> None:
        nonlocal started
        _wait(device)
        started = time.perf_counter()

    def after(block: nn.Module, _: object, __: object) -> None:
        _wait(device)
        spent.append((block, time.perf_counter() - started))

    hooks = [block.register_forward_pre_hook(before) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    begin = time.perf_counter()
    run()
    _wait(device)
    spent.append((None, time.perf_counter() - begin))
    for hook in hooks:
        hook.remove()
    return spent


def _text(
    facts: Facts, dtype: torch.dtype, int8: bool, device: torch.device, instruction: int, guided: bool
) -> float:
    """One layer of Gemma-2 on the instruction, on a prompt, and on the empty negative one."""
    from transformers import Gemma2Config, Gemma2Model

    sizes = {name: value for name, value in facts.text.items() if name != "vocab_size"}
    config = Gemma2Config(
        **{**sizes, "num_hidden_layers": 1},
        vocab_size=8,
        layer_types=["full_attention"],
        pad_token_id=0,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = Gemma2Model(config)
    _fill(model, dtype, device)
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    if int8:
        for name in text_targets(1):
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            model.set_submodule(name, WeightOnlyLinear(*quantize_weight(weight, name)))
    found = 0.0
    for tokens in (instruction, PROMPT_TOKENS, *([1] if guided else [])):
        ids = torch.ones(1, max(tokens, 1), dtype=torch.long, device=device)
        found += _timed(partial(model, ids, use_cache=True), device)
    return found * int(facts.text["num_hidden_layers"])


def _fill(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Small weights, whose sums are neither slow nor infinite, with an outlier in each row.

    As trained ones have: most levels are small, which decides how fp32 multiplies INT8 where a CPU cannot.
    """
    network.to_empty(device=device).to(dtype).requires_grad_(False).eval()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(max(tensor[0].numel(), 1) ** -0.5 if tensor.ndim > 1 else 0.5)
            if tensor.ndim > 1:
                tensor.flatten(1)[:, 0] *= _OUTLIER


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call: the median of some, behind one that makes it ready."""
    run()
    spent: list[float] = []
    begin = time.perf_counter()
    while not spent or time.perf_counter() - begin < _SECONDS:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
