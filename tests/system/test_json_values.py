"""JSON of strangers: how much of it is read."""

from __future__ import annotations

import pytest

from sana_edge.system.json_values import MOST_VALUES, parse


@pytest.mark.parametrize("one", ["[],", "{},", "1,", '"a",'])
@pytest.mark.parametrize("encoding", [None, "utf-8", "utf-16"])
def test_values_are_counted_before_they_are_made(one: str, encoding: str | None) -> None:
    """Two bytes of a file may be sixty of Python's objects."""
    text = f"[{one * (MOST_VALUES + 1)}1]"
    with pytest.raises(ValueError, match="values"):
        parse(text if encoding is None else text.encode(encoding))


def test_a_long_string_is_one_value() -> None:
    text = "A" * (4 * MOST_VALUES)
    assert parse(f'{{"a": "{text}"}}') == {"a": text}
    assert len(parse("[1" + ",1" * 1000 + "]", most=1001)) == 1001
