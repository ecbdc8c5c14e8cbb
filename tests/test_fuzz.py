"""Every parser on mutated files: it reads them, or raises SanaError, soon and in little memory.

`make test` draws a few inputs for each with hypothesis, `make test-all` 100,000, and prints how many.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
from fuzz import Parser
from fuzz_parsers import PARSERS, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sana_edge.errors import SanaError

# of a call; the machine's other work does not count
SECONDS = 5.0
# Beside four times the file: a process grows in steps, torch keeps buffers, Python's objects of a small JSON
# take twenty times its bytes.
FLOOR = 48 << 20
ALL = int(os.environ.get("SANA_EDGE_FUZZ", "100000"))


@pytest.fixture(scope="module", autouse=True)
def _tiny(tiny_folder: Path) -> None:
    TINY[:] = [tiny_folder]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What came of a mutated file: "read", "refused", or what may not be: "raw", "slow", "large".

    ``seconds`` are of this process, ``grown`` are bytes.
    """

    outcome: str
    seconds: float
    grown: int
    error: BaseException | None = None

    @property
    def right(self) -> bool:
        return self.outcome in ("read", "refused")


def attempt(parser: Parser, folder: Path, content: bytes) -> Attempt:
    """Read a mutated file."""
    (folder / parser.file).write_bytes(content)
    before, start = fuzz.peak_reset(), time.process_time()
    outcome, caught = "read", None
    try:
        parser.read(folder)
    except KeyboardInterrupt:
        raise
    except SanaError as error:
        fits = error.message and "\n" not in error.message and len(error.message) < 2000
        outcome, caught = "refused" if fits else "raw", error
    except BaseException as error:
        outcome, caught = "raw", error
    seconds, grown = time.process_time() - start, fuzz.peak() - before if before else 0
    if outcome != "raw" and seconds > SECONDS:
        outcome = "slow"
    elif outcome != "raw" and grown > 4 * len(content) + FLOOR:
        outcome = "large"
    return Attempt(outcome, seconds, grown, caught)


def tried(parser: Parser, folder: Path, content: bytes) -> Attempt:
    """An attempt; one that was slow or large is made again: threads and caches of others are in the process."""
    found = attempt(parser, folder, content)
    return attempt(parser, folder, content) if found.outcome in ("slow", "large") else found


# the long run begins with the quick ones
ORDER = sorted(PARSERS, key=lambda name: -PARSERS[name].share)


@pytest.fixture(params=[PARSERS[name] for name in ORDER], ids=ORDER)
def parser(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parser:
    found: Parser = request.param
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    (tmp_path / "in").mkdir()
    found.prepare(tmp_path / "in")
    return dataclasses.replace(found)


def test_mutated(parser: Parser, tmp_path: Path) -> None:
    original = (tmp_path / "in" / parser.file).read_bytes()
    parser.read(tmp_path / "in")

    @settings(
        max_examples=max(int(40 * parser.share), 10),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def check(draw: random.Random) -> None:
        found = tried(parser, tmp_path / "in", parser.mutate(original, draw))
        if found.outcome == "raw" and found.error is not None:
            raise found.error
        assert found.right, f"{found.outcome}: {found.seconds:.1f} s, {found.grown >> 20} MB"

    check()


@pytest.mark.slow
def test_many(parser: Parser, tmp_path: Path, figures: Callable[..., None]) -> None:
    """A share of `ALL` inputs, each from a seed of its own; all failures are shown, by kind."""
    original = (tmp_path / "in" / parser.file).read_bytes()
    # what it imports
    parser.read(tmp_path / "in")
    count = int(ALL * parser.share / sum(each.share for each in PARSERS.values())) + 1
    outcomes = Counter(dict.fromkeys(("read", "refused", "raw", "slow", "large"), 0))
    slowest, most, failures = 0.0, 0, dict[str, list[str]]()
    for seed in range(count):
        found = tried(parser, tmp_path / "in", parser.mutate(original, random.Random(seed)))
        outcomes[found.outcome] += 1
        slowest, most = max(slowest, found.seconds), max(most, found.grown)
        if not found.right:
            shown = f"seed {seed}: {found.outcome}, {found.seconds:.1f} s, {found.grown >> 20} MB, "
            shown += f"{type(found.error).__name__}: {found.error}"[:300]
            failures.setdefault(kind_of(found.error), []).append(shown)
    figures(inputs=count, **outcomes, slowest=round(slowest, 2), most_mb=most >> 20)
    lines = [f"{len(found)} x {kind}\n    {found[0]}" for kind, found in failures.items()]
    assert not failures, "\n".join(lines)


def kind_of(error: BaseException | None) -> str:
    """Where in the package an error came from."""
    place, trace = "", error.__traceback__ if error is not None else None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "site-packages" not in name and "test_fuzz" not in name:
            place = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} in {place}"
