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
from fuzz_parsers import PARSERS, TINY, Parser
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


def attempt(parser: Parser, folder: Path, content: bytes) -> str:
    """Read a mutated file; returns what came of it, and fails where that may not be."""
    (folder / parser.file).write_bytes(content)
    before, start = fuzz.peak_reset(), time.process_time()
    try:
        parser.read(folder)
        outcome = "read"
    except SanaError as error:
        assert error.message and "\n" not in error.message and len(error.message) < 2000, error.message
        outcome = "refused"
    seconds, grown = time.process_time() - start, fuzz.peak() - before if before else 0
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert grown < 4 * len(content) + FLOOR, f"{grown >> 20} MB for {len(content)} bytes"
    return outcome


@pytest.fixture(params=PARSERS.values(), ids=PARSERS)
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
        attempt(parser, tmp_path / "in", parser.mutate(original, draw))

    check()


@pytest.mark.slow
def test_many(parser: Parser, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A share of `ALL` inputs, each from a seed of its own; all failures are shown, by kind."""
    original = (tmp_path / "in" / parser.file).read_bytes()
    count = int(ALL * parser.share / sum(each.share for each in PARSERS.values())) + 1
    outcomes: Counter[str] = Counter()
    failures: dict[str, list[str]] = {}
    for seed in range(count):
        try:
            outcomes[attempt(parser, tmp_path / "in", parser.mutate(original, random.Random(seed)))] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcomes["failed"] += 1
            failures.setdefault(kind_of(error), []).append(
                f"seed {seed}: {type(error).__name__}: {error}"[:300]
            )
    record_property("fuzz", f"{parser.file}: {count} inputs, {dict(outcomes)}")
    shown = [f"{len(found)} x {kind}\n    {found[0]}" for kind, found in failures.items()]
    assert not failures, "\n".join(shown)


def kind_of(error: BaseException) -> str:
    """Where in the package an error came from."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "site-packages" not in name and "test_fuzz" not in name:
            place = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} in {place}"
