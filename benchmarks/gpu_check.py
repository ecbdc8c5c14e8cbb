"""Builds, tests, times: all that a GPU has to show, in steps that lose nothing.

    python3 benchmarks/gpu_check.py --steps smoke --library libsana_edge_cuda.so --wheels wheels --out found
    python3 benchmarks/gpu_check.py --steps full --library libsana_edge_cuda.so --wheels wheels --out found

Needs no network, no installation and no make: Python with torch is enough, and diffusers for the tests and
what is compared with it, which may be a carried wheel. Each step is a process with a time limit; the results
file <gpu>-<date>.json is written after every step, and a step that fails is recorded and passed over.
gpu/steps.py has the steps, their estimates and limits; --dry-run runs all of them without a GPU, with the
emulated library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# the checkout, installed or not
sys.path.insert(0, str(ROOT))

from gpu.results import Outcome, Results, scrubbed, tail
from gpu.steps import NAMES, SETS, STEPS, Setting, Step
from harness import RESULTS
from harness.results import ended, positive
from sana_edge.bench.process import run_step
from sana_edge.bench.results import header
from sana_edge.errors import InvalidInput, SanaError, UnsupportedDevice

# how long the machine may take to say what it is
ASKING = 90.0


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all passed, 1 where something failed, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    try:
        names, limits = chosen(options.steps), _limits(options.limit)
    except InvalidInput as error:
        print(f"error: {error}\nhint:  {error.hint}", file=sys.stderr)
        return 2
    # what kills by a polite signal, such as `timeout`, leaves a whole file too
    if hasattr(signal, "SIGTERM") and argv is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    passed: list[bool] = []
    code = ended(lambda: passed.append(_run(options, given, names, limits)))
    return code or (0 if all(passed) else 1)


def chosen(text: str) -> tuple[str, ...]:
    """Names of steps in their order, of a list of names and sets.

    Raises:
        InvalidInput: an unknown one.
    """
    # all others need it, and it takes seconds where it is carried
    wanted = {"library"}
    for word in text.split(","):
        if word not in SETS and word not in NAMES:
            known = f"{', '.join(SETS)}, or steps of them: {', '.join(NAMES)}"
            raise InvalidInput(f"unknown step {word!r}", f"choose from {known}")
        wanted |= set(SETS.get(word, (word,)))
    return tuple(name for name in NAMES if name in wanted)


def _limits(given: Sequence[str]) -> dict[str, float]:
    """`--limit picture=200` as a number of seconds by step."""
    found = {}
    for text in given:
        name, _, seconds = text.partition("=")
        if name not in NAMES or not re.fullmatch(r"\d+(\.\d+)?", seconds):
            raise InvalidInput(f"--limit {text!r} is no step and seconds", "write it as picture=200")
        found[name] = float(seconds)
    return found


def _run(
    options: argparse.Namespace, given: Sequence[str], names: Sequence[str], limits: Mapping[str, float]
) -> bool:
    out: Path = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if options.carried and not options.carried.is_file():
        raise InvalidInput(f"there is no {options.carried}", "name a library that csrc/compile.py built")
    if not (ROOT / "sana_edge" / "kernels" / "__init__.py").exists():
        raise SanaError(
            "sana_edge/kernels is missing", "it is a symbolic link: copy the checkout with its links"
        )
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        scratch = Path(folder)
        carried = options.carried.absolute() if options.carried else None
        setting = Setting(out, scratch, carried, options.dry_run)
        environment = _environment(setting, options.wheels)
        call = _with_commit(_facts(setting, environment, given), options.commit)
        if not call.get("cuda") and not options.dry_run:
            raise UnsupportedDevice(
                f"torch sees no CUDA device (nvidia-smi: {call.get('nvidia_smi')})",
                "run this on a machine with an NVIDIA GPU, or try its steps with --dry-run",
            )
        results = _results(setting, call)
        runner = Runner(setting, environment, call.get("modules"), limits)
        try:
            _steps(runner, results, names, time.monotonic() + (options.budget or float("inf")))
        finally:
            print(f"\n{results.summary()}\n{results.path.name} in {options.out}", flush=True)
    return results.passed


def _steps(runner: Runner, results: Results, names: Sequence[str], end: float) -> None:
    for step in (step for step in STEPS if step.name in names):
        remaining = end - time.monotonic()
        if step.estimate > remaining:
            reason = f"takes about {step.estimate:.0f} s, {max(remaining, 0):.0f} s are left"
            results.add(Outcome(step.name, "skipped", 0.0, step.limit, step.estimate, reason))
            continue
        try:
            print(f"{step.name}, about {step.estimate:.0f} s...", file=sys.stderr, flush=True)
            outcome = runner.run(step, remaining)
        except KeyboardInterrupt:
            results.add(Outcome(step.name, "interrupted", 0.0, step.limit, step.estimate, "interrupted"))
            raise
        results.add(outcome)
        print(f"  {outcome.status} in {outcome.seconds:.0f} s: {outcome.figure}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Runner:
    """Runs steps and reads what they left.

    modules: that are there, None where nobody could say; limits: that take the place of the steps' own.
    """

    setting: Setting
    environment: Mapping[str, str]
    modules: Sequence[str] | None
    limits: Mapping[str, float]

    def run(self, step: Step, remaining: float) -> Outcome:
        # an emulator on a busy CPU takes its time
        own = step.limit * (5 if self.setting.dry else 1)
        limit = min(self.limits.get(step.name, own), remaining)
        missing = [name for name in step.needs if self.modules is not None and name not in self.modules]
        if missing:
            reason = (
                f"{', '.join(missing)} not installed: carry the wheels and name their folder with --wheels"
            )
            return Outcome(step.name, "failed", 0.0, limit, step.estimate, reason)
        log = self.setting.out / f"{step.name}.log"
        written = Path(self.setting.json(step.name))
        for old in (log, written):
            old.unlink(missing_ok=True)
        status, spent = "passed", 0.0
        for command in step.commands(self.setting):
            left = max(limit - spent, 0.1)
            done = run_step(_python(command), limit=left, log=log, environment=self.environment, folder=ROOT)
            spent += done.seconds
            status = done.status if done.status != "passed" else status
            # tests of the second run even where those of the first fail
            if done.status == "timeout" or (done.code and "pytest" not in command):
                break
        return self._outcome(step, status, spent, limit, log, written)

    def _outcome(
        self, step: Step, status: str, seconds: float, limit: float, log: Path, written: Path
    ) -> Outcome:
        folders = (self.setting.out, self.setting.scratch, ROOT, Path(sys.prefix), Path.home())
        figures = _read(written)
        text = "\n".join(tail(log, folders))
        try:
            figure = step.figure(figures or {}, text)
        except (KeyError, TypeError, ValueError) as error:
            figure = f"what it wrote cannot be read: {error!r}"
        if "pytest" in step.needs and status == "passed" and "passed" not in text and not self.setting.dry:
            status, figure = "failed", f"no test ran: {figure}"
        shown = [] if status == "passed" else text.splitlines()
        figure, figures = scrubbed(figure, folders), scrubbed(figures, folders)
        return Outcome(step.name, status, round(seconds, 2), limit, step.estimate, figure, figures, shown)


def _python(command: Sequence[str]) -> list[str]:
    """A command of Python, isolated as this process is."""
    return [sys.executable, *(["-S"] if sys.flags.no_site else []), *command]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _environment(setting: Setting, wheels: Path | None) -> dict[str, str]:
    """What every step sees: the checkout and carried wheels on the path, no network, Triton that compiles."""
    paths = [
        str(ROOT),
        str(ROOT / "benchmarks"),
        *([str(_unpacked(wheels, setting.scratch / "wheels"))] if wheels else []),
    ]
    # only what exists: an empty entry would be the folder where a step runs
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SANA_EDGE_CUDA_LIBRARY": str(setting.built),
        "TRITON_INTERPRET": "1" if setting.dry else "0",
        "TRITON_CACHE_DIR": str(setting.scratch / "triton"),
        # compiling is another matter, which a dry run leaves out
        **({"TORCHDYNAMO_DISABLE": "1"} if setting.dry else {}),
    }


def _unpacked(wheels: Path, target: Path) -> Path:
    """The content of all wheels of a folder: as good as installed, for Python's own ones."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise InvalidInput(
            f"there are no wheels in {wheels}", "pip download --no-deps -d DIR NAME fetches one"
        )
    for file in files:
        try:
            zipfile.ZipFile(file).extractall(target)
        except (OSError, zipfile.BadZipFile) as error:
            raise InvalidInput(f"{file.name} cannot be unpacked: {error}", "fetch it again") from error
    return target


def _facts(setting: Setting, environment: Mapping[str, str], given: Sequence[str]) -> dict[str, Any]:
    """The circumstances, asked for in a process of its own."""
    written, log = setting.scratch / "machine.json", setting.out / "machine.log"
    log.unlink(missing_ok=True)
    asked = json.dumps({"output": str(written), "arguments": list(given)})
    done = run_step(
        _python(["-m", "gpu", "machine", asked]), limit=ASKING, log=log, environment=environment, folder=ROOT
    )
    found = _read(written)
    if found is None:
        lines = tail(log, (ROOT, setting.scratch))
        return {**header("benchmarks/gpu_check.py", given), "machine_failed": [done.status, *lines]}
    return {**found, "dry_run": setting.dry}


def _with_commit(call: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """The commit that was said, where git knows none: a checkout may travel without its history."""
    if commit and not call["commit"]["hash"]:
        call["commit"] = {"hash": commit, "dirty": None}
    return call


def _results(setting: Setting, call: Mapping[str, Any]) -> Results:
    """This GPU's file of the day, which goes on where one lies in the folder or among the results."""
    gpu = (call.get("cuda") or {}).get("name", "dry run")
    name = f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{date.today()}.json"
    path = setting.out / name
    return Results(path, call, path if path.exists() or setting.dry else RESULTS / name)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--steps", default="smoke", metavar="A,B", help=f"{', '.join(SETS)}, or single ones (default: smoke)")
    add(
        "--library",
        dest="carried",
        type=Path,
        metavar="FILE",
        help="a CUDA library built elsewhere (default: build it here)",
    )
    add("--wheels", type=Path, metavar="DIR", help="a folder of wheels that this Python lacks")
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", metavar="DIR", help="results and logs")
    add("--limit", action="append", default=[], metavar="STEP=SECONDS", help="in place of the step's own")
    add("--budget", type=positive, metavar="SECONDS", help="steps that no longer fit are skipped")
    add("--commit", metavar="HASH", help="of this checkout, where it is without its .git")
    add("--dry-run", action="store_true", help="all steps on the CPU, with the emulated library")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
