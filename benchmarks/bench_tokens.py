"""What fewer tokens save, and what each thing that is kept between steps and prompts saves: switched off.

    python benchmarks/bench_tokens.py --shapes 0.6b --layers 4 --threads 2

Tokens: latents of an autoencoder that shrinks sides by 32, each cell a token, beside one that shrinks by 8
with 2x2 cells a token (as PixArt has it), at equal pixels: tokens, multiply-adds of a prediction by the
shapes, and the time of one layer. Savings: a guided step of a network cut to --layers, and the text of a
prompt, as they are and with a saving switched off; what comes out is compared. Weights are random and fp32,
and all take turns in one run. A text encoder of Gemma-2-2B's widths is cut to --text-layers and to the
tokenizer of sana-tiny.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers")

import torch
from torch import Tensor

from bench_growth import TOKENS, SoftmaxBlock
from harness.results import ended, output_for, positive, say
from harness.study_tables import savings, tokens
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import DENOISERS, weights
from sana_edge.config import DenoiserConfig
from sana_edge.errors import InvalidInput
from sana_edge.nets.block import Block, KeysValues
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_encoder import PromptTokenizer, TextEncoder, TextFeatures
from sana_edge.store.architectures import GEMMA_2_2B
from sana_edge.store.known_models import BUNDLED
from works.denoiser import DenoiserWork, step_inputs, step_times, text_groups

PROMPT = "a red house left of a yellow star, with two blue birds above it"


@dataclass(frozen=True)
class Latent:
    """An autoencoder's latent: pixels per cell, channels, and cells per side of a token."""

    cell: int
    channels: int
    patch: int

    @property
    def name(self) -> str:
        return f"f{self.cell}c{self.channels}p{self.patch}"

    def tokens(self, side: int) -> int:
        return (side // (self.cell * self.patch)) ** 2


LATENTS = (Latent(32, 32, 1), Latent(8, 4, 2))


def macs(config: DenoiserConfig, latent: Latent, side: int, *, softmax: bool = False) -> int:
    """Multiply-adds of one prediction of the denoiser for a picture, without the text's keys and values.

    Source: arXiv 2410.10629, table 8, which has 1.08 T for f32c32p1 and 4.19 T for f8c4p2 at 1024 px of its
    1.6B model.
    """
    N, d, h = latent.tokens(side), config.dim, config.ffn_dim
    inner = config.num_cross_attention_heads * config.cross_attention_head_dim
    heads = config.num_attention_heads
    # linear: K^T V and Q times it; softmax: Q K^T and the weights times V
    core = 2 * N * d * (N if softmax else d // heads)
    attention = 4 * N * d * d + core
    cross = 2 * N * d * inner + 2 * N * TOKENS * inner
    mix_ffn = N * d * 2 * h + 9 * N * 2 * h + N * h * d
    ends = 2 * N * latent.channels * latent.patch**2 * d
    return config.num_layers * (attention + cross + mix_ffn) + ends


@torch.inference_mode()
def measure_tokens(config: DenoiserConfig, side: int, repeat: int) -> list[dict[str, Any]]:
    """Tokens, multiply-adds and seconds of a layer for each of `LATENTS`, by linear and softmax attention."""
    torch.manual_seed(0)
    blocks = {False: Block(config).eval(), True: SoftmaxBlock(config).eval()}
    vectors = list(torch.randn(6, config.dim) * 0.1)
    heads = (1, config.num_cross_attention_heads, TOKENS, config.cross_attention_head_dim)
    text = [KeysValues(torch.randn(heads), torch.randn(heads), None)]
    rows, calls = [], {}
    for latent in LATENTS:
        for softmax, block in blocks.items():
            count = latent.tokens(side)
            x, cells = torch.randn(1, count, config.dim), side // (latent.cell * latent.patch)
            kind = "softmax" if softmax else "linear"
            name = f"{latent.name} {kind}"

            # a block works in place
            def call(block: Block = block, x: Tensor = x, cells: int = cells) -> Tensor:
                return block(x.clone(), vectors, text, (cells, cells), False)

            calls[name] = call
            found = {"name": name, "latent": latent.name, "attention": kind, "size": side, "tokens": count}
            rows.append({**found, "macs": macs(config, latent, side, softmax=softmax)})
    taken = in_turns(calls, repeat)
    return [{**row, "seconds": taken[row["name"]][0], "samples": taken[row["name"]][1]} for row in rows]


def in_turns(calls: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, tuple[float, list[float]]]:
    """The median of each call's seconds, and all of them; the first turn makes workspaces and is left out."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds), seconds) for name, seconds in found.items()}


class Unfolded(Denoiser):
    """Prompts of one token are read like others: of two equal tokens, which attention weighs the same."""

    def _caption(self, group: TextFeatures) -> tuple[Tensor, Tensor | None]:
        caption, mask = super()._caption(group)
        return (caption.repeat(1, 2, 1), None) if caption.shape[1] == 1 else (caption, mask)


class Padded(Denoiser):
    """All 300 slots of a prompt are projected, and masked where they are read."""

    def _caption(self, group: TextFeatures) -> tuple[Tensor, Tensor | None]:
        every = torch.ones_like(group.mask)
        caption, _ = super()._caption(TextFeatures(group.embeddings, every))
        return caption, group.mask.bool()


class Whole(TextEncoder):
    """The instruction is read again with each prompt."""

    def _hidden_states(self, rows: list[list[int]], prefix: Any) -> Tensor:
        return super()._hidden_states(rows, None)


@torch.inference_mode()
def step_calls(work: DenoiserWork) -> dict[str, Callable[[], Tensor]]:
    """A guided prediction: as it is, and with a saving switched off; both halves (2, C, h, w)."""
    state = work.state()

    def made(kind: type[Denoiser]) -> Denoiser:
        denoiser = kind.from_diffusers(work.config, state).requires_grad_(False).eval()
        denoiser.clamp = True
        return denoiser

    latent, captions, mask = step_inputs(work)
    pair = torch.cat([latent] * 2)
    short = text_groups(work)
    slots = [TextFeatures(captions[i : i + 1], mask[i : i + 1]) for i in range(2)]
    plain, unfolded, padded = made(Denoiser), made(Unfolded), made(Padded)
    tables = plain.modulation(step_times(work))[work.steps // 2]
    texts = plain.text_context(short), unfolded.text_context(short), padded.text_context(slots)
    return {
        "step": lambda: plain(pair, tables, texts[0]),
        "text keys and values again in each step": lambda: plain(pair, tables, plain.text_context(short)),
        "negative prompt read, not folded": lambda: unfolded(pair, tables, texts[1]),
        "all 300 slots, not the prompt's tokens": lambda: padded(pair, tables, texts[2]),
        "all three": lambda: padded(pair, tables, padded.text_context(slots)),
    }


def text_calls(encoder: TextEncoder) -> dict[str, Callable[[], Tensor]]:
    """A prompt's features, with the instruction kept and with it read again."""
    whole = Whole(encoder._tokenizer, encoder._model)
    return {
        "text": lambda: encoder.encode([PROMPT]).embeddings,
        "instruction read again for each prompt": lambda: whole.encode([PROMPT]).embeddings,
    }


def cut_encoder(layers: int) -> TextEncoder:
    """Gemma-2-2B's widths with random weights and the tokenizer of sana-tiny."""
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = PromptTokenizer(BUNDLED / "sana-tiny" / "tokenizer")
    tiny = TextEncoder.load(BUNDLED / "sana-tiny", dtype=torch.float32, device="cpu")
    vocabulary = tiny._model.config.vocab_size
    config = {**GEMMA_2_2B, "num_hidden_layers": layers, "vocab_size": vocabulary}
    # not on the meta device: it has buffers that no file holds
    model = Gemma2Model(Gemma2Config.from_dict(config))
    model.load_state_dict(dict(weights(model.state_dict(), torch.float32)))
    return TextEncoder(tokenizer, model.requires_grad_(False).eval())


@torch.inference_mode()
def measure_savings(calls: Mapping[str, Callable[[], Tensor]], title: str, repeat: int) -> dict[str, Any]:
    """Seconds as it is and of each way without a saving, and how far its output is from the first's."""
    reference, *_ = (call() for call in list(calls.values())[:1])
    taken = in_turns(calls, repeat)
    base, *_ = taken.values()
    rows = []
    for name, call in calls.items():
        median, samples = taken[name]
        apart = float((call() - reference).norm() / reference.norm())
        ratio = statistics.median(a / b for a, b in zip(samples, base[1], strict=True))
        rows.append(
            {"name": name, "seconds": median, "samples": samples, "ratio": ratio, "difference": apart}
        )
    return {"title": title, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    torch.set_num_threads(options.threads)
    config = DENOISERS[options.shapes]
    if options.layers > config.num_layers:
        hint = f"choose up to {config.num_layers}"
        raise InvalidInput(f"{options.layers} layers are more than {options.shapes} has", hint)
    if options.size % 32:
        raise InvalidInput(f"size {options.size} is no multiple of 32", "as the latent's cells are")
    output = output_for(options, f"bench_tokens-{options.shapes}")
    data = {**header("benchmarks/bench_tokens.py", given), "load_before": load()}
    data |= {"shapes": options.shapes, "layers": options.layers, "text_layers": options.text_layers}
    data |= {"all_layers": config.num_layers, "size": options.size, "threads": options.threads}
    say("tokens", f"a layer at {options.size} px")
    data["tokens"] = measure_tokens(config, options.size, options.repeat)
    data["savings"] = []
    write_json(output, data)
    for title, made in _works(options):
        say("savings", title)
        data["savings"].append(measure_savings(made(), title, options.repeat))
        write_json(output, data)
    print(tokens(data).text(), savings(data).text(), sep="\n\n")
    print(output)


def _works(options: argparse.Namespace) -> list[tuple[str, Callable[[], dict[str, Callable[[], Tensor]]]]]:
    work = DenoiserWork(
        dtype="fp32",
        device="cpu",
        threads=options.threads,
        shapes=options.shapes,
        layers=options.layers,
        size=options.size,
        tokens=TOKENS,
        steps=20,
    )
    tiny = BUNDLED / "sana-tiny"
    return [
        (work.title, lambda: step_calls(work)),
        (
            f"text encoder of Gemma-2-2B's widths, {options.text_layers} of 26 layers",
            lambda: text_calls(cut_encoder(options.text_layers)),
        ),
        (
            "sana-tiny's text encoder",
            lambda: text_calls(TextEncoder.load(tiny, dtype=torch.float32, device="cpu")),
        ),
    ]


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_tokens.py", description="What fewer tokens and what is kept save.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--shapes", choices=sorted(DENOISERS), default="0.6b", help="(default: %(default)s)")
    add("--size", type=positive, default=1024, metavar="PX", help="side of the picture (default: 1024)")
    add("--layers", type=positive, default=4, metavar="N", help="of the step's network (default: 4)")
    add("--text-layers", type=positive, default=2, metavar="N", help="of the text encoder (default: 2)")
    add("--repeat", type=positive, default=5, metavar="N", help="samples (default: %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_tokens-*.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
