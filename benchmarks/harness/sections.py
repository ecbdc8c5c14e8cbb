"""The tables of results files: commands print them, and `report.py` writes them into Markdown files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.engine_tables import (
    cold,
    engines_quality,
    engines_speed,
    pictures,
    products,
    text_graph,
    verification,
)
from harness.gpu_tables import ROOFLINE, tile_choices
from harness.results import BASELINE, FASTEST, HALF, INT8, OURS
from harness.study_tables import launches, peers, savings, solver, text_features, tokens
from sana_edge.bench.table import Table, circumstances, gigabytes, interval, median, most

Numbers = Mapping[str, Any]

STAGES = {
    "text": "text",
    "context": "text keys and values, once per picture",
    "step": "denoising step",
    "step+context/20": "denoising step with its share of that",
    "decode": "decode",
    "picture": "whole picture, 20 steps",
}
PARTS = {
    "transformer": "denoiser",
    "vae": "decoder",
    "text_encoder": "text encoder, its embedding table on disk only",
}


ATTENTIONS = ("linear", "softmax")


def files(results: Path, *patterns: str) -> list[dict[str, Any]]:
    """What files of these names hold, in order."""
    paths = [path for pattern in patterns for path in sorted(results.glob(f"{pattern}.json"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def sections(results: Path) -> Iterator[tuple[str, str]]:
    """The name and the Markdown of every section whose files are there."""
    engines = ("bench_engines-step-*", "bench_engines-decode-*")
    made: dict[str, tuple[Callable[..., Table], list[Any]]] = {
        "summary": (summary, [results]),
        "quality": (quality, files(results, "quality")),
        "speed": (speed, [files(results, "bench_image-*")]),
        "growth": (growth, files(results, "bench_growth-*")),
        "series": (series, [found] if (found := files(results, "bench_series-*")) else []),
        "quantize": (quantize, files(results, "bench_quantize")),
        "plan": (plans, files(results, "bench_plan")),
        "verification": (verification, files(results, "verify_export")),
        "engines": (engines_speed, [files(results, *engines)]),
        "pictures": (pictures, files(results, "bench_engines-picture-*")),
        "roofline": (
            lambda made: made[0](made[1]),
            [(table, data) for data in files(results, "roofline") for table in ROOFLINE],
        ),
        "tiles": (tile_choices, files(results, "tiles")),
        "cold": (cold, files(results, "bench_engines-cold")),
        "products": (products, files(results, "bench_products-*")),
        "text-graph": (text_graph, files(results, "bench_text_graph")),
        "engines-quality": (engines_quality, files(results, "quality_engines")),
        "peers": (peers, files(results, "bench_peers-*")),
        "solver": (solver, files(results, "bench_solver")),
        "tokens": (tokens, files(results, "bench_tokens-*")),
        "savings": (savings, files(results, "bench_tokens-*")),
        "launches": (launches, files(results, "bench_launches")),
        "text": (text_features, files(results, "bench_text")),
        "sidecar": (sidecar, files(results, "bench_sidecar")),
        "serving": (serving, files(results, "bench_serve")),
    }
    for name, (table, found) in made.items():
        tables = [made for made in map(table, found) if made.rows]
        if tables:
            yield name, "\n\n".join(table.markdown() for table in tables)


def growth(data: Mapping[str, Any]) -> Table:
    """Seconds of a layer at each size, by its attention."""
    found = Table(["size", "tokens", "linear attention", "softmax attention", "ratio"])
    for row in data["rows"]:
        seconds = [f"{row[kind]:.3g} s" for kind in ATTENTIONS]
        found.add(
            f"{row['size']} px", f"{row['tokens']:,}", *seconds, f"{row['softmax'] / row['linear']:.2f}"
        )
    shown = ", ".join(f"{kind} {value:.2f}" for kind, value in data["exponents"].items())
    found.notes = [f"Exponents of growth: {shown}.", circumstances(data)]
    return found


def series(runs: Sequence[Numbers]) -> Table:
    """Seconds of a picture, or a step, by the size of its batch."""
    sizes = sorted({row["batch"] for data in runs for row in data["rows"]})
    titles = ["work", "one by one", *(f"batch of {size}" for size in sizes[1:]), "values apart by at most"]
    table = Table(titles)
    for data in runs:
        rows = {row["batch"]: row for row in data["rows"]}
        ratios = [f"{rows[size]['ratio']:.2f}" if size in rows else "" for size in sizes[1:]]
        apart = max(row["apart"] for row in data["rows"])
        table.add(data["title"], f"{rows[sizes[0]]['median']:.3g} s", *ratios, f"{apart:.2g}")
    table.notes = [circumstances(data) for data in runs]
    return table


def plans(data: Numbers) -> Table:
    """What `plan` said of each combination, and what happened."""
    titles = (
        "picture",
        "networks",
        "memory as planned",
        "found",
        "ratio",
        "seconds as planned",
        "found",
        "ratio",
    )
    table = Table(titles, named=2)
    for row in data["rows"]:
        memory, spent = row["memory"], row["time"]
        sizes = [f"{memory[key] / 1e9:.2f} GB" for key in ("said", "found")]
        seconds = [f"{spent[key]:.3g} s" for key in ("said", "found")]
        ratios = [f"{numbers['ratio']:.2f}" for numbers in (memory, spent)]
        table.add(row["name"], row["way"], *sizes, ratios[0], *seconds, ratios[1])
    counts = {
        key: sum(abs(row[key]["ratio"] - 1) <= bound for row in data["rows"])
        for key, bound in data["bounds"].items()
    }
    loads = [row["load"] for row in data["rows"] if row["load"] is not None]
    busy = f" Processes that ran beside it: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    all_ = len(data["rows"])
    table.notes = [
        f"Memory within {100 * data['bounds']['memory']:.0f} % in {counts['memory']} of {all_}, time within"
        f" {100 * data['bounds']['time']:.0f} % in {counts['time']} of {all_}.{busy}",
        f"INT8 products: {data['int8_products']}.",
        circumstances(data),
    ]
    return table


def sidecar(data: Numbers) -> Table:
    """The first picture of the command and of the sidecar, from the start of their processes."""
    taken = data["seconds"]
    used = zip(taken["sidecar's processor"], taken["command's processor"], strict=True)
    rows = {
        "the command, process start to PNG": taken["command"],
        "the sidecar, the same": taken["sidecar"],
        "sidecar less command, of each turn": taken["difference"],
        "the same of processor time": [sidecar - command for sidecar, command in used],
        "processor time of the command": taken["command's processor"],
        "the sidecar's second picture": taken["second"],
    }
    found = Table((f"{data['model']}, {data['steps']} steps", "median", "from", "to"))
    for name, seconds in rows.items():
        found.add(
            name, *(f"{value:.2f} s" for value in (statistics.median(seconds), min(seconds), max(seconds)))
        )
    busy = f"{data['load_before']} processes were running before"
    found.notes = [f"{len(taken['command'])} turns; {busy}.", circumstances(data)]
    return found


def serving(data: Mapping[str, Any]) -> Table:
    """Pictures per minute of each contender."""
    drawn = data["pictures"]
    table = Table(["256x256", "pictures per minute", "least", "most", "to the loop"])
    for name, rates in drawn["rates"].items():
        numbers = (statistics.median(rates), min(rates), max(rates))
        table.add(name, *(f"{number:.1f}" for number in numbers), f"{drawn['ratios'][name]:.2f}")
    spent = data["overhead"]["milliseconds"]
    beyond, png = spent["beyond computed"], spent["png computed"]
    table.notes = [
        f"A request computes {beyond['median']:.1f} ms beyond its picture (nine of ten {beyond['low']:.1f} "
        f"to {beyond['high']:.1f} ms), the PNG of 256x256 itself {png['median']:.1f} ms. "
        f"Processes that were running besides, on average: {data['load_before']}.",
        f"{data['model']} in fp32, {drawn['steps']} steps. {circumstances(data)}",
    ]
    return table


def summary(results: Path) -> Table:
    """Float and INT8 of each backend, at most six rows: a step in full size, and pictures of sana-tiny."""
    titles = ("model and work", "backend", "float", "INT8", "memory", "quality of INT8")
    table = Table(titles, named=2)
    notes: list[str] = []
    for data in files(results, "bench_engines-step-0.6b-1024px"):
        rows = {row["name"]: row for row in data["works"][0]["rows"]}
        pairs = {
            "torch": (HALF, "diffusers in bf16", INT8),
            "onnxruntime": ("onnxruntime", "fp32", "onnxruntime int8"),
            "OpenVINO": ("openvino bf16", "bf16", FASTEST),
        }
        for backend, (large, kind, small) in pairs.items():
            a, b = rows.get(large), rows.get(small)
            if a is None or b is None:
                continue
            cells = [f"{median(a)}, {kind}", median(b), f"{most(a) / 1e9:.2f} / {gigabytes(most(b))}"]
            table.add(
                "0.6B, a step at 1024x1024", backend, *cells, f"velocity off by {100 * b['difference']:.1f} %"
            )
        notes.append(circumstances(data))
    scores = [data["models"] for data in files(results, "quality") if "paired" in data]
    overall = [model["overall"] for model in (scores[0].values() if scores else ())]
    right = " and ".join(f"{score['score']:.3f}" for score in overall)
    asked = overall[0]["n"] if overall else 0
    for data in files(results, "bench_image-sana-tiny-*"):
        work = next(work for work in data["works"] if work["dtype"] == "bf16")
        rows = {row["name"]: row for row in work["rows"] if row["stage"] == "picture"}
        a, b = rows[OURS], rows[INT8]
        cells = [f"{median(a)}, bf16", median(b), f"{most(a) / 1e9:.2f} / {gigabytes(most(b))}"]
        table.add("sana-tiny, a picture", "torch", *cells, f"{right} of {asked} prompts right")
        notes.append(circumstances(data))
    judged = [data["models"] for data in files(results, "quality_engines")]
    for data in files(results, "bench_engines-cold"):
        rows = {row["name"]: row for row in data["cold"]["rows"]}
        for backend, name in (("onnxruntime", "onnxruntime"), ("OpenVINO", "openvino")):
            a, b = rows.get(f"{name} fp32"), rows.get(f"{name} int8")
            if a is None or b is None:
                continue
            cells = [median(a), median(b), f"{a['peak'] / 1e9:.2f} / {gigabytes(b['peak'])}"]
            best = judged[0][name]["overall"] if judged else {}
            score = f"{best['score']:.3f} of {best['n']} prompts right" if best else ""
            table.add("sana-tiny, process start to PNG", backend, *cells, score)
        notes.append(circumstances(data))
    table.notes = notes
    return table


def quality(data: Numbers) -> Table:
    """One row for each category, of both models where two ran; with the judge's ceiling and the control."""
    name, *_ = data["models"]
    compared, best = data.get("paired"), data["ceiling"]
    controls = (*(("judge's ceiling",) if best else ()), "shuffled prompts")
    if compared:
        models = [data["models"][compared[key]] for key in ("float", "int8")]
        titles = ("prompts", "float", "95 % interval", "INT8", "95 % interval")
        table = Table(("category", *titles, "right only as float", "only as INT8", *controls))
    else:
        models = list(data["models"].values())
        table = Table(("category", "prompts", "score", "95 % interval", *controls))
    for (title, first), *others in zip(*map(_with_overall, models), strict=True):
        scores = [
            cell for c in (first, *(o for _, o in others)) for cell in (f"{c['score']:.3f}", interval(c))
        ]
        counts = compared["categories"].get(title, compared) if compared else {}
        only = [counts["only_float"], counts["only_int8"]] if compared else []
        top = [f"{best['categories'].get(title, best['overall']):.3f}"] if best else []
        table.add(title, first["n"], *scores, *only, *top, f"{first['shuffled']:.3f}")
    settings = data["settings"]
    note = f"{name}, {settings['steps']} steps, guidance {settings['guidance']}. {circumstances(data)}"
    table.notes = [*(_verdict(compared) if compared else []), note]
    return table


def _with_overall(numbers: Numbers) -> list[tuple[str, dict[str, Any]]]:
    """A model's categories, and the overall score with the mean of their controls."""
    control = statistics.fmean(c["shuffled"] for c in numbers["categories"].values())
    return [*numbers["categories"].items(), ("**overall**", {**numbers["overall"], "shuffled": control})]


def _verdict(compared: Numbers) -> list[str]:
    """How the scores of two models differ, and how near their pictures are."""
    points, *ends = (100 * share for share in (compared["difference"], *compared["interval_95"]))
    psnr, ssim = compared["psnr"], compared["ssim"]
    return [
        f"INT8 less float: {points:+.1f} points, 95 % interval {ends[0]:+.1f} to {ends[1]:+.1f}.",
        f"{compared['only_float']} prompts right only as float, {compared['only_int8']} only as INT8: "
        f"p {compared['mcnemar_p']:.2g} (exact McNemar test).",
        f"PSNR of INT8 to float pictures: {_spread(psnr, ' dB')}.",
        f'The worst of them: "{psnr["worst_prompt"]}".',
        f"SSIM of INT8 to float pictures: {_spread(ssim, '')}.",
    ]


def _spread(spread: Numbers, unit: str) -> str:
    values = {word: spread[word] for word in ("mean", "median", "worst")}
    return ", ".join(
        f"{w} {'infinite' if value is None else f'{value}{unit}'}" for w, value in values.items()
    )


def quantize(data: Numbers) -> Table:
    """What a model weighs before and after, and what quantizing it took."""
    table = Table(("weights", "fp32", "as stored", "INT8 package", "of fp32"))
    for name, before in data["bytes"]["float"].items():
        after = data["bytes"]["int8"][name]["stored"]
        sizes = (f"{size / 1e6:,.0f} MB" for size in (before["fp32"], before["stored"], after))
        table.add(PARTS[name], *sizes, f"{after / before['fp32']:.3f}")
    took, made = data["quantize"], data.get("generate")
    text = f"Quantizing took {took['seconds']:.0f} s and at most {gigabytes(took['peak_memory'], 1)}"
    if made:
        text += f"; loading the package and making a picture in one step {made['seconds']:.0f} s and "
        text += gigabytes(made["peak_memory"], 1)
    table.notes = [f"{text}.", circumstances(data)]
    return table


def speed(found: Sequence[Numbers]) -> Table:
    """One row for each stage that was measured side by side, of all files of `bench_image.py`."""
    works = [work for data in found for work in data["works"]]
    int8 = any(row["name"] == INT8 for work in works for row in work["rows"])
    columns = ("INT8", "to diffusers", "to our float", "INT8's weights") if int8 else ()
    titles = ("work", "stage", "diffusers", "sana-edge", "ratio", *columns, "peak memory of each")
    rows: list[Sequence[object]] = [row for work in works for row in _speed_rows(work, int8)]
    return Table(titles, rows, dict.fromkeys(circumstances(data) for data in found), 2)


def _speed_rows(work: Numbers, int8: bool) -> Iterator[list[str]]:
    """Of stages that more than one implementation has, and diffusers where it took part."""
    by_stage: dict[str, dict[str, Any]] = {}
    for row in work["rows"]:
        by_stage.setdefault(row["stage"], {})[row["name"]] = row
    against = any(BASELINE in names for names in by_stage.values())
    for stage, names in by_stage.items():
        theirs, ours, small = (names.get(name) for name in (BASELINE, OURS, INT8))
        if stage not in STAGES or len(names) < 2 or (against and theirs is None):
            continue
        cells = [work["title"], STAGES[stage], median(theirs), median(ours), _share(ours, "ratio")]
        if int8:
            cells += [median(small), _share(small, "ratio"), _share(small, "ratio_to_float")]
            cells.append(_weights(small, ours))
        used = [most(row) for row in (theirs, ours, small) if row is not None]
        memory = "" if None in used else " / ".join(f"{value / 1e9:.2f}" for value in used if value) + " GB"
        yield [*cells, memory]


def _share(row: Numbers | None, name: str) -> str:
    return "" if row is None or row.get(name) is None else f"{row[name]:.2f}"


def _weights(row: Numbers | None, whole: Numbers | None) -> str:
    """The size of the weights in memory, and as a share of the float ones."""
    if row is None or row.get("weights") is None:
        return ""
    part = f" ({row['weights'] / whole['weights']:.2f})" if whole and whole.get("weights") else ""
    return f"{row['weights'] / 1e6:.3g} MB{part}"
