"""Budgets of memory: how they may be written, and what they leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sana_edge.errors import InvalidInput
from sana_edge.system import budget
from sana_edge.system.budget import parse_memory, within

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GB", 8_000_000_000),
        ("8 gb", 8_000_000_000),
        (" 8GiB ", 8 << 30),
        ("7500MB", 7_500_000_000),
        ("2000000kB", 2_000_000_000),
        ("512MiB", 512 << 20),
        ("1tb", 10**12),
        ("5000000", 5_000_000),
        ("5000000 bytes", 5_000_000),
        (5_000_000, 5_000_000),
    ],
)
def test_as_people_write_it(text: Any, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0", "less than any model takes"),
        ("0GB", "less than any model takes"),
        ("12", "less than any model takes"),
        ("-8GB", "memory is '-8GB'"),
        ("8 gigs", "memory is '8 gigs'"),
        ("8G", "memory is '8G'"),
        ("", "memory is ''"),
        ("half", "memory is 'half'"),
        ("99999999TB", "more than any machine has"),
        ("9" * 400, "memory is"),
        (True, "memory is 'True'"),
        (float("nan"), "memory is 'nan'"),
        (["8GB"], "memory is"),
    ],
)
def test_what_is_none(text: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        parse_memory(text)
    assert "whole number with its unit, such as 8GB" in caught.value.hint


@pytest.mark.parametrize("text", ["1.5GB", "1,5gb"])
def test_a_fraction_is_said_in_megabytes(text: str) -> None:
    with pytest.raises(InvalidInput, match="a fraction") as caught:
        parse_memory(text)
    assert caught.value.hint.endswith("that is 1500MB")


def test_what_a_budget_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "used_memory", lambda device: 300)
    assert within(1000, None, CPU) == 1000 and within(None, None) is None
    assert within(1000, 500, CPU) == 200 and within(100, 500, CPU) == 100
    assert within(None, 500) == 200 and within(1000, 200) == 0
    monkeypatch.setattr(budget, "used_memory", lambda device: None)
    assert within(1000, 500) == 1000
