"""The page: whole, in one file, without scripts, and true to the numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from bench_runs import data, row, work

from sana_edge.bench import summary
from sana_edge.bench.page import _ticks, page

ROWS = [
    row("openvino", "float", [110.0, 120.0], peak=9e9),
    row("openvino", "int8", [40.0, 44.0], peak=4e9, psnr=36.0, psnr_to="openvino bf16"),
    row("torch", "int8", failure="not enough <memory>"),
]
VOID = {"meta", "br", "line", "rect", "circle"}


class _Tags(HTMLParser):
    """That every tag is closed, and where links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.links = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def _page(*rows: dict[str, object], **others: object) -> str:
    found = data(work(*rows), **others)
    return page({**found, "sentences": [summary.sentence(w, found["machine"]) for w in found["works"]]})


def test_one_file_without_scripts() -> None:
    text = _page(*ROWS)
    tags = _Tags(text)
    assert not tags.open and not tags.links and "script" not in tags.seen and "link" not in tags.seen
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_it_says_what_the_terminal_says() -> None:
    text = _page(*ROWS)
    assert "2.7 times as fast as bf16, with 56 % less memory." in text.replace("&nbsp;", " ")
    assert "not enough &lt;memory&gt;" in text and "<memory>" not in text
    assert text.count("<figure>") == 4 and "2.74 &times;" in text
    assert "partial" not in text.lower() and "random weights" not in text.lower()


def test_partial_and_random() -> None:
    text = page(
        {**data(work(*ROWS, random_weights=True), partial=True, total=9), "sentences": ["A sentence."]}
    )
    assert '<p class="tag">partial</p>' in text and "interrupted after 4 of 9 runs" in text
    assert '<span class="tag">random weights</span>' in text and "pictures are noise" in text


def test_bars_are_in_proportion() -> None:
    text = _page(*ROWS)
    first = re.search(r"<figure>.*?</figure>", text, re.DOTALL)
    assert first is not None
    rows = re.findall(r"<svg.*?</svg>", first[0], re.DOTALL)
    widths = [sum(map(float, re.findall(r'<rect [^>]*width="([\d.]+)%"', svg))) for svg in rows]
    # medians 42 and 115; five parts, each rounded to a hundredth of a percent
    assert widths[1] / widths[0] == pytest.approx(115 / 42, rel=5 * 0.005 / widths[0])
    assert all(width <= 100 for width in widths)


def test_figures_for_what_is_known() -> None:
    one = row("torch", "int8", [1.0], device_peak=2e9, joules=30.0)
    text = _page(one)
    assert "Peak memory of the GPU" in text and "Energy of a picture" in text and "Every turn" not in text
    assert "<figure>" not in _page(row("torch", "int8", failure="no"))


@pytest.mark.parametrize("most", [0.0, 0.0031, 0.99, 1.0, 7.3, 41.2, 999.0, 1.2e10])
def test_ticks(most: float) -> None:
    found = _ticks(most)
    assert found[0] == 0 and 2 <= len(found) <= 6 and (most == 0 or most / 2 <= found[-1] <= most)
