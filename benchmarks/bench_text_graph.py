"""The text encoder's graph in onnxruntime and OpenVINO beside transformers: the time of a prompt's tokens.

    python benchmarks/bench_text_graph.py --layers 4 --threads 2

A Gemma-2-2B cut to --layers, with random weights and a small vocabulary; a layer's time is that of the whole
network's. --tokens are read behind an instruction whose keys and values are there, as of a prompt, and alone,
as of a negative one. All take turns in one run, and what they return is compared: transformers in fp32 and
bf16, its model with our INT8 weights, and the exported graphs, float and INT8.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers", "onnx")

import torch
from torch import Tensor

from bench_tokens import in_turns
from harness.engine_tables import text_graph
from harness.results import BASELINE_TEXT, ended, output_for, positive, say
from sana_edge.bench.machine import versions
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import weights
from sana_edge.engines.choose import choose
from sana_edge.engines.engine import Engine, Settings
from sana_edge.errors import SanaError
from sana_edge.export.graph.builder import GraphBuilder
from sana_edge.export.graph.external_data import ExternalData
from sana_edge.export.graph.ports import ports
from sana_edge.export.graph.text import add_text_encoder
from sana_edge.int8.text_linear import WeightOnlyLinear, quantize_weight
from sana_edge.nets.text_weights import text_targets
from sana_edge.store.architectures import GEMMA_2_2B
from works.engines import ENGINES
from works.graphs import INT8

# tokens of SANA's instruction in Gemma's vocabulary
INSTRUCTION = 246
# as `works.engines` has them for a step; INT8: of weights alone, a few thousandths for each layer
_EXACT, _HALF_ERROR, _INT8_ERROR = 1e-3, 0.1, 0.1
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-2-2b": GEMMA_2_2B,
    "tiny": {**GEMMA_2_2B, **_TINY, "head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 3},
}
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino")
HALF, OURS = f"{BASELINE_TEXT} bf16", f"{BASELINE_TEXT} with our INT8 weights"

# keys and values (1, heads, P, d) of each layer
Past = list[tuple[Tensor, Tensor]]


def gemma(shapes: Mapping[str, Any], layers: int) -> Any:
    """A transformers' Gemma2Model in fp32."""
    from transformers import Gemma2Config, Gemma2Model

    config = {**shapes, "num_hidden_layers": layers, "vocab_size": 1000}
    # not on the meta device: it has buffers that no file holds
    model = Gemma2Model(Gemma2Config.from_dict(config))
    model.load_state_dict(dict(weights(model.state_dict(), torch.float32)))
    return model.requires_grad_(False).eval()


def quantized(model: Any) -> Any:
    """A copy with INT8 weights."""
    model = copy.deepcopy(model)
    for name in text_targets(len(model.layers)):
        layer = model.get_submodule(name)
        model.set_submodule(name, WeightOnlyLinear(*quantize_weight(layer.weight, name), layer.bias))
    return model


def read(model: Any, ids: Tensor, past: Past) -> tuple[Tensor, Past]:
    """Hidden states, and the keys and values of all tokens."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    hidden = model(ids, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden, [(layer.keys, layer.values) for layer in cache.layers]


def write_graph(model: Any, folder: Path) -> Path:
    """The exported text encoder of a model."""
    folder.mkdir()
    with ExternalData(folder / "text_encoder.data") as data:
        graph = GraphBuilder("text_encoder", data)
        add_text_encoder(graph, model)
        graph.save(folder / "text_encoder.onnx")
    return folder / "text_encoder.onnx"


def engine(name: str, path: Path, threads: int) -> Engine:
    """One of `ENGINES`, loaded.

    Raises:
        SanaError: it does not run here.
    """
    asked, precision, _ = ENGINES[name]
    chosen = choose(asked, "cpu", settings=Settings(threads=threads, precision=precision))
    described = ports(path)
    return chosen.load(path, described.inputs, described.outputs)


def _hidden(model: Any, ids: Tensor, past: Past) -> Tensor:
    return read(model, ids, past)[0].float()


def _of_engine(loaded: Engine, inputs: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(loaded.run(inputs)["hidden"])


@torch.inference_mode()
def measured(
    models: Mapping[str, Any], engines: Mapping[str, Engine], tokens: int, instruction: int, repeat: int
) -> dict[str, Any]:
    """Seconds of all contenders for so many tokens behind so many.

    Raises:
        SanaError: what one returns is too far from transformers in fp32.
    """
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 1000, (1, instruction + tokens), generator=generator)
    before, new = ids[:, :instruction], ids[:, instruction:]
    calls: dict[str, Callable[[], Tensor]] = {}
    pasts = {name: read(model, before, [])[1] if instruction else [] for name, model in models.items()}
    for name, model in models.items():
        calls[name] = partial(_hidden, model, new, pasts[name])
    config = models[BASELINE_TEXT].config
    shape = (config.num_hidden_layers, config.num_key_value_heads, 0, config.head_dim)
    stacked = [
        torch.cat([pair[which] for pair in pasts[BASELINE_TEXT]]) if instruction else torch.zeros(shape)
        for which in (0, 1)
    ]
    inputs = dict(zip(("past_keys", "past_values"), (each.numpy() for each in stacked), strict=True))
    inputs |= {"ids": new.numpy()}
    for name, loaded in engines.items():
        calls[name] = partial(_of_engine, loaded, inputs)
    reference = calls[BASELINE_TEXT]()
    apart = {name: float((call() - reference).norm() / reference.norm()) for name, call in calls.items()}
    for name, error in apart.items():
        limit = _HALF_ERROR if "bf16" in name else _EXACT
        limit += _INT8_ERROR if "int8" in name.lower() else 0
        if not error <= limit:
            raise SanaError(f"{name} is off by {error:.2e}, at most {limit:.2e} is expected")
    taken = in_turns(calls, repeat)
    base = taken[BASELINE_TEXT][1]
    rows = []
    for name, (median, samples) in taken.items():
        ratio = statistics.median(a / b for a, b in zip(samples, base, strict=True))
        row = {"name": name, "seconds": median, "samples": samples, "ratio": ratio}
        rows.append({**row, "difference": apart[name]})
    return {"tokens": tokens, "instruction": instruction, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    torch.set_num_threads(options.threads)
    output = output_for(options, "bench_text_graph")
    shapes = SHAPES[options.shapes]
    data = {
        **header("benchmarks/bench_text_graph.py", given),
        "packages": {name: found for name, found in versions(*PACKAGES).items() if found},
        "load_before": load(),
        "shapes": options.shapes,
        "layers": options.layers,
        "all_layers": shapes["num_hidden_layers"],
        "threads": options.threads,
        "left_out": {},
        "works": [],
    }
    say("text", "making the model and its graphs")
    model = gemma(shapes, options.layers)
    models = {BASELINE_TEXT: model, HALF: copy.deepcopy(model).to(torch.bfloat16), OURS: quantized(model)}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        graphs = {
            kind: write_graph(models[OURS] if kind == INT8 else model, Path(folder) / kind)
            for kind in {kind for _, _, kind in ENGINES.values()}
        }
        engines: dict[str, Engine] = {}
        for name, (_, _, kind) in ENGINES.items():
            say("text", f"loading {name}")
            try:
                engines[name] = engine(name, graphs[kind], options.threads)
            except SanaError as error:
                data["left_out"][name] = error.message
        try:
            for instruction in (INSTRUCTION, 0):
                say("text", f"{options.tokens} tokens behind {instruction}")
                work = measured(models, engines, options.tokens, instruction, options.repeat)
                data["works"].append(work)
                write_json(output, data)
        finally:
            for loaded in engines.values():
                loaded.close()
    print(text_graph(data).text(), output, sep="\n\n")


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_text_graph.py", description="The text graph beside transformers.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--shapes", choices=sorted(SHAPES), default="gemma-2-2b", help="(default: %(default)s)")
    add("--layers", type=positive, default=4, metavar="N", help="of the network (default: %(default)s)")
    add("--tokens", type=positive, default=30, metavar="N", help="of the prompt (default: %(default)s)")
    add("--repeat", type=positive, default=7, metavar="N", help="samples (default: %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    add("--scratch", type=Path, metavar="DIR", help="where the graphs lie meanwhile (default: the system's)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_text_graph.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
