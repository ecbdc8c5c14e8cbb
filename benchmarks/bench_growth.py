"""How the time of a layer grows with the picture: linear attention, and softmax attention in its place.

    python benchmarks/bench_growth.py --shapes 0.6b --threads 2

One block of the denoiser with random weights, for pictures of 512 to 4096 px, in turns. The exponent is the
slope of log time over log tokens by least squares, over the upper half of the sizes: small ones are overhead.
The plot lies beside the results file.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "matplotlib", "tqdm")

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from harness.results import ended, output_for, positive, sizes
from harness.run_tables import ATTENTIONS, growth
from sana_edge.bench.results import header, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.config import LATENT_CELL
from sana_edge.nets.block import Block, KeysValues
from sana_edge.system.atomic import write_bytes

SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)
TOKENS = 30


class SoftmaxBlock(Block):
    """The same layer with softmax attention over the same heads."""

    def _attend(self, x: Tensor) -> Tensor:
        rows, length, dim = x.shape
        shape = (rows, length, 3, self.heads, dim // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.out(attended.transpose(1, 2).reshape(x.shape))
        return output


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    return ended(lambda: run(_options(given), given))


def run(options: argparse.Namespace, given: Sequence[str]) -> None:
    torch.set_num_threads(options.threads)
    output = output_for(options, f"bench_growth-{options.shapes}")
    rows = measure(options.shapes, options.sizes, options.repeat)
    data = {
        **header("benchmarks/bench_growth.py", given),
        "shapes": options.shapes,
        "threads": options.threads,
        "repeat": options.repeat,
    }
    data |= {"rows": rows, "exponents": {kind: exponent(rows, kind) for kind in ATTENTIONS}}
    write_json(output, data)
    write_bytes(output.with_suffix(".png"), plot(rows, data["exponents"]))
    print(growth(data).text())
    print(output)


@torch.inference_mode()
def measure(shapes: str, sides: Sequence[int], repeat: int) -> list[dict[str, Any]]:
    """Median seconds of a block for each kind of attention and each size, fp32."""
    config = DENOISERS[shapes]
    torch.manual_seed(0)
    blocks = {"linear": Block(config).eval(), "softmax": SoftmaxBlock(config).eval()}
    blocks["softmax"].load_state_dict(blocks["linear"].state_dict())
    vectors = list(torch.randn(6, config.dim) * 0.1)
    heads = (1, config.num_cross_attention_heads, TOKENS, config.cross_attention_head_dim)
    text = [KeysValues(torch.randn(heads), torch.randn(heads), None)]
    rows = []
    for side in tqdm(sides, unit="size", disable=not sys.stderr.isatty()):
        cells = side // LATENT_CELL
        x = torch.randn(1, cells * cells, config.dim)
        found: dict[str, list[float]] = {kind: [] for kind in ATTENTIONS}
        for turn in range(repeat + 1):
            for kind in ATTENTIONS:
                call = _call(blocks[kind], x, vectors, text, cells)
                start = time.perf_counter()
                call()
                # the first turn makes workspaces
                if turn:
                    found[kind].append(time.perf_counter() - start)
        rows.append(
            {
                "size": side,
                "tokens": cells**2,
                **{kind: statistics.median(found[kind]) for kind in ATTENTIONS},
            }
        )
    return rows


def _call(
    block: Block, x: Tensor, vectors: list[Tensor], text: list[KeysValues], cells: int
) -> Callable[[], Tensor]:
    # the block works in place
    own = x.clone()
    return lambda: block(own, vectors, text, (cells, cells), False)


def exponent(rows: Sequence[Mapping[str, Any]], kind: str) -> float:
    """The slope of log seconds over log tokens, over the upper half of the sizes."""
    upper = rows[len(rows) // 2 :] if len(rows) > 3 else rows
    x, y = ([math.log(row[name]) for row in upper] for name in ("tokens", kind))
    return round(statistics.linear_regression(x, y).slope, 3)


def plot(rows: Sequence[Mapping[str, Any]], exponents: Mapping[str, float]) -> bytes:
    """A PNG: seconds over tokens, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for kind in ATTENTIONS:
        label = f"{kind} attention: tokens to the {exponents[kind]:.2f}"
        axes.plot([row["tokens"] for row in rows], [row[kind] for row in rows], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds of one layer")
    axes.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']:,}\n{row['size']} px" for row in rows])
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    pyplot.close(figure)
    return content.getvalue()


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=sorted(DENOISERS), default="0.6b")
    parser.add_argument(
        "--sizes", type=sizes, default=list(SIZES), metavar="PX,PX", help="of square pictures"
    )
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: in results/)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
