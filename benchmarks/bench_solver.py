"""What Flow-DPM-Solver saves beside Flow-Euler: how near pictures of few steps are to a solution, and right.

    python benchmarks/bench_solver.py --threads 1

draws held-out prompts of GenEval's six categories with both solvers, from the same noise, in 8 to 50 steps,
and once in 200: what many steps lead to. Of each solver and number of steps it says the PSNR to the solution
of Flow-DPM and to the solver's own, and the share of prompts that the judge of `quality.py` finds right.
Prints a table, writes JSON with every picture's numbers, and a plot beside it. Nothing here depends on how
fast or busy the machine is. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers", "matplotlib", "tqdm")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from harness.results import Diary, ended, output_for, positive
from harness.study_tables import solver
from judge.evaluation import code, world
from sana_edge.bench.results import header, write_json
from sana_edge.config import SamplerKind
from sana_edge.evaluate.judge.prompts import Judgement, Prompt
from sana_edge.evaluate.judge.scores import Outcome, categories, judgement, overall
from sana_edge.evaluate.paired import finite
from sana_edge.image_metrics import psnr
from sana_edge.request.request import Request
from sana_edge.sampler import denoise, guide
from sana_edge.store import hub
from sana_edge.system.atomic import write_bytes
from sana_edge.torch_runtime.runtime import TorchRuntime

SOLVERS: tuple[SamplerKind, ...] = ("flow-dpm", "flow-euler")
STEPS = (8, 10, 14, 20, 28, 50)
SOLUTION = 200

Pixels = NDArray[np.uint8]
Judge = Callable[[Pixels], Judgement]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given), "interrupted: the same command goes on from here")


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    torch.set_num_threads(options.threads)
    output = output_for(options, "bench_solver")
    place = world("art")
    chosen = place.choose(options.limit)
    settings = {name: getattr(options, name) for name in ("model", "steps", "solution", "guidance", "seed")}
    model = hub.resolve(options.model, offline=True)
    runtime = TorchRuntime.load(model, device=torch.device("cpu"), dtype="fp32", int8=False, backend="auto")
    with (
        Diary(output, {**settings, "benchmark": code()}) as diary,
        tqdm(total=len(chosen), unit="prompt", disable=not sys.stderr.isatty()) as bar,
    ):
        known = {row["number"] for row in diary.rows}
        bar.update(len(known & chosen.keys()))
        for numbers in batches(chosen, known):
            prompts = {number: chosen[number] for number in numbers}
            for row in drawn(runtime, prompts, options, place.judge):
                diary.add(row)
            bar.update(len(numbers))
        data = {**header("benchmarks/bench_solver.py", given), **settings, "prompts": len(chosen)}
        data |= found(diary.rows, {number: chosen[number] for number in sorted(chosen)})
        write_json(output, data)
        write_bytes(output.with_suffix(".png"), plot(data))
        diary.finish()
    print(solver(data).text())
    print(output)


def batches(chosen: Mapping[int, Prompt], known: Collection[int]) -> list[list[int]]:
    """The prompts that wait, one of each category at a time: what is done first is a smaller ``--limit``."""
    by_category: dict[str, list[int]] = {}
    for number, prompt in chosen.items():
        by_category.setdefault(prompt.category, []).append(number)
    rounds = ([n for n in of if n is not None] for of in zip_longest(*by_category.values()))
    waiting = [[number for number in of if number not in known] for of in rounds]
    return [numbers for numbers in waiting if numbers]


def drawn(
    runtime: TorchRuntime, prompts: Mapping[int, Prompt], options: argparse.Namespace, judge: Judge
) -> Iterator[dict[str, Any]]:
    """Every prompt's row: `compared`, of pictures by both solvers in all numbers of steps."""
    texts = [prompt.text for prompt in prompts.values()]
    seeds = [options.seed + number for number in prompts]
    pictures = {
        f"{kind} {steps}": draw(runtime, texts, seeds, kind, steps, options.guidance)
        for kind in SOLVERS
        for steps in (*options.steps, options.solution)
    }
    for i, (number, prompt) in enumerate(prompts.items()):
        own = {name: batch[i] for name, batch in pictures.items()}
        yield {"number": number, **compared(own, prompt, judge)}


@torch.inference_mode()
def draw(
    runtime: TorchRuntime,
    texts: Sequence[str],
    seeds: Sequence[int],
    kind: SamplerKind,
    steps: int,
    guidance: float,
) -> list[Pixels]:
    """What `sana.generate` draws for each text and its seed, all in one batch."""
    asked = [
        Request(text, seed=seed, steps=steps, guidance=guidance)
        for text, seed in zip(texts, seeds, strict=True)
    ]
    plans = [request.plan(runtime.trained_side, kind) for request in asked]
    encoder = runtime.text_encoder
    groups = [encoder.encode([""], instruction=None), encoder.encode([plan.prompt for plan in plans])]
    context = runtime.denoiser.text_context(groups)
    sampler, tables = runtime.schedule(plans[0])

    def velocity(x: Tensor, i: int) -> Tensor:
        return guide(runtime.denoiser(torch.cat([x, x]), tables[i], context).chunk(2), guidance)

    noise = torch.cat([runtime.noise(plan)() for plan in plans])
    *_, last = denoise(sampler, velocity, lambda: noise)
    return [runtime.decode(latent[None]) for latent in last.x]


def compared(drawn: Mapping[str, Pixels], prompt: Prompt, judge: Judge) -> dict[str, dict[str, Any]]:
    """Of each picture the PSNR in dB to both solutions, the largest number of steps of each solver, and
    what the judge saw; equal pictures have no PSNR."""
    most = {kind: max((k for k in drawn if k.startswith(kind)), key=_steps) for kind in SOLVERS}
    rows = {}
    for name, pixels in drawn.items():
        own = most[name.rpartition(" ")[0]]
        rows[name] = {
            "psnr": finite(psnr(pixels, drawn[most[SOLVERS[0]]]), 3),
            "own": finite(psnr(pixels, drawn[own]), 3),
            **Outcome(prompt, judge(pixels)).row(),
        }
    return {"models": rows}


def _steps(name: str) -> int:
    return int(name.rpartition(" ")[2])


def found(rows: Sequence[Mapping[str, Any]], chosen: Mapping[int, Prompt]) -> dict[str, Any]:
    """What the JSON says of each solver and number of steps, and of each picture."""
    by_number = {row["number"]: row["models"] for row in rows}
    results = []
    for name in by_number[min(by_number)]:
        kind, _, steps = name.rpartition(" ")
        pictures = {number: by_number[number][name] for number in chosen}
        outcomes = [Outcome(chosen[number], judgement(row)) for number, row in pictures.items()]
        score = overall(categories(outcomes))
        facts: dict[str, Any] = {"solver": kind, "steps": int(steps)}
        for column in ("psnr", "own"):
            values = [row[column] for row in pictures.values()]
            # the solution itself has none; a picture equal to it counts for no mean of decibels
            differing = [value for value in values if value is not None]
            facts[column] = round(statistics.fmean(differing), 2) if differing else None
            facts[f"{column}_lowest"] = min(differing, default=None)
            facts[f"{column}_pictures"] = values
        facts |= {"score": round(score.share, 4), "interval_95": [round(score.low, 4), round(score.high, 4)]}
        facts["right"] = sum(not outcome.fault for outcome in outcomes)
        results.append(facts)
    return {"rows": results}


def plot(data: Mapping[str, Any]) -> bytes:
    """A PNG: mean PSNR to the solution, and the share of right prompts, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = data["steps"]
    figure, (near, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind in SOLVERS:
        rows = [row for row in data["rows"] if row["solver"] == kind and row["steps"] in steps]
        at = [row["steps"] for row in rows]
        near.plot(at, [row["psnr"] for row in rows], "o-", label=kind)
        low, high = ([row["interval_95"][end] for row in rows] for end in (0, 1))
        (line,) = right.plot(at, [row["score"] for row in rows], "o-", label=kind)
        right.fill_between(at, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    near.set(title=f"PSNR to Flow-DPM in {data['solution']} steps", ylabel="dB, mean of pictures")
    right.set(
        title=f"{data['prompts']} held-out prompts", ylabel="share right, with 95 % interval", ylim=(0, 1.02)
    )
    for axes in (near, right):
        axes.set(xscale="log", xlabel="steps")
        axes.set_xticks(steps, [str(number) for number in steps])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    return content.getvalue()


def counts(text: str) -> list[int]:
    """The argument of an option that lists numbers of steps, without repeats and in order."""
    return sorted({positive(part) for part in text.split(",")})


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_solver.py", description="Flow-DPM-Solver beside Flow-Euler.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="sana-tiny", help="a bundled name or a folder (default: %(default)s)")
    add("--steps", type=counts, default=list(STEPS), metavar="N,N", help="(default: 8,10,14,20,28,50)")
    add("--solution", type=positive, default=SOLUTION, metavar="N", help="steps of it (default: %(default)s)")
    add("--limit", type=positive, default=7, metavar="N", help="prompts of each category (default: 7, so 42)")
    add("--guidance", type=float, default=4.5, metavar="F", help="(default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt, counting up (default: 0)")
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: %(default)s)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_solver.json)")
    options = parser.parse_args(given)
    if options.steps[-1] >= options.solution:
        parser.error(f"--solution {options.solution} must be more than the most of --steps")
    return options


if __name__ == "__main__":
    sys.exit(main())
